// Rows times a panel: the one kernel under linear layers and attention. A panel holds a few outputs
// (kWidth) for all inputs, input by input. Every output is one chain of multiply-adds over the
// inputs in their order, cut into blocks of kBlock whose sums are added up in turn: how many rows
// are computed at once changes nothing of it.
#pragma once
#include <cstdint>

#include "cpu/vectors.h"

namespace msn::MSN_ISA {

// Registers: kVectors per row and as many of weights; rows that fit beside them.
#if defined(__AVX512F__)
constexpr int kWeightWidth = 32, kMaxRows = 12;
#elif defined(__AVX2__)
constexpr int kWeightWidth = 16, kMaxRows = 6;
#elif defined(__aarch64__)
constexpr int kWeightWidth = 16, kMaxRows = 6;
#else
constexpr int kWeightWidth = 16, kMaxRows = 2;
#endif
constexpr int kSumBlock = 256;
constexpr int kInt8Block = 64;

typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));

// ---- ways to store a panel
// ----------------------------------------------------------------------- `bytes(inputs)` of a
// panel; `at(panel, k)` is where the weights of input k begin, k a multiple of kGroup, and kStep
// bytes further those of the next group in the same block; `expand(from, g, w)` gives the g-th of a
// group.

template <typename T, int kOutputs, int kSums>
struct Floats {  // [inputs][kWidth]
  using In = T;
  using Sum = T;
  static constexpr int kWidth = kOutputs, kVectors = kOutputs / Vector<T>::size, kBlock = kSums;
  static constexpr int kGroup = 1;
  static constexpr bool kPairs = false, kScales = false;
  using Register = Vec<T>;
  using Accumulator = Vec<T>;

  static int64_t bytes(int64_t inputs) { return inputs * kWidth * sizeof(T); }
  static constexpr int kStep = kWidth * sizeof(T);
  static const char* at(const char* panel, int64_t k) { return panel + k * kStep; }
  static void expand(const char* from, int, Vec<T> (&w)[kVectors]) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j)
      w[j] = load(reinterpret_cast<const T*>(from) + j * Vector<T>::size);
  }
  static Vec<T> multiply_add(Vec<T> sum, T x, Vec<T> w) { return fused(splat(x), w, sum); }
};

template <int kOutputs, int kSums>
struct BFloats {  // [inputs / 2][kWidth][2]
  using In = float;
  using Sum = float;
  static constexpr int kWidth = kOutputs, kVectors = kOutputs / Vector<float>::size, kBlock = kSums;
  static constexpr int kGroup = 2;
  static constexpr bool kPairs = false, kScales = false;
  using Register = Vec<float>;
  using Accumulator = Vec<float>;

  static int64_t bytes(int64_t inputs) { return (inputs + 1) / 2 * kWidth * 4; }
  static constexpr int kStep = kWidth * 4;
  static const char* at(const char* panel, int64_t k) { return panel + k / 2 * kStep; }
  static void expand(const char* from, int g, Vec<float> (&w)[kVectors]) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const IntVec both = load(reinterpret_cast<const int32_t*>(from) + j * Vector<float>::size);
      w[j] = bit_cast<Vec<float>>(g ? both & static_cast<int32_t>(0xffff0000) : both << 16);
    }
  }
  static Vec<float> multiply_add(Vec<float> sum, float x, Vec<float> w) {
    return fused(splat(x), w, sum);
  }
};

template <int kOutputs, int kSums>
struct Halfs {  // [inputs][kWidth]
  using In = float;
  using Sum = float;
  static constexpr int kWidth = kOutputs, kVectors = kOutputs / Vector<float>::size, kBlock = kSums;
  static constexpr int kGroup = 2;
  static constexpr bool kPairs = false, kScales = false;
  using Register = Vec<float>;
  using Accumulator = Vec<float>;

  static int64_t bytes(int64_t inputs) { return inputs * kWidth * 2; }
  static constexpr int kStep = kGroup * kWidth * 2;
  static const char* at(const char* panel, int64_t k) { return panel + k * kWidth * 2; }
  static void expand(const char* from, int g, Vec<float> (&w)[kVectors]) {
    const Half* row = reinterpret_cast<const Half*>(from) + g * kWidth;
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) w[j] = widen_halfs(row + j * Vector<float>::size);
  }
  static Vec<float> multiply_add(Vec<float> sum, float x, Vec<float> w) {
    return fused(splat(x), w, sum);
  }
};

// Blocks of kInt8Block inputs: [pairs of inputs][kWidth][2] of int8, then [kWidth] scales in
// bfloat16. The last block is filled up with zeros. x is int16 with a scale of its own for every
// block: the sum over a block is an exact integer. A row is pairs of int16, the earlier one low;
// before it lie its blocks' scales, backwards.
template <int kOutputs>
struct Int8s {
  using In = uint32_t;
  using Sum = float;
  static constexpr int kWidth = kOutputs, kVectors = kOutputs / Vector<float>::size,
                       kBlock = kInt8Block;
  static constexpr int kGroup = 1;
  static constexpr bool kPairs = true, kScales = true;
  using Register = IntVec;  // pairs of int16
  using Accumulator = IntVec;
  static constexpr int64_t kBlockBytes = kInt8Block * kWidth + 2 * kWidth;

  static int64_t bytes(int64_t inputs) {
    return (inputs + kInt8Block - 1) / kInt8Block * kBlockBytes;
  }
  static constexpr int kStep = 2 * kWidth;
  static const char* at(const char* panel, int64_t pair) {
    constexpr int64_t kBlockPairs = kInt8Block / 2;
    return panel + pair / kBlockPairs * kBlockBytes + pair % kBlockPairs * kStep;
  }
  static void expand(const char* from, int, IntVec (&w)[kVectors]) {
    typedef int8_t Bytes __attribute__((vector_size(kVectorBytes / 2)));
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      Bytes bytes;
      std::memcpy(&bytes, from + j * sizeof bytes, sizeof bytes);
#if defined(__AVX512BW__)
      w[j] = (IntVec)_mm512_cvtepi8_epi16((__m256i)bytes);  // GCC makes two halves of it below
#else
      typedef int16_t Words __attribute__((vector_size(kVectorBytes)));
      w[j] = bit_cast<IntVec>(__builtin_convertvector(bytes, Words));
#endif
    }
  }
  static IntVec multiply_add(IntVec sum, uint32_t x, IntVec w) {
#if defined(__AVX512VNNI__)
    return (IntVec)_mm512_dpwssd_epi32((__m512i)sum, _mm512_set1_epi32(x), (__m512i)w);
#elif defined(__AVX512BW__)
    return sum + (IntVec)_mm512_madd_epi16(_mm512_set1_epi32(x), (__m512i)w);
#elif defined(__AVX2__)
    return sum + (IntVec)_mm256_madd_epi16(_mm256_set1_epi32(x), (__m256i)w);
#elif defined(__SSE2__)
    return sum + (IntVec)_mm_madd_epi16(_mm_set1_epi32(x), (__m128i)w);
#else
    return sum + (w << 16 >> 16) * static_cast<int16_t>(x) +
           (w >> 16) * (bit_cast<int32_t>(x) >> 16);
#endif
  }
  static void scales(const char* panel, int64_t pair, Vec<float> (&s)[kVectors]) {
    typedef uint16_t Words __attribute__((vector_size(kVectorBytes / 2)));
    const char* from = at(panel, pair) + kInt8Block * kWidth;
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      Words words;
      std::memcpy(&words, from + j * sizeof words, sizeof words);
#if defined(__AVX512F__)
      s[j] = (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)words), 16);
#else
      typedef uint32_t Doubles __attribute__((vector_size(kVectorBytes)));
      s[j] = bit_cast<Vec<float>>(__builtin_convertvector(words, Doubles) << 16);
#endif
    }
  }
  static float scale_of(const uint32_t* x, int64_t pair) {
    return bit_cast<float>(x[-1 - pair / (kInt8Block / 2)]);
  }
};

#if defined(__AVX512BF16__)
// The same layout as BFloats; pairs are multiplied and added by one instruction, which rounds x to
// bfloat16 before.
template <int kOutputs, int kSums>
struct BFloatPairs : BFloats<kOutputs, kSums> {
  using In = uint32_t;  // two of them, the earlier one low
  static constexpr bool kPairs = true;
  static constexpr int kGroup = 1;
  static constexpr int kVectors = BFloats<kOutputs, kSums>::kVectors;
  static_assert(kSums % 2 == 0);

  static const char* at(const char* panel, int64_t pair) { return panel + pair * kOutputs * 4; }
  using Register = IntVec;
  static void expand(const char* from, int, IntVec (&w)[kVectors]) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j)
      w[j] = load(reinterpret_cast<const int32_t*>(from) + j * Vector<float>::size);
  }
  static Vec<float> multiply_add(Vec<float> sum, uint32_t x, IntVec w) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)w);
  }
};
using WeightBFloats = BFloatPairs<kWeightWidth, kSumBlock>;
#else
using WeightBFloats = BFloats<kWeightWidth, kSumBlock>;
#endif

// ---- the product
// ---------------------------------------------------------------------------------

// Memory to fetch into the first cache while a panel is worked on, `rate` 64ths of a byte for every
// group, at most two lines. What a thread reads next lies behind what it reads now, so that a pass
// over all rows of a panel fetches what comes kAhead bytes later: far enough for memory to answer,
// and little enough to stay in a cache of 32 KB. Of several passes over a panel each fetches a
// part of the panel that follows.
struct Ahead {
  const char* from = nullptr;
  int64_t rate = 0;

  const char* at(int64_t group) const { return from + (group * rate >> 6); }
  void fetch(int64_t group) const {
    __builtin_prefetch(at(group));
    if (rate > 64 * 64) __builtin_prefetch(at(group) + 64);
  }
};
constexpr int64_t kAhead = 12 << 10;

// sum[r] += x[r][k + g] * w[k + g], for row pointers at k, one for three rows.
template <typename P, int kRows, int kBases>
[[gnu::always_inline]] inline void multiply_add(typename P::Accumulator (&sum)[kRows][P::kVectors],
                                                const typename P::In* (&row)[kBases],
                                                int64_t x_stride, const char*& from, int g) {
  typename P::Register w[P::kVectors];
  asm("" : "+r"(from));  // else the compiler keeps what it loaded before, and has no room for it
  P::expand(from, g, w);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const auto value = row[r / 3][r % 3 * x_stride + g];
#pragma GCC unroll 8
    for (int j = 0; j < P::kVectors; ++j) sum[r][j] = P::multiply_add(sum[r][j], value, w[j]);
  }
}

// out[r][o] = sum over k of x[r][k] * w[k][o], the part of it from step `first` to `last`, where
// `first` begins a block; before the last part it is what was summed up to there.
template <typename P, int kRows>
void product(const typename P::In* x, int64_t x_stride, const char* panel, int64_t first,
             int64_t last, typename P::Sum* out, int64_t out_stride, Ahead ahead) {
  using Sum = typename P::Sum;
  constexpr int kVectors = P::kVectors, kLanes = Vector<Sum>::size;
  const int64_t block = P::kBlock ? P::kBlock / (P::kPairs ? 2 : 1) : last - first;
  for (int64_t begin = first; begin < last; begin += block) {
    const int64_t end = begin + block < last ? begin + block : last;
    typename P::Accumulator sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[r][j] = typename P::Accumulator{};
    // Three rows are in reach of one pointer (base + index * scale).
    constexpr int kBases = (kRows + 2) / 3;
    const typename P::In* row[kBases];
#pragma GCC unroll 4
    for (int i = 0; i < kBases; ++i) row[i] = x + 3 * i * x_stride + begin;
    const char* from = P::at(panel, begin);
    int64_t k = begin;
    for (; k + P::kGroup <= end; k += P::kGroup) {
      ahead.fetch((k - first) / P::kGroup);
#pragma GCC unroll 4
      for (int g = 0; g < P::kGroup; ++g) multiply_add<P>(sum, row, x_stride, from, g);
#pragma GCC unroll 4
      for (int i = 0; i < kBases; ++i) {
        row[i] += P::kGroup;
        asm("" : "+r"(row[i]));  // else each row gets a pointer of its own
      }
      from += P::kStep;
    }
#pragma GCC unroll 4
    for (int g = 0; g < P::kGroup - 1; ++g)
      if (k + g < end) multiply_add<P>(sum, row, x_stride, from, g);
    Vec<Sum> scale[kVectors];
    if constexpr (P::kScales) P::scales(panel, begin, scale);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        Sum* to = out + r * out_stride + j * kLanes;
        const Vec<Sum> before = begin ? load(to) : Vec<Sum>{};
        if constexpr (P::kScales)
          store(to, fused(__builtin_convertvector(sum[r][j], Vec<Sum>) * scale[j],
                          splat(P::scale_of(x + r * x_stride, begin)), before));
        else
          store(to, before + sum[r][j]);
      }
  }
}

template <typename P>
using Product = void (*)(const typename P::In*, int64_t, const char*, int64_t, int64_t,
                         typename P::Sum*, int64_t, Ahead);

// Rows at once. Widening pairs of bfloat16 takes a register more, which AVX2 has not got.
template <typename P>
constexpr int kRowsFor = sizeof(typename P::Sum) == 8 ? (kMaxRows + 1) / 2
                         : P::kGroup == 2 && kMaxRows == 6 && kVectorBytes == 32 ? kMaxRows - 1
                                                                                 : kMaxRows;

template <typename P, int... kRows>
struct ProductTable {
  static constexpr Product<P> of[] = {product<P, kRows + 1>...};
};
template <typename P, int kCount, int... kRows>
struct MakeTable : MakeTable<P, kCount - 1, kCount - 1, kRows...> {};
template <typename P, int... kRows>
struct MakeTable<P, 0, kRows...> : ProductTable<P, kRows...> {};

// Steps of a panel that stay in the first cache while all rows are multiplied with them.
constexpr int64_t kStepsAtOnce = 256;

// The same for any number of rows; `each(first, count)` for some of them once they are done.
// `neighbour` is what is read next, as many bytes; kStream: panels lie one behind the other, and a
// single pass over one of them fetches what comes kAhead bytes later.
template <typename P, bool kStream = true, typename Each>
inline void multiply_rows(const typename P::In* x, int64_t x_stride, int64_t rows,
                          const char* panel, int64_t inputs, const char* neighbour,
                          typename P::Sum* out, int64_t out_stride, const Each& each) {
  constexpr int kMost = kRowsFor<P>;
  const int64_t parts = (rows + kMost - 1) / kMost;
  const int64_t steps = P::kPairs ? (inputs + 1) / 2 : inputs;
  const int64_t at_once = P::kBlock && parts > 2 ? kStepsAtOnce : steps;
  const int64_t groups = (steps + P::kGroup - 1) / P::kGroup * parts;
  const int64_t rate = P::bytes(inputs) * 64 / groups;  // of the neighbour
  for (int64_t begin = 0; begin < steps; begin += at_once) {
    const int64_t end = begin + at_once < steps ? begin + at_once : steps;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t first = rows * i / parts, count = rows * (i + 1) / parts - first;
      const int64_t fetched = (begin * parts + (end - begin) * i) / P::kGroup * rate >> 6;
      const Ahead ahead{kStream && parts == 1 ? panel + kAhead : neighbour + fetched, rate};
      MakeTable<P, kMost>::of[count - 1](x + first * x_stride, x_stride, panel, begin, end,
                                         out + first * out_stride, out_stride, ahead);
      if (end == steps) each(first, count);
    }
  }
}

}  // namespace msn::MSN_ISA

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
constexpr int kInt8Block = 32;

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

  static int64_t bytes(int64_t inputs) { return inputs * kWidth * sizeof(T); }
  static constexpr int kStep = kWidth * sizeof(T);
  static const char* at(const char* panel, int64_t k) { return panel + k * kStep; }
  static void expand(const char* from, int, Vec<T> (&w)[kVectors]) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j)
      w[j] = load(reinterpret_cast<const T*>(from) + j * Vector<T>::size);
  }
};

template <int kOutputs, int kSums>
struct BFloats {  // [inputs / 2][kWidth][2]
  using In = float;
  using Sum = float;
  static constexpr int kWidth = kOutputs, kVectors = kOutputs / Vector<float>::size, kBlock = kSums;
  static constexpr int kGroup = 2;
  static constexpr bool kPairs = false, kScales = false;

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
};

template <int kOutputs, int kSums>
struct Halfs {  // [inputs][kWidth]
  using In = float;
  using Sum = float;
  static constexpr int kWidth = kOutputs, kVectors = kOutputs / Vector<float>::size, kBlock = kSums;
  static constexpr int kGroup = 2;
  static constexpr bool kPairs = false, kScales = false;

  static int64_t bytes(int64_t inputs) { return inputs * kWidth * 2; }
  static constexpr int kStep = kGroup * kWidth * 2;
  static const char* at(const char* panel, int64_t k) { return panel + k * kWidth * 2; }
  static void expand(const char* from, int g, Vec<float> (&w)[kVectors]) {
    const Half* row = reinterpret_cast<const Half*>(from) + g * kWidth;
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) w[j] = widen_halfs(row + j * Vector<float>::size);
  }
};

// Blocks of kInt8Block inputs: [inputs of the block][kWidth] of int8, then [kWidth] scales in
// bfloat16. The last block is filled up with zeros.
template <int kOutputs>
struct Int8s {
  using In = float;
  using Sum = float;
  static constexpr int kWidth = kOutputs, kVectors = kOutputs / Vector<float>::size,
                       kBlock = kInt8Block;
  static constexpr int kGroup = 4;
  static constexpr bool kPairs = false, kScales = true;
  static constexpr int64_t kBlockBytes = kInt8Block * kWidth + 2 * kWidth;

  static int64_t bytes(int64_t inputs) {
    return (inputs + kInt8Block - 1) / kInt8Block * kBlockBytes;
  }
  static constexpr int kStep = kGroup * kWidth;
  static const char* at(const char* panel, int64_t k) {
    return panel + k / kInt8Block * kBlockBytes + k % kInt8Block * kWidth;
  }
  static void expand(const char* from, int g, Vec<float> (&w)[kVectors]) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j)
      w[j] = widen_int8(from + g * kWidth + j * Vector<float>::size);
  }
  static void scales(const char* panel, int64_t k, Vec<float> (&s)[kVectors]) {
    const char* from = panel + k / kInt8Block * kBlockBytes + kInt8Block * kWidth;
    for (int j = 0; j < kVectors; ++j)
      for (int i = 0; i < Vector<float>::size; ++i)
        s[j][i] = widen(reinterpret_cast<const BFloat16*>(from)[j * Vector<float>::size + i]);
  }
  static Vec<float> widen_int8(const char* from) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
    return (Vec<float>)_mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    Vec<float> v;
    for (int i = 0; i < Vector<float>::size; ++i) v[i] = reinterpret_cast<const int8_t*>(from)[i];
    return v;
#endif
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
  static Vec<float> multiply_add(Vec<float> sum, uint32_t x, const char* from, int j) {
    const __m512i w = _mm512_loadu_si512(from + j * 64);
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)w);
  }
};
using WeightBFloats = BFloatPairs<kWeightWidth, kSumBlock>;
#else
using WeightBFloats = BFloats<kWeightWidth, kSumBlock>;
#endif

// ---- the product
// ---------------------------------------------------------------------------------

// Memory to fetch while a panel is worked on: `rate` 64ths of a byte for every step.
struct Ahead {
  const char* from = nullptr;
  int64_t rate = 0;
};

// sum[r] += x[r][k + g] * w[k + g], for row pointers at k, one for three rows.
template <typename P, typename VecSum, int kRows, int kVectors, int kBases>
[[gnu::always_inline]] inline void multiply_add(VecSum (&sum)[kRows][kVectors],
                                                const typename P::In* (&row)[kBases],
                                                int64_t x_stride, const char*& from, int g) {
  VecSum w[kVectors];
  asm("" : "+r"(from));  // else the compiler keeps what it loaded before, and has no room for it
  if constexpr (!P::kPairs) P::expand(from, g, w);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const auto value = row[r / 3][r % 3 * x_stride + g];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j)
      if constexpr (P::kPairs)
        sum[r][j] = P::multiply_add(sum[r][j], value, from, j);
      else
        sum[r][j] += value * w[j];
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
    Vec<Sum> sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[r][j] = Vec<Sum>{};
    // Three rows are in reach of one pointer (base + index * scale).
    constexpr int kBases = (kRows + 2) / 3;
    const typename P::In* row[kBases];
#pragma GCC unroll 4
    for (int i = 0; i < kBases; ++i) row[i] = x + 3 * i * x_stride + begin;
    const char* from = P::at(panel, begin);
    int64_t k = begin;
    for (; k + P::kGroup <= end; k += P::kGroup) {
      __builtin_prefetch(ahead.from + ((k - first) * ahead.rate >> 6));
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
        if constexpr (P::kScales) sum[r][j] *= scale[j];
        store(to, begin ? load(to) + sum[r][j] : sum[r][j]);
      }
  }
}

template <typename P>
using Product = void (*)(const typename P::In*, int64_t, const char*, int64_t, int64_t,
                         typename P::Sum*, int64_t, Ahead);

// Rows at once. Widening pairs of bfloat16 takes a register more, which AVX2 has not got.
template <typename P>
constexpr int kRowsFor =
    sizeof(typename P::Sum) == 8                                          ? (kMaxRows + 1) / 2
    : P::kGroup == 2 && !P::kPairs && kMaxRows == 6 && kVectorBytes == 32 ? kMaxRows - 1
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

// The same for any number of rows; `each(first, count)` for some of them once they are done. Of
// `neighbour`, a panel of the same size, a part is fetched each time.
template <typename P, typename Each>
inline void multiply_rows(const typename P::In* x, int64_t x_stride, int64_t rows,
                          const char* panel, int64_t inputs, const char* neighbour,
                          typename P::Sum* out, int64_t out_stride, Each each) {
  constexpr int kMost = kRowsFor<P>;
  const int64_t parts = (rows + kMost - 1) / kMost;
  const int64_t steps = P::kPairs ? (inputs + 1) / 2 : inputs;
  const int64_t at_once = P::kBlock && parts > 2 ? kStepsAtOnce : steps;
  const int64_t rate = P::bytes(inputs) * 64 / (parts * steps);  // of the neighbour, a step
  for (int64_t begin = 0; begin < steps; begin += at_once) {
    const int64_t end = begin + at_once < steps ? begin + at_once : steps;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t first = rows * i / parts, count = rows * (i + 1) / parts - first;
      const Ahead ahead{neighbour + ((begin * parts + (end - begin) * i) * rate >> 6), rate};
      MakeTable<P, kMost>::of[count - 1](x + first * x_stride, x_stride, panel, begin, end,
                                         out + first * out_stride, out_stride, ahead);
      if (end == steps) each(first, count);
    }
  }
}

}  // namespace msn::MSN_ISA

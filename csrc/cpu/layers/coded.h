// Panels of bfloat16 in twelve bits a number, of which every number comes back as it was. The
// exponents of a matrix's numbers are few: a block keeps fifteen of its own, and each number a code
// of four bits beside its sign and fraction. Pairs with another exponent lie behind the panels, as
// they are.
#pragma once
#include <algorithm>

#include "cpu/layers/packing.h"
#include "cpu/layers/panels.h"

namespace msn::MSN_ISA {

template <typename P>
constexpr bool kIsCoded = false;

#if defined(__AVX512BF16__)

constexpr int64_t kCodedSteps = kSumBlock / 2;  // of a block; a step is a pair of inputs
constexpr int64_t kStepsTogether = 4;
constexpr int kOtherCode = 15;

// A block: this, then for each step a byte of sign and fraction for every number of its first
// vector and of its second one, and 32 bytes of their codes, the first vector's in the low bits.
struct CodedHeader {
  static constexpr int64_t kStep = 3 * kWeightWidth;
  uint16_t exponents[16];            // of a code, where they stand in a number
  uint32_t marks[kCodedSteps / 32];  // bit by step, whether it has other pairs
  uint32_t others;                   // bytes from here to the block's other pairs, in their order
  char unused[12];
};
static_assert(sizeof(CodedHeader) == 64);

struct CodedBFloats : WeightBFloats {
  static int64_t bytes(int64_t inputs) {
    return (inputs + kSumBlock - 1) / kSumBlock * static_cast<int64_t>(sizeof(CodedHeader)) +
           inputs / 2 * CodedHeader::kStep;
  }
};
template <>
constexpr bool kIsCoded<CodedBFloats> = true;
constexpr int64_t kCodedBytes = sizeof(CodedHeader) + kCodedSteps * CodedHeader::kStep;

// ---- to codes ----------------------------------------------------------------------------------

// The fifteen exponents that most of a block's numbers have, and every exponent's code.
struct ExponentCodes {
  uint16_t exponents[16] = {};
  uint8_t code[256];

  ExponentCodes(const uint16_t* numbers, int64_t count) {
    int64_t often[256] = {};
    for (int64_t i = 0; i < count; ++i) ++often[numbers[i] >> 7 & 255];
    std::memset(code, kOtherCode, sizeof code);
    for (int c = 0; c < kOtherCode; ++c) {
      int most = 0;
      for (int e = 1; e < 256; ++e)
        if (often[e] > often[most]) most = e;
      if (often[most] <= 0) break;
      often[most] = 0;
      code[most] = static_cast<uint8_t>(c);
      exponents[c] = static_cast<uint16_t>(most << 7);
    }
  }
  uint8_t of(uint16_t number) const { return code[number >> 7 & 255]; }
  bool is_other(const uint16_t* pair) const {
    return of(pair[0]) == kOtherCode || of(pair[1]) == kOtherCode;
  }
};

// f(numbers of a block of a panel of WeightBFloats, its steps), block by block.
template <typename F>
void each_block(const void* plain, int64_t inputs, F f) {
  const uint16_t* numbers = static_cast<const uint16_t*>(plain);
  for (int64_t begin = 0; begin < inputs / 2; begin += kCodedSteps) {
    const int64_t steps = std::min(kCodedSteps, inputs / 2 - begin);
    f(numbers + begin * 2 * kWeightWidth, steps);
  }
}

// Pairs of a panel whose exponents have no code.
inline int64_t count_other_pairs(const void* plain, int64_t inputs) {
  int64_t others = 0;
  each_block(plain, inputs, [&](const uint16_t* numbers, int64_t steps) {
    const int64_t count = steps * 2 * kWeightWidth;
    const ExponentCodes codes(numbers, count);
    for (int64_t i = 0; i < count; i += 2) others += codes.is_other(numbers + i);
  });
  return others;
}

// Codes a panel of WeightBFloats; `others`: where its other pairs go.
inline void code_panel(const void* plain, int64_t inputs, char* panel, uint32_t* others) {
  each_block(plain, inputs, [&](const uint16_t* numbers, int64_t steps) {
    const ExponentCodes codes(numbers, steps * 2 * kWeightWidth);
    CodedHeader header = {};
    std::memcpy(header.exponents, codes.exponents, sizeof header.exponents);
    header.others = static_cast<uint32_t>(reinterpret_cast<char*>(others) - panel);
    uint8_t* to = reinterpret_cast<uint8_t*>(panel + sizeof header);
    for (int64_t k = 0; k < steps; ++k, numbers += 2 * kWeightWidth, to += CodedHeader::kStep) {
      uint8_t* of_exponents = to + 2 * kWeightWidth;
      std::memset(of_exponents, 0, kWeightWidth);
      for (int i = 0; i < 2 * kWeightWidth; i += 2) {
        if (codes.is_other(numbers + i)) {
          header.marks[k / 32] |= 1u << k % 32;
          std::memcpy(others++, numbers + i, 4);
        }
        for (int at = i; at < i + 2; ++at) {
          to[at] = static_cast<uint8_t>((numbers[at] >> 8 & 0x80) | (numbers[at] & 0x7f));
          of_exponents[at % kWeightWidth] |= codes.of(numbers[at]) << at / kWeightWidth * 4;
        }
      }
    }
    std::memcpy(panel, &header, sizeof header);
    panel = reinterpret_cast<char*>(to);
  });
}

// ---- and back ----------------------------------------------------------------------------------

struct CodedBlock {
  const char* from;  // of the next step
  __m512i exponents;
  const uint32_t *others, *marks;

  explicit CodedBlock(const char* block) : from(block + sizeof(CodedHeader)) {
    const CodedHeader* header = reinterpret_cast<const CodedHeader*>(block);
    exponents = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(header)));
    others = reinterpret_cast<const uint32_t*>(block + header->others);
    marks = header->marks;
  }

  // Marks of step k and those after it.
  uint32_t marks_from(int64_t k) const { return marks[k / 32] >> k % 32; }

  // The pairs of the next step.
  [[gnu::always_inline]] void next(bool marked, __m512i (&w)[2]) {
    asm("" : "+r"(from));  // else the compiler loads for several steps, and has no room for it
    const __m512i both = codes();
    w[0] = pairs(0, both);
    w[1] = pairs(1, _mm512_srli_epi16(both, 4));
    if (__builtin_expect(marked, 0)) {
      w[0] = replaced(w[0], _mm512_and_si512(both, _mm512_set1_epi16(15)));
      w[1] = replaced(w[1], _mm512_srli_epi16(both, 4));
    }
    from += CodedHeader::kStep;
  }

 private:
  [[gnu::always_inline]] __m256i bytes(int part) const {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + part * kWeightWidth));
  }
  [[gnu::always_inline]] __m512i codes() const { return _mm512_cvtepu8_epi16(bytes(2)); }
  // Of an index the instruction takes five bits; the fifth is one of the other vector's code, and
  // both halves of the table are the same.
  [[gnu::always_inline]] __m512i pairs(int vector, __m512i code) const {
    const __m512i kept = _mm512_set1_epi16(static_cast<int16_t>(0x807f));
    const __m512i number = _mm512_cvtepi8_epi16(bytes(vector));
    const __m512i exponent = _mm512_permutexvar_epi16(code, exponents);
    return _mm512_ternarylogic_epi32(number, kept, exponent, 0xea);  // number & kept | exponent
  }
  [[gnu::always_inline]] __m512i replaced(__m512i w, __m512i code) {
    const __m512i other =
        _mm512_movm_epi16(_mm512_cmpeq_epi16_mask(code, _mm512_set1_epi16(kOtherCode)));
    const __mmask16 which = _mm512_test_epi32_mask(other, other);
    // From a register: loading as many pairs as are wanted is slow on some processors.
    w = _mm512_mask_expand_epi32(w, which, _mm512_loadu_si512(others));
    others += __builtin_popcount(which);
    return w;
  }
};

[[gnu::always_inline]] inline __m512i* keep(const __m512i (&w)[2], __m512i* to) {
  to[0] = w[0];
  to[1] = w[1];
  return to + 2;
}

// A block as WeightBFloats have it.
inline void decode_block(const char* block, int64_t steps, __m512i* to) {
  CodedBlock coded(block);
  for (int64_t k = 0; k < steps; ++k) {
    __m512i w[2];
    coded.next(coded.marks_from(k) & 1, w);
    to = keep(w, to);
  }
}

template <>
inline void unpack<CodedBFloats>(const Packed& from, int64_t row, float* to) {
  alignas(64) __m512i block[2 * kCodedSteps];
  const char* panel =
      static_cast<const char*>(from.data) + row / kWeightWidth * CodedBFloats::bytes(from.inputs);
  for (int64_t begin = 0; begin < from.inputs; begin += kSumBlock, panel += kCodedBytes) {
    const int64_t end = std::min<int64_t>(begin + kSumBlock, from.inputs);
    decode_block(panel, (end - begin) / 2, block);
    char* plain = reinterpret_cast<char*>(block);
    for (int64_t k = begin; k < end; ++k)
      to[k] = unpacked(WeightBFloats{}, plain, k - begin, static_cast<int>(row % kWeightWidth));
  }
}

// ---- the product -------------------------------------------------------------------------------

// sum[r] += x[r][k + g] * w. A lambda that holds the sums would keep them in memory.
template <int kRows, int kBases>
[[gnu::always_inline]] inline void multiply_add(Vec<float> (&sum)[kRows][2],
                                                const uint32_t* (&row)[kBases], int64_t x_stride,
                                                int64_t g, const __m512i (&w)[2]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const uint32_t value = row[r / 3][r % 3 * x_stride + g];
    for (int j = 0; j < 2; ++j)
      sum[r][j] = WeightBFloats::multiply_add(sum[r][j], value, (IntVec)w[j]);
  }
}

// `product` of a block, by the same sums; kKeep: its weights go to `kept`, as WeightBFloats have
// them, and `ahead` is fetched, else what comes kAhead bytes later.
template <int kRows, bool kKeep>
void coded_product(const uint32_t* x, int64_t x_stride, const char* block, int64_t begin,
                   int64_t end, float* out, int64_t out_stride, __m512i* kept, Ahead ahead) {
  CodedBlock coded(block);
  Vec<float> sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = Vec<float>{};
  constexpr int kBases = (kRows + 2) / 3;
  const uint32_t* row[kBases];
#pragma GCC unroll 4
  for (int i = 0; i < kBases; ++i) row[i] = x + 3 * i * x_stride + begin;
  for (int64_t k = 0; k < end - begin; k += kStepsTogether) {
    const uint32_t marks = coded.marks_from(k);
    const char* later = coded.from + kAhead;
#pragma GCC unroll 4
    for (int g = 0; g < kStepsTogether; ++g) {
      if (kKeep) {
        __builtin_prefetch(ahead.at(k + g));
      } else {  // six lines
        __builtin_prefetch(later + (3 * g + 1) / 2 * 64);
        if (g % 2 == 0) __builtin_prefetch(later + (3 * g / 2 + 1) * 64);
      }
      __m512i w[2];
      coded.next(marks >> g & 1, w);
      if (kKeep) kept = keep(w, kept);
      multiply_add(sum, row, x_stride, g, w);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kBases; ++i) {
      row[i] += kStepsTogether;
      asm("" : "+r"(row[i]));  // else each row gets a pointer of its own
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < 2; ++j) {
      float* to = out + r * out_stride + j * Vector<float>::size;
      store(to, (begin ? load(to) : Vec<float>{}) + sum[r][j]);
    }
}

using CodedProduct = void (*)(const uint32_t*, int64_t, const char*, int64_t, int64_t, float*,
                              int64_t, __m512i*, Ahead);
template <bool kKeep, int... kRows>
struct CodedProductTable {
  static constexpr CodedProduct of[] = {coded_product<kRows + 1, kKeep>...};
};
template <bool kKeep, int kCount, int... kRows>
struct MakeCodedTable : MakeCodedTable<kKeep, kCount - 1, kCount - 1, kRows...> {};
template <bool kKeep, int... kRows>
struct MakeCodedTable<kKeep, 0, kRows...> : CodedProductTable<kKeep, kRows...> {};

// As multiply_rows. Of more rows than are computed at once, the first ones keep a block's weights
// for the others.
template <typename Each>
void multiply_coded(const uint32_t* x, int64_t x_stride, int64_t rows, const char* panel,
                    int64_t inputs, float* out, int64_t out_stride, const Each& each) {
  const int64_t steps = inputs / 2, parts = (rows + kMaxRows - 1) / kMaxRows;
  alignas(64) __m512i kept[2 * kCodedSteps];
  for (int64_t begin = 0; begin < steps; begin += kCodedSteps, panel += kCodedBytes) {
    const int64_t end = std::min(begin + kCodedSteps, steps);
    const char* plain = reinterpret_cast<char*>(kept) - begin * WeightBFloats::kStep;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t first = rows * i / parts, count = rows * (i + 1) / parts - first;
      const Ahead ahead{panel + kAhead + (end - begin) * CodedHeader::kStep * i / parts,
                        CodedHeader::kStep * 64 / parts};
      const uint32_t* from = x + first * x_stride;
      float* to = out + first * out_stride;
      if (i)
        MakeTable<WeightBFloats, kMaxRows>::of[count - 1](from, x_stride, plain, begin, end, to,
                                                          out_stride, ahead);
      else
        (parts > 1 ? MakeCodedTable<true, kMaxRows>::of
                   : MakeCodedTable<false, kMaxRows>::of)[count - 1](
            from, x_stride, panel, begin, end, to, out_stride, kept, ahead);
      if (end == steps) each(first, count);
    }
  }
}

#endif

}  // namespace msn::MSN_ISA

// Panels of float32 in twenty-four bits a number, of matrices whose numbers all end in eight zeros:
// such as come from float16, bfloat16, or a file of four bits a number with scales of sixteen.
#pragma once
#include "cpu/layers/packing.h"
#include "cpu/layers/panels.h"

namespace msn::MSN_ISA {

#if defined(__AVX512F__)

// Of an input the sixteen high bits of every output, then the eight after them; output o beside
// output o + 16, in one lane.
struct ShortFloats : Floats<float, kWeightWidth, kSumBlock> {
  static constexpr int kLanes = kWeightWidth / 2, kStep = 3 * kWeightWidth;
  static_assert(kVectors == 2);

  static int64_t bytes(int64_t inputs) { return inputs * kStep; }
  static const char* at(const char* panel, int64_t k) { return panel + k * kStep; }
  static void expand(const char* from, int, Vec<float> (&w)[kVectors]) {
    const __m512i high = _mm512_loadu_si512(from);
    const __m512i low = _mm512_cvtepu16_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 2 * kWeightWidth)));
    const __m512i byte = _mm512_set1_epi32(0xff00), half = _mm512_set1_epi32(0xffff0000);
    // a | b & mask
    w[0] = (Vec<float>)_mm512_ternarylogic_epi32(_mm512_slli_epi32(high, 16),
                                                 _mm512_slli_epi32(low, 8), byte, 0xf8);
    w[1] = (Vec<float>)_mm512_ternarylogic_epi32(_mm512_and_si512(high, half), low, byte, 0xf8);
  }

  static int place(int o) { return 2 * (o % kLanes) + o / kLanes; }
};

inline bool is_short(const void* plain, int64_t inputs) {
  const uint32_t* bits = static_cast<const uint32_t*>(plain);
  uint32_t any = 0;
  for (int64_t i = 0; i < inputs * kWeightWidth; ++i) any |= bits[i];
  return !(any & 0xff);
}

// A panel of Floats.
inline void shorten_panel(const void* plain, int64_t inputs, char* to) {
  const uint32_t* bits = static_cast<const uint32_t*>(plain);
  for (int64_t k = 0; k < inputs; ++k, bits += kWeightWidth, to += ShortFloats::kStep)
    for (int o = 0; o < kWeightWidth; ++o) {
      const int at = ShortFloats::place(o);
      const uint16_t high = static_cast<uint16_t>(bits[o] >> 16);
      std::memcpy(to + 2 * at, &high, sizeof high);
      to[2 * kWeightWidth + at] = static_cast<char>(bits[o] >> 8);
    }
}

inline float unpacked(ShortFloats, char* panel, int64_t k, int o) {
  const char* from = panel + k * ShortFloats::kStep;
  const int at = ShortFloats::place(o);
  uint16_t high;
  std::memcpy(&high, from + 2 * at, sizeof high);
  return bit_cast<float>(uint32_t{high} << 16 |
                         uint32_t{static_cast<uint8_t>(from[2 * kWeightWidth + at])} << 8);
}

#endif

}  // namespace msn::MSN_ISA

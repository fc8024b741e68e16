// float16 of CUDA for the emulation (cuda_runtime.h says what that is): conversions and the larger
// of two alone, to nearest and ties to even as on the device. Not modelled: arithmetic on halves; a
// NaN's payload.
#pragma once
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

struct __half2 {
  __half x, y;
};

inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half x) {
  const uint32_t magnitude = x.bits & 0x7fffu, sign = (x.bits & 0x8000u) << 16;
  uint32_t bits = magnitude << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  value *= 0x1p112f;  // exact, subnormals too
  std::memcpy(&bits, &value, sizeof bits);
  if (magnitude >= 0x7c00u) bits = 0x7f800000u | magnitude << 13;  // inf and NaN
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline __half __float2half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7fff;
  } else if (bits >= 0x477ff000u) {  // rounds past the largest half
    half = 0x7c00;
  } else if (bits < 0x38800000u) {  // subnormal: the addition rounds
    const float sum = (x < 0 ? -x : x) + 0.5f;
    std::memcpy(&half, &sum, sizeof half);
    half -= 0x3f000000u;
  } else {
    half = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(half | sign)};
}

// The larger; of a NaN the one that a device makes.
inline __half __hmax_nan(__half a, __half b) {
  const float x = __half2float(a), y = __half2float(b);
  if (x != x || y != y) return {0x7fff};
  return x > y || (x == y && !(a.bits >> 15)) ? a : b;
}
inline __half2 __hmax2_nan(__half2 a, __half2 b) {
  return {__hmax_nan(a.x, b.x), __hmax_nan(a.y, b.y)};
}

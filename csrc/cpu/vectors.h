// The compiler's vector types for the instruction set that a file is compiled for (MSN_ISA), the
// storage types of floats, and the functions of vectors that kernels share.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace msn::MSN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  static constexpr int size = kVectorBytes / sizeof(T);
};
template <typename T>
using Vec = typename Vector<T>::type;

template <typename T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <typename T>
inline void store(T* to, const Vec<T>& v) {
  std::memcpy(to, &v, sizeof v);
}

template <typename T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // the compiler knows that taking 0 off changes nothing
}

template <typename To, typename From>
inline To bit_cast(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// a * b + c, rounded once where the instruction set can: left to the compiler, it might differ from
// one instance of a template to the next.
#if defined(__AVX512F__)
inline Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__FMA__)
inline Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#elif defined(__aarch64__)
inline Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
template <typename V>
inline V fused(V a, V b, V c) {
  return a * b + c;
}
#endif

// ---- storage types
// -------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
inline float widen(Half x) {
  const uint32_t magnitude = x.bits & 0x7fffu, sign = (x.bits & 0x8000u) << 16;
  const float value = bit_cast<float>(magnitude << 13) * 0x1p112f;  // exact, subnormals too
  return bit_cast<float>(
      (magnitude >= 0x7c00u ? 0x7f800000u | (magnitude << 13) : bit_cast<uint32_t>(value)) | sign);
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, BFloat16* to) {  // to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(x);
  to->bits = x != x ? 0x7fc0 : (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}
inline void narrow(float x, Half* to) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000u) {  // rounds past the largest half
    half = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // subnormal: let the addition round
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// A vector of numbers: the same, from memory to memory.
template <typename T, typename S>
inline void narrow_vector(const T* from, S* to) {
  for (int i = 0; i < Vector<T>::size; ++i) narrow(from[i], to + i);
}
inline void narrow_vector(const float* from, BFloat16* to) {
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  const Vec<float> x = load(from);
  const Words bits = bit_cast<Words>(x), none = Words{} + 0x7fc0u;
  const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Halves halves = __builtin_convertvector(x != x ? none : rounded, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

// Vector<float>::size halfs.
inline Vec<float> widen_halfs(const Half* from) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vec<float> v;
  for (int i = 0; i < Vector<float>::size; ++i) v[i] = widen(from[i]);
  return v;
#endif
}

// ---- functions
// -----------------------------------------------------------------------------------

// e^x for x <= 0: 2^n * p(r) with the degree-6 Taylor polynomial of e^r on |r| <= ln(2)/2.
inline Vec<float> exp_negative(Vec<float> x) {
  typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
  const Vec<float> shifter = Vec<float>{} + 0x1.8p23f;
  const Vec<float> shifted = x * 0x1.715476p+0f + shifter, n = shifted - shifter;
  const Vec<float> r = (x - n * 0x1.62e400p-1f) - n * 0x1.7f7d1cp-20f;
  Vec<float> p = Vec<float>{} + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Ints exponent = bit_cast<Ints>(shifted) << 23;
  const Vec<float> value = bit_cast<Vec<float>>(bit_cast<Ints>(p) + exponent);
  return x < -87.0f ? Vec<float>{} : value;
}
inline Vec<double> exp_negative(Vec<double> x) {
  for (int i = 0; i < Vector<double>::size; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace msn::MSN_ISA

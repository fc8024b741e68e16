// Norms and activations of vectors.
#pragma once
#include "cpu/vectors.h"
#include "layers_ops.h"

namespace msn::MSN_ISA {

// The numbers of a vector put together by f: one half with the other, until one is left.
template <typename T, typename V, typename F>
inline T folded(const V& v, F f) {
  if constexpr (sizeof(V) == 2 * sizeof(T)) {
    return f(v[0], v[1]);
  } else {
    typedef T Half __attribute__((vector_size(sizeof(V) / 2)));
    Half halves[2];
    std::memcpy(halves, &v, sizeof halves);
    return folded<T>(Half(f(halves[0], halves[1])), f);
  }
}

template <typename T>
inline T sum_of(Vec<T> v) {
  return folded<T>(v, [](auto a, auto b) { return a + b; });
}

// Of numbers none of which is NaN.
template <typename T>
inline T largest_of(Vec<T> v) {
  return folded<T>(v, [](auto a, auto b) { return b > a ? b : a; });
}

// The first `count` numbers, zeros after them.
template <typename T>
inline Vec<T> load_part(const T* from, int64_t count) {
  Vec<T> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
}

// f(vector) of `size` numbers; the last vector is filled up with zeros.
template <typename T, typename F>
inline void transform(const T* from, int64_t size, T* to, F f) {
  constexpr int kLanes = Vector<T>::size;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(to + i, f(load(from + i), i));
  if (i == size) return;
  const Vec<T> last = f(load_part(from + i, size - i), i);
  for (int64_t j = 0; i + j < size; ++j) to[i + j] = last[j];
}

template <typename T, typename F>
inline T sum(const T* from, int64_t size, F f) {
  constexpr int kLanes = Vector<T>::size;
  Vec<T> sums[2] = {};  // in turn, since one would wait for itself
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    sums[0] += f(load(from + i));
    sums[1] += f(load(from + i + kLanes));
  }
  T rest = 0;
  for (; i < size; ++i) rest += f(splat(from[i]))[0];
  return sum_of<T>(sums[0] + sums[1]) + rest;
}

template <typename T>
inline void normalise(const Norm& norm, const T* x, int64_t size, T* to) {
  const T* weight = static_cast<const T*>(norm.weight);
  const T* bias = static_cast<const T*>(norm.bias);
  T mean = 0;
  if (norm.kind == Norm::kLayer) mean = sum(x, size, [](Vec<T> v) { return v; }) / size;
  const T squares = sum(x, size, [mean](Vec<T> v) { return (v - mean) * (v - mean); });
  const T scale = 1 / std::sqrt(squares / size + static_cast<T>(norm.eps));
  constexpr int kLanes = Vector<T>::size;
  transform(x, size, to, [=](Vec<T> v, int64_t i) {
    const bool whole = i + kLanes <= size;
    const Vec<T> w = whole ? load(weight + i) : load_part(weight + i, size - i);
    v = (v - mean) * scale * w;
    if (bias) v += whole ? load(bias + i) : load_part(bias + i, size - i);
    return v;
  });
}

// ---- activations
// ---------------------------------------------------------------------------------

template <typename T>
inline Vec<T> exponential(Vec<T> x) {
  const T most = sizeof(T) == 4 ? 88 : 700;
  return exp_negative(Vec<T>(x > most ? splat(most) : x));
}

template <typename T>
inline Vec<T> sigmoid(Vec<T> x) {
  return 1 / (1 + exponential<T>(-x));
}

inline Vec<float> tanh_of(Vec<float> x) {
  const Vec<float> square = x * x;
  const Vec<float> small =
      x + x * square * (-1.0f / 3 + square * (2.0f / 15 - square * (17.0f / 315)));
  const Vec<float> large = 1 - 2 / (1 + exponential<float>(2 * x));
  return square < 0.01f ? small : large;
}
inline Vec<double> tanh_of(Vec<double> x) {
  for (int i = 0; i < Vector<double>::size; ++i) x[i] = std::tanh(x[i]);
  return x;
}

// x * P(Z < x) for a standard normal Z.
inline Vec<float> gelu(Vec<float> x) {
  // erfc(z) = exp(-z^2) p(1 / (1 + z / 2)) for z >= 0, to 3e-8 of it: a polynomial fitted to
  // Chebyshev's points of z in [0, 10].
  const Vec<float> z = (x < 0 ? -x : x) * 0x1.6a09e6p-1f;
  const Vec<float> u = 1 / (1 + 0.5f * z);
  Vec<float> p{};
  static constexpr float kErfc[] = {
      0.03483942556978927f, -0.24999146717288065f, 0.739632332979878f,     -1.1065643588408058f,
      0.8095210308371127f,  -0.32609716009644574f, 0.3145924796890784f,    0.21578891836911027f,
      0.2865362590292488f,  0.28172943259458955f,  1.3106554092534584e-05f};
#pragma GCC unroll 16
  for (const float c : kErfc) p = p * u + c;
  const Vec<float> tail = 0.5f * p * exp_negative(-z * z);
  return x * (x < 0 ? tail : 1 - tail);
}
inline Vec<double> gelu(Vec<double> x) {
  for (int i = 0; i < Vector<double>::size; ++i)
    x[i] = 0.5 * x[i] * std::erfc(-x[i] * 0.70710678118654752440);
  return x;
}

template <typename T>
inline Vec<T> gelu_tanh(Vec<T> x) {
  const T root = 0.79788456080286535588;  // sqrt(2 / pi)
  return T(0.5) * x * (1 + tanh_of(Vec<T>(root * (x + T(0.044715) * x * x * x))));
}

template <typename T>
inline Vec<T> activate(Activation kind, Vec<T> x) {
  switch (kind) {
    case Activation::kSilu: return x * sigmoid<T>(x);
    case Activation::kGelu: return gelu(x);
    case Activation::kGeluTanh: return gelu_tanh<T>(x);
    default: return x < 0 ? Vec<T>{} : x;
  }
}

template <typename T>
inline Vec<T> soft_cap(Vec<T> x, T cap) {
  return cap * tanh_of(Vec<T>(x / cap));
}

}  // namespace msn::MSN_ISA

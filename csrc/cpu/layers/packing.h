// Weights into panels, and back.
#pragma once
#include "cpu/layers/kernels.h"
#include "cpu/layers/panels.h"

namespace msn::MSN_ISA {

// Number i of a row as torch stores it.
inline double number(DType dtype, const char* row, int64_t i) {
  if (!row) return 0;
  switch (dtype) {
    case DType::kFloat64: return reinterpret_cast<const double*>(row)[i];
    case DType::kFloat32: return reinterpret_cast<const float*>(row)[i];
    case DType::kFloat16: return widen(reinterpret_cast<const Half*>(row)[i]);
    default: return widen(reinterpret_cast<const BFloat16*>(row)[i]);
  }
}

// ---- one number of a panel: input k, output o
// ----------------------------------------------------

template <typename T, int kWidth, int kSums>
T* place(Floats<T, kWidth, kSums>, char* panel, int64_t k, int o) {
  return reinterpret_cast<T*>(panel) + k * kWidth + o;
}
template <int kWidth, int kSums>
BFloat16* place(BFloats<kWidth, kSums>, char* panel, int64_t k, int o) {
  return reinterpret_cast<BFloat16*>(panel) + (k / 2 * kWidth + o) * 2 + k % 2;
}
template <int kWidth, int kSums>
Half* place(Halfs<kWidth, kSums>, char* panel, int64_t k, int o) {
  return reinterpret_cast<Half*>(panel) + k * kWidth + o;
}

template <typename P>
void pack_panel(P panels, const Unpacked& source, const char* const* rows, char* to) {
  // So that the strided writes stay in cache.
  constexpr int64_t kChunk = 64;
  if (source.inputs % 2) std::memset(to, 0, P::bytes(source.inputs));
  for (int64_t begin = 0; begin < source.inputs; begin += kChunk) {
    const int64_t end = begin + kChunk < source.inputs ? begin + kChunk : source.inputs;
    for (int o = 0; o < P::kWidth; ++o)
      for (int64_t k = begin; k < end; ++k) {
        auto* at = place(panels, to, k, o);
        const double value = number(source.dtype, rows[o], k * source.stride);
        if constexpr (sizeof(*at) == 8)
          *at = value;
        else
          narrow(static_cast<float>(value), at);
      }
  }
}

// The scale of a block is the least that has no number beyond 127 of them, in bfloat16.
template <int kWidth>
void pack_panel(Int8s<kWidth>, const Unpacked& source, const char* const* rows, char* to) {
  using P = Int8s<kWidth>;
  for (int64_t begin = 0; begin < source.inputs; begin += kInt8Block, to += P::kBlockBytes) {
    BFloat16* scales = reinterpret_cast<BFloat16*>(to + kInt8Block * kWidth);
    for (int o = 0; o < kWidth; ++o) {
      float values[kInt8Block] = {}, most = 0;
      for (int64_t k = begin; k < begin + kInt8Block && k < source.inputs; ++k) {
        const float value = number(source.dtype, rows[o], k * source.stride);
        values[k - begin] = value;
        most = std::fabs(value) > most ? std::fabs(value) : most;
      }
      narrow(most / 127, scales + o);
      if (widen(scales[o]) * 127 < most) ++scales[o].bits;
      const float scale = widen(scales[o]);
      for (int k = 0; k < kInt8Block; ++k)
        to[(k / 2 * kWidth + o) * 2 + k % 2] =
            scale > 0 ? static_cast<int8_t>(std::lrintf(values[k] / scale)) : int8_t{0};
    }
  }
}

template <typename P>
void pack(const Unpacked& source, char* to) {
  const int64_t bytes = P::bytes(source.inputs);
  for (int64_t row = 0; row < source.count; row += P::kWidth, to += bytes)
    pack_panel(P{}, source, source.rows + row, to);
}

template <typename P>
typename P::Sum unpacked(P panels, char* panel, int64_t k, int o) {
  return widen(*place(panels, panel, k, o));
}
template <int kWidth>
float unpacked(Int8s<kWidth>, char* panel, int64_t k, int o) {
  using P = Int8s<kWidth>;
  const char* block = panel + k / kInt8Block * P::kBlockBytes;
  const auto scale = reinterpret_cast<const BFloat16*>(block + kInt8Block * kWidth)[o];
  const int64_t i = k % kInt8Block;
  return static_cast<int8_t>(block[(i / 2 * kWidth + o) * 2 + i % 2]) * widen(scale);
}

template <typename P>
void unpack(const Packed& from, int64_t row, typename P::Sum* to) {
  char* panel =
      static_cast<char*>(const_cast<void*>(from.data)) + row / P::kWidth * P::bytes(from.inputs);
  for (int64_t k = 0; k < from.inputs; ++k) to[k] = unpacked(P{}, panel, k, row % P::kWidth);
}

template <typename P>
void embed(const Embed& stage, int t, int threads) {
  using T = typename P::Sum;
  const Rows& rows = *stage.rows;
  const int64_t size = stage.size;
  const int item = stage.dtype == static_cast<int>(DType::kFloat64)   ? 8
                   : stage.dtype == static_cast<int>(DType::kFloat32) ? 4
                                                                      : 2;
  for (int64_t n = rows.count * t / threads; n < rows.count * (t + 1) / threads; ++n) {
    T* to = static_cast<T*>(stage.out) + n * size;
    if (stage.table) {
      const char* row = static_cast<const char*>(stage.table) + rows.tokens[n] * size * item;
      for (int64_t i = 0; i < size; ++i)
        to[i] = static_cast<T>(number(static_cast<DType>(stage.dtype), row, i));
    } else {
      unpack<P>(stage.packed, rows.tokens[n], to);
    }
    for (int64_t i = 0; i < size; ++i) to[i] *= static_cast<T>(stage.scale);
    if (!stage.positions) continue;
    const T* position = static_cast<const T*>(stage.positions) + rows.positions[n] * size;
    for (int64_t i = 0; i < size; ++i) to[i] += position[i];
  }
}

}  // namespace msn::MSN_ISA

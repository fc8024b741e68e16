// Linear layers over packed weights, with what comes before (a norm) and after (residual,
// activation).
#pragma once
#include "cpu/drafting/best_guesses.h"
#include "cpu/layers/coded.h"
#include "cpu/layers/functions.h"
#include "cpu/layers/kernels.h"
#include "cpu/layers/panels.h"
#include "cpu/layers/short_floats.h"

namespace msn::MSN_ISA {

// ---- before: rows as the kernel multiplies them
// --------------------------------------------------

// Rows as P multiplies them: `size` numbers to pairs.
#if defined(__AVX512BF16__)
template <int kWidth, int kSums>
void to_pairs(BFloatPairs<kWidth, kSums>, const float* x, int64_t size, uint32_t* to) {
  int64_t i = 0;
  for (; i + 32 <= size; i += 32)
    _mm512_storeu_si512(to + i / 2, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16),
                                                                 _mm512_loadu_ps(x + i)));
  for (; i < size; i += 2) {
    BFloat16 low{}, high{};
    narrow(x[i], &low);
    if (i + 1 < size) narrow(x[i + 1], &high);
    to[i / 2] = low.bits | uint32_t{high.bits} << 16;
  }
}
#endif

// To int16, the largest of a block to 32767; a block with a NaN or an infinity gets a NaN as scale.
template <int kWidth>
void to_pairs(Int8s<kWidth>, const float* x, int64_t size, uint32_t* to) {
  constexpr int kLanes = Vector<float>::size, kVectors = kInt8Block / kLanes;
  typedef int16_t Words __attribute__((vector_size(kVectorBytes / 2)));
  for (int64_t begin = 0; begin < size; begin += kInt8Block) {
    Vec<float> v[kVectors], most{}, finite{};
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = begin + i * kLanes;
      v[i] = at + kLanes <= size ? load(x + at) : load_part(x + at, at < size ? size - at : 0);
      const Vec<float> magnitude = v[i] < 0 ? -v[i] : v[i];
      most = magnitude > most ? magnitude : most;
      finite += v[i] * 0;
    }
    const float top = largest_of<float>(most);
    const float scale = top / 32767 + sum_of<float>(finite);
    const float inverse = top > 0 ? 32767 / top : 0;
    for (int i = 0; i < kVectors; ++i) {
      const Vec<float> shifted = v[i] * inverse + 0x1.8p23f;  // rounds to nearest
      const IntVec rounded = bit_cast<IntVec>(shifted) - bit_cast<int32_t>(0x1.8p23f);
      const Words words = __builtin_convertvector(rounded, Words);
      std::memcpy(reinterpret_cast<int16_t*>(to) + begin + i * kLanes, &words, sizeof words);
    }
    to[-1 - begin / kInt8Block] = bit_cast<uint32_t>(scale);
  }
}

template <typename P>
struct Inputs {
  const typename P::In* x;
  int64_t stride;
};

// Numbers before a row of pairs, and of a row with them: the scales take less than half of it.
inline int64_t scales_before(int64_t size) { return (size / kInt8Block + 16) / 16 * 16; }
inline int64_t row_stride(int64_t size) { return (size + 31) / 32 * 32 + 32; }

// Where the inputs of a stage are once `make_inputs` has made them in this memory: rows as they are
// need not be made.
template <typename P>
bool are_made(const Linear& stage) {
  return P::kPairs || stage.norm.kind != Norm::kNone || stage.pick;
}
template <typename P>
Inputs<P> inputs_in(const Linear& stage, char* memory) {
  using T = typename P::Sum;
  if (!are_made<P>(stage)) {
    if constexpr (!P::kPairs) return {static_cast<const T*>(stage.x), stage.x_stride};
  }
  const int64_t stride = row_stride(stage.weights.inputs);
  const int64_t before = P::kPairs ? scales_before(stage.weights.inputs) : 0;
  return {reinterpret_cast<typename P::In*>(memory) + before, stride};
}

// Makes some of a stage's rows; `row` has room for one.
template <typename P>
void make_inputs(const Linear& stage, int64_t begin, int64_t end, typename P::Sum* row,
                 char* memory) {
  using T = typename P::Sum;
  if (!are_made<P>(stage)) return;
  const Inputs<P> made = inputs_in<P>(stage, memory);
  const int64_t size = stage.weights.inputs;
  for (int64_t r = begin; r < end; ++r) {
    const T* from =
        static_cast<const T*>(stage.x) + (stage.pick ? stage.pick[r] : r) * stage.x_stride;
    auto* to = const_cast<typename P::In*>(made.x) + r * made.stride;
    if constexpr (P::kPairs) {
      if (stage.norm.kind != Norm::kNone) {
        normalise(stage.norm, from, size, row);
        from = row;
      }
      to_pairs(P{}, from, size, to);
    } else if (stage.norm.kind != Norm::kNone) {
      normalise(stage.norm, from, size, to);
    } else {
      std::memcpy(to, from, size * sizeof(T));
    }
  }
}

// Those that all threads made together, else all of them: of a few rows, each thread makes them for
// itself, which is cheaper than to wait for others.
template <typename P>
Inputs<P> inputs_of(const Linear& stage, char* scratch) {
  using T = typename P::Sum;
  if (stage.inputs) return inputs_in<P>(stage, static_cast<char*>(stage.inputs));
  T* row = reinterpret_cast<T*>(scratch);
  char* memory = scratch + row_stride(stage.weights.inputs) * sizeof(T);
  make_inputs<P>(stage, 0, stage.rows, row, memory);
  return inputs_in<P>(stage, memory);
}

inline int64_t inputs_bytes(int64_t rows, int64_t size, int64_t item) {
  return (rows + 1) * row_stride(size) * item;
}

// ---- after
// ---------------------------------------------------------------------------------------

// Whether a value is larger than another one, or NaN.
inline bool any_above(Vec<float> values, float least) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)values, _mm512_set1_ps(least), _CMP_NLE_UQ);
#elif defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)values, _mm256_set1_ps(least), _CMP_NLE_UQ));
#elif defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpnle_ps((__m128)values, _mm_set1_ps(least)));
#else
  bool any = false;
  for (int i = 0; i < Vector<float>::size; ++i) any |= !(values[i] <= least);
  return any;
#endif
}

// Adds the values of outputs from `output` on to the largest ones of their row.
template <int kWidth>
void keep_best(Best<int32_t>& best, const float* y, int64_t output, int count) {
  // All pass NaN, which stands here while there are fewer than kGuesses.
  const float least =
      best.at[kGuesses - 1] < 0 ? NAN : bit_cast<float>(OrderedFloat32::bits(best.least()));
  bool any = false;
  for (int o = 0; o < kWidth; o += Vector<float>::size) any |= any_above(load(y + o), least);
  if (!any) return;
  for (int o = 0; o < count; ++o)
    best.add(OrderedFloat32::key(bit_cast<uint32_t>(y[o])), output + o);
}

// y[o] of one row, o < count of the panel's outputs that there are, in place; then out.
template <typename T, int kWidth>
struct After {
  const Linear& stage;

  void add_bias(T* y, int64_t output, int count) const {
    if (!stage.bias) return;
    const T* bias = static_cast<const T*>(stage.bias) + output;
    for (int o = 0; o < count; ++o) y[o] += bias[o];
  }

  void operator()(T* y, int64_t row, int64_t output, int count) const {
    add_bias(y, output, count);
    T* out = static_cast<T*>(stage.out);
    if (out) out += row * stage.out_stride + output;
    switch (stage.epilogue) {
      case Linear::kAdd: {
        const T scale = static_cast<T>(stage.scale);
        if (count < kWidth)
          for (int o = 0; o < count; ++o) out[o] += scale * y[o];
        else
          for (int o = 0; o < kWidth; o += Vector<T>::size)
            store(out + o, load(out + o) + scale * load(y + o));
        return;
      }
      case Linear::kActivate:
        transform(y, kWidth, y,
                  [&](Vec<T> v, int64_t) { return activate<T>(stage.activation, v); });
        break;
      case Linear::kLogits: {
        const T scale = static_cast<T>(stage.scale), cap = static_cast<T>(stage.softcap);
        if (scale != 1) transform(y, kWidth, y, [&](Vec<T> v, int64_t) { return v * scale; });
        if (cap > 0)
          transform(y, kWidth, y, [&](Vec<T> v, int64_t) { return soft_cap<T>(v, cap); });
        if constexpr (sizeof(T) == 4)
          if (stage.best) keep_best<kWidth>(stage.best[row], y, output, count);
        if (!out) return;  // these are all that is wanted
        break;
      }
      default: break;
    }
    std::memcpy(out, y, count * sizeof(T));
  }

  void gate(T* gates, T* ups, int64_t row, int64_t output, int count) const {
    T* out = static_cast<T*>(stage.out) + row * stage.out_stride + output;
    add_bias(gates, output, count);
    add_bias(ups, stage.weights.outputs / 2 + output, count);
    for (int o = 0; o < kWidth; o += Vector<T>::size)
      store(gates + o, activate<T>(stage.activation, load(gates + o)) * load(ups + o));
    std::memcpy(out, gates, count * sizeof(T));
  }
};

// ---- noise rows
// ------------------------------------------------------------------------------------

// How an adapter's panels are stored: as the weights are, were they not coded; those beside int8 as
// bfloat16.
template <typename P>
struct AdapterPanels {
  using Of = P;
};
template <int kOutputs>
struct AdapterPanels<Int8s<kOutputs>> {
  using Of = WeightBFloats;
};
#if defined(__AVX512BF16__)
template <>
struct AdapterPanels<CodedBFloats> {
  using Of = WeightBFloats;
};
#endif
#if defined(__AVX512F__)
template <>
struct AdapterPanels<ShortFloats> {
  using Of = Floats<float, kWeightWidth, kSumBlock>;
};
#endif

// B (A x), a panel of outputs of all noise rows at a time.
template <typename P>
class NoiseRows {
 public:
  using T = typename P::Sum;

  static size_t bytes(const LowRank& adapter) {
    return adapter.rows * (P::kWidth + row_stride(adapter.stride)) * sizeof(T);
  }
  NoiseRows(const LowRank& adapter, char* memory)
      : adapter_(adapter), tile_(reinterpret_cast<T*>(memory)), size_(P::bytes(adapter.b.inputs)) {
    const T* low = static_cast<const T*>(adapter.low);
    if constexpr (P::kPairs) {
      uint32_t* pairs = reinterpret_cast<uint32_t*>(tile_ + adapter.rows * P::kWidth);
      stride_ = row_stride(adapter.stride);
      for (int64_t r = 0; r < adapter.rows; ++r)
        to_pairs(P{}, low + r * adapter.stride, adapter.stride, pairs + r * stride_);
      low_ = pairs;
    } else {
      stride_ = adapter.stride;
      low_ = low;
    }
  }

  // Asks for a panel of B before it is needed: it is too small for a core to see it coming.
  void ahead(int64_t panel) const {
    if (!adapter_.rows) return;
    __builtin_prefetch(adapter_.first + panel);
    for (int64_t i = 0; i < size_; i += 64) __builtin_prefetch(panel_of(panel) + i);
  }

  void multiply(int64_t panel) const {
    if (!adapter_.rows) return;
    ahead(panel + 1);
    const char* b = panel_of(panel);
    const int64_t first = adapter_.first[panel] / (P::kPairs ? 2 : 1);
    multiply_rows<P>(low_ + first, stride_, adapter_.rows, b, adapter_.b.inputs, b + size_, tile_,
                     P::kWidth, [](int64_t, int64_t) {});
  }
  // To the panel's outputs y of rows of the layer, P::kWidth each.
  void add(T* y, int64_t first, int64_t many) const {
    if (!adapter_.rows) return;
    for (int64_t r = first; r < first + many; ++r) {
      const int64_t noise = adapter_.index[r];
      if (noise < 0) continue;
      for (int o = 0; o < P::kWidth; ++o) y[r * P::kWidth + o] += tile_[noise * P::kWidth + o];
    }
  }

 private:
  const char* panel_of(int64_t panel) const {
    return static_cast<const char*>(adapter_.b.data) + panel * size_;
  }

  const LowRank& adapter_;
  T* tile_;
  const int64_t size_;  // of a panel, in bytes
  const typename P::In* low_ = nullptr;
  int64_t stride_ = 0;
};

// ---- the stage
// -----------------------------------------------------------------------------------

// Makes this thread's share of stage.inputs; whether anything is made there.
template <typename P>
bool prepare(const Linear& stage, int t, int threads, Scratch& scratch) {
  using T = typename P::Sum;
  T* row = reinterpret_cast<T*>(scratch.get(row_stride(stage.weights.inputs) * sizeof(T)));
  make_inputs<P>(stage, stage.rows * t / threads, stage.rows * (t + 1) / threads, row,
                 static_cast<char*>(stage.inputs));
  return are_made<P>(stage);
}

template <typename P>
void linear(const Linear& stage, int t, int threads, Scratch& scratch) {
  using T = typename P::Sum;
  constexpr int kWidth = P::kWidth;
  const bool gated = stage.epilogue == Linear::kGate;
  const int64_t inputs = stage.weights.inputs, bytes = P::bytes(inputs), rows = stage.rows;
  const int64_t outputs = gated ? stage.weights.outputs / 2 : stage.weights.outputs;
  const int64_t panels = (outputs + kWidth - 1) / kWidth, together = gated ? 2 : 1;
  const int64_t tile_bytes = rows * kWidth * sizeof(T);
  using Noise = NoiseRows<typename AdapterPanels<P>::Of>;
  const int64_t noise_at = 2 * tile_bytes, inputs_at = noise_at + Noise::bytes(stage.adapter);
  const int64_t made = stage.inputs ? 0 : inputs_bytes(rows, inputs, sizeof(T));
  char* memory = scratch.get(inputs_at + made);
  T* tiles[2] = {reinterpret_cast<T*>(memory), reinterpret_cast<T*>(memory + tile_bytes)};
  const Noise noise(stage.adapter, memory + noise_at);
  const int64_t begin = panels * t / threads, end = panels * (t + 1) / threads;
  noise.ahead(begin * together);
  const Inputs<P> in = inputs_of<P>(stage, memory + inputs_at);
  const After<T, kWidth> after{stage};

  for (int64_t p = begin; p < end; ++p) {
    const char* panel = static_cast<const char*>(stage.weights.data) + p * together * bytes;
    const int64_t output = p * kWidth;
    const int count = output + kWidth <= outputs ? kWidth : static_cast<int>(outputs - output);
    for (int i = 0; i < together; ++i, panel += bytes) {
      noise.multiply(p * together + i);
      const auto each = [&](int64_t first, int64_t many) {
        noise.add(tiles[i], first, many);
        if (gated) return;
        for (int64_t r = first; r < first + many; ++r)
          after(tiles[0] + r * kWidth, r, output, count);
      };
      if constexpr (kIsCoded<P>)
        multiply_coded(in.x, in.stride, rows, panel, inputs, tiles[i], kWidth, each);
      else
        multiply_rows<P>(in.x, in.stride, rows, panel, inputs, panel + together * bytes, tiles[i],
                         kWidth, each);
    }
    if (!gated) continue;
    for (int64_t r = 0; r < rows; ++r)
      after.gate(tiles[0] + r * kWidth, tiles[1] + r * kWidth, r, output, count);
  }
}

template <typename T>
void add_norm(const AddNorm& stage, int t, int threads) {
  const T scale = static_cast<T>(stage.scale);
  for (int64_t r = stage.rows * t / threads; r < stage.rows * (t + 1) / threads; ++r) {
    T* x = static_cast<T*>(const_cast<void*>(stage.x)) + r * stage.size;
    T* h = static_cast<T*>(stage.h) + r * stage.size;
    normalise(stage.norm, x, stage.size, x);
    for (int64_t i = 0; i < stage.size; ++i) h[i] += scale * x[i];
  }
}

}  // namespace msn::MSN_ISA

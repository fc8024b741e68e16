// The largest logits of a row, without all of the head's weights: a copy of them in int8 bounds
// every logit, and only those that may be among a row's largest are computed from the weights, by
// the kernel that would have computed them all. So they are the same, to the bit.
//
// For a row x and an output with weights w, of which w' = scale * integers is stored and x' is what
// x is rounded to:
//     |w x - w' x'| <= |w - w'| |x| + |w'| |x - x'|      (Euclidean norms)
// and what the kernel gives for w x is off by less than kRounding |w| |x| more.
#pragma once
#include <algorithm>
#include <cmath>

#include "cpu/layers/functions.h"
#include "cpu/layers/linear.h"
#include "cpu/layers/packing.h"

namespace msn::MSN_ISA {

#if defined(__AVX512VNNI__)

constexpr int kScreenWidth = 32;  // outputs of a panel: those of the weights
constexpr int kFours = 4;         // inputs that one instruction multiplies and adds up
constexpr int kScreenRows = 8;    // at once; with more of them the compiler runs out of registers

// A panel: [inputs / 4][kScreenWidth][4] of weights + 128, then of each output the scale, a bound
// of |w - w'| and one of |w'|.
struct ScreenPanel {
  static int64_t fours(int64_t inputs) { return (inputs + kFours - 1) / kFours; }
  static int64_t bytes(int64_t inputs) {
    return fours(inputs) * kScreenWidth * kFours + 3 * kScreenWidth * sizeof(float);
  }
  const uint8_t* weights;
  const float *scales, *errors, *norms;

  ScreenPanel(const void* screen, int64_t panel, int64_t inputs)
      : weights(static_cast<const uint8_t*>(screen) + panel * bytes(inputs)),
        scales(reinterpret_cast<const float*>(weights + fours(inputs) * kScreenWidth * kFours)),
        errors(scales + kScreenWidth),
        norms(errors + kScreenWidth) {}
};

// More than float32 loses in sums and bounds of so many products.
inline float rounding(int64_t inputs) {
  return static_cast<float>((2 * std::min<int64_t>(inputs, kSumBlock) + inputs / 64 + 64)) *
         0x1p-24f;
}
constexpr double kUpward = 1 + 1e-4;  // for what is computed of norms, and stored in float32

template <typename P>
bool pack_screen(const Packed& head, int64_t panel, void* to) {
  const int64_t inputs = head.inputs, fours = ScreenPanel::fours(inputs);
  char* from = static_cast<char*>(const_cast<void*>(head.data)) + panel * P::bytes(inputs);
  const ScreenPanel at(to, 0, inputs);
  uint8_t* weights = const_cast<uint8_t*>(at.weights);
  for (int o = 0; o < kScreenWidth; ++o) {
    double most = 0;
    for (int64_t k = 0; k < inputs; ++k) {
      const double w = unpacked(P{}, from, k, o);
      if (!(std::fabs(w) <= 1e30)) return false;
      most = std::max(most, std::fabs(w));
    }
    const float scale = static_cast<float>(most / 127);
    double error = 0, norm = 0;
    for (int64_t k = 0; k < fours * kFours; ++k) {
      const double w = k < inputs ? unpacked(P{}, from, k, o) : 0;
      const double near = scale > 0 ? std::nearbyint(w / scale) : 0;
      const double n = std::max(-127.0, std::min(127.0, near)), stored = n * scale;
      error += (w - stored) * (w - stored);
      norm += stored * stored;
      weights[(k / kFours * kScreenWidth + o) * kFours + k % kFours] =
          static_cast<uint8_t>(static_cast<int>(n) + 128);
    }
    const_cast<float*>(at.scales)[o] = scale;
    const_cast<float*>(at.errors)[o] = static_cast<float>(std::sqrt(error) * kUpward);
    const_cast<float*>(at.norms)[o] = static_cast<float>(std::sqrt(norm) * kUpward);
  }
  return true;
}

// ---- rows
// ----------------------------------------------------------------------------------------

// Rows in integers of one scale each. A few fours of inputs, where some row has its largest
// numbers, have 15 bits; the others have 8, as otherwise a single large number would cost all of
// them their digits.
struct ScreenRows {
  int64_t fours, wide;  // wide: how many of them have high bytes, too
  int32_t *low, *high;  // [rows][fours], [rows][wide]: four bytes each
  int32_t* which;       // [fours], the wide ones first
  uint32_t* offsets;    // [rows], 128 times the sum of the integers
  float *scales, *norms, *errors;

  // All of them, as long as memory is what is waited for.
  static constexpr int kAllWide = 4;
  static int64_t most_wide(int64_t rows, int64_t fours) {
    return rows <= kAllWide ? fours : (fours + 3) / 4;
  }
  static int64_t bytes(int64_t rows, int64_t inputs) {
    const int64_t fours = ScreenPanel::fours(inputs), wide = most_wide(rows, fours);
    return 4 * (rows * (fours + wide) + 2 * fours + 4 * rows);
  }
};

// Row r as it is multiplied, in float32, zeros behind its inputs.
template <typename P>
void numbers_of(const Inputs<P>& in, int64_t r, int64_t inputs, int64_t padded, float* to) {
  const auto* x = in.x + r * in.stride;
  for (int64_t k = 0; k < inputs; ++k) {
    if constexpr (P::kPairs)
      to[k] = bit_cast<float>(k % 2 ? x[k / 2] & 0xffff0000u : x[k / 2] << 16);
    else
      to[k] = x[k];
  }
  for (int64_t k = inputs; k < padded; ++k) to[k] = 0;
}

// Chooses the wide fours of rows [rows][fours][4], those whose numbers are largest beside the
// others of their row: weight[f] becomes -1.
inline void choose_wide(const float* numbers, int64_t rows, ScreenRows* to, float* weight) {
  const int64_t fours = to->fours;
  for (int64_t f = 0; f < fours; ++f) {
    weight[f] = 0;
    to->which[f] = static_cast<int32_t>(f);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = numbers + r * fours * kFours;
    const float inverse = to->norms[r] > 0 ? 1 / to->norms[r] : 0;
    for (int64_t k = 0; k < fours * kFours; ++k)
      weight[k / kFours] = std::max(weight[k / kFours], std::fabs(x[k]) * inverse);
  }
  if (to->wide < fours)
    std::nth_element(to->which, to->which + to->wide, to->which + fours,
                     [weight](int32_t a, int32_t b) { return weight[a] > weight[b]; });
  for (int64_t w = 0; w < to->wide; ++w) weight[to->which[w]] = -1;
}

inline void round_row(const float* x, int64_t r, const float* weight, ScreenRows* to) {
  const int64_t padded = to->fours * kFours;
  float wide = 0, other = 0, sum = 0;
  for (int64_t k = 0; k < padded; ++k) {
    const float size = std::fabs(x[k]);
    sum += size;
    float& most = weight[k / kFours] < 0 ? wide : other;
    most = std::max(most, size);
  }
  // So that no sum of integers times weights reaches 2^31; what it is on the way may wrap around.
  float scale = std::max({other / 127, wide / 32000, sum / 1.6e7f});
  if (!(scale > 1e-30f)) scale = 1;
  const float inverse = 1 / scale;
  const auto rounded = [&](int64_t k) {
    return static_cast<int32_t>(std::nearbyint(x[k] * inverse));
  };
  int8_t* low = reinterpret_cast<int8_t*>(to->low + r * to->fours);
  int32_t total = 0;
  double error = 0;
  for (int64_t k = 0; k < padded; ++k) {
    const int32_t n = rounded(k);
    const double off = x[k] - static_cast<double>(n) * scale;
    error += off * off;
    total += n;
    low[k] = static_cast<int8_t>(n);  // of a wide one, what is left of 256 times its high byte
  }
  int8_t* high = reinterpret_cast<int8_t*>(to->high + r * to->wide);
  for (int64_t i = 0; i < to->wide * kFours; ++i) {
    const int64_t k = to->which[i / kFours] * kFours + i % kFours;
    high[i] = static_cast<int8_t>((rounded(k) - low[k]) / 256);
  }
  to->offsets[r] = 128 * static_cast<uint32_t>(total);
  to->scales[r] = scale;
  to->errors[r] = static_cast<float>(std::sqrt(error) * kUpward);
}

// Returns whether all numbers are finite.
template <typename P>
bool round_rows(const Inputs<P>& in, int64_t rows, int64_t inputs, char* memory, float* numbers,
                ScreenRows* to) {
  const int64_t fours = ScreenPanel::fours(inputs), padded = fours * kFours;
  to->fours = fours;
  to->wide = ScreenRows::most_wide(rows, fours);
  to->low = reinterpret_cast<int32_t*>(memory);
  to->high = to->low + rows * fours;
  to->which = to->high + rows * to->wide;
  to->offsets = reinterpret_cast<uint32_t*>(to->which + fours);
  to->scales = reinterpret_cast<float*>(to->offsets + rows);
  to->norms = to->scales + rows;
  to->errors = to->norms + rows;
  float* weight = to->errors + rows;
  for (int64_t r = 0; r < rows; ++r) {
    float* x = numbers + r * padded;
    numbers_of<P>(in, r, inputs, padded, x);
    double squares = 0;
    for (int64_t k = 0; k < padded; ++k) squares += static_cast<double>(x[k]) * x[k];
    if (!(squares < 1e30)) return false;
    to->norms[r] = static_cast<float>(std::sqrt(squares) * kUpward);
  }
  choose_wide(numbers, rows, to, weight);
  for (int64_t r = 0; r < rows; ++r) round_row(numbers + r * padded, r, weight, to);
  return true;
}

// ---- bounds
// --------------------------------------------------------------------------------------

struct Candidate {
  int32_t output;
  float above;  // its logit is no larger
};

// The outputs of a row that may be among its kGuesses largest.
struct Candidates {
  static constexpr int kMost = 1024;
  float least[kGuesses];  // logits of this row reach these, the largest first
  float* shared;          // the best bound of all threads; a late one costs work, nothing else
  int count;
  bool full;
  Candidate at[kMost];

  void clear(float* of_row) {
    shared = of_row;
    for (float& bound : least) bound = -__builtin_inff();
    count = 0;
    full = false;
  }
  float bound() const {
    float all;
    __atomic_load(shared, &all, __ATOMIC_RELAXED);
    return std::max(least[kGuesses - 1], all);
  }
  void add(int32_t output, float below, float above) {
    if (count == kMost) {
      drop();
      full |= count > kMost / 2;
      if (full) return;
    }
    at[count++] = {output, above};
    if (!(below > least[kGuesses - 1])) return;
    int place = kGuesses - 1;
    for (; place > 0 && least[place - 1] < below; --place) least[place] = least[place - 1];
    least[place] = below;
    float mine = bound();
    __atomic_store(shared, &mine, __ATOMIC_RELAXED);
  }
  void drop() {  // those that are out by now
    int kept = 0;
    for (int i = 0; i < count; ++i)
      if (!(at[i].above < bound())) at[kept++] = at[i];
    count = kept;
  }
};

// kAll: all inputs are wide.
template <int kRows, bool kAll>
void screen_rows(const ScreenRows& rows, int64_t first, const ScreenPanel& panel, float rounding,
                 int32_t output, int outputs, int64_t ahead, Candidates* to) {
  __m512i sum[kRows][2], high[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < 2; ++j) sum[r][j] = high[r][j] = _mm512_setzero_si512();
  constexpr int64_t kStep = kScreenWidth * kFours;
  const auto add = [](__m512i(&to)[kRows][2], const int32_t* x, int64_t stride,
                      const uint8_t* from) [[gnu::always_inline]] {
    const __m512i w[2] = {_mm512_loadu_si512(from), _mm512_loadu_si512(from + 64)};
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512i value = _mm512_set1_epi32(x[r * stride]);
      to[r][0] = _mm512_dpbusd_epi32(to[r][0], w[0], value);
      to[r][1] = _mm512_dpbusd_epi32(to[r][1], w[1], value);
    }
  };
  const auto shift = [&](const __m512i(&from)[kRows][2]) [[gnu::always_inline]] {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      for (int j = 0; j < 2; ++j)
        sum[r][j] = _mm512_add_epi32(kAll ? sum[r][j] : _mm512_setzero_si512(),
                                     _mm512_slli_epi32(from[r][j], 8));
  };
  const int32_t* wide = rows.high + first * rows.wide;
  if (!kAll) {
    for (int64_t w = 0; w < rows.wide; ++w)
      add(sum, wide + w, rows.wide, panel.weights + rows.which[w] * kStep);
    shift(sum);
  }
  for (int i = 0; i < 6; ++i) __builtin_prefetch(panel.scales + 16 * i, 0, 2);
  const uint8_t* from = panel.weights;
  const int32_t* x = rows.low + first * rows.fours;
  for (int64_t f = 0; f < rows.fours; ++f, from += kStep) {
    __builtin_prefetch(from + ahead);
    __builtin_prefetch(from + ahead + 64);
    add(sum, x + f, rows.fours, from);
    if (kAll) add(high, wide + f, rows.fours, from);
  }
  if (kAll) shift(high);
  const __m512 flushed = _mm512_set1_ps(1e-30f);  // more than what subnormal numbers may come to
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const int64_t n = first + r;
    const __m512 norm = _mm512_set1_ps(rows.norms[n]);
    const __m512 error = _mm512_set1_ps(rows.errors[n] + rounding * rows.norms[n]);
    for (int j = 0; j < 2; ++j) {
      const __m512i exact =
          _mm512_sub_epi32(sum[r][j], _mm512_set1_epi32(static_cast<int32_t>(rows.offsets[n])));
      const __m512 near = _mm512_mul_ps(
          _mm512_cvtepi32_ps(exact),
          _mm512_mul_ps(_mm512_loadu_ps(panel.scales + 16 * j), _mm512_set1_ps(rows.scales[n])));
      const __m512 off =
          _mm512_fmadd_ps(_mm512_loadu_ps(panel.errors + 16 * j), norm,
                          _mm512_fmadd_ps(_mm512_loadu_ps(panel.norms + 16 * j), error, flushed));
      const __m512 above = _mm512_add_ps(near, off);
      uint32_t lanes = _mm512_cmp_ps_mask(above, _mm512_set1_ps(to[n].bound()), _CMP_NLT_UQ);
      if (__builtin_expect(!lanes, 1)) continue;
      alignas(64) float highest[16], lowest[16];
      _mm512_store_ps(highest, above);
      _mm512_store_ps(lowest, _mm512_sub_ps(near, off));
      for (; lanes; lanes &= lanes - 1) {
        const int o = 16 * j + __builtin_ctz(lanes);
        if (o < outputs) to[n].add(output + o, lowest[o % 16], highest[o % 16]);
      }
    }
  }
}

using ScreenRowsOf = void (*)(const ScreenRows&, int64_t, const ScreenPanel&, float, int32_t, int,
                              int64_t, Candidates*);
template <bool kAll, int... kRows>
struct ScreenTable {
  static constexpr ScreenRowsOf of[] = {screen_rows<kRows + 1, kAll>...};
};
template <bool kAll, int kCount, int... kRows>
struct MakeScreenTable : MakeScreenTable<kAll, kCount - 1, kCount - 1, kRows...> {};
template <bool kAll, int... kRows>
struct MakeScreenTable<kAll, 0, kRows...> : ScreenTable<kAll, kRows...> {};

// ---- the stage
// -----------------------------------------------------------------------------------

// What panels hold of an output at a time.
template <typename P>
struct UnitOf {
  using type = uint32_t;  // a float, or a pair of bfloat16
};
template <int kWidth, int kSums>
struct UnitOf<Halfs<kWidth, kSums>> {
  using type = uint16_t;
};

// Copies outputs of a matrix into one panel, one beside the other: from its rows, if there are any,
// else from its panels, where a line of memory has to be read for every unit.
template <typename P>
void gather_outputs(const Packed& weights, const void* dense, const int32_t* outputs, int count,
                    char* panel) {
  using Unit = typename UnitOf<P>::type;
  const int64_t bytes = P::bytes(weights.inputs);
  const int64_t units = bytes / (P::kWidth * sizeof(Unit));
  const int64_t step = dense ? 1 : P::kWidth;
  for (int i = 0; i < count; ++i) {
    const int64_t o = outputs[i];
    const Unit* from = dense ? static_cast<const Unit*>(dense) + o * units
                             : reinterpret_cast<const Unit*>(
                                   static_cast<const char*>(weights.data) + o / P::kWidth * bytes) +
                                   o % P::kWidth;
    if (i + 1 < count && dense)
      __builtin_prefetch(static_cast<const Unit*>(dense) + outputs[i + 1] * units);
    Unit* to = reinterpret_cast<Unit*>(panel) + i;
    for (int64_t s = 0; s < units; ++s) to[s * P::kWidth] = from[s * step];
  }
}

// Marks the outputs from `first` on that are somebody's candidates, a bit each; returns how many
// there are, or -1 where some row has too many.
inline int64_t mark(Candidates* candidates, int64_t rows, int64_t first, int64_t panels,
                    uint32_t* marks) {
  for (int64_t p = 0; p < panels; ++p) marks[p] = 0;
  int64_t marked = 0;
  for (int64_t r = 0; r < rows; ++r) {
    candidates[r].drop();
    if (candidates[r].full) return -1;
    for (int i = 0; i < candidates[r].count; ++i) {
      const int64_t at = candidates[r].at[i].output - first;
      uint32_t& bits = marks[at / kScreenWidth];
      marked += !(bits >> at % kScreenWidth & 1);
      bits |= 1u << at % kScreenWidth;
    }
  }
  return marked;
}

// The logits of marked outputs, of all rows: what is no candidate does no harm.
template <typename P>
void keep_marked(const Linear& stage, const Inputs<P>& in, int64_t first, int64_t panels,
                 const uint32_t* marks, char* panel, typename P::Sum* tile) {
  int32_t outputs[kScreenWidth];
  int count = 0;
  const auto keep = [&] {
    gather_outputs<P>(stage.weights, stage.dense, outputs, count, panel);
    multiply_rows<P>(in.x, in.stride, stage.rows, panel, stage.weights.inputs, panel, tile,
                     kScreenWidth, [](int64_t, int64_t) {});
    for (int64_t r = 0; r < stage.rows; ++r)
      for (int i = 0; i < count; ++i)
        stage.best[r].add(OrderedFloat32::key(bit_cast<uint32_t>(tile[r * kScreenWidth + i])),
                          outputs[i]);
    count = 0;
  };
  for (int64_t p = 0; p < panels; ++p)
    for (uint32_t bits = marks[p]; bits; bits &= bits - 1) {
      outputs[count++] = static_cast<int32_t>(first + p * kScreenWidth + __builtin_ctz(bits));
      if (count == kScreenWidth) keep();
    }
  if (count) keep();
}

constexpr int64_t kMostScreened = 12;  // rows; more of them wait for arithmetic, not for memory

// Adds the largest logits of this thread's share to stage.best; false: they cannot be told by
// bounds, or not with less work than it is to compute them all.
template <typename P>
bool screened(const Linear& stage, int t, int threads, Scratch& scratch) {
  static_assert(P::kWidth == kScreenWidth);
  if (stage.rows > kMostScreened) return false;
  using T = typename P::Sum;
  const int64_t inputs = stage.weights.inputs, all_outputs = stage.weights.outputs;
  const int64_t rows = stage.rows, all = (all_outputs + kScreenWidth - 1) / kScreenWidth;
  const int64_t begin = all * t / threads, panels = all * (t + 1) / threads - begin;
  const int64_t first = begin * kScreenWidth;
  const int64_t sizes[] = {rows * static_cast<int64_t>(sizeof(Candidates)),
                           ScreenRows::bytes(rows, inputs),
                           rows * ScreenPanel::fours(inputs) * kFours * 4,
                           panels * 4,
                           P::bytes(inputs),
                           rows * kScreenWidth * static_cast<int64_t>(sizeof(T)),
                           inputs_bytes(rows, inputs, sizeof(T))};
  int64_t total = 0, starts[7];
  for (int i = 0; i < 7; ++i) {
    starts[i] = total;
    total += (sizes[i] + 63) / 64 * 64;
  }
  char* memory = scratch.get(total);
  Candidates* candidates = reinterpret_cast<Candidates*>(memory + starts[0]);
  float* numbers = reinterpret_cast<float*>(memory + starts[2]);
  uint32_t* marks = reinterpret_cast<uint32_t*>(memory + starts[3]);
  const Inputs<P> in = inputs_of<P>(stage, memory + starts[6]);
  ScreenRows rounded;
  if (!round_rows<P>(in, rows, inputs, memory + starts[1], numbers, &rounded)) return false;
  for (int64_t r = 0; r < rows; ++r) candidates[r].clear(stage.bounds + r);
  const ScreenRowsOf* of = rows <= ScreenRows::kAllWide
                               ? MakeScreenTable<true, ScreenRows::kAllWide>::of
                               : MakeScreenTable<false, kScreenRows>::of;
  const int64_t parts = (rows + kScreenRows - 1) / kScreenRows;
  for (int64_t p = 0; p < panels; ++p) {
    const ScreenPanel panel(stage.screen, begin + p, inputs);
    const int64_t output = first + p * kScreenWidth;
    const int count = static_cast<int>(std::min<int64_t>(kScreenWidth, all_outputs - output));
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t from = rows * i / parts, many = rows * (i + 1) / parts - from;
      of[many - 1](rounded, from, panel, rounding(inputs), static_cast<int32_t>(output), count,
                   i ? 0 : ScreenPanel::bytes(inputs), candidates);
    }
  }
  const int64_t marked = mark(candidates, rows, first, panels, marks);
  if (marked < 0 || marked * 4 > panels * kScreenWidth) return false;
  keep_marked<P>(stage, in, first, panels, marks, memory + starts[4],
                 reinterpret_cast<T*>(memory + starts[5]));
  return true;
}

#endif

}  // namespace msn::MSN_ISA

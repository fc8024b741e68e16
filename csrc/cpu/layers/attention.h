// Queries, keys and values of one layer: turned and cached, then attention to them.
//
// A row attends to the logical positions 0, 1, ...: the slots of its prefix, then its path. Scores
// go to their logical positions before soft-max and values, so that sums have the same order
// whether a token above was a node of this tree or was committed before.
#pragma once
#include "cpu/layers/functions.h"
#include "cpu/layers/kernels.h"
#include "cpu/layers/packing.h"
#include "cpu/layers/panels.h"

namespace msn::MSN_ISA {

template <typename S>
struct CachePanelsOf {
  using type = Floats<S, kCacheWidth, 0>;
};
template <>
struct CachePanelsOf<BFloat16> {
  using type = BFloats<kCacheWidth, 0>;
};
template <>
struct CachePanelsOf<Half> {
  using type = Halfs<kCacheWidth, 0>;
};
template <typename S>
using CachePanels = typename CachePanelsOf<S>::type;

// The panels of one head of one batch row.
template <typename S>
struct HeadCache {
  using P = CachePanels<S>;
  char *keys, *values;
  int64_t size, slots;

  HeadCache(const Cache& cache, const Heads& heads, int64_t batch, int64_t head)
      : size(heads.size), slots(cache.slots) {
    const int64_t at = batch * heads.kv + head;
    keys = static_cast<char*>(cache.keys) + at * (slots / kCacheWidth) * P::bytes(size);
    values = static_cast<char*>(cache.values) + at * value_panels() * P::bytes(slots);
  }
  int64_t value_panels() const { return (size + kCacheWidth - 1) / kCacheWidth; }
  char* key_panel(int64_t slot) const { return keys + slot / kCacheWidth * P::bytes(size); }
  char* value_panel(int64_t panel) const { return values + panel * P::bytes(slots); }

  template <typename T>
  void write_key(int64_t slot, const T* key) const {
    char* panel = key_panel(slot);
    each_stored(key, [&](int64_t d, S number) {
      *place(P{}, panel, d, static_cast<int>(slot % kCacheWidth)) = number;
    });
  }
  template <typename T>
  void write_value(int64_t slot, const T* value) const {
    each_stored(value, [&](int64_t d, S number) {
      *place(P{}, value_panel(d / kCacheWidth), slot, d % kCacheWidth) = number;
    });
  }
  void move(int64_t from, int64_t to) const {
    for (int64_t d = 0; d < size; ++d) {
      const int o = static_cast<int>(d % kCacheWidth);
      *place(P{}, key_panel(to), d, static_cast<int>(to % kCacheWidth)) =
          *place(P{}, key_panel(from), d, static_cast<int>(from % kCacheWidth));
      *place(P{}, value_panel(d / kCacheWidth), to, o) =
          *place(P{}, value_panel(d / kCacheWidth), from, o);
    }
  }

 private:
  // f(d, number) of a head's numbers as they are stored.
  template <typename T, typename F>
  void each_stored(const T* from, F f) const {
    constexpr int kLanes = Vector<T>::size;
    S stored[kLanes];
    int64_t d = 0;
    for (; d + kLanes <= size; d += kLanes) {
      narrow_vector(from + d, stored);
      for (int i = 0; i < kLanes; ++i) f(d + i, stored[i]);
    }
    for (; d < size; ++d) {
      narrow(from[d], stored);
      f(d, stored[0]);
    }
  }
};

// ---- rotary embedding and cache
// ------------------------------------------------------------------

template <typename T>
void rotate(const RotaryWrite& stage, int64_t position, T* x) {
  const int64_t half = stage.turned / 2;
  const T* cosines = static_cast<const T*>(stage.cosines) + position * half;
  const T* sines = static_cast<const T*>(stage.sines) + position * half;
  constexpr int kLanes = Vector<T>::size;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec<T> a = load(x + i), b = load(x + i + half);
    const Vec<T> cosine = load(cosines + i), sine = load(sines + i);
    store(x + i, a * cosine - b * sine);
    store(x + i + half, b * cosine + a * sine);
  }
  for (; i < half; ++i) {
    const T a = x[i], b = x[i + half];
    x[i] = a * cosines[i] - b * sines[i];
    x[i + half] = b * cosines[i] + a * sines[i];
  }
}

template <typename S>
void rotary_write(const RotaryWrite& stage, int t, int threads) {
  using T = typename CachePanels<S>::Sum;
  const Rows& rows = *stage.rows;
  const Heads& heads = stage.heads;
  const int64_t size = heads.size, all = heads.query + 2 * heads.kv;
  const bool norms = stage.q_norm.kind != Norm::kNone;
  // Norms over all heads have to be one thread's.
  const int64_t each = norms && !stage.norm_each_head ? all : 1;
  const int64_t units = rows.count * all / each;
  const int64_t begin = units * t / threads * each, end = units * (t + 1) / threads * each;
  int64_t tree = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / all, head = unit % all;
    while (rows.tree_begin[tree + 1] <= n) ++tree;
    T* x = static_cast<T*>(stage.qkv) + (n * all + head) * size;
    const bool is_query = head < heads.query, is_value = head >= heads.query + heads.kv;
    if (norms && !is_value) {
      const Norm& norm = is_query ? stage.q_norm : stage.k_norm;
      if (stage.norm_each_head)
        normalise(norm, x, size, x);
      else if (head == 0 || head == heads.query)
        normalise(norm, x, size * (is_query ? heads.query : heads.kv), x);
    }
    if (!is_value) rotate(stage, rows.positions[n], x);
    if (is_query) continue;
    const int64_t kv_head = (head - heads.query) % heads.kv;
    const HeadCache<S> cache(stage.cache, heads, rows.batch[tree], kv_head);
    const int64_t slot = rows.prefix[tree] + n - rows.tree_begin[tree];
    if (is_value)
      cache.write_value(slot, x);
    else
      cache.write_key(slot, x);
  }
}

// ---- attention
// -----------------------------------------------------------------------------------

// Some rows (node x query head) of one key/value head.
template <typename S>
struct AttentionBlock {
  using P = CachePanels<S>;
  using T = typename P::Sum;
  static constexpr int kLanes = Vector<T>::size;
  static constexpr int kRows = 2 * kRowsFor<P>;
  // Keys are fetched so many panels before they are read: one takes less time than memory does.
  static constexpr int64_t kPanelsAhead = 4;

  const CachedAttention& stage;
  const HeadCache<S>& cache;
  int64_t tree, first_node, kv_head, first_row, count;
  bool more;  // after this, the keys of the next head are read

  const Rows& rows = *stage.rows;
  const Heads& heads = stage.heads;
  int64_t size = heads.size, group = heads.query / heads.kv, prefix = rows.prefix[tree];
  int64_t padded = cache.value_panels() * kCacheWidth;
  int64_t starts[kRows] = {};               // logical position where a row's window begins
  int64_t base = prefix, end = prefix;      // slots that scores are computed for
  int64_t stride = 0;                       // of scores
  int64_t common = path_length(row_of(0));  // nodes that all paths begin with: 0, 1, ...
  T *queries = nullptr, *scores = nullptr, *sums = nullptr;

  int64_t row_of(int64_t i) const { return first_node + (first_row + i) / group; }
  int64_t head_of(int64_t i) const { return kv_head * group + (first_row + i) % group; }
  int64_t path_length(int64_t n) const { return rows.path_begin[n + 1] - rows.path_begin[n]; }
  const int64_t* path_of(int64_t n) const { return rows.path + rows.path_begin[n]; }

  void run(Scratch& scratch) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = row_of(i), length = path_length(n), next = prefix + length;
      starts[i] = stage.window > 0 && next > stage.window ? next - stage.window : 0;
      base = starts[i] < base ? starts[i] : base;
      const int64_t* path = path_of(n);
      const int64_t last = prefix + path[length - 1] + 1;
      end = last > end ? last : end;
      // A path only rises: what ends in n - 1 after n nodes began with 0.
      common = length < common ? length : common;
      while (common && path[common - 1] != common - 1) --common;
    }
    base -= base % kCacheWidth;
    stride = (end - base + kCacheWidth - 1) / kCacheWidth * kCacheWidth;
    char* memory = scratch.get((count * (size + stride + padded) + 64) * sizeof(T));
    sums = reinterpret_cast<T*>(memory);
    scores = sums + count * padded;
    queries = scores + count * stride;
    score();
    T inverse[kRows];
    for (int64_t i = 0; i < count; ++i) inverse[i] = 1 / soft_max(i);
    add_values();
    for (int64_t i = 0; i < count; ++i) {
      T* to = static_cast<T*>(stage.out) + row_of(i) * heads.query * size + head_of(i) * size;
      for (int64_t d = 0; d < size; ++d) to[d] = sums[i * padded + d] * inverse[i];
    }
  }

  void score() {
    const int64_t all = heads.query + 2 * heads.kv;
    for (int64_t i = 0; i < count; ++i) {
      const T* q = static_cast<const T*>(stage.qkv) + (row_of(i) * all + head_of(i)) * size;
      for (int64_t d = 0; d < size; ++d) queries[i * size + d] = q[d] * static_cast<T>(stage.scale);
    }
    const int64_t bytes = P::bytes(size);
    const char* last = cache.key_panel(base + stride);
    for (int64_t slot = base; slot < end; slot += kCacheWidth) {
      const char *panel = cache.key_panel(slot), *later = panel + kPanelsAhead * bytes;
      if (later >= last) later = P::at(cache.value_panel(0), base) + (later - last);
      multiply_rows<P, false>(queries, size, count, panel, size, later, scores + (slot - base),
                              stride, [](int64_t, int64_t) {});
    }
  }

  // Turns the scores of row i into weights that sum up to what is returned.
  T soft_max(int64_t i) {
    T* s = scores + i * stride;
    const int64_t n = row_of(i), length = path_length(n), root = prefix - base;
    for (int64_t j = common; j < length; ++j) s[root + j] = s[root + path_of(n)[j]];
    const int64_t known = root + length, whole = (known + kLanes - 1) / kLanes * kLanes;
    if (const T cap = static_cast<T>(stage.softcap); cap > 0)
      transform(s, known, s, [cap](Vec<T> v, int64_t) { return soft_cap<T>(v, cap); });
    const T none = -static_cast<T>(__builtin_inf());
    for (int64_t j = 0; j < starts[i] - base; ++j) s[j] = none;
    for (int64_t j = known; j < whole; ++j) s[j] = none;
    Vec<T> top = splat(none);
    for (int64_t j = 0; j < whole; j += kLanes) {
      const Vec<T> v = load(s + j);
      top = v > top ? v : top;
    }
    const T most = largest_of<T>(top);
    Vec<T> total{};
    for (int64_t j = 0; j < whole; j += kLanes) {
      const Vec<T> weight = exp_negative(Vec<T>(load(s + j) - most));
      total += weight;
      store(s + j, weight);
    }
    return sum_of<T>(total);
  }

  // What all rows attend to at once, then what is left of each one's path: the same sums.
  void add_values() {
    const int64_t known = prefix - base + common;
    if (!known)
      for (int64_t i = 0; i < count * padded; ++i) sums[i] = 0;
    for (int64_t j = 0; known && j < cache.value_panels(); ++j) {
      const char *panel = P::at(cache.value_panel(j), base), *later = panel;
      if (j + 1 < cache.value_panels())
        later = P::at(cache.value_panel(j + 1), base);
      else if (more)
        later = cache.key_panel(cache.slots + base);
      multiply_rows<P, false>(scores, stride, count, panel, known, later, sums + j * kCacheWidth,
                              padded, [](int64_t, int64_t) {});
    }
    for (int64_t i = 0; i < count; ++i) {
      int64_t j = 0;
      for (; j + 4 <= cache.value_panels(); j += 4) add_path<4>(i, j);
      for (; j < cache.value_panels(); ++j) add_path<1>(i, j);
    }
  }

  // Of several panels at once, since one sum would wait for itself.
  template <int kPanels>
  void add_path(int64_t i, int64_t first) {
    const int64_t n = row_of(i), length = path_length(n), bytes = P::bytes(cache.slots);
    const T* weights = scores + i * stride + prefix - base;
    T* to = sums + i * padded + first * kCacheWidth;
    Vec<T> sum[kPanels][P::kVectors], value[P::kVectors];
    for (int p = 0; p < kPanels; ++p)
      for (int v = 0; v < P::kVectors; ++v) sum[p][v] = load(to + p * kCacheWidth + v * kLanes);
    for (int64_t j = common; j < length; ++j) {
      const int64_t slot = prefix + path_of(n)[j], g = slot % P::kGroup;
      const char* from = P::at(cache.value_panel(first), slot - g);
      const Vec<T> weight = splat(weights[j]);
      for (int p = 0; p < kPanels; ++p, from += bytes) {
        P::expand(from, static_cast<int>(g), value);
        for (int v = 0; v < P::kVectors; ++v) sum[p][v] = fused(weight, value[v], sum[p][v]);
      }
    }
    for (int p = 0; p < kPanels; ++p)
      for (int v = 0; v < P::kVectors; ++v) store(to + p * kCacheWidth + v * kLanes, sum[p][v]);
  }
};

// Threads share rows (tree x head x node x query head of it), neighbours to one.
template <typename S>
void attend(const CachedAttention& stage, int t, int threads, Scratch& scratch) {
  const Rows& rows = *stage.rows;
  const int64_t group = stage.heads.query / stage.heads.kv;
  const int64_t all = (rows.count - stage.first) * stage.heads.query;
  const int64_t from = all * t / threads, to = all * (t + 1) / threads;
  int64_t at = 0;
  for (int64_t tree = 0; tree < rows.trees; ++tree) {
    const int64_t node = std::max(rows.tree_begin[tree], stage.first);
    const int64_t count = std::max<int64_t>(rows.tree_begin[tree + 1] - node, 0) * group;
    for (int64_t h = 0; h < stage.heads.kv; ++h, at += count) {
      int64_t first = from > at ? from - at : 0;
      const int64_t last = to - at < count ? to - at : count;
      if (first >= last) continue;
      const HeadCache<S> cache(stage.cache, stage.heads, rows.batch[tree], h);
      constexpr int64_t kMost = AttentionBlock<S>::kRows;
      const int64_t parts = (last - first + kMost - 1) / kMost;
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t begin = first + (last - first) * i / parts;
        const int64_t many = first + (last - first) * (i + 1) / parts - begin;
        const bool more = i + 1 == parts && h + 1 < stage.heads.kv && to > at + count;
        AttentionBlock<S>{stage, cache, tree, node, h, begin, many, more}.run(scratch);
      }
    }
  }
}

}  // namespace msn::MSN_ISA

// The eight likeliest tokens of a row of logits and what became of them as guesses. A row is cut
// into parts, a block each, so that few rows keep the whole device busy; a part's block leaves its
// eight largest in the workspace, and the last of the row's blocks to arrive merges them.
//
// A value and its place are one key, largest first and the lowest place of equals. Every thread
// keeps the one largest of its share. The threads form eight groups; the least of the groups'
// largest keys is a bound that eight keys at least reach, and of the others a handful: the shares
// of the threads that reach it are read again, from L1 mostly, and what reaches it is ranked by
// counting. Eight threads turn the eight into levels, summed in one order. Rows of whole 16 bytes
// are read so many at a time, others value by value.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "best_first.h"
#include "block_space.h"
#include "cuda/common.cuh"
#include "tensor.h"

namespace msn {

constexpr int kTopThreads = 256, kTopWarps = kTopThreads / kWarp;
constexpr int kTopBlocks = 4;  // of a multiprocessor at once
constexpr int kMostParts = 64;
constexpr int kMostReached = kMostParts * kGuesses;  // keys that are ranked at once
constexpr int64_t kNoKey = INT64_MIN;
constexpr int32_t kNoOrder = INT32_MIN;

// ---- values, orders and keys
// ---------------------------------------------------------------------

// Integers of the values' order: both zeros 0, every NaN the largest. Of 16-bit values the lower 16
// bits are 0.
__device__ inline int32_t order_of(uint32_t bits, int32_t infinity, int32_t nan) {
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  return magnitude > infinity ? nan : bits >> 31 ? -magnitude : magnitude;
}
__device__ inline int32_t order_of(float x) {
  return order_of(__float_as_uint(x), 0x7f800000, INT32_MAX);
}
__device__ inline int32_t order_of(__half x) {
  return order_of(uint32_t{__half_as_ushort(x)} << 16, 0x7c000000, 0x7fff0000);
}
__device__ inline int32_t order_of(__nv_bfloat16 x) {
  return order_of(uint32_t{__bfloat16_as_ushort(x)} << 16, 0x7f800000, 0x7fff0000);
}
template <typename T>
__device__ double value_of(int32_t order) {
  const uint32_t bits =
      order < 0 ? 0x80000000u | static_cast<uint32_t>(-order) : static_cast<uint32_t>(order);
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> 16)));
  else
    return __uint_as_float(bits);
}

// Above: the order. Below: the place.
__device__ inline int64_t key_of(int32_t order, int at) {
  return order * (int64_t{1} << 32) + (INT32_MAX - at);
}
__device__ inline int32_t key_order(int64_t key) { return static_cast<int32_t>(key >> 32); }
__device__ inline int key_place(int64_t key) {
  return INT32_MAX - static_cast<int>(key & 0xffffffff);
}
__device__ inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The largest order of some values, and the number of the first that has it.
struct Largest {
  int32_t order = kNoOrder;
  int first = 0;

  __device__ void offer(int32_t other, int at) {
    if (other > order) order = other, first = at;
  }
};

// The same of up to 64 values that come 16 bytes at a time.
template <typename T>
struct LargestOfMany {  // 16-bit values: the order above, 63 - number below, in one
  int32_t key = kNoOrder;

  // Of the value in the upper half of `bits`, no negative NaN.
  __device__ static int32_t order(uint32_t bits) {
    const int32_t sign = static_cast<int32_t>(bits) >> 31;
    return (static_cast<int32_t>(bits & 0x7fff0000u) ^ sign) - sign;
  }
  __device__ void offer(const uint4& raw, int from) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t two = one_nan(words[i], T{});
      key = max(key, order(two << 16) + (63 - from - 2 * i));
      key = max(key, order(two) + (62 - from - 2 * i));
    }
  }
  __device__ Largest get() const {
    return {static_cast<int32_t>(key & 0xffff0000), 63 - (key & 0xffff)};
  }
  // Two values with one NaN, 0x7fff, for all.
  __device__ static uint32_t one_nan(uint32_t two, __half) {
    __half2 x;
    memcpy(&x, &two, sizeof x);
    x = __hmax2_nan(x, x);
    memcpy(&two, &x, sizeof two);
    return two;
  }
  __device__ static uint32_t one_nan(uint32_t two, __nv_bfloat16) {
    __nv_bfloat162 x;
    memcpy(&x, &two, sizeof x);
    x = __hmax2_nan(x, x);
    memcpy(&two, &x, sizeof two);
    return two;
  }
};
template <>
struct LargestOfMany<float> {
  Largest largest;

  __device__ void offer(const uint4& raw, int from) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) largest.offer(order_of(__uint_as_float(words[i])), from + i);
  }
  __device__ Largest get() const { return largest; }
};

// ---- the eight largest keys of a block
// -----------------------------------------------------------

struct TopShared {
  int64_t groups[kTopWarps][kGuesses], reached[kMostReached], winners[kGuesses], scratch[kWarp];
  int owners[kTopThreads];
  int n_owners, n_reached;
  bool last_of_row, last_of_tree;  // among the blocks

  __device__ void add(int64_t key) {
    const int at = atomicAdd(&n_reached, 1);
    if (at < kMostReached) reached[at] = key;
  }
};

// A key that at least eight of the block reach, where it has as many, given each thread's largest.
// Thread i is of group i % 8, so that of equal or sorted values, too, few reach it.
__device__ inline int64_t bound_of_block(int64_t largest, TopShared& shared) {
  const int lane = threadIdx.x % kWarp, group = lane % kGuesses;
  for (int distance = kWarp / 2; distance >= kGuesses; distance /= 2)
    largest = larger(largest, __shfl_xor_sync(kWholeWarp, largest, distance));
  if (lane < kGuesses) shared.groups[threadIdx.x / kWarp][group] = largest;
  if (threadIdx.x < kGuesses) shared.winners[threadIdx.x] = kNoKey;
  if (threadIdx.x == 0) shared.n_owners = shared.n_reached = 0;
  __syncthreads();
  int64_t bound = kNoKey;
#pragma unroll
  for (int warp = 0; warp < kTopWarps; warp += kWarp / kGuesses)
    bound = larger(bound, shared.groups[warp + lane / kGuesses][group]);
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const int64_t other = __shfl_xor_sync(kWholeWarp, bound, distance);
    bound = (other > bound) == (distance >= kGuesses) ? other : bound;
  }
  return bound;
}

// Puts the eight largest of the keys that reached the bound into `winners`, kNoKey where there are
// fewer.
__device__ inline void rank_reached(TopShared& shared) {
  __syncthreads();
  const int count = shared.n_reached;
  for (int i = threadIdx.x; i < count; i += kTopThreads) {
    const int64_t key = shared.reached[i];
    int rank = 0;
    for (int j = 0; j < count; ++j) rank += shared.reached[j] > key;
    if (rank < kGuesses) shared.winners[rank] = key;
  }
  __syncthreads();
}

// ---- one part of a row
// ---------------------------------------------------------------------------

// Thread t has the pieces t, t + kTopThreads, ... of the part, each of 16 bytes or of one value.
template <typename T>
struct RowPart {
  const T* row;
  int from, to;
  bool wide;

  static constexpr int kWide = 16 / sizeof(T);

  __device__ int size() const { return wide ? kWide : 1; }  // of a piece
  __device__ int place(int thread, int piece) const {
    return from + (piece * kTopThreads + thread) * size();
  }
  __device__ int pieces() const {
    return (to - from + kTopThreads * size() - 1) / (kTopThreads * size());
  }

  template <typename F>  // F takes a key
  __device__ void each_key(int thread, int piece, const F& f) const {
    const int at = place(thread, piece);
    if (at >= to) return;
    if (!wide) return f(key_of(order_of(row[at]), at));
    const uint4 raw = *reinterpret_cast<const uint4*>(row + at);
    T values[kWide];
    memcpy(values, &raw, sizeof raw);
#pragma unroll
    for (int i = 0; i < kWide; ++i) f(key_of(order_of(values[i]), at + i));
  }

  // The largest of pieces 0, kTopThreads, ... of `left` at `at`, so many in flight.
  static constexpr int kInFlight = 8;
  __device__ static Largest largest_of(const uint4* at, int left) {
    uint4 raw[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
      if (j * kTopThreads < left) raw[j] = at[j * kTopThreads];
    LargestOfMany<T> many;
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
      if (j * kTopThreads < left) many.offer(raw[j], j * kWide);
    return many.get();
  }
  __device__ static Largest largest_of(const T* at, int left) {
    int32_t orders[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
      orders[j] = j * kTopThreads < left ? order_of(at[j * kTopThreads]) : kNoOrder;
    Largest largest;
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) largest.offer(orders[j], j);
    return largest;
  }

  // The largest key of this thread's share.
  template <typename Piece>
  __device__ int64_t largest_of_share() const {
    constexpr int kSize = sizeof(Piece) / sizeof(T);
    const int thread = threadIdx.x;
    const Piece* at = reinterpret_cast<const Piece*>(row + from) + thread;
    const int all = (to - from) / kSize - thread;
    Largest largest;
    for (int done = 0; done < all; done += kInFlight * kTopThreads) {
      const Largest next = largest_of(at + done, all - done);
      largest.offer(next.order, done / kTopThreads * kSize + next.first);
    }
    if (largest.order == kNoOrder) return kNoKey;
    return key_of(largest.order, place(thread, largest.first / kSize) + largest.first % kSize);
  }
};

// Puts the eight largest keys of a part into `winners`.
template <typename T>
__device__ void top_of_part(const RowPart<T>& part, TopShared& shared) {
  const int thread = threadIdx.x, pieces = part.pieces();
  const int64_t largest = part.wide ? part.template largest_of_share<uint4>()
                                    : part.template largest_of_share<T>(),
                bound = bound_of_block(largest, shared);
  if (largest >= bound && largest != kNoKey) shared.owners[atomicAdd(&shared.n_owners, 1)] = thread;
  __syncthreads();
  for (int i = thread; i < shared.n_owners * pieces; i += kTopThreads)
    part.each_key(shared.owners[i / pieces], i % pieces, [&](int64_t key) {
      if (key >= bound) shared.add(key);
    });
  __syncthreads();
  if (shared.n_reached <= kMostReached) return rank_reached(shared);

  // Values in an order made for it: each thread looks for the largest below the last winner.
  int64_t last = INT64_MAX;
  for (int rank = 0; rank < kGuesses; ++rank) {
    int64_t next = kNoKey;
    for (int piece = 0; piece < pieces; ++piece)
      part.each_key(thread, piece, [&](int64_t key) {
        if (key < last) next = larger(next, key);
      });
    last = block_max(next, shared.scratch);
    if (thread == 0) shared.winners[rank] = last;
  }
  __syncthreads();
}

// ---- the parts of rows
// ---------------------------------------------------------------------------

template <typename T>
struct TopRows {
  const T* logits;
  int64_t stride;
  int vocabulary, parts, length;  // the last of them: values of a part
  bool wide;
  int64_t* keys;  // [rows, parts, kGuesses]: what the blocks leave
  int* arrived;   // [rows]
  int32_t* guesses;

  __device__ RowPart<T> part(int64_t row, int number) const {
    return {logits + row * stride, number * length, min((number + 1) * length, vocabulary), wide};
  }
  __device__ int64_t* keys_of(int64_t row) const { return keys + row * parts * kGuesses; }
  // Past L1, where an older value may lie.
  __device__ int64_t key(int64_t row, int at) const {
    return __ldcg(reinterpret_cast<const long long*>(keys_of(row)) + at);
  }
};

// The keys of a row that a thread merges.
struct LeftKeys {
  int64_t keys[kMostReached / kTopThreads];

  template <typename T>
  __device__ LeftKeys(const TopRows<T>& rows, int64_t row) {
#pragma unroll
    for (int i = 0; i < kMostReached / kTopThreads; ++i) {
      const int at = i * kTopThreads + threadIdx.x;
      keys[i] = at < rows.parts * kGuesses ? rows.key(row, at) : kNoKey;
    }
  }
};

__device__ inline void merge_parts(const LeftKeys& left, TopShared& shared) {
  int64_t largest = kNoKey;
  for (const int64_t key : left.keys) largest = larger(largest, key);
  const int64_t bound = bound_of_block(largest, shared);
  for (const int64_t key : left.keys)
    if (key >= bound && key != kNoKey) shared.add(key);
  rank_reached(shared);
}

// Writes the winners as guesses, -1 where there are fewer tokens. Warp 0 calls it.
template <typename T>
__device__ void write_guesses(int32_t* guesses, const TopShared& shared) {
  const int lane = threadIdx.x;
  const int64_t mine = lane < kGuesses ? shared.winners[lane] : kNoKey;
  const double first = value_of<T>(key_order(shared.winners[0]));
  const double weight = mine != kNoKey ? exp(value_of<T>(key_order(mine)) - first) : 0.0;
  double total = 0;
  for (int i = 0; i < kGuesses; ++i) total += __shfl_sync(kWholeWarp, weight, i);
  if (lane < kGuesses)
    guesses[lane] = mine != kNoKey ? pack_guess(key_place(mine), level_of(weight / total)) : -1;
}

// ---- launches
// ------------------------------------------------------------------------------------

struct TopPlan {
  int parts, length;
};

// As many parts of a row as give every multiprocessor a few blocks, and all of them as much to
// read.
inline TopPlan plan_parts(const char* op, const Tensor& logits) {
  int processors = 0;
  check(op,
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, logits.device_index));
  const int64_t rows = logits.shape[0], vocabulary = logits.shape[1], line = 128 / logits.item_size,
                step = kTopThreads * 16 / logits.item_size;
  const int64_t most = clamp((vocabulary + step - 1) / step, 1, kMostParts),
                least = clamp((3 * processors + rows - 1) / rows, 1, most);
  const auto blocks_each = [&](int64_t parts) {
    return (rows * parts + processors - 1) / processors;
  };
  int64_t parts = least;
  for (int64_t more = least + 1; more <= most && more <= 2 * least; ++more)
    if (blocks_each(more) * parts < blocks_each(parts) * more) parts = more;
  const int64_t length = ((vocabulary + parts - 1) / parts + line - 1) / line * line;
  return {static_cast<int>((vocabulary + length - 1) / length), static_cast<int>(length)};
}

inline BlockSpace space_for(const Tensor& logits, const TopPlan& plan) {
  const int64_t rows = logits.shape[0];
  return {nullptr, nullptr, 2 * rows * plan.parts * kGuesses, rows};
}

template <typename T>
TopRows<T> plan_rows(const char* op, const Tensor& logits, const Tensor& guesses,
                     const BlockSpace& space, int64_t more_counters = 0) {
  const TopPlan plan = plan_parts(op, logits);
  const BlockSpace needed = space_for(logits, plan);
  if (space.floats < needed.floats || space.counters < needed.counters + more_counters)
    throw std::invalid_argument(
        std::string(op) + " has a workspace of " + std::to_string(space.floats) + " floats and " +
        std::to_string(space.counters) + " counters; expected " + std::to_string(needed.floats) +
        " and " + std::to_string(needed.counters + more_counters));
  return {logits.as<T>(),
          logits.strides[0],
          static_cast<int>(logits.shape[1]),
          plan.parts,
          plan.length,
          whole_rows(logits, 16),
          reinterpret_cast<int64_t*>(space.partial),
          space.arrived,
          guesses.as<int32_t>()};
}

// Calls `f` with a value of the logits' type.
template <typename F>
void with_logits(const Tensor& logits, const F& f) {
  switch (logits.dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat16: return f(__half{});
    case DType::kBFloat16: return f(__nv_bfloat16{});
    default:
      throw std::invalid_argument(
          "logits has dtype float64; expected float16, bfloat16 or float32 (float64 is CPU only)");
  }
}

}  // namespace msn

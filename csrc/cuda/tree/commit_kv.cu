// Moves the accepted path's keys and values to the slots after the prefix, in place, for all layers
// in one launch: a grid of (row, cache, part of the columns). A thread owns one column, up to 16
// bytes wide, of one head of one row, through all slots, so no other thread touches what it moves
// and neither shared memory nor a barrier is needed. The i-th target is slot i after the prefix and
// its source comes strictly after it (a node that is not is in place already, or malformed, and
// stays), so a target is never the source of a later move and several loads can be in flight.
// A slot outside the cache is neither read nor written; a row whose length is outside is left
// alone. Bytes: reads and writes each accepted, moved slot once, plus the row's path.
#include <algorithm>

#include "cuda/common.cuh"
#include "tree_ops.h"

static_assert(CUDART_VERSION >= 12010, "kernel parameters beyond 4 KB need CUDA 12.1 or later");

namespace msn {

namespace {

constexpr int kThreads = 128;
constexpr int kInFlight = 4;  // loads of a thread; a path is seldom longer

// Strides in bytes. A column is `unit` bytes; `parts` columns make one stretch of contiguous bytes
// (the whole row of a head where its values are contiguous, else one value) and `stride_stretch`
// lies between stretches.
struct Cache {
  char* data;
  int64_t stride_row, stride_head, stride_slot, stride_stretch, slots;
  uint32_t heads, columns, parts, unit;
};

// A launch carries its caches as kernel parameters: no copy to the device, nothing to keep alive,
// and a CUDA graph stores them with its node. Parameters hold 32764 bytes (sm_70 and later; 4 KB
// before CUDA 12.1). All of the array is copied at each launch whatever is used of it, hence the
// small size for models of up to 32 layers; more than 480 caches (240 layers) take another launch.
constexpr int kFew = 64, kMany = 480;

template <int kCapacity>
struct Caches {
  Cache at[kCapacity];
};
static_assert(sizeof(Caches<kMany>) + 4 * sizeof(int64_t) <= 32764,
              "kernel parameters hold 32764 bytes");

template <typename Unit>
__device__ void move_column(char* first_target, int64_t stride_slot, int64_t room,
                            const int64_t* path, int64_t accepted) {
  for (int64_t i = 0; i < accepted; i += kInFlight) {
    Unit value[kInFlight];
    bool moves[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t node = i + j < accepted ? path[i + j] : -1;
      moves[j] = node > i + j && node < room;
      if (moves[j]) value[j] = *reinterpret_cast<const Unit*>(first_target + node * stride_slot);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
      if (moves[j]) *reinterpret_cast<Unit*>(first_target + (i + j) * stride_slot) = value[j];
  }
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads)
    commit_kv_kernel(const __grid_constant__ Caches<kCapacity> caches, const int64_t* lengths,
                     const int64_t* paths, int64_t width, const int64_t* accept_length) {
  const Cache& cache = caches.at[blockIdx.y];
  const int64_t row = blockIdx.x, start = lengths[row];
  if (start < 0 || start >= cache.slots) return;
  const int64_t accepted = clamp(accept_length[row], 0, width), room = cache.slots - start;
  const int64_t* path = paths + row * width;
  char* row_data = cache.data + row * cache.stride_row + start * cache.stride_slot;
  for (uint32_t i = blockIdx.z * kThreads + threadIdx.x; i < cache.heads * cache.columns;
       i += gridDim.z * kThreads) {
    const uint32_t head = i / cache.columns, column = i % cache.columns;
    char* at = row_data + head * cache.stride_head + column / cache.parts * cache.stride_stretch +
               column % cache.parts * cache.unit;
    switch (cache.unit) {
      case 16: move_column<uint4>(at, cache.stride_slot, room, path, accepted); break;
      case 8: move_column<uint2>(at, cache.stride_slot, room, path, accepted); break;
      case 4: move_column<uint32_t>(at, cache.stride_slot, room, path, accepted); break;
      case 2: move_column<uint16_t>(at, cache.stride_slot, room, path, accepted); break;
      default: move_column<uint8_t>(at, cache.stride_slot, room, path, accepted); break;
    }
  }
}

Cache describe(const Tensor& t) {
  const int64_t item = t.item_size, size = t.shape[3];
  const bool dense = size == 1 || t.strides[3] == 1;
  const int64_t stretch = dense ? size * item : item;
  Cache cache{};
  cache.data = t.as<char>();
  cache.stride_row = t.strides[0] * item;
  cache.stride_head = t.strides[1] * item;
  cache.stride_slot = t.strides[2] * item;
  cache.stride_stretch = t.strides[3] * item;
  cache.slots = t.shape[2];
  cache.unit = 16;
  const uint64_t all = reinterpret_cast<uint64_t>(t.data) | cache.stride_row | cache.stride_head |
                       cache.stride_slot | stretch | (dense ? 0 : cache.stride_stretch);
  while (all % cache.unit) cache.unit /= 2;
  const int64_t parts = stretch / cache.unit, columns = dense ? parts : parts * size;
  if (t.shape[1] * columns > INT32_MAX)
    throw std::invalid_argument("a slot of caches holds " + std::to_string(t.shape[1] * size) +
                                " values; expected fewer than 2^31");
  cache.heads = static_cast<uint32_t>(t.shape[1]);
  cache.parts = static_cast<uint32_t>(parts);
  cache.columns = static_cast<uint32_t>(columns);
  return cache;
}

template <int kCapacity>
void launch_some(const Cache* caches, int count, int64_t batch, const Tensor& lengths,
                 const Tensor& path, const Tensor& accept_length, void* stream) {
  Caches<kCapacity> some{};
  std::copy(caches, caches + count, some.at);
  uint32_t columns = 0;
  for (int i = 0; i < count; ++i) columns = std::max(columns, caches[i].heads * caches[i].columns);
  const dim3 grid(grid_x("commit_kv", batch), count,
                  std::min((columns + kThreads - 1) / kThreads, 65535u));
  launch("commit_kv", commit_kv_kernel<kCapacity>, grid, kThreads, 0, stream, some,
         lengths.as<int64_t>(), path.as<int64_t>(), path.shape[1], accept_length.as<int64_t>());
}

}  // namespace

void CommitKV::on_cuda(void* stream) const {
  const int64_t batch = path.shape[0];
  if (batch == 0 || path.shape[1] == 0) return;
  std::vector<Cache> described;
  described.reserve(caches.size());
  for (const Tensor& cache : caches)
    if (cache.shape[1] && cache.shape[2] && cache.shape[3]) described.push_back(describe(cache));
  if (described.empty()) return;
  const DeviceGuard guard("commit_kv", path);
  for (size_t done = 0; done < described.size(); done += kMany) {
    const int count = static_cast<int>(std::min<size_t>(described.size() - done, kMany));
    const auto launch_them = count <= kFew ? launch_some<kFew> : launch_some<kMany>;
    launch_them(&described[done], count, batch, lengths, path, accept_length, stream);
  }
}

}  // namespace msn

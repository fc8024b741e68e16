// Products of warp groups, barriers in shared memory and bulk copies for the emulation:
// csrc/cuda/tree/wgmma.cuh in plain C++, after the PTX ISA ("Asynchronous Warpgroup Level Matrix
// Instructions", "mbarrier", "cp.async.bulk.tensor").
//
// What happens asynchronously happens at a random time of those that the ISA allows: a product at
// its issue or when its group is waited for, a bulk copy when somebody waits for its barrier. Until
// then its registers, or the bytes it will write, hold NaN; a thread that has changed such a
// register meanwhile ends the process, and so does a product without a fence since the last wait,
// one that nobody has committed and waited for, or a warp that brings other descriptors than its
// group. Products read a second image of shared memory, which sees what threads have written there
// only from the next fence of the async proxy on (anybody's, of all that was written until then).
//
// Not modelled: descriptors with a base offset or without the 128-byte swizzle; a barrier's
// invalidation; ordering between barriers of different addresses.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>

#include "cuda/tree/mma.cuh"

#define MSN_HAVE_WGMMA 1

struct alignas(64) CUtensorMap {
  const uint16_t* values;
  int64_t sizes[4], strides[4];  // columns, slots, heads, rows
};

namespace emulation {

constexpr int kGroupWarps = 4, kBox = 64;
// Where a 128-byte row's chunks of 16 bytes lie, by row of eight: the CUDA C++ Programming Guide's
// figure of the 128-byte swizzle. Products go by the ISA's formula on addresses instead.
constexpr int kChunks[8][8] = {{0, 1, 2, 3, 4, 5, 6, 7}, {1, 0, 3, 2, 5, 4, 7, 6},
                               {2, 3, 0, 1, 6, 7, 4, 5}, {3, 2, 1, 0, 7, 6, 5, 4},
                               {4, 5, 6, 7, 0, 1, 2, 3}, {5, 4, 7, 6, 1, 0, 3, 2},
                               {6, 7, 4, 5, 2, 3, 0, 1}, {7, 6, 5, 4, 3, 2, 1, 0}};
alignas(16) inline char async_shared[kMostShared];

// ---- bulk copies and their barriers

struct Copy {
  CUtensorMap map;
  int at[4];
  char* to;
};
struct Barrier {
  int arrivals, missing;
  int64_t bytes;  // expected and not there yet
  bool odd;       // the phase that runs
  std::vector<Copy> copies;

  void advance() {
    if (missing > 0 || bytes != 0) return;
    missing = arrivals;
    odd = !odd;
  }
  void arrive() {
    if (missing == 0) fail("more arrivals at a barrier than it was made for");
    --missing;
    moved = true;
    advance();
  }
};
inline std::map<const uint64_t*, Barrier> barriers;
inline Barrier& barrier_at(const uint64_t* at) {
  const auto found = barriers.find(at);
  if (found == barriers.end()) fail("a barrier that is not initialized");
  return found->second;
}

// Both images of shared memory.
inline void write_shared(char* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
  std::memcpy(async_shared + (to - dynamic_shared), from, bytes);
}

inline void land(const Copy& copy) {
  for (int slot = 0; slot < kBox; ++slot)
    for (int column = 0; column < kBox; ++column) {
      const int at[4] = {copy.at[0] + column, copy.at[1] + slot, copy.at[2], copy.at[3]};
      const uint16_t* from = copy.map.values;
      bool inside = true;
      for (int d = 0; d < 4; ++d) {
        inside &= at[d] >= 0 && at[d] < copy.map.sizes[d];
        from += at[d] * copy.map.strides[d];
      }
      const uint16_t value = inside ? *from : 0;
      const int chunk = kChunks[slot % 8][column / 8];
      write_shared(copy.to + slot * 128 + chunk * 16 + column % 8 * 2, &value, 2);
    }
}

inline bool phase_has_ended(const uint64_t* at, bool odd) {
  Barrier& barrier = barrier_at(at);
  // After the phase only its bytes are there. Often all of them at once, so that a warp gets far
  // ahead of the others.
  while (barrier.odd == odd && !barrier.copies.empty()) {
    moved = true;  // they are under way
    if (order() % 8 == 0) break;
    std::swap(barrier.copies[order() % barrier.copies.size()], barrier.copies.back());
    land(barrier.copies.back());
    barrier.copies.pop_back();
    barrier.bytes -= kBox * kBox * 2;
    barrier.advance();
  }
  return barrier.odd != odd;
}

// ---- products

// The values of a product's matrix b [16, columns]; decoded when a lane of the warp first needs it.
struct MatrixB {
  uint64_t descriptor;
  bool transposed;
  std::vector<float> values;

  template <typename T>
  void decode(int columns) {
    const auto field = [&](int from, int bits) {
      return static_cast<uint32_t>(descriptor >> from & ((1u << bits) - 1));
    };
    const uint32_t start = field(0, 14) << 4, leading = field(16, 14) << 4,
                   stride = field(32, 14) << 4;
    if (field(49, 3) != 0 || field(62, 2) != 1) fail("a descriptor that is not modelled");
    values.resize(16 * columns);
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < columns; ++n) {
        uint32_t address =
            start + (transposed ? k / 8 * stride + k % 8 * 128 + n / 64 * leading + n % 64 * 2
                                : n / 8 * stride + n % 8 * 128 + k * 2);
        address ^= address >> 3 & 0x70;  // bits 4 to 6 by bits 7 to 9: 128-byte swizzle
        const uint32_t offset = address - shared_base;
        if (offset >= most_shared()) fail("a product that reads outside of shared memory");
        uint16_t bits;
        std::memcpy(&bits, async_shared + offset, 2);
        values[k * columns + n] = msn::half_of(bits, 0, T{});
      }
  }
};

struct Product {
  float* c;
  int tiles;
  bool add;
  const uint32_t* a[4];  // of the lanes that hold the thread's two rows
  std::shared_ptr<MatrixB> b;
  void (*run)(const Product&, int lane, float* sums);
};
// The registers c of products under way, and what they will hold.
struct Sums {
  int users;
  std::vector<float> values;
};
struct Products {
  std::vector<Product> queue;  // not executed yet
  std::vector<float*> issued;  // registers of those that are not waited for, in order
  std::vector<size_t> groups;  // where each group of them ends
  std::map<float*, Sums> sums;
  bool open = false;
  int count = 0;  // since the block began

  void run_queue(int lane) {
    for (const Product& product : queue) product.run(product, lane, sums[product.c].values.data());
    queue.clear();
  }
};
inline Products products[kMaxThreads];
inline std::vector<uint64_t> sequence[kMaxThreads / kWarp / kGroupWarps];  // a group's descriptors
inline std::shared_ptr<MatrixB> of_warp[kMaxThreads / kWarp];              // the latest product's

template <typename T>
void run_product(const Product& product, int lane, float* sums) {
  const int columns = 8 * product.tiles;
  if (product.b->values.empty()) product.b->decode<T>(columns);
  float left[2][16];
  for (int r = 0; r < 2; ++r)
    for (int k = 0; k < 16; ++k)
      left[r][k] = msn::half_of(product.a[k % 8 / 2][k / 8 * 2 + r], k % 2, T{});
  for (int n = 0; n < product.tiles; ++n)
    for (int r = 0; r < 2; ++r)
      for (int i = 0; i < 2; ++i) {
        float& c = sums[n * 4 + r * 2 + i];
        double sum = product.add ? c : 0.0f;
        for (int k = 0; k < 16; ++k)
          sum += double{left[r][k]} * product.b->values[k * columns + n * 8 + lane % 4 * 2 + i];
        c = static_cast<float>(sum);
      }
}

// The thread's part of a product; `product` has its own a alone.
__attribute__((noinline)) inline void issue(Product product, uint64_t descriptor, bool transposed) {
  const int thread = running, warp = thread / kWarp, lane = thread % kWarp;
  Products& mine = products[thread];
  if (!mine.open) fail("a product without a fence before it");
  auto& of_group = sequence[warp / kGroupWarps];
  if (mine.count == static_cast<int>(of_group.size())) of_group.push_back(descriptor);
  if (of_group[mine.count] != descriptor) fail("a warp whose descriptor is not its group's");
  ++mine.count;

  const uint64_t* of_lanes = exchange(0xffffffffu, reinterpret_cast<uint64_t>(product.a[0]));
  for (int of = 0; of < 4; ++of)
    product.a[of] = reinterpret_cast<const uint32_t*>(of_lanes[lane / 4 * 4 + of]);
  const auto [flying, fresh] = mine.sums.try_emplace(product.c);
  ++flying->second.users;
  if (fresh) {
    flying->second.values.assign(product.c, product.c + 4 * product.tiles);
    std::memset(product.c, 0xff, 4 * product.tiles * sizeof(float));
  }
  // The warp's lanes share b.
  if (lane == 0) of_warp[warp] = std::make_shared<MatrixB>(MatrixB{descriptor, transposed, {}});
  exchange(0xffffffffu, 0);
  product.b = of_warp[warp];
  exchange(0xffffffffu, 0);
  mine.queue.push_back(product);
  mine.issued.push_back(product.c);
  if (order() % 2) mine.run_queue(lane);
}

__attribute__((noinline)) inline void await_groups(size_t left) {
  exchange(0xffffffffu, 0);
  Products& mine = products[running];
  mine.open = false;
  while (mine.groups.size() > left) {
    mine.run_queue(running % kWarp);
    const size_t count = mine.groups.front();
    for (size_t i = 0; i < count; ++i) {
      float* c = mine.issued[i];
      Sums& sums = mine.sums[c];
      if (--sums.users > 0) continue;
      for (size_t at = 0; at < sums.values.size(); ++at) {
        if (__float_as_uint(c[at]) != 0xffffffffu)
          fail("a register of a product that was written before it was waited for");
        c[at] = sums.values[at];
      }
      mine.sums.erase(c);
    }
    mine.issued.erase(mine.issued.begin(), mine.issued.begin() + count);
    mine.groups.erase(mine.groups.begin());
    for (size_t& end : mine.groups) end -= count;
  }
  exchange(0xffffffffu, 0);  // no lane changes registers that others still read
}

inline const bool hooked = [] {
  begin_block = [] {
    shared_base = 1024 + 16 * (order() % 64);
    std::memset(async_shared, 0xff, most_shared());
    barriers.clear();
    for (auto& of_group : sequence) of_group.clear();
    for (Products& of_thread : products) of_thread = {};
  };
  end_block = [] {
    for (const auto& [at, barrier] : barriers)
      if (!barrier.copies.empty()) fail("a bulk copy that nobody waited for");
    for (const Products& of_thread : products)
      if (!of_thread.issued.empty()) fail("a product that nobody waited for");
  };
  return true;
}();

}  // namespace emulation

namespace msn {

inline bool describe_tiles(CUtensorMap* map, const void* values, int64_t rows, int64_t heads,
                           int64_t slots, int64_t columns, int64_t row_stride, int64_t head_stride,
                           int64_t slot_stride) {
  if (reinterpret_cast<uintptr_t>(values) % 16 || slot_stride % 8 ||
      (heads > 1 && head_stride % 8) || (rows > 1 && row_stride % 8))
    emulation::fail("a tensor for bulk copies that is not whole 16 bytes");
  // A driver that refuses something.
  if (rows > 1 && row_stride < slot_stride && row_stride < head_stride) return false;
  *map = {static_cast<const uint16_t*>(values),
          {columns, slots, heads, rows},
          {1, slot_stride, head_stride, row_stride}};
  return true;
}

inline void copy_tile(void* to, const CUtensorMap* map, int column, int slot, int head, int row,
                      uint64_t* barrier) {
  if (shared_address(to) % 1024) emulation::fail("a box that is not aligned to 1024 bytes");
  char* bytes = static_cast<char*>(to);
  const std::vector<char> nan(emulation::kBox * emulation::kBox * 2, '\xff');
  emulation::write_shared(bytes, nan.data(), nan.size());  // undefined from now on
  emulation::barrier_at(barrier).copies.push_back({*map, {column, slot, head, row}, bytes});
}

inline void init_barrier(uint64_t* barrier, int arrivals) {
  emulation::barriers[barrier] = {arrivals, arrivals, 0, false, {}};
}
inline void arrive(uint64_t* barrier) { emulation::barrier_at(barrier).arrive(); }
inline void arrive_and_expect(uint64_t* barrier, int bytes) {
  emulation::barrier_at(barrier).bytes += bytes;
  emulation::barrier_at(barrier).arrive();
}
inline void await_phase(uint64_t* barrier, int parity) {
  emulation::ordered_otherwise();
  emulation::wait_until([=] { return emulation::phase_has_ended(barrier, parity != 0); });
}
inline void publish_shared() {
  std::memcpy(emulation::async_shared, emulation::dynamic_shared, emulation::most_shared());
}

inline uint64_t matrix_descriptor(const void* start, int leading, int stride) {
  const auto encoded = [](uint32_t bytes) { return uint64_t{(bytes & 0x3ffff) >> 4}; };
  return encoded(shared_address(start)) | encoded(leading) << 16 | encoded(stride) << 32 |
         uint64_t{1} << 62;
}
inline uint64_t moved_by(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

inline void open_products() {
  emulation::exchange(0xffffffffu, 0);
  emulation::products[emulation::running].open = true;
}

inline void commit_products() {
  emulation::exchange(0xffffffffu, 0);
  auto& mine = emulation::products[emulation::running];
  mine.groups.push_back(mine.issued.size());
}

template <int kLeft>
void await_products() {
  emulation::await_groups(kLeft);
}

template <int kTiles>
void hold(float (&)[kTiles][4]) {}

template <typename T, bool kTransposed, int kTiles>
void multiply_add_async(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t descriptor,
                        bool add) {
  emulation::issue({&c[0][0], kTiles, add, {a}, nullptr, emulation::run_product<T>}, descriptor,
                   kTransposed);
}

}  // namespace msn

// CUDA's kernel language on a CPU, as much of it as csrc/cuda uses: enough to run the kernels
// themselves, thread by thread, where there is no GPU. Each thread of a block is a fiber; warps and
// lanes run in random order, each up to the next barrier or warp operation, so that a missing
// barrier shows as a wrong result. What a GPU would hang on or leave undefined (a barrier or a
// shuffle that not all threads reach, a partial mask) aborts with a message, and so does a write
// to shared memory that the launch did not ask for. Shared memory holds NaN before each block.
// Blocks begin in random order; before an atomic operation on global memory, by which blocks tell
// each other things, a block may let others go first, a few of which are under way at once.
// races.cpp finds accesses that nothing orders, of one block or of two.
// The device may be of compute capability 8.6, or 9.0 with more shared memory (wgmma.cuh).
//
// Not modelled: blocks that meet elsewhere than at atomic operations, or meet there with barriers
// in shared memory (wgmma.cuh); caches and pointers of the device (host memory stands for it);
// alignment faults (build.py has the compiler check alignment instead); the rounding of the
// device's exp and tanh; the limit on kernel parameters (4 KB before CUDA 12.1); registers and
// launch bounds; streams and graph capture.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <tuple>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// build.py turns `__shared__ T name` into a reference to emulation::static_shared<T>(), and
// `extern __shared__ T name[]` into a pointer to emulation::dynamic_shared.

#define CUDART_VERSION 13000
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
using cudaStream_t = void*;
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
using std::exp;
using std::fmax;
using std::max;
using std::min;
using std::tanh;

namespace emulation {

constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStack = 64 << 10;
constexpr size_t kUnasked = 48 << 10, kMostShared = 227 << 10;

enum State { kReady, kAtWarp, kAtBlock, kPolling, kDone };
struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf at;  // swapcontext would be a system call each time
  State state;
  int operations;   // warp operations so far
  size_t declared;  // bytes of static shared memory
  bool awaited;     // the launch before
  std::vector<std::pair<void*, const void*>>
      copies;                  // asynchronous ones that nobody has waited for (mma.cuh)
  std::vector<size_t> groups;  // where each group of them ends
};
// A block that has begun, of which a few are under way at once.
struct Block {
  dim3 index;
  bool left = false;  // while others go first; its shared memory is kept here then
  std::vector<char> static_memory, dynamic_shared;
  Fiber fibers[kMaxThreads];
  uint64_t exchanged[2][kMaxThreads];  // alternating: a lane may be one operation ahead
  bool voted = false;                  // of __syncthreads_or
};
constexpr int kBlocks = 3;
inline Block blocks[kBlocks];
inline int block_running;
inline Fiber* fibers = blocks[0].fibers;  // of the block that runs
inline jmp_buf scheduler;
inline int running;
inline std::function<void()> kernel;
inline std::mt19937 order{1};
inline bool moved;           // a thread got further since the last look
inline bool goes_last;       // the block lets others go first
inline int processors = 1;   // multiprocessors of the device
inline bool hopper = false;  // its compute capability: 9.0, or 8.6
inline size_t most_shared() { return hopper ? kMostShared : 99 << 10; }
inline std::map<const void*, size_t> asked_for;  // of shared memory, by kernels that have asked
inline size_t most_declared;                     // by the kernel of a launch
inline bool early = false;  // the launch may start before the last one has ended
// Aligned as the largest value that a kernel reads there as one, four float64.
alignas(32) inline char static_memory[kUnasked], dynamic_shared[kMostShared];
inline void (*begin_block)() = [] {};  // set by wgmma.cuh
inline void (*end_block)() = [] {};

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s (block %u %u %u)\n", what, blockIdx.x, blockIdx.y,
               blockIdx.z);
  std::abort();
}

inline void wait(State state) {
  fibers[running].state = state;
  if (!_setjmp(fibers[running].at)) _longjmp(scheduler, 1);
}
// Comes back to this thread until the condition holds.
template <typename Condition>
void wait_until(const Condition& condition) {
  while (!condition()) wait(kPolling);
  moved = true;
}
inline void run_thread() {
  for (;; wait(kDone)) kernel();
}
inline void resume(int thread) {
  Fiber& fiber = fibers[thread];
  running = thread;
  threadIdx = dim3(thread, 0, 0);
  if (_setjmp(scheduler)) return;
  if (fiber.stack) _longjmp(fiber.at, 1);
  fiber.stack.reset(new char[kStack]);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  makecontext(&fiber.start, run_thread, 0);
  setcontext(&fiber.start);
}

// All lanes of the warp bring a value; afterwards each may read any other lane's.
inline const uint64_t* exchange(unsigned mask, uint64_t value) {
  if (mask != 0xffffffffu) fail("a mask other than the whole warp");
  uint64_t* values = blocks[block_running].exchanged[fibers[running].operations++ % 2];
  values[running] = value;
  wait(kAtWarp);
  return values + running / kWarp * kWarp;
}

inline bool all_are(State state, int first, int count) {
  return std::all_of(fibers + first, fibers + first + count,
                     [=](const Fiber& f) { return f.state == state; });
}
inline void let_go(int first, int count) {
  for (int i = first; i < first + count; ++i) fibers[i].state = kReady;
}

inline bool is_shared(const void* at) {
  return (at >= static_memory && at < std::end(static_memory)) ||
         (at >= dynamic_shared && at < std::end(dynamic_shared));
}
// What a kernel declares, in the order in which it does.
template <typename T>
T& static_shared() {
  size_t& declared = fibers[running].declared;
  const size_t at = (declared + alignof(T) - 1) / alignof(T) * alignof(T);
  declared = at + sizeof(T);
  if (declared > kUnasked) fail("a kernel that declares more than 48 KB of shared memory");
  return *reinterpret_cast<T*>(static_memory + at);
}
// Before an atomic operation.
inline void let_others_go(const void* at) {
  if (is_shared(at) || order() % 4) return;
  goes_last = true;
  wait(kPolling);
  moved = true;
}

inline void begin() {
  for (int i = 0; i < static_cast<int>(blockDim.x); ++i) {
    fibers[i].operations = 0;
    fibers[i].declared = 0;
    fibers[i].awaited = !early;
  }
  std::memset(dynamic_shared, 0xff, most_shared());
  begin_block();
  std::memset(static_memory, 0xff, sizeof static_memory);
}
inline void check_bounds(size_t shared_bytes) {
  if (std::any_of(dynamic_shared + shared_bytes, dynamic_shared + most_shared(),
                  [](char x) { return x != '\xff'; }))
    fail("a write to shared memory that the launch did not ask for");
}
inline void leave(Block& block, size_t shared_bytes) {
  block.left = true;
  check_bounds(shared_bytes);
  size_t declared = 0;
  for (unsigned i = 0; i < blockDim.x; ++i) declared = std::max(declared, fibers[i].declared);
  block.static_memory.assign(static_memory, static_memory + declared);
  block.dynamic_shared.assign(dynamic_shared, dynamic_shared + shared_bytes);
}
inline void come_back(const Block& block) {
  std::memset(static_memory, 0xff, sizeof static_memory);
  std::copy(block.static_memory.begin(), block.static_memory.end(), static_memory);
  std::memset(dynamic_shared, 0xff, most_shared());
  std::copy(block.dynamic_shared.begin(), block.dynamic_shared.end(), dynamic_shared);
}

// False if it has let others go first.
inline bool run_block(Block& block, size_t shared_bytes) {
  const int threads = static_cast<int>(blockDim.x);
  int warps[kMaxThreads / kWarp], lanes[kWarp];
  std::iota(warps, warps + threads / kWarp, 0);
  std::iota(lanes, lanes + kWarp, 0);
  // One warp after the other runs until a barrier stops it: the widest possible skew.
  do {
    if (!block.left) let_go(0, threads);
    block.left = false;
    do {
      moved = false;
      std::shuffle(warps, warps + threads / kWarp, order);
      for (int w = 0; w < threads / kWarp; ++w) {
        const int first = warps[w] * kWarp;
        do {
          if (all_are(kAtWarp, first, kWarp)) let_go(first, kWarp);
          std::shuffle(lanes, lanes + kWarp, order);
          for (const int lane : lanes)
            if (const State state = fibers[first + lane].state;
                state == kReady || state == kPolling) {
              resume(first + lane);
              if (goes_last) {
                goes_last = false;
                leave(block, shared_bytes);
                return false;
              }
            }
        } while (all_are(kAtWarp, first, kWarp));
      }
    } while (moved);
  } while (all_are(kAtBlock, 0, threads));
  if (!all_are(kDone, 0, threads))
    fail("threads wait at a barrier or warp operation that others never reach");
  for (int i = 0; i < threads; ++i) {
    if (!fibers[i].copies.empty()) fail("an asynchronous copy that nobody waited for");
    if (!fibers[i].awaited) fail("a thread that did not wait for the launch before");
    if (fibers[i].declared > most_declared)
      fail("more shared memory, with what the kernel declares, than it gets");
  }
  end_block();
  check_bounds(shared_bytes);
  return true;
}

template <typename T>
T read_lane(unsigned mask, T value, int lane) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  std::memcpy(&value, exchange(mask, bits) + lane, sizeof value);
  return value;
}

// What orders memory (races.cpp).
void launch_begins(size_t shared_bytes);
void block_begins();  // of the block that runs
void barrier_passed();
void ordered_otherwise();  // by barriers in shared memory: no races inside this block are reported
void warp_barrier_passed();
void fence_passed();
void before_atomic(const void* at);

// All blocks of a launch: the next one to run is one that has not begun or one that let others go
// first.
inline void run_blocks(size_t shared_bytes) {
  std::vector<dim3> to_come;
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; ++x) to_come.emplace_back(x, y, z);
  std::shuffle(to_come.begin(), to_come.end(), order);
  std::vector<int> free(kBlocks), left;
  std::iota(free.begin(), free.end(), 0);
  while (!to_come.empty() || !left.empty()) {
    const bool begins =
        left.empty() || (!to_come.empty() && !free.empty() && order() % (left.size() + 1) == 0);
    std::vector<int>& from = begins ? free : left;
    std::swap(from[order() % from.size()], from.back());
    block_running = from.back();
    from.pop_back();
    Block& block = blocks[block_running];
    fibers = block.fibers;
    if (begins) {
      block.index = blockIdx = to_come.back();
      to_come.pop_back();
      block_begins();
      begin();
    } else {
      blockIdx = block.index;
      come_back(block);
    }
    (run_block(block, shared_bytes) ? free : left).push_back(block_running);
  }
}

}  // namespace emulation

inline void __syncthreads() {
  emulation::wait(emulation::kAtBlock);
  emulation::barrier_passed();
}
inline int __syncthreads_or(int vote) {
  bool& voted = emulation::blocks[emulation::block_running].voted;
  voted |= vote != 0;
  emulation::wait(emulation::kAtBlock);
  const int any = voted;
  emulation::wait(emulation::kAtBlock);  // all have read it
  voted = false;
  emulation::wait(emulation::kAtBlock);  // and nobody votes before all have forgotten it
  emulation::barrier_passed();
  return any;
}
inline void __threadfence() { emulation::fence_passed(); }
template <typename T>
T __ldcg(const T* at) {
  return *at;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulation::read_lane(mask, value, lane % emulation::kWarp);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return emulation::read_lane(mask, value,
                              static_cast<int>(threadIdx.x % emulation::kWarp) ^ other);
}
inline void __syncwarp() {
  emulation::exchange(0xffffffffu, 0);
  emulation::warp_barrier_passed();
}
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const uint64_t* votes = emulation::exchange(mask, vote);
  unsigned all = 0;
  for (int lane = 0; lane < emulation::kWarp; ++lane)
    all |= static_cast<unsigned>(votes[lane]) << lane;
  return all;
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  const uint64_t* values = emulation::exchange(mask, value);
  return static_cast<unsigned>(*std::max_element(values, values + emulation::kWarp));
}

__attribute__((no_sanitize("thread"))) inline int atomicAdd(int* at, int value) {
  emulation::let_others_go(at);
  emulation::before_atomic(at);
  return (*at += value) - value;
}
__attribute__((no_sanitize("thread"))) inline int atomicMax(int* at, int value) {
  emulation::let_others_go(at);
  emulation::before_atomic(at);
  const int before = *at;
  *at = std::max(before, value);
  return before;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
enum {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  using namespace emulation;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = processors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(most_shared()); break;
    case cudaDevAttrComputeCapabilityMajor: *value = hopper ? 9 : 8; break;
    default: *value = hopper ? 0 : 6;
  }
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  return *version = CUDART_VERSION, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, int, int bytes) {
  if (static_cast<size_t>(bytes) > emulation::most_shared()) return cudaErrorInvalidConfiguration;
  emulation::asked_for[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  const cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  // What a kernel has asked for holds beside what it declares; unasked there is some for both.
  const auto asked = emulation::asked_for.find(reinterpret_cast<const void*>(kernel));
  const bool has_asked = asked != emulation::asked_for.end();
  const size_t limit = has_asked ? asked->second : emulation::kUnasked;
  if (!grid.x || !grid.y || !grid.z || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 ||
      !block.x || block.x > emulation::kMaxThreads || config->dynamicSmemBytes > limit)
    return cudaErrorInvalidConfiguration;
  if (block.x % emulation::kWarp) emulation::fail("a block that is no whole number of warps");
  emulation::most_declared =
      has_asked ? emulation::most_shared() - limit : limit - config->dynamicSmemBytes;
  emulation::early = config->numAttrs > 0;
  const std::tuple<Parameters...> values(arguments...);
  emulation::kernel = [&] { std::apply(kernel, values); };
  emulation::launch_begins(config->dynamicSmemBytes);
  gridDim = grid;
  blockDim = block;
  emulation::run_blocks(config->dynamicSmemBytes);
  return cudaSuccess;
}

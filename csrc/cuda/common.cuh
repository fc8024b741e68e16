// Parts of every CUDA op: the device of its tensors made current, the launch with its error
// check, and the block-wide maximum that both searches end in.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "tensor.h"

namespace msn {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

inline void check(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears it, so that it is not reported again for another call
  throw std::runtime_error(std::string("msn_ext ") + op + ": " + cudaGetErrorString(status));
}

// Makes the device of a tensor the current one; the destructor goes back to the caller's.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, const Tensor& tensor) : device_(tensor.device_index) {
    check(op, cudaGetDevice(&before_));
    if (before_ != device_) check(op, cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_ = 0;
};

// Blocks along the x axis of a grid, which holds 2^31 - 1.
inline unsigned grid_x(const char* op, int64_t blocks) {
  if (blocks > INT32_MAX)
    throw std::invalid_argument(std::string(op) + " needs " + std::to_string(blocks) +
                                " thread blocks; expected fewer than 2^31: split the batch");
  return static_cast<unsigned>(blocks);
}

// One launch. An error of the launch itself is thrown here; one inside the kernel shows, as
// always with CUDA, at a later synchronisation.
template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, int threads,
            size_t shared_bytes, void* stream, Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(op, cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

// A launch that may be set up while the one before it in the stream still runs, where the device
// and its driver know how. The kernel calls await_launch_before (mma.cuh) before it reads what that
// one writes, in every thread.
template <typename... Parameters, typename... Arguments>
void launch_early(const char* op, int device, void (*kernel)(Parameters...), dim3 grid, int threads,
                  void* stream, Arguments&&... arguments) {
  int major = 0, driver = 0;
  check(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check(op, cudaDriverGetVersion(&driver));
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = major >= 9 && driver >= 12030;  // captured graphs keep it since CUDA 12.3
  check(op, cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

inline int whole_warps(int threads) { return (threads + kWarp - 1) / kWarp * kWarp; }

__host__ __device__ inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// True if rows, along the last axis, can be read `bytes` at a time.
inline bool whole_rows(const Tensor& t, uint64_t bytes) {
  uint64_t all = reinterpret_cast<uint64_t>(t.data);
  for (int i = 0; i < t.ndim; ++i)
    all |= (i + 1 < t.ndim ? t.strides[i] : t.shape[i]) * t.item_size;
  return all % bytes == 0;
}

// The largest `value` of the block, in every thread. All threads of the block call it, and the
// block consists of whole warps. The last barrier lets `scratch` be used again at once.
__device__ inline int64_t block_max(int64_t value, int64_t (&scratch)[kWarp]) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const int64_t other = __shfl_xor_sync(kWholeWarp, value, distance);
    value = other > value ? other : value;
  }
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp)
    value = scratch[warp] > value ? scratch[warp] : value;
  __syncthreads();
  return value;
}

}  // namespace msn

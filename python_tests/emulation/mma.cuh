// Tensor cores, asynchronous copies and early launches for the emulation: csrc/cuda/tree/mma.cuh in
// plain C++. A copy lands when it is waited for, no sooner, so that a missing wait shows; one that
// nobody waits for ends the process, and so does a thread of an early launch that does not wait for
// the launch before.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace emulation {
inline uint32_t shared_base =
    1024;  // where dynamic shared memory begins: at any 16 bytes (wgmma.cuh)
}

namespace msn {

inline uint32_t shared_address(const void* pointer) {
  return emulation::shared_base +
         static_cast<uint32_t>(static_cast<const char*>(pointer) - emulation::dynamic_shared);
}

inline void copy_async(void* to, const void* from, bool wanted) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || (wanted && reinterpret_cast<uintptr_t>(from) % 16))
    emulation::fail("an asynchronous copy of 16 bytes that are not aligned");
  emulation::fibers[emulation::running].copies.push_back({to, wanted ? from : nullptr});
}

inline void commit_copies() {
  auto& fiber = emulation::fibers[emulation::running];
  fiber.groups.push_back(fiber.copies.size());
}

template <int kLeft>
void await_copies() {
  auto& fiber = emulation::fibers[emulation::running];
  while (fiber.groups.size() > kLeft) {
    const size_t count = fiber.groups.front();
    for (size_t i = 0; i < count; ++i) {
      const auto& [to, from] = fiber.copies[i];
      if (from)
        std::memcpy(to, from, 16);
      else
        std::memset(to, 0, 16);
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + count);
    fiber.groups.erase(fiber.groups.begin());
    for (size_t& end : fiber.groups) end -= count;
  }
}

inline void let_next_launch_start() {}
inline void await_launch_before() { emulation::fibers[emulation::running].awaited = true; }

inline float exp2_approx(float x) {
  const float power = std::exp2(x);
  return power < 0x1p-126f ? 0.0f : power;
}

inline void read_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    emulation::fail("a matrix row that is not aligned to 16 bytes");
  const uint64_t* rows = emulation::exchange(0xffffffffu, reinterpret_cast<uint64_t>(row));
  const int lane = threadIdx.x % 32;
  for (int m = 0; m < 4; ++m) {
    const auto value = [&](int r, int c) {
      return uint32_t{reinterpret_cast<const uint16_t*>(rows[m * 8 + r])[c]};
    };
    const int r = lane / 4, c = lane % 4 * 2;
    to[m] = transposed ? value(c, r) | value(c + 1, r) << 16 : value(r, c) | value(r, c + 1) << 16;
  }
}
inline void load_matrices(uint32_t (&to)[4], const void* row) { read_matrices(to, row, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  read_matrices(to, row, true);
}

inline float half_of(uint32_t pair, int which, __half) {
  return __half2float(__half{static_cast<uint16_t>(pair >> 16 * which)});
}
inline float half_of(uint32_t pair, int which, __nv_bfloat16) {
  return __bfloat162float(__nv_bfloat16{static_cast<uint16_t>(pair >> 16 * which)});
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
  uint32_t left[2][2][4],
      right[2][2]
           [4];  // [row g, g + 8][columns from 0, from 8][of which lane], [column][rows][lane]
  for (int half = 0; half < 2; ++half) {
    const uint64_t* all =
        emulation::exchange(0xffffffffu, a[2 * half] | uint64_t{a[2 * half + 1]} << 32);
    for (int of = 0; of < 4; ++of)
      for (int r = 0; r < 2; ++r)
        left[r][half][of] = static_cast<uint32_t>(all[group * 4 + of] >> 32 * r);
  }
  const uint64_t* all = emulation::exchange(0xffffffffu, b0 | uint64_t{b1} << 32);
  for (int of = 0; of < 4; ++of)
    for (int column = 0; column < 2; ++column)
      for (int half = 0; half < 2; ++half)
        right[column][half][of] = static_cast<uint32_t>(all[(pair + column) * 4 + of] >> 32 * half);
  for (int r = 0; r < 2; ++r)
    for (int column = 0; column < 2; ++column) {
      double sum = c[2 * r + column];
      for (int k = 0; k < 16; ++k)
        sum += double{half_of(left[r][k / 8][k % 8 / 2], k % 2, T{})} *
               half_of(right[column][k / 8][k % 8 / 2], k % 2, T{});
      c[2 * r + column] = static_cast<float>(sum);
    }
}

template <typename T>
uint32_t pack(float low, float high);
template <>
inline uint32_t pack<__half>(float low, float high) {
  return __float2half(low).bits | uint32_t{__float2half(high).bits} << 16;
}
template <>
inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  return __float2bfloat16(low).bits | uint32_t{__float2bfloat16(high).bits} << 16;
}

}  // namespace msn

// Products of warp groups, barriers in shared memory and bulk copies of sm_90a, a PTX instruction a
// function; nothing of them stands anywhere else. A warp group is four warps, the first of them a
// multiple of four. The emulation (python_tests/emulation/wgmma.cuh) has the same functions in
// plain C++.
//
// Products and bulk copies see shared memory through the async proxy: what threads have written
// there themselves it sees only after `publish_shared`. Products read and write registers while the
// program goes on: between `open_products` and `await_products` it touches none of theirs, and
// `hold` keeps the compiler from moving an access into or out of that stretch.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/tree/mma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define MSN_HAVE_WGMMA 1  // these instructions exist
#endif

namespace msn {

// ---- tiles: boxes of a tensor in global memory

// A tensor [rows, heads, slots, columns] of 16-bit values for the copy engine, which takes boxes of
// 64 slots x 64 columns; what lies outside the tensor comes as zeros. Strides in values; columns
// lie next to each other, and everything is whole 16 bytes. False where the driver cannot describe
// it.
inline bool describe_tiles(CUtensorMap* map, const void* values, int64_t rows, int64_t heads,
                           int64_t slots, int64_t columns, int64_t row_stride, int64_t head_stride,
                           int64_t slot_stride) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                                12000, cudaEnableDefault, &result);
#else
    const cudaError_t status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    if (status != cudaSuccess) cudaGetLastError();  // clears it
    return status == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<Encode>(found)
               : nullptr;
  }();
  // An axis of one has a stride that nobody uses; it may be anything, 0 included.
  const auto bytes = [&](int64_t size, int64_t stride) {
    return static_cast<cuuint64_t>(2 * (size == 1 ? slot_stride : stride));
  };
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(slots),
                               static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[3] = {static_cast<cuuint64_t>(2 * slot_stride),
                                 bytes(heads, head_stride), bytes(rows, row_stride)};
  const cuuint32_t box[4] = {64, 64, 1, 1}, steps[4] = {1, 1, 1, 1};
  return encode && encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(values), sizes,
                          strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                          CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Starts the copy of a box, 8 KB, to shared memory at a multiple of 1024 bytes, where the eight
// 16-byte chunks of each 128-byte row r change places: chunk c lies at c ^ r % 8. Its bytes count
// for the barrier when they are there.
__device__ inline void copy_tile(void* to, const CUtensorMap* map, int column, int slot, int head,
                                 int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(slot), "r"(head), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// ---- barriers in shared memory

// A phase ends with its `arrivals`-th arrival and with the last byte that was expected in it.
__device__ inline void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

__device__ inline void arrive_and_expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// True once the phase of this parity has ended; waits about so long for it.
__device__ inline bool phase_ended(uint64_t* barrier, int parity, uint32_t nanoseconds) {
  int ended;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2, %3;\n"
      "selp.s32 %0, 1, 0, done;\n"
      "}"
      : "=r"(ended)
      : "r"(shared_address(barrier)), "r"(parity), "r"(nanoseconds)
      : "memory");
  return ended;
}
// Waits until the phase of this parity has ended; the one before the first counts as odd. One that
// never ends is an error of the launch, not a hang. Lanes may come back one after the other.
__device__ inline void await_phase(uint64_t* barrier, int parity) {
  constexpr int kMostTries = 1 << 22;  // some seconds; a tile takes a millionth of one
  for (int left = kMostTries; !phase_ended(barrier, parity, 1000);)
    if (--left == 0) __trap();
}

// What this thread has written to shared memory becomes visible to the async proxy.
__device__ inline void publish_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- products

// A matrix in shared memory whose 128-byte rows are swizzled as copy_tile leaves them. `leading`
// and `stride`: see multiply_add_async. The start may lie anywhere in the first 1024 bytes by 16s.
__device__ inline uint64_t matrix_descriptor(const void* start, int leading, int stride) {
  const auto encoded = [](uint32_t bytes) { return uint64_t{(bytes & 0x3ffff) >> 4}; };
  constexpr uint64_t kSwizzle128 = 1;
  return encoded(shared_address(start)) | encoded(leading) << 16 | encoded(stride) << 32 |
         kSwizzle128 << 62;
}
// The descriptor of the matrix that starts `bytes` further on; no carry leaves the start's bits.
__device__ inline uint64_t moved_by(uint64_t descriptor, int bytes) {
  return (descriptor >> 32 << 32) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

// Before the first product, and between an access of their registers and the next one.
__device__ inline void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a group of products.
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits for this warp group's groups of products, all but the last `kLeft`.
template <int kLeft>
__device__ inline void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// No access of these registers moves past this place; no instruction.
template <int kTiles>
__device__ __forceinline__ void hold(float (&c)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
}

#define MSN_FOUR(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define MSN_16(n) MSN_FOUR(n), MSN_FOUR(n + 1), MSN_FOUR(n + 2), MSN_FOUR(n + 3)
#define MSN_0_TO_31                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MSN_32_TO_47 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define MSN_48_TO_63 \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MSN_PRODUCT(columns, type, c_list, a_list, b, add_at, transposed, ...)                     \
  asm volatile(                                                                                    \
      "{\n"                                                                                        \
      ".reg .pred add;\n"                                                                          \
      "setp.ne.s32 add, %" #add_at                                                                 \
      ", 0;\n"                                                                                     \
      "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" c_list            \
      "}, {" a_list "}, %" #b ", add, 1, 1, %" #transposed                                         \
      ";\n"                                                                                        \
      "}"                                                                                          \
      : __VA_ARGS__                                                                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor), "r"(static_cast<int>(add)), \
        "n"(kTransposed ? 1 : 0))
#define MSN_PRODUCTS(type)                                                                        \
  if constexpr (kTiles == 8)                                                                      \
    MSN_PRODUCT(64, type, MSN_0_TO_31, "%32, %33, %34, %35", 36, 37, 38, MSN_16(0), MSN_16(4));   \
  else if constexpr (kTiles == 12)                                                                \
    MSN_PRODUCT(96, type, MSN_0_TO_31 ", " MSN_32_TO_47, "%48, %49, %50, %51", 52, 53, 54,        \
                MSN_16(0), MSN_16(4), MSN_16(8));                                                 \
  else                                                                                            \
    MSN_PRODUCT(128, type, MSN_0_TO_31 ", " MSN_32_TO_47 ", " MSN_48_TO_63, "%64, %65, %66, %67", \
                68, 69, 70, MSN_16(0), MSN_16(4), MSN_16(8), MSN_16(12))

// Starts c [64 x 8 kTiles] = a [64 x 16] b [16 x 8 kTiles], added to c if `add`, summed in float32.
// Of c and a, warp w of the group has rows 16 w to 16 w + 15, its lanes as in multiply_add
// (mma.cuh), c in kTiles tiles of 8 columns.
// b lies in shared memory in 128-byte rows, eight of them to a pattern. A row is a column of b, and
// the 32 bytes at the start are its 16 values: patterns follow each other after `stride` bytes,
// `leading` is 1. Or, kTransposed, a row is 64 columns of a row of b: the next eight rows come
// after `stride` bytes, the next 64 columns after `leading` bytes.
template <typename T, bool kTransposed, int kTiles>
__device__ __forceinline__ void multiply_add_async(float (&c)[kTiles][4], const uint32_t (&a)[4],
                                                   uint64_t b_descriptor, bool add) {
  static_assert(kTiles == 8 || kTiles == 12 || kTiles == 16);
  if constexpr (std::is_same_v<T, __half>) {
    MSN_PRODUCTS("f16");
  } else {
    MSN_PRODUCTS("bf16");
  }
}

#undef MSN_FOUR
#undef MSN_16
#undef MSN_0_TO_31
#undef MSN_32_TO_47
#undef MSN_48_TO_63
#undef MSN_PRODUCT
#undef MSN_PRODUCTS

}  // namespace msn

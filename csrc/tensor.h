// A borrowed view of a tensor: where it lies and how it is laid out, nothing owned.
// The kernels see only this; Python objects end in csrc/bindings.
#pragma once
#include <cstdint>

namespace msn {

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16, kInt32, kInt64, kOther };
enum class Device { kCPU, kCUDA };

constexpr int kMaxDims = 4;

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kOther;
  int item_size = 0;  // bytes of one element
  Device device = Device::kCPU;
  int device_index = 0;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Of a dense one.
inline int64_t bytes_of(const Tensor& t) {
  int64_t bytes = t.item_size;
  for (int i = 0; i < t.ndim; ++i) bytes *= t.shape[i];
  return bytes;
}

}  // namespace msn

#include "bindings/dlpack.h"

#include <string>

#include "bindings/checks.h"

namespace py = pybind11;

namespace msn {

namespace {

// DLPack 1.x, the parts used here (dmlc/dlpack, dlpack.h: a stable C ABI).
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  void* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*dltensor_from_py_object)(void* object, DLTensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** stream);
};

constexpr int32_t kDLCPU = 1, kDLCUDA = 2;

const DLPackExchangeAPI& exchange() {
  static const DLPackExchangeAPI* api = [] {
    const py::object tensor_type = py::module_::import("torch").attr("Tensor");
    for (const char* name : {"__dlpack_c_exchange_api__", "__c_dlpack_exchange_api__"}) {
      if (!py::hasattr(tensor_type, name)) continue;
      const py::object capsule = tensor_type.attr(name);
      auto* found = static_cast<const DLPackExchangeAPI*>(
          PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (!found) throw py::error_already_set();
      if (found->major == 1 && found->dltensor_from_py_object) return found;
    }
    throw py::import_error(
        "msn_ext needs torch >= 2.11 (its tensors must offer the DLPack C exchange API)");
  }();
  return *api;
}

DType dtype_of(const DLTensor& t) {
  switch (t.code << 8 | t.bits) {
    case 0 << 8 | 32: return DType::kInt32;
    case 0 << 8 | 64: return DType::kInt64;
    case 2 << 8 | 16: return DType::kFloat16;
    case 2 << 8 | 32: return DType::kFloat32;
    case 2 << 8 | 64: return DType::kFloat64;
    case 4 << 8 | 16: return DType::kBFloat16;
    default: return DType::kOther;
  }
}

}  // namespace

Argument borrow(const char* name, py::handle object) {
  DLTensor source{};
  if (exchange().dltensor_from_py_object(object.ptr(), &source) != 0) {
    PyErr_Clear();
    refuse(name, " is a ", std::string(py::str(py::type::of(object))),
           "; expected a dense torch.Tensor");
  }
  if (source.ndim > kMaxDims)
    refuse(name, " has ", source.ndim, " dimensions; expected at most ", kMaxDims);
  if (source.device_type != kDLCPU && source.device_type != kDLCUDA)
    refuse(name, " is on DLPack device type ", source.device_type, "; expected cpu or cuda");
  Argument t;
  t.name = name;
  t.data = static_cast<char*>(source.data) + source.byte_offset;
  t.dtype = dtype_of(source);
  t.item_size = source.bits * source.lanes / 8;
  t.device = source.device_type == kDLCPU ? Device::kCPU : Device::kCUDA;
  t.device_index = source.device_id;
  t.ndim = source.ndim;
  for (int i = 0; i < source.ndim; ++i) {
    t.shape[i] = source.shape[i];
    t.strides[i] = source.strides[i];
  }
  return t;
}

OptionalArgument borrow_optional(const char* name, py::handle object) {
  OptionalArgument taken;
  static_cast<Argument&>(taken) = object.is_none() ? Argument{} : borrow(name, object);
  taken.name = name;
  return taken;
}

void* stream_of(const Tensor& t) {
  void* stream = nullptr;
  if (exchange().current_work_stream &&
      exchange().current_work_stream(kDLCUDA, t.device_index, &stream) != 0)
    throw py::error_already_set();
  return stream;
}

}  // namespace msn

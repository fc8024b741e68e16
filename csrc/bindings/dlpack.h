// Borrows torch's tensors by the DLPack C exchange API: no copy, no libtorch.
#pragma once
#include <pybind11/pybind11.h>

#include "tensor.h"

namespace msn {

// A tensor as an argument of an op; `name` is what messages call it.
struct Argument : Tensor {
  const char* name = "";
};
// One that may be None, and then has no data.
struct OptionalArgument : Argument {};

// The tensor that lies in `object`, for as long as that lives; raises ValueError where it is none.
Argument borrow(const char* name, pybind11::handle object);
OptionalArgument borrow_optional(const char* name, pybind11::handle object);

// torch's current stream on the device of a CUDA tensor.
void* stream_of(const Tensor& t);

}  // namespace msn

// A binding of an op is a function of its arguments, which checks them and calls `run`; `define`
// makes it a function of the extension.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "bindings/dlpack.h"

namespace msn {

// Each topic's ops and constants.
void define_tree(pybind11::module_& m);
void define_drafting(pybind11::module_& m);
void define_sizing(pybind11::module_& m);
void define_noise(pybind11::module_& m);
void define_fused(pybind11::module_& m);
void define_layers(pybind11::module_& m);
void define_forward_pass(pybind11::module_& m);
void define_native_steps(pybind11::module_& m);
void define_layer_ops(pybind11::module_& m);

// Calls the op's backend of the device where `on` lies: on the CPU without the GIL, on CUDA on
// torch's current stream.
template <typename Op>
void run(const Tensor& on, const Op& op) {
  if (on.device == Device::kCPU) {
    pybind11::gil_scoped_release release;
    return op.on_cpu();
  }
#ifdef MSN_WITH_CUDA
  op.on_cuda(stream_of(on));
#else
  throw std::runtime_error("msn_ext was built without CUDA; reinstall it with nvcc on PATH");
#endif
}

// The way from what Python passes to a binding's parameter: a tensor is borrowed under its name,
// anything else is what pybind11 converts.
template <typename T>
struct Parameter {
  using Passed = T;
  static T take(const char*, T passed) { return passed; }
};
template <>
struct Parameter<const Argument&> {
  using Passed = pybind11::handle;
  static Argument take(const char* name, Passed passed) { return borrow(name, passed); }
};
template <>
struct Parameter<const OptionalArgument&> {
  using Passed = pybind11::handle;
  static OptionalArgument take(const char* name, Passed passed) {
    return borrow_optional(name, passed);
  }
};

template <typename Result, typename... T, size_t... kAt>
void define_with(pybind11::module_& m, const char* op, Result (*binding)(T...),
                 const char* const (&names)[sizeof...(T)], std::index_sequence<kAt...>) {
  m.def(op, [binding, names = std::array{names[kAt]...}](typename Parameter<T>::Passed... passed) {
    // In braces, so that arguments are taken in their order and the first wrong one is named.
    std::tuple<decltype(Parameter<T>::take(names[kAt], passed))...> taken{
        Parameter<T>::take(names[kAt], passed)...};
    return std::apply(binding, taken);
  });
}

// `names` of all arguments, in their order.
template <typename Result, typename... T, size_t kNames>
void define(pybind11::module_& m, const char* op, Result (*binding)(T...),
            const char* const (&names)[kNames]) {
  static_assert(kNames == sizeof...(T), "a name for each argument");
  define_with(m, op, binding, names, std::index_sequence_for<T...>{});
}

}  // namespace msn

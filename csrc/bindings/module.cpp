// The extension msn_ext._C. csrc/bindings is the one folder that knows Python.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/define.h"
#include "tree_ops.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = MSN_VERSION;
  info["compiler"] = MSN_COMPILER;
  info["cuda"] = std::string(MSN_CUDA_VERSION).empty() ? py::object(py::none())
                                                       : py::object(py::str(MSN_CUDA_VERSION));
  info["cuda_architectures"] = py::str(MSN_CUDA_ARCHS).attr("split")();
  info["cpu_isa"] = msn::attention_isa();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of msn_ext; call them through msn_ext.ops.";
  m.def("build_info", &build_info);
  msn::define_tree(m);
  msn::define_drafting(m);
  msn::define_sizing(m);
  msn::define_noise(m);
  msn::define_fused(m);
  msn::define_layers(m);
}

// Sizes of trees, which Python asks for between two passes.
#include "sizing.h"

#include <pybind11/stl.h>

#include "bindings/checks.h"
#include "bindings/define.h"

namespace py = pybind11;

namespace msn {

void define_sizing(py::module_& m) {
  py::class_<StepTimes>(m, "StepTimes")
      .def(py::init<std::vector<std::pair<int64_t, double>>, double, double>())
      .def("of", &StepTimes::of)
      .def("at_best", &StepTimes::at_best)
      .def("observe", &StepTimes::observe);
  py::class_<TreeSizer>(m, "TreeSizer")
      .def(py::init([](StepTimes& times, int64_t rows, double lesson) {
             expect_range("rows", rows, 1, INT64_MAX);
             return TreeSizer(times, rows, lesson);
           }),
           py::keep_alive<1, 2>())
      .def("choose", &TreeSizer::choose)
      .def("observe", &TreeSizer::observe)
      .def("size", &TreeSizer::size);
}

}  // namespace msn

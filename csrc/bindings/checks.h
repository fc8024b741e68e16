// Checks of an op's arguments. One that fails raises a ValueError that names the argument, what
// came and what was expected.
#pragma once
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <sstream>
#include <string>

#include "bindings/dlpack.h"
#include "block_space.h"

namespace msn {

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw pybind11::value_error(message.str());
}

std::string shape_text(const Tensor& t);  // [2, 3]

void expect_range(const char* name, int64_t value, int64_t low, int64_t high);
void expect_dtype(const Argument& t, DType dtype);
void expect_float(const Argument& t);
void expect_dims(const Argument& t, int ndim);
void expect_shape(const Argument& t, std::initializer_list<int64_t> shape);
void expect_contiguous(const Argument& t);
void expect_device(const Argument& t, const Tensor& like);
void expect_cpu(const Argument& t);
// Of what the CPU alone works on.
Argument borrow_cpu(const char* name, pybind11::handle object);

// A tensor as most kernels read it: this dtype and shape, contiguous, on the device of `like`.
void expect_dense(const Argument& t, DType dtype, std::initializer_list<int64_t> shape,
                  const Tensor& like);
// The same of a tree: [N] for all rows or [B, N].
void expect_tree(const Argument& t, DType dtype, int64_t batch, int64_t nodes, const Tensor& like);
// A number of nodes that a tree may have, which argument `t` says.
void expect_nodes(const Argument& t, int64_t nodes);
// Rows of logits [rows, V].
void expect_logits(const Argument& logits);
// Float32 and int32 of one dimension as the memory of a launch; nothing where either is None.
BlockSpace space_in(const OptionalArgument& partial, const OptionalArgument& arrived,
                    const Tensor& like);

}  // namespace msn

#include "bindings/checks.h"

#include <algorithm>

#include "best_first.h"
#include "tree.h"

namespace msn {

namespace {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kFloat16: return "float16";
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
    case DType::kBFloat16: return "bfloat16";
    default: return "another dtype";
  }
}

std::string shape_text(const int64_t* shape, int ndim) {
  std::ostringstream text;
  text << '[';
  for (int i = 0; i < ndim; ++i) text << (i ? ", " : "") << shape[i];
  text << ']';
  return text.str();
}

}  // namespace

std::string shape_text(const Tensor& t) { return shape_text(t.shape, t.ndim); }

void expect_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) refuse(name, " is ", value, "; expected ", low, " to ", high);
}

void expect_dtype(const Argument& t, DType dtype) {
  if (t.dtype != dtype)
    refuse(t.name, " has dtype ", name_of(t.dtype), "; expected ", name_of(dtype));
}

void expect_float(const Argument& t) {
  if (t.dtype != DType::kFloat32 && t.dtype != DType::kFloat64 && t.dtype != DType::kFloat16 &&
      t.dtype != DType::kBFloat16)
    refuse(t.name, " has dtype ", name_of(t.dtype),
           "; expected float16, bfloat16, float32 or float64");
}

void expect_dims(const Argument& t, int ndim) {
  if (t.ndim != ndim)
    refuse(t.name, " has shape ", shape_text(t), "; expected ", ndim, " dimensions");
}

void expect_shape(const Argument& t, std::initializer_list<int64_t> shape) {
  if (!std::equal(t.shape, t.shape + t.ndim, shape.begin(), shape.end()))
    refuse(t.name, " has shape ", shape_text(t), "; expected ",
           shape_text(shape.begin(), static_cast<int>(shape.size())));
}

void expect_contiguous(const Argument& t) {
  if (std::count(t.shape, t.shape + t.ndim, 0)) return;
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] != 1 && t.strides[i] != stride) refuse(t.name, " is not contiguous");
    stride *= t.shape[i];
  }
}

void expect_device(const Argument& t, const Tensor& like) {
  if (t.device != like.device || t.device_index != like.device_index)
    refuse(t.name, " is on another device than the other arguments");
}

void expect_cpu(const Argument& t) {
  if (t.device != Device::kCPU) refuse(t.name, " does not lie on the CPU");
}

Argument borrow_cpu(const char* name, pybind11::handle object) {
  Argument taken = borrow(name, object);
  expect_cpu(taken);
  return taken;
}

void expect_dense(const Argument& t, DType dtype, std::initializer_list<int64_t> shape,
                  const Tensor& like) {
  expect_dtype(t, dtype);
  expect_shape(t, shape);
  expect_contiguous(t);
  expect_device(t, like);
}

void expect_tree(const Argument& t, DType dtype, int64_t batch, int64_t nodes, const Tensor& like) {
  if (t.ndim == 1)
    expect_dense(t, dtype, {nodes}, like);
  else
    expect_dense(t, dtype, {batch, nodes}, like);
}

void expect_nodes(const Argument& t, int64_t nodes) {
  if (nodes < 1 || nodes > kMaxNodes)
    refuse(t.name, " has ", nodes, " nodes; expected 1 to ", kMaxNodes);
}

void expect_logits(const Argument& logits) {
  expect_dims(logits, 2);
  expect_float(logits);
  expect_range("vocabulary of logits", logits.shape[1], 1, kMaxVocabulary);
  if (logits.shape[1] > 1 && logits.strides[1] != 1)
    refuse("logits has rows that are not contiguous");
}

BlockSpace space_in(const OptionalArgument& partial, const OptionalArgument& arrived,
                    const Tensor& like) {
  if (!partial.data || !arrived.data) return {};
  expect_dense(partial, DType::kFloat32, {partial.shape[0]}, like);
  expect_dense(arrived, DType::kInt32, {arrived.shape[0]}, like);
  return {partial.as<float>(), arrived.as<int>(), partial.shape[0], arrived.shape[0]};
}

}  // namespace msn

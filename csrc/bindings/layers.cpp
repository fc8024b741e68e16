// The bindings that pack a model's weights. bound_pass.cpp has the pass that reads them,
// layer_ops.cpp its stages one by one.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "bindings/checks.h"
#include "bindings/define.h"
#include "bindings/layers.h"

namespace py = pybind11;

namespace msn {

namespace {

int64_t padded_to(int64_t count, int64_t width) { return (count + width - 1) / width * width; }

int64_t panels_of(const Kernels& kernels, int64_t outputs, int64_t halves) {
  return halves * padded_to(outputs / halves, kernels.width) / kernels.width;
}

}  // namespace

int64_t packed_bytes(const std::string& weights, const std::string& isa, int64_t outputs,
                     int64_t inputs, int64_t halves) {
  const Kernels& kernels = kernels_named(isa);
  expect_range("inputs", inputs, 1, int64_t{1} << 30);
  expect_range("outputs", outputs, halves, int64_t{1} << 30);
  const Weights kind = stored_named(weights);
  if (is_coded(kind)) {
    const bool pairs = kind == Weights::kCodedBFloat16;
    if (!kernels.has_codes(pairs ? Weights::kBFloat16 : Weights::kFloat32))
      refuse("weights is '", weights, "', which ", kernels.isa, " has not");
    if (pairs && inputs % kCodedInputs)
      refuse("inputs is ", inputs, "; expected a multiple of ", kCodedInputs, " for '", weights,
             "'");
  }
  return panels_of(kernels, outputs, halves) * kernels.panel_bytes(kind, inputs);
}

void expect_packed(const Argument& packed, const std::string& weights, const std::string& isa,
                   int64_t outputs, int64_t inputs, int64_t halves) {
  const int64_t bytes = packed_bytes(weights, isa, outputs, inputs, halves);
  const bool coded = is_coded(stored_named(weights));
  if (packed.item_size != 1 || packed.ndim != 1 ||
      (coded ? packed.shape[0] < bytes : packed.shape[0] != bytes))
    refuse(packed.name, " has shape ", shape_text(packed), "; expected ", bytes, " bytes",
           coded ? " or more" : "", ", uint8");
  expect_contiguous(packed);
}

namespace {

// Where what lies behind the panels of a matrix begins for each of them, were it coded, in bytes
// from the end of the panels; last, where it ends. Empty: it cannot be coded.
std::vector<int64_t> behind_panels(const Kernels& kernels, Weights kind, const char* packed,
                                   int64_t panels, int64_t inputs) {
  const int64_t bytes = kernels.panel_bytes(kind, inputs);
  std::vector<int64_t> begin(panels + 1, 0);
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < panels; ++p)
    begin[p + 1] = kernels.bytes_behind(kind, packed + p * bytes, inputs);
  for (int64_t p = 0; p < panels; ++p) {
    if (begin[p + 1] < 0) return {};
    begin[p + 1] += begin[p];
  }
  return begin;
}

// Bytes of a packed matrix once it is coded; 0: it cannot be, or a block could not reach what lies
// behind the panels.
int64_t coded_bytes(const std::string& weights, const std::string& isa, py::handle packed,
                    int64_t outputs, int64_t inputs, int64_t halves) {
  const Kernels& kernels = kernels_named(isa);
  const Weights kind = weights_named(weights);
  const Argument from = borrow_cpu("packed", packed);
  expect_packed(from, weights, isa, outputs, inputs, halves);
  if (!kernels.has_codes(kind) || (kind == Weights::kBFloat16 && inputs % kCodedInputs)) return 0;
  const int64_t panels = panels_of(kernels, outputs, halves);
  py::gil_scoped_release release;
  const auto behind = behind_panels(kernels, kind, from.as<char>(), panels, inputs);
  if (behind.empty()) return 0;
  const int64_t bytes =
      panels * kernels.panel_bytes(coded_kind(kind), inputs) + behind.back() + kCodedMargin;
  return bytes < int64_t{1} << 32 ? bytes : 0;
}

void code(const std::string& weights, const std::string& isa, py::handle packed, int64_t outputs,
          int64_t inputs, int64_t halves, py::handle coded) {
  const Kernels& kernels = kernels_named(isa);
  const Weights kind = weights_named(weights);
  const Argument from = borrow_cpu("packed", packed), to = borrow_cpu("coded", coded);
  expect_packed(from, weights, isa, outputs, inputs, halves);
  const int64_t size = coded_bytes(weights, isa, packed, outputs, inputs, halves);
  if (!size) refuse("packed cannot be coded");
  expect_contiguous(to);
  expect_shape(to, {size});
  const int64_t panels = panels_of(kernels, outputs, halves);
  const int64_t plain = kernels.panel_bytes(kind, inputs);
  const int64_t bytes = kernels.panel_bytes(coded_kind(kind), inputs);
  py::gil_scoped_release release;
  const auto behind = behind_panels(kernels, kind, from.as<char>(), panels, inputs);
  char* end = to.as<char>() + panels * bytes;
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < panels; ++p)
    kernels.code(kind, from.as<char>() + p * plain, inputs, to.as<char>() + p * bytes,
                 end + behind[p]);
}

py::dict layer_isa(const std::string& isa) {
  const Kernels& kernels = kernels_named(isa);
  py::dict facts;
  facts["name"] = kernels.isa;
  facts["width"] = kernels.width;
  facts["rounds_to_bfloat16"] = kernels.rounds_to_bfloat16;
  return facts;
}

// Packs the rows of `pieces`, one below the other, into `to`, for the pass's threads to read.
void pack(const std::string& weights, const std::string& isa, const py::list& pieces,
          int64_t halves, py::handle packed) {
  const Kernels& kernels = kernels_named(isa);
  std::vector<const char*> rows;
  Unpacked source;
  for (const py::handle piece : pieces) {
    const Argument matrix = borrow_cpu("weights", piece);
    expect_dims(matrix, 2);
    expect_float(matrix);
    if (rows.empty())
      source = {nullptr, 0, matrix.shape[1], matrix.strides[1], matrix.dtype};
    else if (matrix.shape[1] != source.inputs || matrix.strides[1] != source.stride ||
             matrix.dtype != source.dtype)
      refuse("weights has pieces of different inputs, strides or dtypes");
    for (int64_t r = 0; r < matrix.shape[0]; ++r)
      rows.push_back(matrix.as<char>() + r * matrix.strides[0] * matrix.item_size);
  }
  const int64_t outputs = static_cast<int64_t>(rows.size());
  const Argument to = borrow_cpu("packed", packed);
  expect_contiguous(to);
  expect_shape(to, {packed_bytes(weights, isa, outputs, source.inputs, halves)});
  // Gate and up panels in turn, each half filled up with rows of zeros.
  const int64_t half = outputs / halves, panels = padded_to(half, kernels.width) / kernels.width;
  std::vector<const char*> order;
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t h = 0; h < halves; ++h)
      for (int64_t o = p * kernels.width; o < (p + 1) * kernels.width; ++o)
        order.push_back(o < half ? rows[h * half + o] : nullptr);
  const Weights kind = weights_named(weights);
  const int64_t bytes = kernels.panel_bytes(kind, source.inputs);
  const int64_t all = static_cast<int64_t>(order.size()) / kernels.width;
  py::gil_scoped_release release;
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < all; ++p) {
    Unpacked panel = source;
    panel.rows = order.data() + p * kernels.width;
    panel.count = kernels.width;
    kernels.pack(kind, panel, to.as<char>() + p * bytes);
  }
}

// Rows of a packed matrix, back into numbers: `rows` int64 [n], `to` [n, inputs] of what sums are
// made in. `rows` count as before packing.
void unpack(const std::string& weights, const std::string& isa, py::handle packed, int64_t outputs,
            int64_t inputs, int64_t halves, py::handle rows, py::handle to) {
  const Kernels& kernels = kernels_named(isa);
  const Weights kind = stored_named(weights);
  const Argument from = borrow_cpu("packed", packed), which = borrow_cpu("rows", rows),
                 numbers = borrow_cpu("to", to);
  expect_packed(from, weights, isa, outputs, inputs, halves);
  expect_dims(which, 1);
  const int64_t count = which.shape[0];
  expect_dense(which, DType::kInt64, {count}, which);
  expect_dense(numbers, number_of(kind), {count, inputs}, which);
  const int64_t* wanted = which.as<int64_t>();
  for (int64_t n = 0; n < count; ++n) expect_range("row", wanted[n], 0, outputs - 1);
  const int64_t half = outputs / halves, width = kernels.width;
  py::gil_scoped_release release;
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < count; ++n) {
    const int64_t o = wanted[n] % half, h = wanted[n] / half;
    kernels.unpack_row(kind, {from.data, outputs, inputs},
                       (o / width * halves + h) * width + o % width,
                       numbers.as<char>() + n * inputs * numbers.item_size);
  }
}

}  // namespace

int64_t screen_bytes(const std::string& weights, const std::string& isa, int64_t outputs,
                     int64_t inputs) {
  return kernels_named(isa).screen_bytes(weights_named(weights), {nullptr, outputs, inputs});
}

namespace {

// Returns whether the screen of a packed head could be made.
bool pack_screen(const std::string& weights, const std::string& isa, py::handle packed,
                 int64_t outputs, int64_t inputs, py::handle screen) {
  const Kernels& kernels = kernels_named(isa);
  const Argument from = borrow_cpu("packed", packed), to = borrow_cpu("screen", screen);
  expect_contiguous(from);
  expect_contiguous(to);
  expect_shape(from, {packed_bytes(weights, isa, outputs, inputs, 1)});
  expect_shape(to, {screen_bytes(weights, isa, outputs, inputs)});
  const Weights kind = weights_named(weights);
  const int64_t panels = padded_to(outputs, kernels.width) / kernels.width;
  py::gil_scoped_release release;
  int64_t failed = 0;
#pragma omp parallel for schedule(static) reduction(+ : failed)
  for (int64_t p = 0; p < panels; ++p)
    failed += !kernels.pack_screen(kind, {from.data, outputs, inputs}, p, to.as<char>());
  return !failed;
}

// Gives freed memory back to the system, as far as the allocator can.
void release_freed() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

void mix(uint64_t& hash, uint64_t word) {
  hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
  hash ^= hash >> 29;
}

// A hash of every 64th line of 64 bytes. Each word meets all before it: a sum of products would
// miss weights whose signs have changed.
uint64_t sample_hash_of(const char* from, int64_t bytes) {
  uint64_t hash = 0;
  constexpr int64_t kStep = 64 * 64, kAhead = 16 * kStep;  // each line is a page of its own
  for (int64_t line = 0; line < bytes; line += kStep) {
    __builtin_prefetch(from + line + kAhead);
    for (int64_t at = line; at < std::min(line + 64, bytes); at += 8) {
      uint64_t word = 0;
      std::memcpy(&word, from + at, std::min<int64_t>(8, bytes - at));
      mix(hash, word);
    }
  }
  return hash;
}

// The same of contiguous tensors together.
uint64_t sample_hash(const py::list& tensors) {
  std::vector<std::pair<const char*, int64_t>> pieces;
  for (const py::handle object : tensors) {
    const Argument tensor = borrow_cpu("tensors", object);
    expect_contiguous(tensor);
    pieces.emplace_back(tensor.as<char>(), bytes_of(tensor));
  }
  std::vector<uint64_t> hashes(pieces.size());
  py::gil_scoped_release release;
#pragma omp parallel for schedule(dynamic)
  for (size_t i = 0; i < pieces.size(); ++i)
    hashes[i] = sample_hash_of(pieces[i].first, pieces[i].second);
  uint64_t hash = 0;
  for (const uint64_t each : hashes) mix(hash, each);
  return hash;
}

}  // namespace

void define_layers(py::module_& m) {
  m.attr("CACHE_WIDTH") = kCacheWidth;
  m.attr("NARROW_STEP") = kNarrowStep;
  m.def("layer_isa", &layer_isa);
  m.def("packed_bytes", &packed_bytes);
  m.def("pack", &pack);
  m.def("coded_bytes", &coded_bytes);
  m.def("code", &code);
  m.def("unpack", &unpack);
  m.def("screen_bytes", &screen_bytes);
  m.def("pack_screen", &pack_screen);
  m.def("release_freed", &release_freed);
  m.def("sample_hash", &sample_hash);
  define_forward_pass(m);
  define_native_steps(m);
  define_layer_ops(m);
}

}  // namespace msn

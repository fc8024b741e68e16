// The bindings of the native forward pass: packing, and a pass as an object, since its plan is read
// once and run often. msn_ext/decoding/forward/native.py is its only user. layer_ops.cpp has its
// stages one by one.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "bindings/checks.h"
#include "bindings/define.h"
#include "bindings/layers.h"
#include "cpu/layers/forward_pass.h"
#include "tree_ops.h"

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
  if (kind == Weights::kCodedBFloat16) {
    if (!kernels.code) refuse("weights is 'coded_bfloat16', which ", kernels.isa, " has not");
    if (inputs % kCodedInputs)
      refuse("inputs is ", inputs, "; expected a multiple of ", kCodedInputs,
             " for 'coded_bfloat16'");
  }
  return panels_of(kernels, outputs, halves) * kernels.panel_bytes(kind, inputs);
}

void expect_packed(const Argument& packed, const std::string& weights, const std::string& isa,
                   int64_t outputs, int64_t inputs, int64_t halves) {
  const int64_t bytes = packed_bytes(weights, isa, outputs, inputs, halves);
  const bool coded = stored_named(weights) == Weights::kCodedBFloat16;
  if (packed.item_size != 1 || packed.ndim != 1 ||
      (coded ? packed.shape[0] < bytes : packed.shape[0] != bytes))
    refuse(packed.name, " has shape ", shape_text(packed), "; expected ", bytes, " bytes",
           coded ? " or more" : "", ", uint8");
  expect_contiguous(packed);
}

namespace {

// Where the other pairs of each panel of a matrix in bfloat16 begin, were it coded, in pairs; last,
// how many there are.
std::vector<int64_t> other_pairs(const Kernels& kernels, const char* packed, int64_t panels,
                                 int64_t inputs) {
  const int64_t bytes = kernels.panel_bytes(Weights::kBFloat16, inputs);
  std::vector<int64_t> begin(panels + 1, 0);
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < panels; ++p)
    begin[p + 1] = kernels.count_other_pairs(packed + p * bytes, inputs);
  for (int64_t p = 0; p < panels; ++p) begin[p + 1] += begin[p];
  return begin;
}

// Bytes of a packed matrix in bfloat16 once it is coded; 0: it cannot be, or a block could not
// reach its other pairs.
int64_t coded_bytes(const std::string& isa, py::handle packed, int64_t outputs, int64_t inputs,
                    int64_t halves) {
  const Kernels& kernels = kernels_named(isa);
  const Argument from = borrow("packed", packed);
  expect_packed(from, "bfloat16", isa, outputs, inputs, halves);
  if (!kernels.code || inputs % kCodedInputs) return 0;
  const int64_t panels = panels_of(kernels, outputs, halves);
  py::gil_scoped_release release;
  const int64_t others = other_pairs(kernels, from.as<char>(), panels, inputs).back();
  const int64_t bytes =
      panels * kernels.panel_bytes(Weights::kCodedBFloat16, inputs) + 4 * others + kCodedMargin;
  return bytes < int64_t{1} << 32 ? bytes : 0;
}

void code(const std::string& isa, py::handle packed, int64_t outputs, int64_t inputs,
          int64_t halves, py::handle coded) {
  const Kernels& kernels = kernels_named(isa);
  const Argument from = borrow("packed", packed), to = borrow("coded", coded);
  expect_packed(from, "bfloat16", isa, outputs, inputs, halves);
  const int64_t size = coded_bytes(isa, packed, outputs, inputs, halves);
  if (!size) refuse("packed cannot be coded");
  expect_contiguous(to);
  expect_shape(to, {size});
  const int64_t panels = panels_of(kernels, outputs, halves);
  const int64_t plain = kernels.panel_bytes(Weights::kBFloat16, inputs);
  const int64_t bytes = kernels.panel_bytes(Weights::kCodedBFloat16, inputs);
  py::gil_scoped_release release;
  const std::vector<int64_t> others = other_pairs(kernels, from.as<char>(), panels, inputs);
  uint32_t* behind = reinterpret_cast<uint32_t*>(to.as<char>() + panels * bytes);
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < panels; ++p)
    kernels.code(from.as<char>() + p * plain, inputs, to.as<char>() + p * bytes,
                 behind + others[p]);
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
    const Argument matrix = borrow("weights", piece);
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
  const Argument to = borrow("packed", packed);
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
  const Argument from = borrow("packed", packed), which = borrow("rows", rows),
                 numbers = borrow("to", to);
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

// The screen of a packed head (cpu/layers/screen.h), whose size is `screen_bytes`, 0 where there is
// none. Returns whether it could be made.
int64_t screen_bytes(const std::string& weights, const std::string& isa, int64_t outputs,
                     int64_t inputs) {
  return kernels_named(isa).screen_bytes(weights_named(weights), {nullptr, outputs, inputs});
}

bool pack_screen(const std::string& weights, const std::string& isa, py::handle packed,
                 int64_t outputs, int64_t inputs, py::handle screen) {
  const Kernels& kernels = kernels_named(isa);
  const Argument from = borrow("packed", packed), to = borrow("screen", screen);
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

// A hash of every 64th line of 64 bytes of contiguous tensors. Each word meets all before it: a sum
// of products would miss weights whose signs have changed.
uint64_t sample_hash(const py::list& tensors) {
  uint64_t hash = 0;
  for (const py::handle object : tensors) {
    const Argument tensor = borrow("tensors", object);
    expect_contiguous(tensor);
    int64_t bytes = tensor.item_size;
    for (int i = 0; i < tensor.ndim; ++i) bytes *= tensor.shape[i];
    const char* from = tensor.as<char>();
    constexpr int64_t kStep = 64 * 64, kAhead = 16 * kStep;  // each line is a page of its own
    for (int64_t line = 0; line < bytes; line += kStep) {
      __builtin_prefetch(from + line + kAhead);
      for (int64_t at = line; at < std::min(line + 64, bytes); at += 8) {
        uint64_t word = 0;
        std::memcpy(&word, from + at, std::min<int64_t>(8, bytes - at));
        hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 29;
      }
    }
  }
  return hash;
}

// A forward pass, what it reads kept alive.
class BoundPass {
 public:
  BoundPass(const std::string& weights, const std::string& isa)
      : pass_(weights_named(weights), kernels_named(isa)),
        number_(number_of(pass_.kind)),
        weights_(weights),
        isa_(isa) {}

  void set_embedding(py::handle table, int64_t hidden, double scale, py::handle positions) {
    pass_.hidden = hidden;
    pass_.embed.scale = scale;
    if (!table.is_none()) {
      const Argument rows = take("embedding", table);
      expect_float(rows);
      pass_.embed.table = rows.data;
      pass_.embed.dtype = static_cast<int>(rows.dtype);
      vocabulary_ = rows.shape[0];
    }
    if (!positions.is_none()) {
      const Argument rows = take("positions", positions);
      expect_dtype(rows, number_);
      pass_.embed.positions = rows.data;
      positions_ = rows.shape[0];
    }
  }

  int add_rotary(int64_t turned) {
    RotaryTables tables;
    tables.turned = turned;
    pass_.rotaries.push_back(tables);
    return static_cast<int>(pass_.rotaries.size()) - 1;
  }
  void set_rotary(int which, py::handle cosines, py::handle sines) {
    RotaryTables& tables = pass_.rotaries.at(which);
    const Argument c = take("cosines", cosines), s = take("sines", sines);
    for (const Argument* table : {&c, &s}) {
      expect_dtype(*table, number_);
      expect_shape(*table, {c.shape[0], tables.turned / 2});
    }
    tables.positions = c.shape[0];
    tables.cosines = c.data;
    tables.sines = s.data;
  }

  void add_layer(const py::dict& d) {
    LayerPlan layer;
    layer.heads = {d["heads"].cast<int64_t>(), d["kv_heads"].cast<int64_t>(),
                   d["head_size"].cast<int64_t>()};
    layer.attention_norm = norm(d["attention_norm"]);
    layer.after_attention = norm(d["after_attention"]);
    layer.mlp_norm = norm(d["mlp_norm"]);
    layer.after_mlp = norm(d["after_mlp"]);
    layer.q_norm = norm(d["q_norm"]);
    layer.k_norm = norm(d["k_norm"]);
    layer.qkv = linear(d["qkv"]);
    layer.out = linear(d["out"]);
    layer.up = linear(d["up"]);
    layer.down = linear(d["down"]);
    layer.norm_each_head = d["norm_each_head"].cast<bool>();
    layer.gated = d["gated"].cast<bool>();
    layer.parallel = d["parallel"].cast<bool>();
    layer.activation = activation_named(d["activation"].cast<std::string>());
    layer.scale = d["scale"].cast<double>();
    layer.softcap = d["softcap"].cast<double>();
    layer.residual_scale = d["residual_scale"].cast<double>();
    layer.window = d["window"].cast<int64_t>();
    layer.rotary = d["rotary"].cast<int>();
    pass_.layers.push_back(layer);
  }

  void set_head(py::handle final_norm, py::handle head, double scale, double softcap) {
    pass_.norm = norm(final_norm);
    pass_.head = linear(head);
    pass_.logit_scale = scale;
    pass_.logit_softcap = softcap;
    if (pass_.embed.table == nullptr) {
      pass_.embed.packed = pass_.head.packed;
      vocabulary_ = pass_.head.packed.outputs;
    }
  }

  // Of the head: what pack_screen made, and its rows, where they are at hand.
  void set_screen(py::handle screen, py::handle dense) {
    const Packed& head = pass_.head.packed;
    const Argument of = take("screen", screen);
    expect_shape(of, {screen_bytes(weights_, isa_, head.outputs, head.inputs)});
    if (pass_.head.bias || pass_.logit_scale != 1 || pass_.logit_softcap > 0)
      refuse("a head with a bias, a scale or a soft cap has no screen");
    pass_.screen = of.data;
    if (dense.is_none()) return;
    const Argument rows = take("the head's weights", dense);
    expect_shape(rows, {head.outputs, head.inputs});
    if (head.inputs % 2 || stored_as(pass_.kind) != rows.dtype)
      refuse("the head's weights are no rows that are packed as they are");
    pass_.dense = rows.data;
  }

  // For every layer, then for the head, by linear layer what adds to noise rows: (A, its outputs,
  // B, inputs of its panels, the first of each panel).
  void set_adapter(const py::list& layers) {
    if (py::len(layers) != pass_.layers.size() + 1)
      refuse("an adapter has ", py::len(layers), " parts; expected ", pass_.layers.size() + 1);
    adapter_ = layers;
    for (size_t l = 0; l < pass_.layers.size(); ++l) {
      LayerPlan& layer = pass_.layers[l];
      const py::dict of = layers[l];
      adapt(layer.qkv, of, "qkv", 1);
      adapt(layer.out, of, "out", 1);
      adapt(layer.up, of, "up", layer.gated ? 2 : 1);
      adapt(layer.down, of, "down", 1);
    }
    adapt(pass_.head, layers[pass_.layers.size()], "head", 1);
  }

  // Keys [layers, batch, heads, slots / 16, ...] and values of all layers.
  void set_cache(py::handle keys, py::handle values, int64_t batch, int64_t slots) {
    if (slots % kCacheWidth) refuse("slots is ", slots, "; expected a multiple of 16");
    const Argument k = borrow("keys", keys), v = borrow("values", values);
    expect_contiguous(k);
    expect_contiguous(v);
    const int64_t layers = static_cast<int64_t>(pass_.layers.size());
    cache_ = py::make_tuple(keys, values);
    for (int64_t l = 0; l < layers; ++l)
      pass_.layers[l].cache = {k.as<char>() + l * bytes_of(k) / layers,
                               v.as<char>() + l * bytes_of(v) / layers, slots};
    batch_ = batch;
    slots_ = slots;
  }

  // Trees of all batch rows: tokens and positions int64 [B, N], ancestors int64 [B or 1, N, W],
  // prefix int64 [B], logits [B, N, V] or, where they are verified, None: then they are computed as
  // far as that needs. `verified` is parents and what ops.verify_logits returns, or None. The last
  // `tails` nodes of every tree are noise.
  void step(py::handle tokens, py::handle positions, py::handle ancestors, py::handle prefix,
            py::handle logits, const std::optional<py::tuple>& verified, int64_t tails,
            int threads) {
    const Argument ids = borrow("tokens", tokens), at = borrow("positions", positions),
                   bits = borrow("ancestors", ancestors), before = borrow("prefix", prefix);
    const int64_t batch = ids.shape[0], nodes = ids.shape[1], words = words_for(nodes);
    expect_nodes(ids, nodes);
    expect_dense(ids, DType::kInt64, {batch, nodes}, ids);
    expect_dense(at, DType::kInt64, {batch, nodes}, ids);
    const int64_t kinds = bits.ndim == 3 ? bits.shape[0] : 1;
    if (bits.ndim == 3)
      expect_dense(bits, DType::kInt64, {batch, nodes, words}, ids);
    else
      expect_dense(bits, DType::kInt64, {nodes, words}, ids);
    expect_dense(before, DType::kInt64, {batch}, ids);
    if (logits.is_none() && !verified) refuse("logits is None, but nothing is verified");
    void* out = logits.is_none() ? nullptr : logits_for(logits, ids);
    VerifyLogits verify;
    if (verified) verify = verification(ids, *verified);
    clear();
    for (int64_t b = 0; b < batch; ++b) {
      const uint64_t* of_tree = bits.as<uint64_t>() + (kinds > 1 ? b * nodes * words : 0);
      expect_tree_room(b, before.as<int64_t>()[b], nodes);
      trees_.add_tree(b, before.as<int64_t>()[b], nodes, of_tree);
    }
    expect_range("tails", tails, 0, nodes);
    for (int64_t n = 0; n < batch * nodes; ++n) {
      const bool is_noise = n % nodes >= nodes - tails;
      noise_index_.push_back(is_noise ? static_cast<int32_t>(noise_.size()) : -1);
      if (is_noise) noise_.push_back(static_cast<int32_t>(n));
    }
    all_wanted(batch * nodes);
    run(ids.as<int64_t>(), at.as<int64_t>(), batch * nodes, out,
        static_cast<int32_t*>(verify.guesses.data), threads);
    if (verified) verify.from_guesses_on_cpu();
  }

  // The logits [B, N, V] of the last step, which was made without.
  void logits(py::handle logits, int threads) {
    const Argument out = borrow("logits", logits);
    const int64_t count = static_cast<int64_t>(wanted_.size());
    expect_dense(out, number_, {out.shape[0], out.shape[1], pass_.head.packed.outputs}, out);
    if (!count || out.shape[0] * out.shape[1] != count)
      refuse("logits has ", out.shape[0] * out.shape[1], " rows; expected the step's, ", count);
    py::gil_scoped_release release;
    pass_.logits_of(noise(), wanted_.data(), count, out.data, threads);
  }

  // A text, `tokens` int64 [n], behind `start` slots of a batch row; logits [keep, V] of its last
  // ones.
  void read(int64_t batch, py::handle tokens, py::handle positions, int64_t start, int64_t keep,
            py::handle logits, int threads) {
    const Argument ids = borrow("tokens", tokens), at = borrow("positions", positions),
                   out = borrow("logits", logits);
    expect_dense(ids, DType::kInt64, {ids.shape[0]}, ids);
    expect_dense(at, DType::kInt64, {ids.shape[0]}, ids);
    expect_range("keep", keep, 0, ids.shape[0]);
    expect_dense(out, number_, {keep, pass_.head.packed.outputs}, ids);
    clear();
    const int64_t count = ids.shape[0];
    expect_tree_room(batch, start, count);
    trees_.add_text(batch, start, count);
    for (int64_t n = count - keep; n < count; ++n) wanted_.push_back(static_cast<int32_t>(n));
    run(ids.as<int64_t>(), at.as<int64_t>(), count, out.data, nullptr, threads);
  }

  // As ops.commit_kv: path int64 [B, N], accepted int64 [B].
  void commit(py::handle prefix, py::handle path, py::handle accepted) {
    const Argument before = borrow("prefix", prefix), nodes = borrow("path", path),
                   count = borrow("accepted", accepted);
    const int64_t batch = before.shape[0];
    expect_dense(before, DType::kInt64, {batch}, before);
    expect_dims(nodes, 2);
    expect_dense(nodes, DType::kInt64, {batch, nodes.shape[1]}, before);
    expect_dense(count, DType::kInt64, {batch}, before);
    for (int64_t b = 0; b < batch; ++b)
      pass_.commit(b, before.as<int64_t>()[b], nodes.as<int64_t>() + b * nodes.shape[1],
                   count.as<int64_t>()[b]);
  }

 private:
  static int64_t bytes_of(const Tensor& t) {
    int64_t bytes = t.item_size;
    for (int i = 0; i < t.ndim; ++i) bytes *= t.shape[i];
    return bytes;
  }

  Argument take(const char* name, py::handle tensor) {
    const Argument taken = borrow(name, tensor);
    expect_contiguous(taken);
    kept_.append(tensor);
    return taken;
  }

  // (kind, weight, bias or None, eps) or None.
  Norm norm(py::handle from) {
    if (from.is_none()) return {};
    const auto [kind, weight, bias, eps] =
        from.cast<std::tuple<std::string, py::object, py::object, double>>();
    Norm norm;
    norm.kind = kind == "rms" ? Norm::kRms : Norm::kLayer;
    norm.eps = eps;
    const Argument w = take("norm", weight);
    expect_dtype(w, number_);
    norm.weight = w.data;
    if (bias.is_none()) return norm;
    const Argument b = take("norm's bias", bias);
    expect_dtype(b, number_);
    norm.bias = b.data;
    return norm;
  }

  // (packed, how it is stored, outputs, inputs, bias or None).
  LinearWeights linear(py::handle from) {
    const auto [packed, stored, outputs, inputs, bias] =
        from.cast<std::tuple<py::object, std::string, int64_t, int64_t, py::object>>();
    LinearWeights weights;
    weights.packed = {take("packed", packed).data, outputs, inputs,
                      stored_named(stored) == Weights::kCodedBFloat16};
    if (bias.is_none()) return weights;
    const Argument b = take("bias", bias);
    expect_dense(b, number_, {outputs}, b);
    weights.bias = b.data;
    return weights;
  }

  void adapt(LinearWeights& weights, const py::dict& of, const char* name, int64_t halves) {
    weights.a = weights.b = {};
    if (!of.contains(name)) return;
    const auto [a, rank, b, inputs, first] =
        of[name].cast<std::tuple<py::object, int64_t, py::object, int64_t, py::object>>();
    const std::string kind = pass_.kind == Weights::kInt8 ? "bfloat16" : weights_;
    const int64_t outputs = weights.packed.outputs, width = pass_.kernels.width;
    const int64_t panels = (outputs / halves + width - 1) / width * halves;
    const Argument down = borrow("adapter", a), up = borrow("adapter", b),
                   begin = borrow("adapter's first inputs", first);
    for (const Argument* each : {&down, &up, &begin}) expect_contiguous(*each);
    expect_dense(down, kind == "bfloat16" ? DType::kBFloat16 : number_,
                 {rank, narrow_stride(weights.packed.inputs)}, begin);
    expect_shape(up, {packed_bytes(kind, isa_, outputs, inputs, halves)});
    expect_dense(begin, DType::kInt32, {panels}, begin);
    for (int64_t p = 0; p < panels; ++p) {
      expect_range("an adapter's first input", begin.as<int32_t>()[p], 0, rank - inputs);
      if (begin.as<int32_t>()[p] % 2)
        refuse("an adapter's first input is odd; expected an even one");
    }
    weights.a = {down.data, rank, weights.packed.inputs};
    weights.b = {up.data, outputs, inputs};
    weights.first = begin.as<int32_t>();
  }

  void* logits_for(py::handle logits, const Argument& tokens) const {
    const Argument out = borrow("logits", logits);
    const int64_t batch = tokens.shape[0], nodes = tokens.shape[1];
    expect_dense(out, number_, {batch, nodes, pass_.head.packed.outputs}, tokens);
    return out.data;
  }

  VerifyLogits verification(const Argument& tokens, const py::tuple& from) const {
    if (py::len(from) != 7) refuse("verified has ", py::len(from), " tensors; expected 7");
    const int64_t batch = tokens.shape[0], nodes = tokens.shape[1];
    const Argument parents = borrow("parents", from[0]), guesses = borrow("guesses", from[1]),
                   targets = borrow("targets", from[2]),
                   accept_length = borrow("accept_length", from[3]), path = borrow("path", from[4]),
                   bonus = borrow("bonus", from[5]), continuation = borrow("continuation", from[6]);
    if (number_ != DType::kFloat32) refuse("only logits in float32 are verified");
    expect_range("the vocabulary", pass_.head.packed.outputs, 1, kMaxVocabulary);
    expect_tree(parents, DType::kInt32, batch, nodes, tokens);
    expect_dense(guesses, DType::kInt32, {batch, nodes, kGuesses}, tokens);
    for (const Argument* each : {&targets, &path, &continuation})
      expect_dense(*each, DType::kInt64, {batch, nodes}, tokens);
    for (const Argument* each : {&accept_length, &bonus})
      expect_dense(*each, DType::kInt64, {batch}, tokens);
    return {{}, tokens, parents, guesses, targets, accept_length, path, bonus, continuation, {}};
  }

  void clear() {
    trees_.clear();
    wanted_.clear();
    noise_.clear();
    noise_index_.clear();
  }
  void expect_tree_room(int64_t batch, int64_t prefix, int64_t nodes) const {
    expect_range("batch", batch, 0, batch_ - 1);
    expect_range("slots before a tree", prefix, 0, slots_ - nodes);
  }
  void all_wanted(int64_t count) {
    for (int64_t n = 0; n < count; ++n) wanted_.push_back(static_cast<int32_t>(n));
  }

  void run(const int64_t* tokens, const int64_t* positions, int64_t count, void* logits,
           int32_t* guesses, int threads) {
    int64_t positions_end = positions_ ? positions_ : int64_t{1} << 60;
    for (const RotaryTables& tables : pass_.rotaries)
      positions_end = std::min(positions_end, tables.positions);
    for (int64_t n = 0; n < count; ++n) {
      expect_range("token", tokens[n], 0, vocabulary_ - 1);
      expect_range("position", positions[n], 0, positions_end - 1);
    }
    const Rows rows = trees_.rows(tokens, positions);
    py::gil_scoped_release release;
    pass_.run(rows, noise(), wanted_.data(), static_cast<int64_t>(wanted_.size()), logits, guesses,
              threads);
  }

  Noise noise() const {
    return {static_cast<int64_t>(noise_.size()), noise_.data(), noise_index_.data()};
  }

  ForwardPass pass_;
  DType number_;
  std::string weights_, isa_;
  py::list kept_, adapter_;
  py::object cache_;
  int64_t vocabulary_ = 0, positions_ = 0, batch_ = 0, slots_ = 0;
  TreeRows trees_;
  std::vector<int32_t> wanted_, noise_, noise_index_;
};

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
  py::class_<BoundPass>(m, "ForwardPass")
      .def(py::init<const std::string&, const std::string&>())
      .def("set_embedding", &BoundPass::set_embedding)
      .def("add_rotary", &BoundPass::add_rotary)
      .def("set_rotary", &BoundPass::set_rotary)
      .def("add_layer", &BoundPass::add_layer)
      .def("set_head", &BoundPass::set_head)
      .def("set_screen", &BoundPass::set_screen)
      .def("set_adapter", &BoundPass::set_adapter)
      .def("set_cache", &BoundPass::set_cache)
      .def("step", &BoundPass::step)
      .def("logits", &BoundPass::logits)
      .def("read", &BoundPass::read)
      .def("commit", &BoundPass::commit);
  define_layer_ops(m);
}

}  // namespace msn

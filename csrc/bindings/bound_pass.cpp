#include "bindings/bound_pass.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>

#include "bindings/define.h"

namespace py = pybind11;

namespace msn {

BoundPass::BoundPass(const std::string& weights, const std::string& isa)
    : pass_(weights_named(weights), kernels_named(isa)),
      number_(number_of(pass_.kind)),
      weights_(weights),
      isa_(isa) {}

void BoundPass::set_embedding(py::handle table, int64_t hidden, double scale,
                              py::handle positions) {
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

int BoundPass::add_rotary(int64_t turned) {
  RotaryTables tables;
  tables.turned = turned;
  pass_.rotaries.push_back(tables);
  return static_cast<int>(pass_.rotaries.size()) - 1;
}
void BoundPass::set_rotary(int which, py::handle cosines, py::handle sines) {
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

void BoundPass::add_layer(const py::dict& d) {
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

void BoundPass::set_head(py::handle final_norm, py::handle head, double scale, double softcap) {
  pass_.norm = norm(final_norm);
  pass_.head = linear(head);
  pass_.logit_scale = scale;
  pass_.logit_softcap = softcap;
  if (pass_.embed.table == nullptr) {
    pass_.embed.packed = pass_.head.packed;
    vocabulary_ = pass_.head.packed.outputs;
  }
}

void BoundPass::set_screen(py::handle screen, py::handle dense) {
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

void BoundPass::set_adapter(const py::list& layers) {
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

void BoundPass::set_cache(py::handle keys, py::handle values, int64_t batch, int64_t slots) {
  if (slots % kCacheWidth) refuse("slots is ", slots, "; expected a multiple of 16");
  const Argument k = borrow_cpu("keys", keys), v = borrow_cpu("values", values);
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

void BoundPass::step(py::handle tokens, py::handle positions, py::handle ancestors,
                     py::handle prefix, py::handle logits, const std::optional<py::tuple>& verified,
                     int64_t tails, int threads) {
  const Argument ids = borrow_cpu("tokens", tokens), at = borrow_cpu("positions", positions),
                 bits = borrow_cpu("ancestors", ancestors), before = borrow_cpu("prefix", prefix);
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
  const Trees trees{batch,
                    nodes,
                    ids.as<int64_t>(),
                    at.as<int64_t>(),
                    bits.as<uint64_t>(),
                    kinds == 1,
                    before.as<int64_t>()};
  check(trees, tails, out, static_cast<int32_t*>(verify.guesses.data), threads);
  if (verified) verify.from_guesses_on_cpu();
}

void BoundPass::check(const Trees& trees, int64_t tails, void* logits, int32_t* guesses,
                      int threads) {
  const int64_t nodes = trees.nodes, count = trees.batch * nodes;
  clear();
  for (int64_t b = 0; b < trees.batch; ++b) {
    const int64_t before = trees.alike ? 0 : b * nodes * words_for(nodes);
    expect_tree_room(b, trees.prefix[b], nodes);
    trees_.add_tree(b, trees.prefix[b], nodes, trees.ancestors + before);
  }
  expect_range("tails", tails, 0, nodes);
  for (int64_t n = 0; n < count; ++n) {
    const bool is_noise = n % nodes >= nodes - tails;
    noise_index_.push_back(is_noise ? static_cast<int32_t>(noise_.size()) : -1);
    if (is_noise) noise_.push_back(static_cast<int32_t>(n));
    wanted_.push_back(static_cast<int32_t>(n));
  }
  run(trees.tokens, trees.positions, count, logits, guesses, threads);
}

void BoundPass::logits(py::handle logits, int threads) {
  const Argument out = borrow_cpu("logits", logits);
  const int64_t count = static_cast<int64_t>(wanted_.size());
  expect_dense(out, number_, {out.shape[0], out.shape[1], pass_.head.packed.outputs}, out);
  if (!count || out.shape[0] * out.shape[1] != count)
    refuse("logits has ", out.shape[0] * out.shape[1], " rows; expected the step's, ", count);
  py::gil_scoped_release release;
  pass_.logits_of(noise(), wanted_.data(), count, out.data, threads);
}

void BoundPass::read(int64_t batch, py::handle tokens, py::handle positions, int64_t start,
                     int64_t keep, py::handle logits, int threads) {
  const Argument ids = borrow_cpu("tokens", tokens), at = borrow_cpu("positions", positions),
                 out = borrow_cpu("logits", logits);
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

void BoundPass::commit(py::handle prefix, py::handle path, py::handle accepted) {
  const Argument before = borrow_cpu("prefix", prefix), nodes = borrow_cpu("path", path),
                 count = borrow_cpu("accepted", accepted);
  const int64_t batch = before.shape[0];
  expect_dense(before, DType::kInt64, {batch}, before);
  expect_dims(nodes, 2);
  expect_dense(nodes, DType::kInt64, {batch, nodes.shape[1]}, before);
  expect_dense(count, DType::kInt64, {batch}, before);
  for (int64_t b = 0; b < batch; ++b)
    pass_.commit(b, before.as<int64_t>()[b], nodes.as<int64_t>() + b * nodes.shape[1],
                 count.as<int64_t>()[b]);
}

Argument BoundPass::take(const char* name, py::handle tensor) {
  const Argument taken = borrow_cpu(name, tensor);
  expect_contiguous(taken);
  kept_.append(tensor);
  return taken;
}

Norm BoundPass::norm(py::handle from) {
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

LinearWeights BoundPass::linear(py::handle from) {
  const auto [packed, stored, outputs, inputs, bias] =
      from.cast<std::tuple<py::object, std::string, int64_t, int64_t, py::object>>();
  LinearWeights weights;
  weights.packed = {take("packed", packed).data, outputs, inputs, is_coded(stored_named(stored))};
  if (bias.is_none()) return weights;
  const Argument b = take("bias", bias);
  expect_dense(b, number_, {outputs}, b);
  weights.bias = b.data;
  return weights;
}

void BoundPass::adapt(LinearWeights& weights, const py::dict& of, const char* name,
                      int64_t halves) {
  weights.a = weights.b = {};
  if (!of.contains(name)) return;
  const auto [a, rank, b, inputs, first] =
      of[name].cast<std::tuple<py::object, int64_t, py::object, int64_t, py::object>>();
  const std::string kind = pass_.kind == Weights::kInt8 ? "bfloat16" : weights_;
  const int64_t outputs = weights.packed.outputs, width = pass_.kernels.width;
  const int64_t panels = (outputs / halves + width - 1) / width * halves;
  const Argument down = borrow_cpu("adapter", a), up = borrow_cpu("adapter", b),
                 begin = borrow_cpu("adapter's first inputs", first);
  for (const Argument* each : {&down, &up, &begin}) expect_contiguous(*each);
  expect_dense(down, kind == "bfloat16" ? DType::kBFloat16 : number_,
               {rank, narrow_stride(weights.packed.inputs)}, begin);
  expect_shape(up, {packed_bytes(kind, isa_, outputs, inputs, halves)});
  expect_dense(begin, DType::kInt32, {panels}, begin);
  for (int64_t p = 0; p < panels; ++p) {
    expect_range("an adapter's first input", begin.as<int32_t>()[p], 0, rank - inputs);
    if (begin.as<int32_t>()[p] % 2) refuse("an adapter's first input is odd; expected an even one");
  }
  weights.a = {down.data, rank, weights.packed.inputs};
  weights.b = {up.data, outputs, inputs};
  weights.first = begin.as<int32_t>();
}

void* BoundPass::logits_for(py::handle logits, const Argument& tokens) const {
  const Argument out = borrow_cpu("logits", logits);
  const int64_t batch = tokens.shape[0], nodes = tokens.shape[1];
  expect_dense(out, number_, {batch, nodes, pass_.head.packed.outputs}, tokens);
  return out.data;
}

VerifyLogits BoundPass::verification(const Argument& tokens, const py::tuple& from) const {
  if (py::len(from) != 7) refuse("verified has ", py::len(from), " tensors; expected 7");
  const int64_t batch = tokens.shape[0], nodes = tokens.shape[1];
  const Argument parents = borrow_cpu("parents", from[0]), guesses = borrow_cpu("guesses", from[1]),
                 targets = borrow_cpu("targets", from[2]),
                 accept_length = borrow_cpu("accept_length", from[3]),
                 path = borrow_cpu("path", from[4]), bonus = borrow_cpu("bonus", from[5]),
                 continuation = borrow_cpu("continuation", from[6]);
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

void BoundPass::clear() {
  trees_.clear();
  wanted_.clear();
  noise_.clear();
  noise_index_.clear();
}
void BoundPass::expect_tree_room(int64_t batch, int64_t prefix, int64_t nodes) const {
  expect_range("batch", batch, 0, batch_ - 1);
  expect_range("slots before a tree", prefix, 0, slots_ - nodes);
}

void BoundPass::run(const int64_t* tokens, const int64_t* positions, int64_t count, void* logits,
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

Noise BoundPass::noise() const {
  return {static_cast<int64_t>(noise_.size()), noise_.data(), noise_index_.data()};
}

void define_forward_pass(py::module_& m) {
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
      .def("commit", py::overload_cast<py::handle, py::handle, py::handle>(&BoundPass::commit));
}

}  // namespace msn

// The bindings of the stages in layers_ops.h, one by one: what ForwardPass runs, as ops.
#include <algorithm>
#include <string>
#include <vector>

#include "bindings/checks.h"
#include "bindings/define.h"
#include "bindings/layers.h"
#include "cpu/layers/team.h"

namespace py = pybind11;

namespace msn {

namespace {

// Calls stage(t, threads, scratch) on a team of threads.
template <typename Stage>
void on_team(int threads, Stage stage) {
  py::gil_scoped_release release;
  std::vector<Scratch> scratch(std::max(threads, 1));
  with_team(std::max(threads, 1), [&](int t, int team, Barrier&) { stage(t, team, scratch[t]); });
}

// `weight`, and `bias` where there is one, of `size` numbers.
Norm norm_of(const std::string& kind, const OptionalArgument& weight, const OptionalArgument& bias,
             double eps, int64_t size, DType number, const Tensor& like) {
  Norm norm;
  norm.kind = norm_named("norm", kind);
  if (norm.kind == Norm::kNone) return norm;
  if (!weight.data) refuse(weight.name, " is missing");
  expect_finite("eps", eps);
  expect_dense(weight, number, {size}, like);
  if (bias.data) expect_dense(bias, number, {size}, like);
  norm.weight = weight.data;
  norm.bias = bias.data;
  norm.eps = eps;
  return norm;
}

Packed packed_of(const Argument& packed, const std::string& weights, const std::string& isa,
                 int64_t outputs, int64_t inputs, int64_t halves) {
  expect_range("outputs", outputs, halves, int64_t{1} << 30);
  if (outputs % halves) refuse("outputs is ", outputs, "; expected gates and as many ups");
  expect_packed(packed, weights, isa, outputs, inputs, halves);
  expect_cpu(packed);
  if (reinterpret_cast<uintptr_t>(packed.data) % 64) refuse("packed is not aligned to 64 bytes");
  return {packed.data, outputs, inputs, is_coded(stored_named(weights))};
}

// ---- linear layers, norms, embeddings ----------------------------------------------------------

void packed_linear(const Argument& x, const Argument& packed, std::string weights, int64_t outputs,
                   const OptionalArgument& bias, std::string norm,
                   const OptionalArgument& norm_weight, const OptionalArgument& norm_bias,
                   double eps, std::string epilogue, std::string activation, double scale,
                   double softcap, const OptionalArgument& pick, std::string isa, int threads,
                   const Argument& out) {
  constexpr const char* kEpilogues[] = {"store", "add", "activate", "gate", "logits"};
  const Weights kind = stored_named(weights);
  const DType number = number_of(kind);
  const Kernels& kernels = kernels_named(isa);
  expect_dims(x, 2);
  expect_cpu(x);
  Linear stage;
  stage.epilogue = static_cast<Linear::Epilogue>(one_of("epilogue", epilogue, kEpilogues));
  stage.activation = activation_named(activation);
  const int64_t rows = x.shape[0], inputs = x.shape[1];
  const int64_t halves = stage.epilogue == Linear::kGate ? 2 : 1;
  expect_dense(x, number, {rows, inputs}, x);
  stage.weights = packed_of(packed, weights, isa, outputs, inputs, halves);
  if (bias.data) expect_dense(bias, number, {outputs}, x);
  expect_finite("softcap", softcap);
  stage.rows = rows;
  std::vector<int32_t> picked;
  if (pick.data) {
    expect_dims(pick, 1);
    expect_dense(pick, DType::kInt64, {pick.shape[0]}, x);
    for (int64_t i = 0; i < pick.shape[0]; ++i) {
      expect_range("pick", pick.as<int64_t>()[i], 0, rows - 1);
      picked.push_back(static_cast<int32_t>(pick.as<int64_t>()[i]));
    }
    stage.rows = pick.shape[0];
    stage.pick = picked.data();
  }
  expect_dense(out, number, {stage.rows, outputs / halves}, x);
  if (stage.rows == 0) return;
  stage.x = x.data;
  stage.x_stride = inputs;
  stage.norm = norm_of(norm, norm_weight, norm_bias, eps, inputs, number, x);
  stage.bias = bias.data;
  stage.scale = scale;
  stage.softcap = softcap;
  stage.out = out.data;
  stage.out_stride = outputs / halves;
  on_team(threads, [&](int t, int team, Scratch& scratch) {
    kernels.linear(kind, stage, t, team, scratch);
  });
}

void add_norm(const Argument& h, const Argument& x, std::string norm,
              const OptionalArgument& norm_weight, const OptionalArgument& norm_bias, double eps,
              double scale, std::string isa, int threads) {
  const Kernels& kernels = kernels_named(isa);
  expect_dims(h, 2);
  expect_cpu(h);
  if (h.dtype != DType::kFloat64) expect_dtype(h, DType::kFloat32);
  expect_dense(h, h.dtype, {h.shape[0], h.shape[1]}, h);
  expect_dense(x, h.dtype, {h.shape[0], h.shape[1]}, h);
  const Weights kind = h.dtype == DType::kFloat64 ? Weights::kFloat64 : Weights::kFloat32;
  if (norm == "none") refuse("norm is 'none'; expected one of rms, layer");
  AddNorm stage;
  stage.rows = h.shape[0];
  stage.size = h.shape[1];
  stage.x = x.data;
  stage.norm = norm_of(norm, norm_weight, norm_bias, eps, stage.size, h.dtype, h);
  stage.scale = scale;
  stage.h = h.data;
  on_team(threads, [&](int t, int team, Scratch&) { kernels.add_norm(kind, stage, t, team); });
}

void embed_rows(const Argument& tokens, const Argument& table, std::string weights, int64_t size,
                int64_t vocabulary, double scale, const OptionalArgument& positions,
                const OptionalArgument& position_table, std::string isa, int threads,
                const Argument& out) {
  const Weights kind = weights_named(weights);
  const Kernels& kernels = kernels_named(isa);
  expect_dims(tokens, 1);
  expect_cpu(tokens);
  const int64_t count = tokens.shape[0];
  expect_dense(tokens, DType::kInt64, {count}, tokens);
  Embed stage;
  if (table.ndim == 1) {
    stage.packed = packed_of(table, weights, isa, vocabulary, size, 1);
  } else {
    expect_float(table);
    expect_dense(table, table.dtype, {vocabulary, size}, tokens);
    stage.table = table.data;
    stage.dtype = static_cast<int>(table.dtype);
  }
  for (int64_t n = 0; n < count; ++n)
    expect_range("token", tokens.as<int64_t>()[n], 0, vocabulary - 1);
  if (position_table.data) {
    expect_dims(position_table, 2);
    expect_dense(position_table, number_of(kind), {position_table.shape[0], size}, tokens);
    if (!positions.data) refuse(positions.name, " is missing");
    expect_dense(positions, DType::kInt64, {count}, tokens);
    for (int64_t n = 0; n < count; ++n)
      expect_range("position", positions.as<int64_t>()[n], 0, position_table.shape[0] - 1);
  }
  expect_dense(out, number_of(kind), {count, size}, tokens);
  Rows rows;
  rows.count = count;
  rows.tokens = tokens.as<int64_t>();
  rows.positions = positions.as<int64_t>();
  stage.rows = &rows;
  stage.scale = scale;
  stage.positions = position_table.data;
  stage.size = size;
  stage.out = out.data;
  on_team(threads, [&](int t, int team, Scratch&) { kernels.embed(kind, stage, t, team); });
}

// ---- queries, keys and values ------------------------------------------------------------------

// The nodes of trees, each in front of its batch row's cache, and that cache.
struct Cached {
  Weights kind;
  DType number;
  Heads heads;
  Cache cache;
  int64_t batch, nodes;
  TreeRows trees;

  Cached(const Argument& qkv, const Argument& keys, const Argument& values, const Argument& prefix,
         const Argument& ancestors, int64_t query, int64_t kv) {
    expect_dims(qkv, 3);
    expect_cpu(qkv);
    batch = qkv.shape[0], nodes = qkv.shape[1];
    expect_nodes(qkv, nodes);
    expect_range("kv_heads", kv, 1, 1 << 16);
    expect_range("heads", query, kv, 1 << 16);
    if (query % kv) refuse("heads is ", query, "; expected a multiple of kv_heads, ", kv);
    const int64_t all = query + 2 * kv, size = qkv.shape[2] / all;
    expect_float(keys);
    kind = keys.dtype == DType::kFloat64   ? Weights::kFloat64
           : keys.dtype == DType::kFloat32 ? Weights::kFloat32
           : keys.dtype == DType::kFloat16 ? Weights::kFloat16
                                           : Weights::kBFloat16;
    number = number_of(kind);
    expect_dense(qkv, number, {batch, nodes, std::max<int64_t>(size, 1) * all}, qkv);
    expect_dims(keys, 3);
    const int64_t key = kind == Weights::kBFloat16 ? (size + 1) / 2 * 2 : size;  // pairs
    const int64_t slots = keys.shape[2] / key / kCacheWidth * kCacheWidth;
    const int64_t padded = (size + kCacheWidth - 1) / kCacheWidth * kCacheWidth;
    expect_dense(keys, keys.dtype, {batch, kv, slots * key}, qkv);
    expect_dense(values, keys.dtype, {batch, kv, slots * padded}, qkv);
    expect_dense(prefix, DType::kInt64, {batch}, qkv);
    const int64_t words = words_for(static_cast<int>(nodes));
    if (ancestors.ndim == 2)
      expect_dense(ancestors, DType::kInt64, {nodes, words}, qkv);
    else
      expect_dense(ancestors, DType::kInt64, {batch, nodes, words}, qkv);
    heads = {query, kv, size};
    cache = {keys.data, values.data, slots};
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t before = prefix.as<int64_t>()[b];
      expect_range("prefix", before, 0, slots - nodes);
      const int64_t of_tree = ancestors.ndim == 3 ? b * nodes * words : 0;
      trees.add_tree(b, before, nodes, ancestors.as<uint64_t>() + of_tree);
    }
  }
};

void rotary_write(const Argument& qkv, const Argument& keys, const Argument& values,
                  const Argument& prefix, const Argument& ancestors, const Argument& positions,
                  int64_t query, int64_t kv, const OptionalArgument& cosines,
                  const OptionalArgument& sines, std::string norm, const OptionalArgument& q_weight,
                  const OptionalArgument& q_bias, const OptionalArgument& k_weight,
                  const OptionalArgument& k_bias, double eps, bool norm_each_head, std::string isa,
                  int threads) {
  const Kernels& kernels = kernels_named(isa);
  const Cached cached(qkv, keys, values, prefix, ancestors, query, kv);
  const int64_t size = cached.heads.size;
  expect_dense(positions, DType::kInt64, {cached.batch, cached.nodes}, qkv);
  RotaryWrite stage;
  if (cosines.data) {
    expect_dims(cosines, 2);
    if (!sines.data) refuse("sines is missing");
    const int64_t known = cosines.shape[0], half = cosines.shape[1];
    expect_range("half of the cosines", half, 0, size / 2);
    expect_dense(cosines, cached.number, {known, half}, qkv);
    expect_dense(sines, cached.number, {known, half}, qkv);
    for (int64_t n = 0; n < cached.batch * cached.nodes; ++n)
      expect_range("positions", positions.as<int64_t>()[n], 0, known - 1);
    stage.turned = 2 * half;
    stage.cosines = cosines.data;
    stage.sines = sines.data;
  }
  const int64_t q_size = norm_each_head ? size : size * query;
  const int64_t k_size = norm_each_head ? size : size * kv;
  stage.q_norm = norm_of(norm, q_weight, q_bias, eps, q_size, cached.number, qkv);
  stage.k_norm = norm_of(norm, k_weight, k_bias, eps, k_size, cached.number, qkv);
  const Rows rows = cached.trees.rows(nullptr, positions.as<int64_t>());
  stage.rows = &rows;
  stage.heads = cached.heads;
  stage.qkv = qkv.data;
  stage.norm_each_head = norm_each_head;
  stage.cache = cached.cache;
  on_team(threads,
          [&](int t, int team, Scratch&) { kernels.rotary_write(cached.kind, stage, t, team); });
}

void packed_attention(const Argument& qkv, const Argument& keys, const Argument& values,
                      const Argument& prefix, const Argument& ancestors, int64_t query, int64_t kv,
                      double scale, int64_t window, double softcap, std::string isa, int threads,
                      const Argument& out) {
  const Kernels& kernels = kernels_named(isa);
  const Cached cached(qkv, keys, values, prefix, ancestors, query, kv);
  expect_range("window", window, 0, int64_t{1} << 40);
  expect_finite("softcap", softcap);
  expect_dense(out, cached.number, {cached.batch, cached.nodes, query * cached.heads.size}, qkv);
  const Rows rows = cached.trees.rows(nullptr, nullptr);
  CachedAttention stage;
  stage.rows = &rows;
  stage.heads = cached.heads;
  stage.qkv = qkv.data;
  stage.scale = scale;
  stage.softcap = softcap;
  stage.window = window;
  stage.cache = cached.cache;
  stage.out = out.data;
  on_team(threads, [&](int t, int team, Scratch& scratch) {
    kernels.attention(cached.kind, stage, t, team, scratch);
  });
}

}  // namespace

void define_layer_ops(py::module_& m) {
  define(m, "packed_linear", &packed_linear,
         {"x", "packed", "weights", "outputs", "bias", "norm", "norm_weight", "norm_bias", "eps",
          "epilogue", "activation", "scale", "softcap", "pick", "isa", "threads", "out"});
  define(m, "add_norm", &add_norm,
         {"h", "x", "norm", "norm_weight", "norm_bias", "eps", "scale", "isa", "threads"});
  define(m, "embed_rows", &embed_rows,
         {"tokens", "table", "weights", "size", "vocabulary", "scale", "positions",
          "position_table", "isa", "threads", "out"});
  define(m, "rotary_write", &rotary_write,
         {"qkv", "keys", "values", "prefix", "ancestors", "positions", "heads", "kv_heads",
          "cosines", "sines", "norm", "q_weight", "q_bias", "k_weight", "k_bias", "eps",
          "norm_each_head", "isa", "threads"});
  define(m, "packed_attention", &packed_attention,
         {"qkv", "keys", "values", "prefix", "ancestors", "heads", "kv_heads", "scale", "window",
          "softcap", "isa", "threads", "out"});
}

}  // namespace msn

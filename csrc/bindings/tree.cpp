// The bindings of the ops in tree_ops.h.
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "best_first.h"
#include "bindings/checks.h"
#include "bindings/define.h"
#include "tree.h"
#include "tree_ops.h"

namespace py = pybind11;

namespace msn {

namespace {

void tree_ancestors(const Argument& parents, const Argument& ancestors, const Argument& depth) {
  if (parents.ndim != 1 && parents.ndim != 2)
    refuse("parents has shape ", shape_text(parents), "; expected [N] or [B, N]");
  const int64_t nodes = parents.shape[parents.ndim - 1];
  const int64_t batch = parents.ndim == 2 ? parents.shape[0] : 1;
  expect_nodes(parents, nodes);
  expect_tree(parents, DType::kInt32, batch, nodes, parents);
  expect_tree(depth, DType::kInt32, batch, nodes, parents);
  expect_dtype(ancestors, DType::kInt64);
  expect_contiguous(ancestors);
  run(parents, TreeAncestors{parents, ancestors, depth});
}

void tree_attention(const Argument& q, const Argument& k, const Argument& v,
                    const Argument& lengths, const OptionalArgument& offsets,
                    const Argument& ancestors, const OptionalArgument& sinks, double scale,
                    int64_t window, double softcap, const Argument& out,
                    const OptionalArgument& partial) {
  expect_dims(q, 4);
  expect_dims(k, 4);
  expect_dims(v, 4);
  const int64_t batch = q.shape[0], heads = q.shape[1], nodes = q.shape[2], dim = q.shape[3];
  const int64_t kv_heads = k.shape[1], slots = k.shape[2], v_dim = v.shape[3];
  expect_nodes(q, nodes);
  expect_range("head size of q", dim, 1, 256);
  expect_range("head size of v_cache", v_dim, 1, 256);
  expect_float(q);
  expect_dtype(k, q.dtype);
  expect_dtype(v, q.dtype);
  expect_device(k, q);
  expect_device(v, q);
  if (heads < 1) refuse("q has shape ", shape_text(q), "; expected at least one head");
  if (kv_heads < 1 || heads % kv_heads)
    refuse("k_cache has ", kv_heads, " heads; expected a divisor of q's ", heads);
  expect_shape(k, {batch, kv_heads, slots, dim});
  expect_shape(v, {batch, kv_heads, slots, v_dim});
  expect_dense(lengths, DType::kInt64, {batch}, q);
  if (offsets.data) expect_dense(offsets, DType::kInt64, {batch}, q);
  if (ancestors.ndim == 2)
    expect_dense(ancestors, DType::kInt64, {nodes, words_for(static_cast<int>(nodes))}, q);
  else
    expect_dense(ancestors, DType::kInt64, {batch, nodes, words_for(static_cast<int>(nodes))}, q);
  if (sinks.data) {
    expect_dtype(sinks, q.dtype);
    expect_shape(sinks, {heads});
    expect_contiguous(sinks);
    expect_device(sinks, q);
  }
  if (window < 0) refuse("window is ", window, "; expected 0 (none) or more");
  if (!(softcap >= 0)) refuse("softcap is ", softcap, "; expected 0 (none) or more");
  expect_dtype(out, q.dtype);
  expect_shape(out, {batch, nodes, heads, v_dim});
  expect_contiguous(out);
  AttentionSpace space;
  if (partial.data) {
    expect_dense(partial, DType::kFloat32, {partial.shape[0]}, q);
    space = {partial.as<float>(), partial.shape[0]};
  }
  if (batch == 0) return;
  run(q, TreeAttention{q, k, v, lengths, offsets, ancestors, sinks, scale, window, softcap, out,
                       space});
}

// Floats that tree_attention wants for these tensors on a GPU, to split the keys over blocks.
int64_t space_wanted(const Argument& q, const Argument& k, const Argument& v) {
  for (const Argument* t : {&q, &k, &v}) expect_dims(*t, 4);
#ifdef MSN_WITH_CUDA
  if (q.device == Device::kCUDA && q.item_size == 2 && k.shape[1] > 0)
    return attention_space(q, k, v).floats;
#endif
  return 0;
}

void verify_tree(const Argument& tokens, const Argument& targets, const Argument& parents,
                 const Argument& accept_length, const Argument& path, const Argument& bonus,
                 const Argument& continuation) {
  expect_dims(tokens, 2);
  const int64_t batch = tokens.shape[0], nodes = tokens.shape[1];
  expect_nodes(tokens, nodes);
  expect_dense(tokens, DType::kInt64, {batch, nodes}, tokens);
  expect_dense(targets, DType::kInt64, {batch, nodes}, tokens);
  expect_tree(parents, DType::kInt32, batch, nodes, tokens);
  expect_dense(accept_length, DType::kInt64, {batch}, tokens);
  expect_dense(path, DType::kInt64, {batch, nodes}, tokens);
  expect_dense(bonus, DType::kInt64, {batch}, tokens);
  expect_dense(continuation, DType::kInt64, {batch, nodes}, tokens);
  run(tokens, VerifyTree{tokens, targets, parents, accept_length, path, bonus, continuation});
}

void verify_logits(const Argument& logits, const Argument& tokens, const Argument& parents,
                   const Argument& guesses, const Argument& targets, const Argument& accept_length,
                   const Argument& path, const Argument& bonus, const Argument& continuation,
                   const OptionalArgument& partial, const OptionalArgument& arrived) {
  expect_dims(tokens, 2);
  const int64_t batch = tokens.shape[0], nodes = tokens.shape[1];
  expect_nodes(tokens, nodes);
  expect_dense(tokens, DType::kInt64, {batch, nodes}, tokens);
  expect_tree(parents, DType::kInt32, batch, nodes, tokens);
  expect_logits(logits);
  expect_shape(logits, {batch * nodes, logits.shape[1]});
  expect_device(logits, tokens);
  expect_dense(guesses, DType::kInt32, {batch * nodes, kGuesses}, tokens);
  expect_dense(targets, DType::kInt64, {batch, nodes}, tokens);
  expect_dense(accept_length, DType::kInt64, {batch}, tokens);
  expect_dense(path, DType::kInt64, {batch, nodes}, tokens);
  expect_dense(bonus, DType::kInt64, {batch}, tokens);
  expect_dense(continuation, DType::kInt64, {batch, nodes}, tokens);
  const BlockSpace space = space_in(partial, arrived, tokens);
  if (batch == 0) return;
  run(tokens, VerifyLogits{logits, tokens, parents, guesses, targets, accept_length, path, bonus,
                           continuation, space});
}

void commit_kv(const std::vector<py::object>& objects, const Argument& lengths,
               const Argument& path, const Argument& accept_length) {
  expect_dims(path, 2);
  const int64_t batch = path.shape[0];
  expect_dense(path, DType::kInt64, {batch, path.shape[1]}, path);
  expect_dense(lengths, DType::kInt64, {batch}, path);
  expect_dense(accept_length, DType::kInt64, {batch}, path);
  CommitKV op{{}, lengths, path, accept_length};
  op.caches.reserve(objects.size());
  for (size_t i = 0; i < objects.size(); ++i) {
    const std::string name = "caches[" + std::to_string(i) + "]";
    const Argument cache = borrow(name.c_str(), objects[i]);
    expect_dims(cache, 4);
    expect_device(cache, path);
    if (cache.shape[0] != batch)
      refuse(name, " has batch size ", cache.shape[0], "; expected ", batch);
    op.caches.push_back(cache);
  }
  if (objects.empty()) return;
  run(path, op);
}

void place_tree(const Argument& tokens, const Argument& history, const Argument& lengths,
                const Argument& offsets, const Argument& last_position, const Argument& depth,
                int64_t vocabulary, const Argument& positions, const Argument& prefix) {
  expect_dims(tokens, 2);
  expect_dims(history, 2);
  const int64_t batch = tokens.shape[0], nodes = tokens.shape[1];
  expect_nodes(tokens, nodes);
  expect_dtype(tokens, DType::kInt64);
  if (batch > 1 && tokens.strides[0] == 0)
    refuse("tokens has rows that lie in one place; expected a place for every root");
  expect_dense(history, DType::kInt64, {batch, history.shape[1]}, tokens);
  expect_dense(lengths, DType::kInt64, {batch}, tokens);
  expect_dense(offsets, DType::kInt64, {batch}, tokens);
  expect_dense(last_position, DType::kInt64, {batch}, tokens);
  expect_tree(depth, DType::kInt32, batch, nodes, tokens);
  if (vocabulary < 1) refuse("vocabulary is ", vocabulary, "; expected 1 or more");
  expect_dense(positions, DType::kInt64, {batch, nodes}, tokens);
  expect_dense(prefix, DType::kInt64, {batch}, tokens);
  run(tokens, PlaceTree{tokens, history, lengths, offsets, last_position, depth, vocabulary,
                        positions, prefix});
}

void advance_text(const Argument& history, const Argument& lengths, const Argument& remaining,
                  const Argument& targets, const Argument& path, const Argument& accept_length,
                  const Argument& ends, int64_t vocabulary, const Argument& gained,
                  const Argument& status) {
  expect_dims(history, 2);
  expect_dims(targets, 2);
  expect_dims(ends, 1);
  const int64_t batch = history.shape[0], nodes = targets.shape[1];
  expect_nodes(targets, nodes);
  expect_dense(history, DType::kInt64, {batch, history.shape[1]}, history);
  expect_dense(lengths, DType::kInt64, {batch}, history);
  expect_dense(remaining, DType::kInt64, {batch}, history);
  expect_dense(targets, DType::kInt64, {batch, nodes}, history);
  expect_dense(path, DType::kInt64, {batch, nodes}, history);
  expect_dense(accept_length, DType::kInt64, {batch}, history);
  expect_dense(ends, DType::kInt64, {ends.shape[0]}, history);
  expect_range("number of ends", ends.shape[0], 0, 1 << 20);
  expect_dense(gained, DType::kInt64, {batch, nodes}, history);
  expect_dense(status, DType::kInt64, {3, batch}, history);
  run(history, AdvanceText{history, lengths, remaining, targets, path, accept_length, ends,
                           vocabulary, gained, status});
}

}  // namespace

void define_tree(py::module_& m) {
  define(m, "tree_ancestors", &tree_ancestors, {"parents", "ancestors", "depth"});
  define(m, "tree_attention", &tree_attention,
         {"q", "k_cache", "v_cache", "lengths", "offsets", "ancestors", "sinks", "scale", "window",
          "softcap", "out", "partial"});
  define(m, "attention_space", &space_wanted, {"q", "k_cache", "v_cache"});
  define(m, "verify_tree", &verify_tree,
         {"tokens", "targets", "parents", "accept_length", "path", "bonus", "continuation"});
  define(m, "verify_logits", &verify_logits,
         {"logits", "tokens", "parents", "guesses", "targets", "accept_length", "path", "bonus",
          "continuation", "partial", "arrived"});
  define(m, "commit_kv", &commit_kv, {"caches", "lengths", "path", "accept_length"});
  define(m, "place_tree", &place_tree,
         {"tokens", "history", "lengths", "offsets", "last_position", "depth", "vocabulary",
          "positions", "prefix"});
  define(m, "advance_text", &advance_text,
         {"history", "lengths", "remaining", "targets", "path", "accept_length", "ends",
          "vocabulary", "gained", "status"});

  // The constants that Python shares, from the headers that own them.
  m.attr("MAX_NODES") = kMaxNodes;
}

}  // namespace msn

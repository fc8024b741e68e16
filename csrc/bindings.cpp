// The one file that knows Python: borrows each tensor (DLPack C exchange API, no copy, no
// libtorch), checks what came against what the op takes, and calls the backend of its device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <string>
#include <vector>

#include "best_first.h"
#include "ops.h"
#include "tree.h"

namespace py = pybind11;

namespace {

using msn::Device;
using msn::DType;
using msn::Tensor;

// ---- DLPack 1.x, the parts used here (dmlc/dlpack, dlpack.h: a stable C ABI) -----------------

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  void* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*dltensor_from_py_object)(void* object, DLTensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** stream);
};

constexpr int32_t kDLCPU = 1, kDLCUDA = 2;

const DLPackExchangeAPI& exchange() {
  static const DLPackExchangeAPI* api = [] {
    const py::object tensor_type = py::module_::import("torch").attr("Tensor");
    for (const char* name : {"__dlpack_c_exchange_api__", "__c_dlpack_exchange_api__"}) {
      if (!py::hasattr(tensor_type, name)) continue;
      const py::object capsule = tensor_type.attr(name);
      auto* found = static_cast<const DLPackExchangeAPI*>(
          PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (!found) throw py::error_already_set();
      if (found->major == 1 && found->dltensor_from_py_object) return found;
    }
    throw py::import_error(
        "msn_ext needs torch >= 2.11 (its tensors must offer the DLPack C exchange API)");
  }();
  return *api;
}

DType dtype_of(const DLTensor& t) {
  switch (t.code << 8 | t.bits) {
    case 0 << 8 | 32: return DType::kInt32;
    case 0 << 8 | 64: return DType::kInt64;
    case 2 << 8 | 16: return DType::kFloat16;
    case 2 << 8 | 32: return DType::kFloat32;
    case 2 << 8 | 64: return DType::kFloat64;
    case 4 << 8 | 16: return DType::kBFloat16;
    default: return DType::kOther;
  }
}

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

// ---- checks: each names the argument, what came, what was expected ---------------------------

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw py::value_error(message.str());
}

std::string shape_text(const int64_t* shape, int ndim) {
  std::ostringstream text;
  text << '[';
  for (int i = 0; i < ndim; ++i) text << (i ? ", " : "") << shape[i];
  text << ']';
  return text.str();
}
std::string shape_text(const Tensor& t) { return shape_text(t.shape, t.ndim); }

Tensor borrow(const char* name, py::handle object) {
  DLTensor source{};
  if (exchange().dltensor_from_py_object(object.ptr(), &source) != 0) {
    PyErr_Clear();
    refuse(name, " is a ", std::string(py::str(py::type::of(object))),
           "; expected a dense torch.Tensor");
  }
  if (source.ndim > msn::kMaxDims)
    refuse(name, " has ", source.ndim, " dimensions; expected at most ", msn::kMaxDims);
  if (source.device_type != kDLCPU && source.device_type != kDLCUDA)
    refuse(name, " is on DLPack device type ", source.device_type, "; expected cpu or cuda");
  Tensor t;
  t.data = static_cast<char*>(source.data) + source.byte_offset;
  t.dtype = dtype_of(source);
  t.item_size = source.bits * source.lanes / 8;
  t.device = source.device_type == kDLCPU ? Device::kCPU : Device::kCUDA;
  t.device_index = source.device_id;
  t.ndim = source.ndim;
  for (int i = 0; i < source.ndim; ++i) {
    t.shape[i] = source.shape[i];
    t.strides[i] = source.strides[i];
  }
  return t;
}

Tensor borrow_optional(const char* name, py::handle object) {
  return object.is_none() ? Tensor{} : borrow(name, object);
}

void expect_dtype(const char* name, const Tensor& t, DType dtype) {
  if (t.dtype != dtype)
    refuse(name, " has dtype ", name_of(t.dtype), "; expected ", name_of(dtype));
}

void expect_float(const char* name, const Tensor& t) {
  if (t.dtype != DType::kFloat32 && t.dtype != DType::kFloat64 && t.dtype != DType::kFloat16 &&
      t.dtype != DType::kBFloat16)
    refuse(name, " has dtype ", name_of(t.dtype),
           "; expected float16, bfloat16, float32 or float64");
}

void expect_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  bool same = t.ndim == static_cast<int>(shape.size());
  for (int i = 0; same && i < t.ndim; ++i) same = t.shape[i] == shape.begin()[i];
  if (!same)
    refuse(name, " has shape ", shape_text(t), "; expected ",
           shape_text(shape.begin(), static_cast<int>(shape.size())));
}

void expect_dims(const char* name, const Tensor& t, int ndim) {
  if (t.ndim != ndim)
    refuse(name, " has shape ", shape_text(t), "; expected ", ndim, " dimensions");
}

void expect_contiguous(const char* name, const Tensor& t) {
  if (std::count(t.shape, t.shape + t.ndim, 0)) return;
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] != 1 && t.strides[i] != stride) refuse(name, " is not contiguous");
    stride *= t.shape[i];
  }
}

void expect_device(const char* name, const Tensor& t, const Tensor& like) {
  if (t.device != like.device || t.device_index != like.device_index)
    refuse(name, " is on another device than the other arguments");
}

// An integer tensor as the kernels read it: exact dtype and shape, contiguous, on `like`'s device.
void expect_index(const char* name, const Tensor& t, DType dtype,
                  std::initializer_list<int64_t> shape, const Tensor& like) {
  expect_dtype(name, t, dtype);
  expect_shape(name, t, shape);
  expect_contiguous(name, t);
  expect_device(name, t, like);
}

void expect_nodes(const char* name, int64_t nodes) {
  if (nodes < 1 || nodes > msn::kMaxNodes)
    refuse(name, " has ", nodes, " nodes; expected 1 to ", msn::kMaxNodes);
}

// [N] for all rows or [B, N].
void expect_tree(const char* name, const Tensor& t, DType dtype, int64_t batch, int64_t nodes,
                 const Tensor& like) {
  if (t.ndim == 1)
    expect_index(name, t, dtype, {nodes}, like);
  else
    expect_index(name, t, dtype, {batch, nodes}, like);
}

void expect_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) refuse(name, " is ", value, "; expected ", low, " to ", high);
}

// Rows of logits [rows, V].
void expect_logits(const Tensor& logits) {
  expect_dims("logits", logits, 2);
  expect_float("logits", logits);
  expect_range("vocabulary of logits", logits.shape[1], 1, msn::kMaxVocabulary);
  if (logits.shape[1] > 1 && logits.strides[1] != 1)
    refuse("logits has rows that are not contiguous");
}

#ifdef MSN_WITH_CUDA
// torch's current stream on the tensor's device.
void* stream_of(const Tensor& t) {
  void* stream = nullptr;
  if (exchange().current_work_stream &&
      exchange().current_work_stream(kDLCUDA, t.device_index, &stream) != 0)
    throw py::error_already_set();
  return stream;
}

// Calls cpu::op(args...) without the GIL, or cuda::op(args..., stream), by where `on` lies.
#define MSN_DISPATCH(op, on, ...)              \
  if ((on).device == Device::kCUDA) {          \
    msn::cuda::op(__VA_ARGS__, stream_of(on)); \
  } else {                                     \
    py::gil_scoped_release release;            \
    msn::cpu::op(__VA_ARGS__);                 \
  }
#else
#define MSN_DISPATCH(op, on, ...)                                                               \
  if ((on).device == Device::kCUDA)                                                             \
    throw std::runtime_error("msn_ext was built without CUDA; reinstall it with nvcc on PATH"); \
  py::gil_scoped_release release;                                                               \
  msn::cpu::op(__VA_ARGS__);
#endif

// ---- the ops ----------------------------------------------------------------------------------

void tree_ancestors(py::handle parents_, py::handle ancestors_, py::handle depth_) {
  const Tensor parents = borrow("parents", parents_), ancestors = borrow("ancestors", ancestors_),
               depth = borrow("depth", depth_);
  if (parents.ndim != 1 && parents.ndim != 2)
    refuse("parents has shape ", shape_text(parents), "; expected [N] or [B, N]");
  const int64_t nodes = parents.shape[parents.ndim - 1];
  const int64_t batch = parents.ndim == 2 ? parents.shape[0] : 1;
  expect_nodes("parents", nodes);
  expect_tree("parents", parents, DType::kInt32, batch, nodes, parents);
  expect_tree("depth", depth, DType::kInt32, batch, nodes, parents);
  expect_dtype("ancestors", ancestors, DType::kInt64);
  expect_contiguous("ancestors", ancestors);
  MSN_DISPATCH(tree_ancestors, parents, parents, ancestors, depth)
}

void tree_attention(py::handle q_, py::handle k_, py::handle v_, py::handle lengths_,
                    py::handle offsets_, py::handle ancestors_, py::handle sinks_, double scale,
                    int64_t window, double softcap, py::handle out_, py::handle partial_,
                    py::handle arrived_) {
  const Tensor q = borrow("q", q_), k = borrow("k_cache", k_), v = borrow("v_cache", v_),
               lengths = borrow("lengths", lengths_), ancestors = borrow("ancestors", ancestors_),
               out = borrow("out", out_), offsets = borrow_optional("offsets", offsets_),
               sinks = borrow_optional("sinks", sinks_);
  expect_dims("q", q, 4);
  expect_dims("k_cache", k, 4);
  expect_dims("v_cache", v, 4);
  const int64_t batch = q.shape[0], heads = q.shape[1], nodes = q.shape[2], dim = q.shape[3];
  const int64_t kv_heads = k.shape[1], slots = k.shape[2], v_dim = v.shape[3];
  expect_nodes("q", nodes);
  expect_range("head size of q", dim, 1, 256);
  expect_range("head size of v_cache", v_dim, 1, 256);
  expect_float("q", q);
  expect_dtype("k_cache", k, q.dtype);
  expect_dtype("v_cache", v, q.dtype);
  expect_device("k_cache", k, q);
  expect_device("v_cache", v, q);
  if (heads < 1) refuse("q has shape ", shape_text(q), "; expected at least one head");
  if (kv_heads < 1 || heads % kv_heads)
    refuse("k_cache has ", kv_heads, " heads; expected a divisor of q's ", heads);
  expect_shape("k_cache", k, {batch, kv_heads, slots, dim});
  expect_shape("v_cache", v, {batch, kv_heads, slots, v_dim});
  expect_index("lengths", lengths, DType::kInt64, {batch}, q);
  if (offsets.data) expect_index("offsets", offsets, DType::kInt64, {batch}, q);
  if (ancestors.ndim == 2)
    expect_index("ancestors", ancestors, DType::kInt64,
                 {nodes, msn::words_for(static_cast<int>(nodes))}, q);
  else
    expect_index("ancestors", ancestors, DType::kInt64,
                 {batch, nodes, msn::words_for(static_cast<int>(nodes))}, q);
  if (sinks.data) {
    expect_dtype("sinks", sinks, q.dtype);
    expect_shape("sinks", sinks, {heads});
    expect_contiguous("sinks", sinks);
    expect_device("sinks", sinks, q);
  }
  if (window < 0) refuse("window is ", window, "; expected 0 (none) or more");
  if (!(softcap >= 0)) refuse("softcap is ", softcap, "; expected 0 (none) or more");
  expect_dtype("out", out, q.dtype);
  expect_shape("out", out, {batch, nodes, heads, v_dim});
  expect_contiguous("out", out);
  msn::AttentionOptions options{scale, window, softcap, {}};
  const Tensor partial = borrow_optional("partial", partial_),
               arrived = borrow_optional("arrived", arrived_);
  if (partial.data && arrived.data) {
    expect_index("partial", partial, DType::kFloat32, {partial.shape[0]}, q);
    expect_index("arrived", arrived, DType::kInt32, {arrived.shape[0]}, q);
    options.space = {partial.as<float>(), arrived.as<int>(), partial.shape[0], arrived.shape[0]};
  }
  if (batch == 0) return;
  MSN_DISPATCH(tree_attention, q, q, k, v, lengths, offsets, ancestors, sinks, options, out)
}

// Floats and counters that tree_attention wants for these tensors on a GPU, to split the keys over
// blocks.
std::pair<int64_t, int64_t> attention_space(py::handle q_, py::handle k_, py::handle v_) {
#ifdef MSN_WITH_CUDA
  const Tensor q = borrow("q", q_), k = borrow("k_cache", k_), v = borrow("v_cache", v_);
  for (const Tensor* t : {&q, &k, &v}) expect_dims("q, k_cache and v_cache", *t, 4);
  if (q.device == Device::kCUDA && q.item_size == 2 && k.shape[1] > 0) {
    const msn::AttentionSpace wanted = msn::cuda::attention_space(q, k, v);
    return {wanted.floats, wanted.counters};
  }
#else
  (void)q_, (void)k_, (void)v_;
#endif
  return {0, 0};
}

void verify_tree(py::handle tokens_, py::handle targets_, py::handle parents_,
                 py::handle accept_length_, py::handle path_, py::handle bonus_,
                 py::handle continuation_) {
  const Tensor tokens = borrow("tokens", tokens_), targets = borrow("targets", targets_),
               parents = borrow("parents", parents_),
               accept_length = borrow("accept_length", accept_length_),
               path = borrow("path", path_), bonus = borrow("bonus", bonus_),
               continuation = borrow("continuation", continuation_);
  expect_dims("tokens", tokens, 2);
  const int64_t batch = tokens.shape[0], nodes = tokens.shape[1];
  expect_nodes("tokens", nodes);
  expect_index("tokens", tokens, DType::kInt64, {batch, nodes}, tokens);
  expect_index("targets", targets, DType::kInt64, {batch, nodes}, tokens);
  expect_tree("parents", parents, DType::kInt32, batch, nodes, tokens);
  expect_index("accept_length", accept_length, DType::kInt64, {batch}, tokens);
  expect_index("path", path, DType::kInt64, {batch, nodes}, tokens);
  expect_index("bonus", bonus, DType::kInt64, {batch}, tokens);
  expect_index("continuation", continuation, DType::kInt64, {batch, nodes}, tokens);
  MSN_DISPATCH(verify_tree, tokens, tokens, targets, parents, accept_length, path, bonus,
               continuation)
}

void verify_logits(py::handle logits_, py::handle tokens_, py::handle parents_, py::handle guesses_,
                   py::handle targets_, py::handle accept_length_, py::handle path_,
                   py::handle bonus_, py::handle continuation_, py::handle arrived_) {
  const Tensor logits = borrow("logits", logits_), tokens = borrow("tokens", tokens_),
               parents = borrow("parents", parents_), guesses = borrow("guesses", guesses_),
               targets = borrow("targets", targets_),
               accept_length = borrow("accept_length", accept_length_),
               path = borrow("path", path_), bonus = borrow("bonus", bonus_),
               continuation = borrow("continuation", continuation_),
               arrived = borrow("arrived", arrived_);
  expect_dims("tokens", tokens, 2);
  const int64_t batch = tokens.shape[0], nodes = tokens.shape[1];
  expect_nodes("tokens", nodes);
  expect_index("tokens", tokens, DType::kInt64, {batch, nodes}, tokens);
  expect_tree("parents", parents, DType::kInt32, batch, nodes, tokens);
  expect_logits(logits);
  expect_shape("logits", logits, {batch * nodes, logits.shape[1]});
  expect_device("logits", logits, tokens);
  expect_index("guesses", guesses, DType::kInt32, {batch * nodes, msn::kGuesses}, tokens);
  expect_index("targets", targets, DType::kInt64, {batch, nodes}, tokens);
  expect_index("accept_length", accept_length, DType::kInt64, {batch}, tokens);
  expect_index("path", path, DType::kInt64, {batch, nodes}, tokens);
  expect_index("bonus", bonus, DType::kInt64, {batch}, tokens);
  expect_index("continuation", continuation, DType::kInt64, {batch, nodes}, tokens);
  expect_dims("arrived", arrived, 1);
  expect_index("arrived", arrived, DType::kInt32, {arrived.shape[0]}, tokens);
  if (arrived.shape[0] < batch)
    refuse("arrived has ", arrived.shape[0], " counters; expected one per row, ", batch);
  if (batch == 0) return;
  MSN_DISPATCH(verify_logits, tokens, logits, tokens, parents, guesses, targets, accept_length,
               path, bonus, continuation, arrived)
}

void commit_kv(const std::vector<py::object>& caches_, py::handle lengths_, py::handle path_,
               py::handle accept_length_) {
  const Tensor lengths = borrow("lengths", lengths_), path = borrow("path", path_),
               accept_length = borrow("accept_length", accept_length_);
  expect_dims("path", path, 2);
  const int64_t batch = path.shape[0];
  expect_index("path", path, DType::kInt64, {batch, path.shape[1]}, path);
  expect_index("lengths", lengths, DType::kInt64, {batch}, path);
  expect_index("accept_length", accept_length, DType::kInt64, {batch}, path);
  std::vector<Tensor> caches;
  caches.reserve(caches_.size());
  for (size_t i = 0; i < caches_.size(); ++i) {
    const std::string name = "caches[" + std::to_string(i) + "]";
    caches.push_back(borrow(name.c_str(), caches_[i]));
    expect_dims(name.c_str(), caches[i], 4);
    expect_device(name.c_str(), caches[i], path);
    if (caches[i].shape[0] != batch)
      refuse(name, " has batch size ", caches[i].shape[0], "; expected ", batch);
  }
  if (caches.empty()) return;
  MSN_DISPATCH(commit_kv, path, caches, lengths, path, accept_length)
}

void advance_text(py::handle history_, py::handle lengths_, py::handle remaining_,
                  py::handle targets_, py::handle path_, py::handle accept_length_,
                  py::handle ends_, int64_t vocabulary, py::handle gained_, py::handle status_) {
  const Tensor history = borrow("history", history_), lengths = borrow("lengths", lengths_),
               remaining = borrow("remaining", remaining_), targets = borrow("targets", targets_),
               path = borrow("path", path_),
               accept_length = borrow("accept_length", accept_length_),
               ends = borrow("ends", ends_), gained = borrow("gained", gained_),
               status = borrow("status", status_);
  expect_dims("history", history, 2);
  expect_dims("targets", targets, 2);
  expect_dims("ends", ends, 1);
  const int64_t batch = history.shape[0], nodes = targets.shape[1];
  expect_nodes("targets", nodes);
  expect_index("history", history, DType::kInt64, {batch, history.shape[1]}, history);
  expect_index("lengths", lengths, DType::kInt64, {batch}, history);
  expect_index("remaining", remaining, DType::kInt64, {batch}, history);
  expect_index("targets", targets, DType::kInt64, {batch, nodes}, history);
  expect_index("path", path, DType::kInt64, {batch, nodes}, history);
  expect_index("accept_length", accept_length, DType::kInt64, {batch}, history);
  expect_index("ends", ends, DType::kInt64, {ends.shape[0]}, history);
  expect_range("number of ends", ends.shape[0], 0, 1 << 20);
  expect_index("gained", gained, DType::kInt64, {batch, nodes}, history);
  expect_index("status", status, DType::kInt64, {3, batch}, history);
  MSN_DISPATCH(advance_text, history, history, lengths, remaining, targets, path, accept_length,
               ends, vocabulary, gained, status)
}

void lookup_ngram(py::handle history_, py::handle lengths_, int64_t max_ngram, py::handle tokens_,
                  py::handle matched_) {
  const Tensor history = borrow("history", history_), lengths = borrow("lengths", lengths_),
               tokens = borrow("tokens", tokens_), matched = borrow("matched", matched_);
  expect_dims("history", history, 2);
  expect_dims("tokens", tokens, 2);
  const int64_t batch = history.shape[0];
  expect_index("history", history, DType::kInt64, {batch, history.shape[1]}, history);
  expect_index("lengths", lengths, DType::kInt64, {batch}, history);
  expect_range("max_ngram", max_ngram, 1, 1 << 20);
  expect_index("tokens", tokens, DType::kInt64, {batch, tokens.shape[1]}, history);
  expect_index("matched", matched, DType::kInt64, {batch}, history);
  MSN_DISPATCH(lookup_ngram, history, history, lengths, max_ngram, tokens, matched)
}

void fill_tree(py::handle candidates_, py::handle retrieved_, py::handle history_,
               py::handle lengths_, py::handle depth_, py::handle rank_, py::handle seed_,
               py::handle tokens_) {
  const Tensor candidates = borrow("candidates", candidates_),
               retrieved = borrow("retrieved", retrieved_), history = borrow("history", history_),
               lengths = borrow("lengths", lengths_), depth = borrow("depth", depth_),
               rank = borrow("rank", rank_), seed = borrow("seed", seed_),
               tokens = borrow("tokens", tokens_);
  expect_dims("candidates", candidates, 3);
  expect_dims("retrieved", retrieved, 2);
  expect_dims("history", history, 2);
  expect_dims("rank", rank, 1);
  const int64_t batch = history.shape[0], nodes = rank.shape[0];
  expect_nodes("rank", nodes);
  expect_index("candidates", candidates, DType::kInt64,
               {batch, candidates.shape[1], candidates.shape[2]}, history);
  expect_index("retrieved", retrieved, DType::kInt64, {batch, retrieved.shape[1]}, history);
  expect_index("history", history, DType::kInt64, {batch, history.shape[1]}, history);
  expect_index("lengths", lengths, DType::kInt64, {batch}, history);
  expect_tree("depth", depth, DType::kInt32, batch, nodes, history);
  expect_index("rank", rank, DType::kInt32, {nodes}, history);
  expect_index("seed", seed, DType::kInt64, {1}, history);
  expect_index("tokens", tokens, DType::kInt64, {batch, nodes}, history);
  MSN_DISPATCH(fill_tree, history, candidates, retrieved, history, lengths, depth, rank, seed,
               tokens)
}

void top_guesses(py::handle logits_, py::handle guesses_) {
  const Tensor logits = borrow("logits", logits_), guesses = borrow("guesses", guesses_);
  expect_logits(logits);
  expect_index("guesses", guesses, DType::kInt32, {logits.shape[0], msn::kGuesses}, logits);
  if (logits.shape[0] == 0) return;
  MSN_DISPATCH(top_guesses, logits, logits, guesses)
}

void index_suffixes(py::handle heads_, py::handle history_, py::handle start_,
                    py::handle lengths_) {
  const Tensor heads = borrow("heads", heads_), history = borrow("history", history_),
               start = borrow("start", start_), lengths = borrow("lengths", lengths_);
  expect_dims("history", history, 2);
  const int64_t batch = history.shape[0];
  expect_range("capacity of history", history.shape[1], 0, INT32_MAX);
  expect_index("history", history, DType::kInt64, {batch, history.shape[1]}, history);
  expect_dims("heads", heads, 3);
  expect_index("heads", heads, DType::kInt32, {batch, msn::kSuffixes, heads.shape[2]}, history);
  expect_index("start", start, DType::kInt64, {batch}, history);
  expect_index("lengths", lengths, DType::kInt64, {batch}, history);
  if (heads.shape[2] == 0) return;
  MSN_DISPATCH(index_suffixes, history, heads, history, start, lengths)
}

void remember_guesses(py::handle contexts_, py::handle history_, py::handle lengths_,
                      py::handle tokens_, py::handle parents_, py::handle path_,
                      py::handle guesses_) {
  const Tensor contexts = borrow("contexts", contexts_), history = borrow("history", history_),
               lengths = borrow("lengths", lengths_), tokens = borrow("tokens", tokens_),
               parents = borrow("parents", parents_), path = borrow("path", path_),
               guesses = borrow("guesses", guesses_);
  expect_dims("tokens", tokens, 2);
  expect_dims("history", history, 2);
  expect_dims("contexts", contexts, 3);
  const int64_t batch = tokens.shape[0], nodes = tokens.shape[1];
  expect_nodes("tokens", nodes);
  expect_index("tokens", tokens, DType::kInt64, {batch, nodes}, tokens);
  expect_index("contexts", contexts, DType::kInt32,
               {msn::kOrders, contexts.shape[1], 1 + msn::kGuesses}, tokens);
  expect_index("history", history, DType::kInt64, {batch, history.shape[1]}, tokens);
  expect_index("lengths", lengths, DType::kInt64, {batch}, tokens);
  expect_tree("parents", parents, DType::kInt32, batch, nodes, tokens);
  expect_index("path", path, DType::kInt64, {batch, nodes}, tokens);
  expect_index("guesses", guesses, DType::kInt32, {batch, nodes, msn::kGuesses}, tokens);
  if (contexts.shape[1] == 0) return;
  MSN_DISPATCH(remember_guesses, tokens, contexts, history, lengths, tokens, parents, path, guesses)
}

void draft_tree(py::handle history_, py::handle lengths_, py::handle denoised_,
                py::handle contexts_, py::handle heads_, py::handle corpus_,
                py::handle corpus_heads_, py::handle factors_, int64_t max_depth, double foresight,
                py::handle tokens_, py::handle parents_, py::handle probability_,
                py::handle sources_) {
  const Tensor history = borrow("history", history_), lengths = borrow("lengths", lengths_),
               denoised = borrow("denoised", denoised_), contexts = borrow("contexts", contexts_),
               heads = borrow("heads", heads_), corpus = borrow("corpus", corpus_),
               corpus_heads = borrow("corpus_heads", corpus_heads_),
               factors = borrow("factors", factors_), tokens = borrow("tokens", tokens_),
               parents = borrow("parents", parents_),
               probability = borrow("probability", probability_),
               sources = borrow("sources", sources_);
  expect_dims("history", history, 2);
  expect_dims("denoised", denoised, 3);
  expect_dims("contexts", contexts, 3);
  expect_dims("heads", heads, 3);
  expect_dims("corpus", corpus, 1);
  expect_dims("corpus_heads", corpus_heads, 2);
  expect_dims("tokens", tokens, 2);
  const int64_t batch = history.shape[0], nodes = tokens.shape[1];
  expect_nodes("tokens", nodes);
  expect_range("max_depth", max_depth, 0, msn::kMaxNodes);
  if (!(foresight >= 0 && foresight <= 1)) refuse("foresight is ", foresight, "; expected 0 to 1");
  expect_index("history", history, DType::kInt64, {batch, history.shape[1]}, history);
  expect_index("lengths", lengths, DType::kInt64, {batch}, history);
  expect_index("denoised", denoised, DType::kInt32, {batch, denoised.shape[1], msn::kGuesses},
               history);
  expect_index("contexts", contexts, DType::kInt32,
               {msn::kOrders, contexts.shape[1], 1 + msn::kGuesses}, history);
  expect_index("heads", heads, DType::kInt32, {batch, msn::kSuffixes, heads.shape[2]}, history);
  expect_range("length of corpus", corpus.shape[0], 0, INT32_MAX);
  expect_index("corpus", corpus, DType::kInt32, {corpus.shape[0]}, history);
  expect_index("corpus_heads", corpus_heads, DType::kInt32, {msn::kSuffixes, corpus_heads.shape[1]},
               history);
  expect_index("factors", factors, DType::kFloat64, {msn::kFactors}, history);
  expect_index("tokens", tokens, DType::kInt64, {batch, nodes}, history);
  expect_index("parents", parents, DType::kInt32, {batch, nodes}, history);
  expect_index("probability", probability, DType::kFloat64, {batch, nodes}, history);
  expect_index("sources", sources, DType::kInt32, {batch, nodes}, history);
  MSN_DISPATCH(draft_tree, history, history, lengths, denoised, contexts, heads, corpus,
               corpus_heads, factors, max_depth, foresight, tokens, parents, probability, sources)
}

void draw_noise(py::handle input_ids_, py::handle labels_, py::handle documents_, py::handle keep_,
                int64_t seed, double random, int64_t vocabulary, bool apart, py::handle starts_,
                py::handle noise_) {
  const Tensor input_ids = borrow("input_ids", input_ids_), labels = borrow("labels", labels_),
               documents = borrow("documents", documents_), keep = borrow("keep_token_ids", keep_),
               starts = borrow("starts", starts_), noise = borrow("noise", noise_);
  expect_dims("input_ids", input_ids, 2);
  expect_dims("documents", documents, 2);
  expect_dims("keep_token_ids", keep, 1);
  expect_dims("noise", noise, 3);
  const msn::NoiseOptions options{seed, noise.shape[2], noise.shape[1], random, vocabulary, apart};
  const int64_t count = documents.shape[0];
  expect_range("length", options.length, 1, msn::kMaxSegment);
  expect_range("segments", options.segments, 1, msn::kMaxSegments);
  if (!(random >= 0 && random <= 1)) refuse("random is ", random, "; expected 0 to 1");
  if (random > 0) expect_range("vocabulary", vocabulary, 1, msn::kMaxVocabulary);
  expect_index("input_ids", input_ids, DType::kInt64, {input_ids.shape[0], input_ids.shape[1]},
               input_ids);
  expect_index("labels", labels, DType::kInt64, {input_ids.shape[0], input_ids.shape[1]},
               input_ids);
  expect_index("documents", documents, DType::kInt64, {count, 3}, input_ids);
  expect_index("keep_token_ids", keep, DType::kInt64, {keep.shape[0]}, input_ids);
  expect_index("starts", starts, DType::kInt64, {count, options.segments}, input_ids);
  expect_index("noise", noise, DType::kInt64, {count, options.segments, options.length}, input_ids);
  MSN_DISPATCH(draw_noise, input_ids, input_ids, labels, documents, keep, options, starts, noise)
}

// ---- the constants that Python shares, each from the header that owns it ----------------------

void register_tree_constants(py::module_& m) { m.attr("MAX_NODES") = msn::kMaxNodes; }

void register_drafting_constants(py::module_& m) {
  m.attr("RETRIEVAL") = msn::kRetrieval;
  m.attr("GUESSES") = msn::kGuesses;
  m.attr("LEVELS") = msn::kLevels;
  m.attr("ORDERS") = msn::kOrders;
  m.attr("CEILING") = msn::kCeiling;
  py::tuple edges(msn::kLevels - 1), suffixes(msn::kSuffixes);
  for (int i = 0; i < msn::kLevels - 1; ++i) edges[i] = msn::edges_of_levels().at[i];
  for (int i = 0; i < msn::kSuffixes; ++i) suffixes[i] = msn::suffix_length(i);
  m.attr("EDGES") = edges;
  m.attr("SUFFIXES") = suffixes;

  m.attr("DENOISED") = static_cast<int>(msn::kDenoised);
  m.attr("ADJACENCY") = static_cast<int>(msn::kAdjacency);
  m.attr("SUFFIX") = static_cast<int>(msn::kSuffix);
  m.attr("NOISE") = static_cast<int>(msn::kNoise);

  m.attr("FACTORS") = msn::kFactors;
  m.attr("FACTORS_BIAS") = msn::kBiasAt;
  m.attr("FACTORS_DENOISED") = msn::kDenoisedAt;
  m.attr("FACTORS_ADJACENCY") = msn::kAdjacencyAt;
  m.attr("FACTORS_SUFFIX") = msn::kSuffixAt;
}

void register_noise_constants(py::module_& m) {
  m.attr("NO_LABEL") = msn::kNoLabel;
  m.attr("ATTEMPTS") = msn::kAttempts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = MSN_VERSION;
  info["compiler"] = MSN_COMPILER;
  info["cuda"] = std::string(MSN_CUDA_VERSION).empty() ? py::object(py::none())
                                                       : py::object(py::str(MSN_CUDA_VERSION));
  info["cuda_architectures"] = py::str(MSN_CUDA_ARCHS).attr("split")();
  info["cpu_isa"] = msn::cpu::attention_isa();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of msn_ext; call them through msn_ext.ops.";
  m.def("tree_ancestors", &tree_ancestors);
  m.def("tree_attention", &tree_attention);
  m.def("attention_space", &attention_space);
  m.def("verify_tree", &verify_tree);
  m.def("verify_logits", &verify_logits);
  m.def("commit_kv", &commit_kv);
  m.def("advance_text", &advance_text);
  m.def("lookup_ngram", &lookup_ngram);
  m.def("fill_tree", &fill_tree);
  m.def("top_guesses", &top_guesses);
  m.def("index_suffixes", &index_suffixes);
  m.def("remember_guesses", &remember_guesses);
  m.def("draft_tree", &draft_tree);
  m.def("draw_noise", &draw_noise);
  m.def("build_info", &build_info);
  register_tree_constants(m);
  register_drafting_constants(m);
  register_noise_constants(m);
}

// Steps as most calls on a CPU take them, best-first drafting (or none) and verification by the
// largest logits or by tokens that the caller draws, in two or three calls: what msn_ext/decoding
// does for any drafter, model and request by an op at a time. After a pass, which has read all
// weights, no cache has anything of Python or torch left, and there each op costs several times
// what it does here. msn_ext/decoding/native_steps.py is its only user.
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <vector>

#include "best_first.h"
#include "bindings/bound_pass.h"
#include "bindings/define.h"
#include "bindings/tables.h"
#include "drafting_ops.h"

namespace py = pybind11;

namespace msn {

namespace {

// Room for a tensor that has another size in every step.
template <typename T>
class Room {
 public:
  Room() = default;
  Room(DType dtype, int64_t most) : dtype_(dtype), numbers_(most) {}
  T* data() { return numbers_.data(); }
  Tensor shaped(std::initializer_list<int64_t> shape) {
    Tensor t;
    t.data = numbers_.data();
    t.dtype = dtype_;
    t.item_size = sizeof(T);
    t.ndim = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), t.shape);
    for (int64_t stride = 1, i = t.ndim - 1; i >= 0; stride *= t.shape[i--]) t.strides[i] = stride;
    return t;
  }

 private:
  DType dtype_ = DType::kOther;
  std::vector<T> numbers_;
};

class NativeSteps {
 public:
  // `text`: history int64 [B, C] and lengths, remaining, last_position int64 [B], ends int64 [E],
  // as ops.place_tree and ops.advance_text take them; gained int64 [B, 256], status int64 [3, B]
  // and accept_length int64 [B], which are written. `known`: the tables that ops.draft_tree takes,
  // and indexed int64 [B], the start of ops.index_suffixes; None: no guesses. Where trees may have
  // tails, factors are [B, 348], and there are tables float64 [2, 348], as ops.keep_tail has them;
  // `length` rows each of `noise`, as in ops.append_tails. All of it is kept alive.
  NativeSteps(BoundPass& pass, const py::dict& text, const std::optional<py::dict>& known,
              int64_t vocabulary, int64_t max_depth, double foresight, int64_t length,
              int64_t noise)
      : pass_(pass),
        text_(text),
        known_(known),
        vocabulary_(vocabulary),
        length_(length),
        noise_(noise) {
    if (pass.number() != DType::kFloat32) refuse("only logits in float32 are verified");
    expect_range("the vocabulary", pass.vocabulary(), 1, kMaxVocabulary);
    expect_range("vocabulary", vocabulary, 1, INT64_MAX);
    expect_range("length", length, 1, kMaxNodes);
    expect_range("noise", noise, -1, vocabulary - 1);
    history_ = take(text, "history");
    expect_dims(history_, 2);
    expect_dense(history_, DType::kInt64, {history_.shape[0], history_.shape[1]}, history_);
    batch_ = history_.shape[0];
    lengths_ = dense(text, "lengths", DType::kInt64, {batch_});
    remaining_ = dense(text, "remaining", DType::kInt64, {batch_});
    last_position_ = dense(text, "last_position", DType::kInt64, {batch_});
    ends_ = take(text, "ends");
    expect_dense(ends_, DType::kInt64, {ends_.shape[0]}, history_);
    gained_ = dense(text, "gained", DType::kInt64, {batch_, kMaxNodes});
    status_ = dense(text, "status", DType::kInt64, {3, batch_});
    accept_length_ = dense(text, "accept_length", DType::kInt64, {batch_});
    for (Room<int64_t>* room : {&tokens_, &drafted_tokens_, &ends_of_tails_, &positions_, &targets_,
                                &path_, &continuation_})
      *room = Room<int64_t>(DType::kInt64, batch_ * kMaxNodes);
    for (Room<int64_t>* room : {&prefix_, &offsets_, &bonus_})
      *room = Room<int64_t>(DType::kInt64, batch_);
    ancestors_ = Room<uint64_t>(DType::kInt64, batch_ * kMaxNodes * words_for(kMaxNodes));
    for (Room<int32_t>* room : {&parents_, &drafted_parents_, &depth_, &sources_})
      *room = Room<int32_t>(DType::kInt32, batch_ * kMaxNodes);
    guesses_ = Room<int32_t>(DType::kInt32, batch_ * kMaxNodes * kGuesses);
    probability_ = Room<double>(DType::kFloat64, batch_ * kMaxNodes);
    std::fill_n(parents_.data(), batch_, -1);  // roots alone
    if (known) bind(*known, max_depth, foresight);
  }

  // Drafts trees of `nodes` nodes, and returns how many guesses are expected to be accepted of the
  // first n + 1 of them, by n: the mean over `rows`; nothing where there are none.
  std::vector<double> draft(int64_t nodes, const std::vector<int64_t>& rows) {
    if (!known_) refuse("there is nothing to draft from");
    expect_range("nodes", nodes, 1, kMaxNodes);
    for (const int64_t row : rows) expect_range("row", row, 0, batch_ - 1);
    if (index_.suffixes.shape[2]) index_.on_cpu();
    std::copy_n(lengths_.as<int64_t>(), batch_, indexed_.as<int64_t>());
    drafted_ = nodes;
    tree_.tokens = tokens_.shaped({batch_, nodes});
    tree_.parents = parents_.shaped({batch_, nodes});
    tree_.probability = probability_.shaped({batch_, nodes});
    tree_.sources = sources_.shaped({batch_, nodes});
    tree_.on_cpu();
    if (rows.empty()) return {};
    std::vector<double> expected(nodes);
    double sum = -1.0;
    for (int64_t n = 0; n < nodes; ++n) {
      double total = 0;
      for (const int64_t row : rows) total += probability_.data()[row * nodes + n];
      expected[n] = sum += total / static_cast<double>(rows.size());
    }
    return expected;
  }

  // Checks trees of so many nodes: the first of those that were drafted, and `tails` behind them;
  // commits what is accepted, learns from it and appends it to the texts.
  void check(int64_t nodes, int64_t tails, int threads) {
    Step step = of_size(nodes, tails);
    compute(step, logits_for(nodes), threads);
    VerifyLogits verify;
    verify.tokens = step.tokens;
    verify.parents = step.parents;
    verify.guesses = step.guesses;
    verify.targets = step.targets;
    verify.accept_length = accept_length_;
    verify.path = step.path;
    verify.bonus = bonus_.shaped({batch_});
    verify.continuation = step.continuation;
    verify.from_guesses_on_cpu();
    finish(step);
  }

  // The same in two calls, between which the caller draws `targets` int64 [B, nodes], the model's
  // next token after each node, from the logits float32 [B, nodes, V] at `positions` int64
  // [B, nodes], both of which are written.
  void look(int64_t nodes, int64_t tails, py::handle logits, py::handle positions, int threads) {
    Step step = of_size(nodes, tails);
    const Argument numbers = borrow_cpu("logits", logits), at = borrow_cpu("positions", positions);
    expect_dense(numbers, DType::kFloat32, {batch_, nodes, pass_.vocabulary()}, history_);
    expect_dense(at, DType::kInt64, {batch_, nodes}, history_);
    compute(step, numbers.as<float>(), threads);
    std::copy_n(step.positions.as<int64_t>(), batch_ * nodes, at.as<int64_t>());
    looked_at_ = step;
  }
  void accept(py::handle targets) {
    if (!looked_at_) refuse("there is no step that was looked at");
    Step step = *looked_at_;
    const Argument drawn = borrow_cpu("targets", targets);
    expect_dense(drawn, DType::kInt64, {batch_, step.nodes}, history_);
    step.targets = drawn;
    VerifyTree{step.tokens,      step.targets, step.parents,
               accept_length_,   step.path,    bonus_.shaped({batch_}),
               step.continuation}
        .on_cpu();
    finish(step);
    looked_at_.reset();
  }

  // That forward passes took.
  double pass_seconds() const { return pass_seconds_; }

 private:
  // The tensors of a step, each in its room.
  struct Step {
    int64_t nodes, tails;
    Tensor tokens, parents, ancestors, depth, ends;  // of the trees, tails included
    Tensor positions, prefix;
    Tensor guesses, targets, path, continuation;  // what the model said of them
  };
  Step of_size(int64_t nodes, int64_t tails) {
    expect_range("tails", tails, 0, has_tails_ ? kMaxNodes / length_ : 0);
    const int64_t rows = tails * length_;
    expect_range("nodes", nodes, 1 + rows, std::min<int64_t>(drafted_ + rows, kMaxNodes));
    Step step;
    step.nodes = nodes;
    step.tails = tails;
    step.tokens = drafted_tokens_.shaped({batch_, nodes});
    step.parents = drafted_parents_.shaped({batch_, nodes});
    step.ancestors = ancestors_.shaped({batch_, nodes, words_for(static_cast<int>(nodes))});
    step.depth = depth_.shaped({batch_, nodes});
    step.ends = ends_of_tails_.shaped({batch_, tails});
    step.positions = positions_.shaped({batch_, nodes});
    step.prefix = prefix_.shaped({batch_});
    step.guesses = guesses_.shaped({batch_, nodes, kGuesses});
    step.targets = targets_.shaped({batch_, nodes});
    step.path = path_.shaped({batch_, nodes});
    step.continuation = continuation_.shaped({batch_, nodes});
    return step;
  }

  void lay_out(const Step& step) {
    AppendTails append;
    append.tokens = tokens_.shaped({batch_, drafted_});
    append.parents = parents_.shaped({batch_, drafted_});
    append.probability = probability_.shaped({batch_, drafted_});
    append.history = history_;
    append.lengths = lengths_;
    append.length = length_;
    append.noise = noise_;
    append.drafted = step.tokens;
    append.drafted_parents = step.parents;
    append.ancestors = step.ancestors;
    append.depth = step.depth;
    append.ends = step.ends;
    append.on_cpu();
    if (tree_.corpus.shape[0]) {  // a damaged file may hold any number
      int64_t* tokens = step.tokens.as<int64_t>();
      for (int64_t n = 0; n < batch_ * step.nodes; ++n)
        tokens[n] = std::min(tokens[n], vocabulary_ - 1);
    }
    PlaceTree place;
    place.tokens = step.tokens;
    place.history = history_;
    place.lengths = lengths_;
    place.offsets = offsets_.shaped({batch_});  // none: texts have no padding here
    place.last_position = last_position_;
    place.depth = step.depth;
    place.vocabulary = vocabulary_;
    place.positions = step.positions;
    place.prefix = step.prefix;
    place.on_cpu();
  }

  void compute(const Step& step, float* logits, int threads) {
    lay_out(step);
    const Trees trees{batch_,
                      step.nodes,
                      step.tokens.as<int64_t>(),
                      step.positions.as<int64_t>(),
                      step.ancestors.as<uint64_t>(),
                      false,
                      step.prefix.as<int64_t>()};
    const auto begin = std::chrono::steady_clock::now();
    pass_.check(trees, step.tails * length_, logits, step.guesses.as<int32_t>(), threads);
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
    pass_seconds_ += taken.count();
  }

  void finish(const Step& step) {
    for (int64_t b = 0; b < batch_; ++b)
      pass_.commit(b, step.prefix.as<int64_t>()[b], step.path.as<int64_t>() + b * step.nodes,
                   accept_length_.as<int64_t>()[b]);
    if (known_) learn(step);
    advance(step);
  }

  void learn(const Step& step) {
    if (has_tails_)
      KeepTail{tree_.denoised, tree_.factors,  tables_,   step.guesses, step.continuation,
               step.path,      accept_length_, step.ends, length_}
          .on_cpu();
    else
      KeepContinuation{tree_.denoised, step.guesses, step.continuation}.on_cpu();
    if (tree_.adjacency.shape[1])
      RememberGuesses{tree_.adjacency, history_,  lengths_,    step.tokens,
                      step.parents,    step.path, step.guesses}
          .on_cpu();
  }

  void advance(const Step& step) {
    AdvanceText{history_,       lengths_, remaining_,         step.targets, step.path,
                accept_length_, ends_,    pass_.vocabulary(), gained_,      status_}
        .on_cpu();
    for (int64_t b = batch_ - 1; b > 0; --b) {  // each row's to where it is expected
      int64_t* gained = gained_.as<int64_t>();
      std::copy_backward(gained + b * step.nodes, gained + (b + 1) * step.nodes,
                         gained + b * kMaxNodes + step.nodes);
    }
  }

  static Argument take(const py::dict& from, const char* name) {
    if (!from.contains(name)) refuse(name, " is missing");
    return borrow_cpu(name, from[name]);
  }
  Argument dense(const py::dict& from, const char* name, DType dtype,
                 std::initializer_list<int64_t> shape) const {
    const Argument taken = take(from, name);
    expect_dense(taken, dtype, shape, history_);
    return taken;
  }

  void bind(const py::dict& known, int64_t max_depth, double foresight) {
    expect_growth(max_depth, foresight);
    tree_.history = history_;
    tree_.lengths = lengths_;
    const Argument denoised = take(known, "denoised"), adjacency = take(known, "adjacency"),
                   habits = take(known, "habits"), suffixes = take(known, "suffixes"),
                   corpus = take(known, "corpus"), corpus_suffixes = take(known, "corpus_suffixes");
    expect_tables(denoised, adjacency, habits, suffixes, corpus, corpus_suffixes, batch_, history_);
    tree_.denoised = denoised;
    tree_.adjacency = adjacency;
    tree_.habits = habits;
    tree_.suffixes = suffixes;
    tree_.corpus = corpus;
    tree_.corpus_suffixes = corpus_suffixes;
    has_tails_ = known.contains("tables");
    if (has_tails_) {
      tree_.factors = dense(known, "factors", DType::kFloat64, {batch_, kFactors});
      tables_ = dense(known, "tables", DType::kFloat64, {2, kFactors});
    } else {
      tree_.factors = dense(known, "factors", DType::kFloat64, {kFactors});
    }
    tree_.max_depth = max_depth;
    tree_.foresight = foresight;
    indexed_ = dense(known, "indexed", DType::kInt64, {batch_});
    index_ = {suffixes, history_, indexed_, lengths_};
  }

  float* logits_for(int64_t nodes) {
    if (pass_.has_screen()) return nullptr;
    const int64_t bytes = batch_ * nodes * pass_.vocabulary() * static_cast<int64_t>(sizeof(float));
    return reinterpret_cast<float*>(logits_.get(bytes));
  }

  BoundPass& pass_;
  py::dict text_;
  std::optional<py::dict> known_;
  int64_t vocabulary_, length_, noise_, batch_ = 0, drafted_ = 1;
  bool has_tails_ = false;
  Argument history_;
  Tensor lengths_, remaining_, last_position_, gained_, status_, accept_length_, indexed_, tables_;
  Argument ends_;
  IndexSuffixes index_;
  DraftTree tree_;
  Room<int64_t> tokens_, drafted_tokens_, ends_of_tails_, positions_, targets_, path_,
      continuation_, prefix_, offsets_, bonus_;
  Room<uint64_t> ancestors_;
  Room<int32_t> parents_, drafted_parents_, depth_, sources_, guesses_;
  Room<double> probability_;
  Scratch logits_;
  std::optional<Step> looked_at_;
  double pass_seconds_ = 0;
};

// What is drawn from, where top-k is said first.
bool top_logits(const Argument& logits, const Argument& values, const Argument& tokens) {
  expect_cpu(logits);
  expect_dims(logits, 2);
  expect_dims(tokens, 2);
  const int64_t rows = logits.shape[0], k = tokens.shape[1];
  expect_dense(logits, DType::kFloat32, {rows, logits.shape[1]}, logits);
  expect_dense(values, DType::kFloat32, {rows, k}, logits);
  expect_dense(tokens, DType::kInt64, {rows, k}, logits);
  expect_range("k", k, 1, logits.shape[1]);
  py::gil_scoped_release release;
  return TopLogits{logits, values, tokens}.on_cpu();
}

}  // namespace

void define_native_steps(py::module_& m) {
  define(m, "top_logits", &top_logits, {"logits", "values", "tokens"});
  py::class_<NativeSteps>(m, "NativeSteps")
      .def(py::init<BoundPass&, const py::dict&, const std::optional<py::dict>&, int64_t, int64_t,
                    double, int64_t, int64_t>(),
           py::keep_alive<1, 2>())
      .def("draft", &NativeSteps::draft)
      .def("check", &NativeSteps::check)
      .def("look", &NativeSteps::look)
      .def("accept", &NativeSteps::accept)
      .def("pass_seconds", &NativeSteps::pass_seconds);
}

}  // namespace msn

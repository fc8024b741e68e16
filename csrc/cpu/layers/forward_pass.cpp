#include "cpu/layers/forward_pass.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/layers/team.h"

namespace msn {

// So many threads compute an adapter's small products each for itself, which is cheaper than to
// wait for each other; more threads share them.
constexpr int kAlone = 2;
// From so many rows on, threads share the work of making them ready to be multiplied.
constexpr int kShared = 32;

// One thread on its way through a pass.
struct ForwardPass::Worker {
  ForwardPass& pass;
  const Rows& rows;
  const Noise& noise;
  const Buffers& at;
  int t, threads;
  Barrier& barrier;
  Scratch& scratch;
  const Kernels& kernels = pass.kernels;
  int64_t first = 0;  // rows before it are left out; noise never is

  Worker from(int64_t row) const {
    Worker later = *this;
    later.first = row;
    return later;
  }
  char* from_first(char* data, int64_t stride) const { return data + first * stride * pass.item(); }
  Linear linear(const LinearWeights& weights, const Norm& norm, char* x, char* out,
                int64_t out_stride) const {
    Linear stage;
    stage.rows = rows.count - first;
    stage.x_stride = weights.packed.inputs;
    stage.x = from_first(x, stage.x_stride);
    stage.norm = norm;
    stage.weights = weights.packed;
    stage.bias = weights.bias;
    stage.out_stride = out_stride;
    stage.out = from_first(out, stage.out_stride);
    return stage;
  }
  void run(Linear stage, const LinearWeights& weights) const {
    if (noise.count && weights.a.data) {
      const bool alone = threads <= kAlone;
      const int64_t begin = alone ? 0 : noise.count * t / threads;
      const int64_t end = alone ? noise.count : noise.count * (t + 1) / threads;
      char* low = at.low + (alone ? t * noise.count * weights.a.outputs * pass.item() : 0);
      multiply_low(stage, weights, begin, end, low);
      if (!alone) barrier.wait();
      stage.adapter = {noise.count, noise.index, low, weights.a.outputs, weights.b, weights.first};
    }
    const Weights kind = stage.weights.coded ? coded_kind(pass.kind) : pass.kind;
    if (threads > 1 && stage.rows >= kShared) {
      stage.inputs = at.inputs;
      if (kernels.prepare(kind, stage, t, threads, scratch)) barrier.wait();
    }
    kernels.linear(kind, stage, t, threads, scratch);
  }

  // A x of some of the noise rows of a stage.
  void multiply_low(const Linear& stage, const LinearWeights& weights, int64_t begin, int64_t end,
                    char* to) const {
    if (begin == end) return;
    NarrowLinear low;
    low.rows = end - begin;
    low.pick = noise.rows + begin;
    low.x = stage.x;
    low.x_stride = stage.x_stride;
    low.norm = stage.norm;
    low.weights = weights.a;
    low.out = to + begin * weights.a.outputs * pass.item();
    kernels.narrow_linear(pass.kind, low, scratch);
  }

  // h += scale * after(x W^T + bias)
  void add_branch(const LayerPlan& layer, const LinearWeights& weights, const Norm& after,
                  char* x) const {
    const bool direct = after.kind == Norm::kNone;
    Linear stage = linear(weights, Norm{}, x, direct ? at.h : at.branch, pass.hidden);
    stage.epilogue = direct ? Linear::kAdd : Linear::kStore;
    stage.scale = layer.residual_scale;
    run(stage, weights);
    if (direct) return;
    barrier.wait();
    AddNorm add;
    add.rows = rows.count - first;
    add.size = pass.hidden;
    add.x = from_first(at.branch, add.size);
    add.norm = after;
    add.scale = layer.residual_scale;
    add.h = from_first(at.h, add.size);
    kernels.add_norm(pass.kind, add, t, threads);
  }

  // Keys and values of all rows are written; those before `wanted` attend to nothing.
  void attention(const LayerPlan& layer, int64_t wanted) const {
    run(linear(layer.qkv, layer.attention_norm, at.h, at.qkv, layer.qkv.packed.outputs), layer.qkv);
    barrier.wait();
    RotaryWrite turn;
    turn.rows = &rows;
    turn.heads = layer.heads;
    turn.qkv = at.qkv;
    turn.q_norm = layer.q_norm;
    turn.k_norm = layer.k_norm;
    turn.norm_each_head = layer.norm_each_head;
    turn.cache = layer.cache;
    if (layer.rotary >= 0) {
      const RotaryTables& tables = pass.rotaries[layer.rotary];
      turn.turned = tables.turned;
      turn.cosines = tables.cosines;
      turn.sines = tables.sines;
    }
    kernels.rotary_write(pass.kind, turn, t, threads);
    barrier.wait();
    CachedAttention attend;
    attend.rows = &rows;
    attend.heads = layer.heads;
    attend.qkv = at.qkv;
    attend.first = wanted;
    attend.scale = layer.scale;
    attend.softcap = layer.softcap;
    attend.window = layer.window;
    attend.cache = layer.cache;
    attend.out = at.mixed;
    kernels.attention(pass.kind, attend, t, threads, scratch);
    barrier.wait();
  }

  void up(const LayerPlan& layer) const {
    Linear stage = linear(layer.up, layer.mlp_norm, at.h, at.middle, layer.down.packed.inputs);
    stage.epilogue = layer.gated ? Linear::kGate : Linear::kActivate;
    stage.activation = layer.activation;
    run(stage, layer.up);
    barrier.wait();
  }

  void after_attention(const LayerPlan& layer) const {
    if (layer.parallel) up(layer);  // reads h before anything is added
    add_branch(layer, layer.out, layer.after_attention, at.mixed);
    barrier.wait();
    if (!layer.parallel) up(layer);
    add_branch(layer, layer.down, layer.after_mlp, at.middle);
    barrier.wait();
  }

  // The largest logits are kept where they are made: afterwards they lie in another core's cache,
  // or in none.
  void head(const int32_t* wanted, int64_t count, void* logits, int32_t* guesses) const {
    Linear stage =
        linear(pass.head, pass.norm, at.h, static_cast<char*>(logits), pass.head.packed.outputs);
    stage.rows = count;
    stage.pick = wanted;
    stage.epilogue = Linear::kLogits;
    stage.scale = pass.logit_scale;
    stage.softcap = pass.logit_softcap;
    if (guesses) {
      stage.best = pass.best_.data() + t * count;
      for (int64_t r = 0; r < count; ++r) stage.best[r].clear();
    }
    const bool changed = noise.count && pass.head.a.data;
    stage.screen = guesses && !logits && !changed ? pass.screen : nullptr;
    stage.dense = pass.dense;
    stage.bounds = pass.bounds_.data();
    if (stage.screen)
      kernels.largest(pass.kind, stage, t, threads, scratch);
    else
      run(stage, pass.head);
    if (!guesses) return;
    barrier.wait();
    for (int64_t r = count * t / threads; r < count * (t + 1) / threads; ++r) {
      Best<int32_t> best = pass.best_[r];
      for (int other = 1; other < threads; ++other) {
        const Best<int32_t>& later = pass.best_[other * count + r];
        for (int i = 0; i < kGuesses && later.at[i] >= 0; ++i) best.add(later.keys[i], later.at[i]);
      }
      const auto value = [](int32_t key) -> double {
        const uint32_t bits = OrderedFloat32::bits(key);
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
      };
      write_guesses(best, value, guesses + r * kGuesses);
    }
  }
};

ForwardPass::Buffers ForwardPass::buffers(int64_t rows) {
  int64_t qkv = 0, mixed = 0, middle = 0, low = head.a.outputs, inputs = head.packed.inputs;
  for (const LayerPlan& layer : layers) {
    qkv = std::max(qkv, layer.qkv.packed.outputs);
    mixed = std::max(mixed, layer.out.packed.inputs);
    middle = std::max(middle, layer.down.packed.inputs);
    for (const LinearWeights* linear : {&layer.qkv, &layer.out, &layer.up, &layer.down}) {
      low = std::max(low, linear->a.outputs);
      inputs = std::max(inputs, linear->packed.inputs);
    }
  }
  constexpr int kBuffers = 7;
  const int64_t sizes[kBuffers] = {hidden, qkv, mixed, middle, hidden, kAlone * low, inputs + 64};
  int64_t total = 0, starts[kBuffers];
  for (int i = 0; i < kBuffers; ++i) {
    starts[i] = total;
    total += (rows * sizes[i] * item() + 63) / 64 * 64;
  }
  char* memory = memory_.get(total);
  return {memory + starts[0], memory + starts[1], memory + starts[2], memory + starts[3],
          memory + starts[4], memory + starts[5], memory + starts[6]};
}

void ForwardPass::reserve_scratch(int threads) {
  if (static_cast<int>(scratch_.size()) < threads) scratch_ = std::vector<Scratch>(threads);
}

void ForwardPass::run(const Rows& rows, const Noise& noise, const int32_t* wanted, int64_t count,
                      void* logits, int32_t* guesses, int threads) {
  const Buffers at = buffers(rows.count);
  rows_ = rows.count;
  reserve_scratch(threads);
  if (guesses) best_.resize(std::max<size_t>(best_.size(), threads * count));
  bounds_.assign(count, -std::numeric_limits<float>::infinity());
  // Of the last layer nothing but keys and values is needed of rows before it.
  const int64_t first = count ? *std::min_element(wanted, wanted + count) : rows.count;
  with_team(threads, [&](int t, int team, Barrier& barrier) {
    const Worker worker{*this, rows, noise, at, t, team, barrier, scratch_[t]};
    Embed begin = embed;
    begin.rows = &rows;
    begin.size = hidden;
    begin.out = at.h;
    kernels.embed(kind, begin, t, team);
    barrier.wait();
    for (const LayerPlan& layer : layers) {
      const int64_t from = &layer == &layers.back() ? first : 0;
      worker.attention(layer, from);
      if (from < rows.count) worker.from(from).after_attention(layer);
    }
    if (count) worker.head(wanted, count, logits, guesses);
  });
}

void ForwardPass::logits_of(const Noise& noise, const int32_t* wanted, int64_t count, void* logits,
                            int threads) {
  reserve_scratch(threads);
  Rows rows;
  rows.count = rows_;
  const Buffers at = buffers(rows_);
  with_team(threads, [&](int t, int team, Barrier& barrier) {
    Worker{*this, rows, noise, at, t, team, barrier, scratch_[t]}.head(wanted, count, logits,
                                                                       nullptr);
  });
}

void ForwardPass::commit(int64_t batch, int64_t prefix, const int64_t* path, int64_t length) {
  for (int64_t i = 0; i < length; ++i) {
    if (path[i] == i) continue;
    for (const LayerPlan& layer : layers)
      kernels.move(kind, layer.cache, layer.heads, batch, prefix + path[i], prefix + i);
  }
}

}  // namespace msn

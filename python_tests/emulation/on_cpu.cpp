// The CPU ops of the emulated module are the CUDA kernels: built with this file in place of
// csrc/cpu, msn_ext._C answers for CPU tensors with what csrc/cuda computes. Every other layer
// (bindings.cpp, the Python ops) is the real one. Not modelled: device tensors and streams;
// cuda_runtime.h lists what the emulated device itself leaves out.
#define MSN_WITH_CUDA
#include <cuda_runtime.h>

#include "ops.h"

namespace msn::cpu {

void tree_ancestors(const Tensor& parents, const Tensor& ancestors, const Tensor& depth) {
  cuda::tree_ancestors(parents, ancestors, depth, nullptr);
}
void tree_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths,
                    const Tensor& offsets, const Tensor& ancestors, const Tensor& sinks,
                    const AttentionOptions& options, const Tensor& out) {
  // On a device of some size, with space that holds NaN; at times with too little of it.
  static std::mt19937 random(1);
  emulation::processors = 1 + random() % 40;
  AttentionOptions with = options;
  if (q.item_size == 2) with.space = cuda::attention_space(q, k, v);
  std::vector<float> partial(with.space.floats, NAN);
  std::vector<int> arrived(with.space.counters, 0);
  with.space.partial = partial.data();
  with.space.arrived = arrived.data();
  if (random() % 8 == 0) with.space.floats /= 2;
  cuda::tree_attention(q, k, v, lengths, offsets, ancestors, sinks, with, out, nullptr);
  if (std::any_of(arrived.begin(), arrived.end(), [](int count) { return count != 0; }))
    emulation::fail("tree_attention leaves a counter behind");
}
void verify_tree(const Tensor& tokens, const Tensor& targets, const Tensor& parents,
                 const Tensor& accept_length, const Tensor& path, const Tensor& bonus,
                 const Tensor& continuation) {
  cuda::verify_tree(tokens, targets, parents, accept_length, path, bonus, continuation, nullptr);
}
void verify_logits(const Tensor& logits, const Tensor& tokens, const Tensor& parents,
                   const Tensor& guesses, const Tensor& targets, const Tensor& accept_length,
                   const Tensor& path, const Tensor& bonus, const Tensor& continuation,
                   const Tensor& arrived) {
  cuda::verify_logits(logits, tokens, parents, guesses, targets, accept_length, path, bonus,
                      continuation, arrived, nullptr);
}
void commit_kv(const std::vector<Tensor>& caches, const Tensor& lengths, const Tensor& path,
               const Tensor& accept_length) {
  cuda::commit_kv(caches, lengths, path, accept_length, nullptr);
}
void advance_text(const Tensor& history, const Tensor& lengths, const Tensor& remaining,
                  const Tensor& targets, const Tensor& path, const Tensor& accept_length,
                  const Tensor& ends, int64_t vocabulary, const Tensor& gained,
                  const Tensor& status) {
  cuda::advance_text(history, lengths, remaining, targets, path, accept_length, ends, vocabulary,
                     gained, status, nullptr);
}
void lookup_ngram(const Tensor& history, const Tensor& lengths, int64_t max_ngram,
                  const Tensor& tokens, const Tensor& matched) {
  cuda::lookup_ngram(history, lengths, max_ngram, tokens, matched, nullptr);
}
void fill_tree(const Tensor& candidates, const Tensor& retrieved, const Tensor& history,
               const Tensor& lengths, const Tensor& depth, const Tensor& rank, const Tensor& seed,
               const Tensor& tokens) {
  cuda::fill_tree(candidates, retrieved, history, lengths, depth, rank, seed, tokens, nullptr);
}
void top_guesses(const Tensor& logits, const Tensor& guesses) {
  cuda::top_guesses(logits, guesses, nullptr);
}
void index_suffixes(const Tensor& heads, const Tensor& history, const Tensor& start,
                    const Tensor& lengths) {
  cuda::index_suffixes(heads, history, start, lengths, nullptr);
}
void remember_guesses(const Tensor& contexts, const Tensor& history, const Tensor& lengths,
                      const Tensor& tokens, const Tensor& parents, const Tensor& path,
                      const Tensor& guesses) {
  cuda::remember_guesses(contexts, history, lengths, tokens, parents, path, guesses, nullptr);
}
void draft_tree(const Tensor& history, const Tensor& lengths, const Tensor& denoised,
                const Tensor& contexts, const Tensor& heads, const Tensor& corpus,
                const Tensor& corpus_heads, const Tensor& factors, int64_t max_depth,
                double foresight, const Tensor& tokens, const Tensor& parents,
                const Tensor& probability, const Tensor& sources) {
  cuda::draft_tree(history, lengths, denoised, contexts, heads, corpus, corpus_heads, factors,
                   max_depth, foresight, tokens, parents, probability, sources, nullptr);
}
void draw_noise(const Tensor& input_ids, const Tensor& labels, const Tensor& documents,
                const Tensor& keep, const NoiseOptions& options, const Tensor& starts,
                const Tensor& noise) {
  cuda::draw_noise(input_ids, labels, documents, keep, options, starts, noise, nullptr);
}
const char* attention_isa() { return "emulated CUDA"; }

}  // namespace msn::cpu

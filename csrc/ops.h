// Every op once per backend. Shapes, dtypes and meaning stand in msn_ext/ops/__init__.py;
// bindings.cpp has checked them before any of these is called. Integer tensors are contiguous.
// `stream` is a cudaStream_t.
#pragma once
#include <vector>

#include "noise.h"
#include "tensor.h"

namespace msn {

// What blocks of one launch leave for each other, so that keys can be split over them.
struct AttentionSpace {
  float* partial = nullptr;
  int* arrived = nullptr;  // 0 before and after
  int64_t floats = 0, counters = 0;
};

struct AttentionOptions {
  double scale = 1.0;
  int64_t window = 0;    // 0: none
  double softcap = 0.0;  // 0: none
  AttentionSpace space;  // CUDA only
};

namespace cpu {
void tree_ancestors(const Tensor& parents, const Tensor& ancestors, const Tensor& depth);
void tree_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths,
                    const Tensor& offsets, const Tensor& ancestors, const Tensor& sinks,
                    const AttentionOptions& options, const Tensor& out);
void verify_tree(const Tensor& tokens, const Tensor& targets, const Tensor& parents,
                 const Tensor& accept_length, const Tensor& path, const Tensor& bonus,
                 const Tensor& continuation);
void verify_logits(const Tensor& logits, const Tensor& tokens, const Tensor& parents,
                   const Tensor& guesses, const Tensor& targets, const Tensor& accept_length,
                   const Tensor& path, const Tensor& bonus, const Tensor& continuation,
                   const Tensor& arrived);
void commit_kv(const std::vector<Tensor>& caches, const Tensor& lengths, const Tensor& path,
               const Tensor& accept_length);
void advance_text(const Tensor& history, const Tensor& lengths, const Tensor& remaining,
                  const Tensor& targets, const Tensor& path, const Tensor& accept_length,
                  const Tensor& ends, int64_t vocabulary, const Tensor& gained,
                  const Tensor& status);
void lookup_ngram(const Tensor& history, const Tensor& lengths, int64_t max_ngram,
                  const Tensor& tokens, const Tensor& matched);
void fill_tree(const Tensor& candidates, const Tensor& retrieved, const Tensor& history,
               const Tensor& lengths, const Tensor& depth, const Tensor& rank, const Tensor& seed,
               const Tensor& tokens);
void top_guesses(const Tensor& logits, const Tensor& guesses);
void index_suffixes(const Tensor& heads, const Tensor& history, const Tensor& start,
                    const Tensor& lengths);
void remember_guesses(const Tensor& contexts, const Tensor& history, const Tensor& lengths,
                      const Tensor& tokens, const Tensor& parents, const Tensor& path,
                      const Tensor& guesses);
void draft_tree(const Tensor& history, const Tensor& lengths, const Tensor& denoised,
                const Tensor& contexts, const Tensor& heads, const Tensor& corpus,
                const Tensor& corpus_heads, const Tensor& factors, int64_t max_depth,
                double foresight, const Tensor& tokens, const Tensor& parents,
                const Tensor& probability, const Tensor& sources);
void draw_noise(const Tensor& input_ids, const Tensor& labels, const Tensor& documents,
                const Tensor& keep, const NoiseOptions& options, const Tensor& starts,
                const Tensor& noise);
const char* attention_isa();  // instruction set that tree_attention runs on here
}  // namespace cpu

#ifdef MSN_WITH_CUDA
namespace cuda {
void tree_ancestors(const Tensor& parents, const Tensor& ancestors, const Tensor& depth,
                    void* stream);
void tree_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths,
                    const Tensor& offsets, const Tensor& ancestors, const Tensor& sinks,
                    const AttentionOptions& options, const Tensor& out, void* stream);
AttentionSpace attention_space(const Tensor& q, const Tensor& k,
                               const Tensor& v);  // the sizes that are wanted
void verify_tree(const Tensor& tokens, const Tensor& targets, const Tensor& parents,
                 const Tensor& accept_length, const Tensor& path, const Tensor& bonus,
                 const Tensor& continuation, void* stream);
void verify_logits(const Tensor& logits, const Tensor& tokens, const Tensor& parents,
                   const Tensor& guesses, const Tensor& targets, const Tensor& accept_length,
                   const Tensor& path, const Tensor& bonus, const Tensor& continuation,
                   const Tensor& arrived, void* stream);
void commit_kv(const std::vector<Tensor>& caches, const Tensor& lengths, const Tensor& path,
               const Tensor& accept_length, void* stream);
void advance_text(const Tensor& history, const Tensor& lengths, const Tensor& remaining,
                  const Tensor& targets, const Tensor& path, const Tensor& accept_length,
                  const Tensor& ends, int64_t vocabulary, const Tensor& gained,
                  const Tensor& status, void* stream);
void lookup_ngram(const Tensor& history, const Tensor& lengths, int64_t max_ngram,
                  const Tensor& tokens, const Tensor& matched, void* stream);
void fill_tree(const Tensor& candidates, const Tensor& retrieved, const Tensor& history,
               const Tensor& lengths, const Tensor& depth, const Tensor& rank, const Tensor& seed,
               const Tensor& tokens, void* stream);
void top_guesses(const Tensor& logits, const Tensor& guesses, void* stream);
void index_suffixes(const Tensor& heads, const Tensor& history, const Tensor& start,
                    const Tensor& lengths, void* stream);
void remember_guesses(const Tensor& contexts, const Tensor& history, const Tensor& lengths,
                      const Tensor& tokens, const Tensor& parents, const Tensor& path,
                      const Tensor& guesses, void* stream);
void draft_tree(const Tensor& history, const Tensor& lengths, const Tensor& denoised,
                const Tensor& contexts, const Tensor& heads, const Tensor& corpus,
                const Tensor& corpus_heads, const Tensor& factors, int64_t max_depth,
                double foresight, const Tensor& tokens, const Tensor& parents,
                const Tensor& probability, const Tensor& sources, void* stream);
void draw_noise(const Tensor& input_ids, const Tensor& labels, const Tensor& documents,
                const Tensor& keep, const NoiseOptions& options, const Tensor& starts,
                const Tensor& noise, void* stream);
}  // namespace cuda
#endif

}  // namespace msn

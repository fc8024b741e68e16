// The ops on a draft tree. An op is its arguments and one function for each backend; shapes, dtypes
// and meaning stand in msn_ext/ops, and csrc/bindings has checked them before either is called.
// Integer tensors are contiguous; a tensor that is not given has no data. `stream` is a
// cudaStream_t; a build without CUDA has no `on_cuda`.
#pragma once
#include <vector>

#include "block_space.h"
#include "tensor.h"

namespace msn {

struct TreeAncestors {
  Tensor parents, ancestors, depth;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

// Memory in which the blocks of one launch leave sums for the next one, so that keys can be split
// over them. Not used where it is too small or its address is not a multiple of 16.
struct AttentionSpace {
  float* partial = nullptr;
  int64_t floats = 0;
};

struct TreeAttention {
  Tensor q, k, v, lengths, offsets, ancestors, sinks;
  double scale = 1.0;
  int64_t window = 0;    // 0: none
  double softcap = 0.0;  // 0: none
  Tensor out;
  AttentionSpace space;  // CUDA only

  void on_cpu() const;
  void on_cuda(void* stream) const;
};
const char* attention_isa();  // instruction set that TreeAttention::on_cpu runs on here
// The size that TreeAttention::on_cuda wants for 16-bit tensors.
AttentionSpace attention_space(const Tensor& q, const Tensor& k, const Tensor& v);

struct VerifyTree {
  Tensor tokens, targets, parents, accept_length, path, bonus, continuation;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

struct VerifyLogits {
  Tensor logits, tokens, parents, guesses, targets, accept_length, path, bonus, continuation;
  BlockSpace space;  // CUDA only: as guesses_space says, and a counter more a row of tokens

  void on_cpu() const;
  void from_guesses_on_cpu() const;  // the same, where these are found already
  void on_cuda(void* stream) const;
};

struct CommitKV {
  std::vector<Tensor> caches;
  Tensor lengths, path, accept_length;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

struct PlaceTree {
  Tensor tokens, history, lengths, offsets, last_position, depth;
  int64_t vocabulary = 0;
  Tensor positions, prefix;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

struct AdvanceText {
  Tensor history, lengths, remaining, targets, path, accept_length, ends;
  int64_t vocabulary = 0;
  Tensor gained, status;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

}  // namespace msn

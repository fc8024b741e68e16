// The CPU ops of the emulated module are the CUDA kernels: built with this file in place of
// csrc/cpu, msn_ext._C answers for CPU tensors with what csrc/cuda computes. Every other layer
// (csrc/bindings, the Python ops) is the real one. Not modelled: device tensors and streams;
// cuda_runtime.h lists what the emulated device itself leaves out.
#include <cuda_runtime.h>

#include "drafting_ops.h"
#include "noise_ops.h"
#include "tree_ops.h"

namespace pybind11 {
class module_;
}

namespace msn {

void define_layers(pybind11::module_&) {}

void TreeAncestors::on_cpu() const { on_cuda(nullptr); }
void TreeAttention::on_cpu() const {
  // On a device of some size, with space that holds NaN; at times with too little of it.
  static std::mt19937 random(1);
  emulation::processors = 1 + random() % 40;
  TreeAttention op = *this;
  if (q.item_size == 2) op.space = attention_space(q, k, v);
  std::vector<float> partial(op.space.floats, NAN);
  std::vector<int> arrived(op.space.counters, 0);
  op.space.partial = partial.data();
  op.space.arrived = arrived.data();
  if (random() % 8 == 0) op.space.floats /= 2;
  op.on_cuda(nullptr);
  if (std::any_of(arrived.begin(), arrived.end(), [](int count) { return count != 0; }))
    emulation::fail("tree_attention leaves a counter that is not 0");
}
// On a device of some size, with space that holds NaN.
template <typename Op>
void with_guesses_space(Op op, int64_t counters) {
  static std::mt19937 random(1);
  emulation::processors = 1 + random() % 40;
  op.space = guesses_space(op.logits);
  std::vector<float> partial(op.space.floats, NAN);
  std::vector<int> arrived(op.space.counters += counters, 0);
  op.space.partial = partial.data();
  op.space.arrived = arrived.data();
  op.on_cuda(nullptr);
  if (std::any_of(arrived.begin(), arrived.end(), [](int count) { return count != 0; }))
    emulation::fail("a counter that is not 0 in the end");
}
void TopGuesses::on_cpu() const { with_guesses_space(*this, 0); }
void VerifyLogits::on_cpu() const {
  with_guesses_space(*this, tokens.shape[0]);
}
void VerifyTree::on_cpu() const { on_cuda(nullptr); }
void CommitKV::on_cpu() const { on_cuda(nullptr); }
void PlaceTree::on_cpu() const { on_cuda(nullptr); }
void AdvanceText::on_cpu() const { on_cuda(nullptr); }
void LookupNgram::on_cpu() const { on_cuda(nullptr); }
void FillTree::on_cpu() const { on_cuda(nullptr); }
void IndexSuffixes::on_cpu() const { on_cuda(nullptr); }
void RememberGuesses::on_cpu() const { on_cuda(nullptr); }
void KeepContinuation::on_cpu() const { on_cuda(nullptr); }
void DraftTree::on_cpu() const { on_cuda(nullptr); }
void DrawNoise::on_cpu() const { on_cuda(nullptr); }
const char* attention_isa() { return "emulated CUDA"; }

}  // namespace msn

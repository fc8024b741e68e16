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
  // On a device of each kind in turn (16-bit tensors), of some size, with space that holds NaN; at
  // times with too little of it, and at times twice, with the blocks in another order.
  static std::mt19937 random(1);
  static bool hopper = false;
  emulation::hopper = q.item_size == 2 && (hopper = !hopper);
  emulation::processors = 1 + random() % 40;
  TreeAttention op = *this;
  if (q.item_size == 2) op.space = attention_space(q, k, v);
  std::vector<float> partial(op.space.floats, NAN);
  op.space.partial = partial.data();
  if (random() % 8 == 0) op.space.floats /= 2;
  op.on_cuda(nullptr);
  if (random() % 4 == 0) {
    const size_t bytes = out.shape[0] * out.shape[1] * out.shape[2] * out.shape[3] * out.item_size;
    const std::vector<char> first(out.as<char>(), out.as<char>() + bytes);
    std::fill(partial.begin(), partial.end(), NAN);
    op.on_cuda(nullptr);
    if (std::memcmp(first.data(), out.data, bytes))
      emulation::fail("tree_attention gives other bits when its blocks run in another order");
  }
  emulation::hopper = false;
}
void VerifyTree::on_cpu() const { on_cuda(nullptr); }
void VerifyLogits::on_cpu() const { on_cuda(nullptr); }
void CommitKV::on_cpu() const { on_cuda(nullptr); }
void PlaceTree::on_cpu() const { on_cuda(nullptr); }
void AdvanceText::on_cpu() const { on_cuda(nullptr); }
void LookupNgram::on_cpu() const { on_cuda(nullptr); }
void FillTree::on_cpu() const { on_cuda(nullptr); }
void TopGuesses::on_cpu() const { on_cuda(nullptr); }
void IndexSuffixes::on_cpu() const { on_cuda(nullptr); }
void RememberGuesses::on_cpu() const { on_cuda(nullptr); }
void KeepContinuation::on_cpu() const { on_cuda(nullptr); }
void DraftTree::on_cpu() const { on_cuda(nullptr); }
void DrawNoise::on_cpu() const { on_cuda(nullptr); }
const char* attention_isa() { return "emulated CUDA"; }

}  // namespace msn

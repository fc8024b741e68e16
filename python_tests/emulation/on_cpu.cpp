// The CPU ops of the emulated module are the CUDA kernels: built with this file in place of
// csrc/cpu, msn_ext._C answers for CPU tensors with what csrc/cuda computes. Every other layer
// (csrc/bindings, the Python ops) is the real one. Not modelled: device tensors and streams;
// cuda_runtime.h lists what the emulated device itself leaves out.
#include <cuda_runtime.h>
#include <sys/mman.h>

#include "drafting_ops.h"
#include "fused_ops.h"
#include "noise_ops.h"
#include "tree_ops.h"

namespace pybind11 {
class module_;
}

namespace msn {

void define_layers(pybind11::module_&) {}

// The workspace of a launch: floats of NaN and counters of 0, which shall be 0 in the end. In pages
// of its own, since races.cpp leaves malloc's memory alone.
class Workspace {
 public:
  explicit Workspace(BlockSpace& space)
      : counters_(space.counters), bytes_(4 * (space.floats + space.counters) + 1) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) emulation::fail("no memory for a workspace");
    space.partial = static_cast<float*>(data_);
    space.arrived = static_cast<int*>(data_) + space.floats;
    std::fill_n(space.partial, space.floats, NAN);
    arrived_ = space.arrived;
  }
  ~Workspace() {
    if (std::any_of(arrived_, arrived_ + counters_, [](int count) { return count != 0; }))
      emulation::fail("a launch leaves a counter that is not 0");
    munmap(data_, bytes_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

 private:
  int64_t counters_;
  size_t bytes_;
  void* data_;
  const int* arrived_;
};

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
  BlockSpace space{nullptr, nullptr, op.space.floats, 0};
  const Workspace workspace(space);
  op.space.partial = space.partial;
  if (random() % 8 == 0) op.space.floats /= 2;
  op.on_cuda(nullptr);
  if (random() % 4 == 0) {
    const size_t bytes = out.shape[0] * out.shape[1] * out.shape[2] * out.shape[3] * out.item_size;
    const std::vector<char> first(out.as<char>(), out.as<char>() + bytes);
    std::fill_n(space.partial, space.floats, NAN);
    op.on_cuda(nullptr);
    if (std::memcmp(first.data(), out.data, bytes))
      emulation::fail("tree_attention gives other bits when its blocks run in another order");
  }
  emulation::hopper = false;
}
// On a device of some size, with space that holds NaN.
template <typename Op>
void with_guesses_space(Op op, int64_t counters) {
  static std::mt19937 random(1);
  emulation::processors = 1 + random() % 40;
  op.space = guesses_space(op.logits);
  op.space.counters += counters;
  const Workspace workspace(op.space);
  op.on_cuda(nullptr);
}
void TopGuesses::on_cpu() const { with_guesses_space(*this, 0); }
void VerifyLogits::on_cpu() const { with_guesses_space(*this, tokens.shape[0]); }
void VerifyTree::on_cpu() const { on_cuda(nullptr); }
void CommitKV::on_cpu() const { on_cuda(nullptr); }
void PlaceTree::on_cpu() const { on_cuda(nullptr); }
void AdvanceText::on_cpu() const { on_cuda(nullptr); }
void LookupNgram::on_cpu() const { on_cuda(nullptr); }
void FillTree::on_cpu() const { on_cuda(nullptr); }
void IndexSuffixes::on_cpu() const { on_cuda(nullptr); }
void RememberGuesses::on_cpu() const { on_cuda(nullptr); }
void KeepContinuation::on_cpu() const { on_cuda(nullptr); }
void KeepTail::on_cpu() const { on_cuda(nullptr); }
void AppendTails::on_cpu() const { on_cuda(nullptr); }
void DraftTree::on_cpu() const { on_cuda(nullptr); }
void DrawNoise::on_cpu() const { on_cuda(nullptr); }
void ResidualNorm::on_cpu() const { on_cuda(nullptr); }
void RotaryCache::on_cpu() const { on_cuda(nullptr); }
void GatedActivation::on_cpu() const { on_cuda(nullptr); }
const char* attention_isa() { return "emulated CUDA"; }

}  // namespace msn

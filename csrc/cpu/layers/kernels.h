// The kernels of layers_ops.h for one instruction set. Each computes the share of thread `t` of
// `threads` of a stage; what one stage writes and the next reads, threads have to wait for between.
#pragma once
#include <cstddef>
#include <cstdint>

#include "layers_ops.h"
#include "tensor.h"

namespace msn {

// Memory of one thread, from stage to stage the same.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();

  // `bytes` that are aligned to 64; what was there is lost.
  char* get(size_t bytes);

 private:
  char* memory_ = nullptr;
  size_t size_ = 0;
};

// Rows of a matrix to pack: where each begins (null: zeros), and how its numbers lie.
struct Unpacked {
  const char* const* rows = nullptr;
  int64_t count = 0;  // a multiple of the panels' width
  int64_t inputs = 0;
  int64_t stride = 1;  // from one input to the next, in numbers
  DType dtype = DType::kFloat32;
};

struct Kernels {
  const char* isa;
  int width;                // outputs of a panel of weights
  bool rounds_to_bfloat16;  // what is multiplied with weights in bfloat16
  int64_t (*panel_bytes)(Weights kind, int64_t inputs);
  void (*pack)(Weights kind, const Unpacked& source, void* to);
  void (*unpack_row)(Weights kind, const Packed& from, int64_t row, void* to);  // to T
  // Whether this instruction set has coded_kind of a kind. Of a packed panel of the kind: bytes
  // that lie behind all panels once it is coded, below 0 where its numbers cannot be; and the panel
  // coded.
  bool (*has_codes)(Weights kind);
  int64_t (*bytes_behind)(Weights kind, const void* panel, int64_t inputs);
  void (*code)(Weights kind, const void* panel, int64_t inputs, char* coded, char* behind);
  void (*embed)(Weights kind, const Embed&, int t, int threads);
  // Makes stage.inputs, which `linear` reads then; false: the stage takes its rows as they are, and
  // there is nothing to wait for.
  bool (*prepare)(Weights kind, const Linear&, int t, int threads, Scratch&);
  void (*linear)(Weights kind, const Linear&, int t, int threads, Scratch&);
  // Of a packed head, what `screened` reads; bytes: 0 where this instruction set or kind has none.
  // Packs a panel; false: it holds what is not finite.
  int64_t (*screen_bytes)(Weights kind, const Packed& head);
  bool (*pack_screen)(Weights kind, const Packed& head, int64_t panel, void* screen);
  // As `linear` with stage.best, but no logits are written; stage.screen is there.
  void (*largest)(Weights kind, const Linear&, int t, int threads, Scratch&);
  void (*narrow_linear)(Weights kind, const NarrowLinear&, Scratch&);  // all of it
  void (*add_norm)(Weights kind, const AddNorm&, int t, int threads);
  void (*rotary_write)(Weights kind, const RotaryWrite&, int t, int threads);
  void (*attention)(Weights kind, const CachedAttention&, int t, int threads, Scratch&);
  // Copies the key and value of a slot of a batch row to another slot.
  void (*move)(Weights kind, const Cache&, const Heads&, int64_t batch, int64_t from, int64_t to);
};

// Those of an instruction set: "baseline", "avx2", "avx512" or "avx512_bf16"; null: not in this
// build, or not on this machine.
const Kernels* layer_kernels(const char* isa);
// The best ones here, or those that the variable MSN_ISA names; raises where it names none.
const Kernels& layer_kernels();

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}

}  // namespace msn

// The ops of noisy training; see tree_ops.h.
#pragma once
#include "noise.h"
#include "tensor.h"

namespace msn {

struct DrawNoise {
  Tensor input_ids, labels, samples, keep;
  NoiseOptions options;
  Tensor starts, noise;

  void on_cpu() const;
  void on_cuda(void* stream) const;
};

}  // namespace msn

// The attention kernel of sm_90a, as tree_attention_mma.cu chooses it.
#pragma once
#include "cuda/tree/tree_attention.cuh"

namespace msn {

// True where it can run and pays: compute capability 9.0, a build with code for sm_90a, head sizes
// up to 128, and so many query rows that the other kernel would take 64 a block. MSN_WGMMA=off,
// read once, says never.
bool wgmma_takes(int64_t dim, int64_t rows, int device);

// Floats of workspace that it wants.
int64_t wgmma_floats(int64_t batch, int64_t kv_heads, int64_t rows, int64_t slots, int64_t dim,
                     int device);

// Of the same as tree_attention_mma, where wgmma_takes. False, and nothing done, where the driver
// cannot describe the keys or values to the copy engine.
template <typename T>
bool tree_attention_wgmma(const AttentionProblem<T>& p, int64_t batch, int device,
                          const AttentionSpace& space, void* stream);

}  // namespace msn

// The softmax of attention on tensor cores, online, in float32 and to base 2, on scores as
// multiply_add leaves them: a thread has four of every eight keys, two of row g = lane / 4 and two
// of row g + 8. Scores stay products of queries and keys until their weights are taken, one fused
// multiply-add and one ex2 each.
#pragma once
#include <type_traits>

#include "cuda/tree/tree_attention_split.cuh"

namespace msn {

// From products to scores to base 2: times `factor`, which is positive, so that the largest product
// is the largest score.
struct Scaling {
  float factor;
  float inner, cap;     // cap > 0: before, products p become cap * tanh(p * inner)
  uint32_t flip, keep;  // what makes `factor` positive: queries' bits & keep ^ flip

  template <typename T>
  __device__ explicit Scaling(const AttentionProblem<T>& p) {
    const float scale = static_cast<float>(p.scale);
    cap = static_cast<float>(p.softcap);
    flip = scale < 0.0f ? 0x80008000u : 0u;
    keep = scale == 0.0f ? 0u : ~0u;
    const float size = scale == 0.0f ? 1.0f : fabsf(scale);
    inner = size / cap;
    factor = cap > 0.0f ? kLog2E : size * kLog2E;
  }

  // Two values of a query as they come into the product.
  __device__ uint32_t of_queries(uint32_t both) const { return both & keep ^ flip; }
};

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
}

template <int kGroups>
__device__ __forceinline__ void cap_scores(const Scaling& scaling, float (&score)[kGroups][4]) {
  if (!(scaling.cap > 0.0f)) return;
#pragma unroll
  for (int n = 0; n < kGroups; ++n)
#pragma unroll
    for (float& s : score[n]) s = scaling.cap * tanhf(s * scaling.inner);
}

// Turns scores into weights relative to the largest one so far, which a 16-bit weight then has
// exactly; where that one is new in a row of the warp, the sums so far follow.
template <int kGroups, int kColumns>
__device__ __forceinline__ void update_softmax(float factor, float (&score)[kGroups][4],
                                               Running<kColumns>& running) {
  float before[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float most = -INFINITY;
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
      most = fmaxf(most, fmaxf(score[n][2 * r], score[n][2 * r + 1]));
    most = quad_max(most) * factor;
    before[r] = running.base[r];
    running.base[r] = fmaxf(before[r], most);
  }
  if (__ballot_sync(kWholeWarp, running.base[0] != before[0] || running.base[1] != before[1])) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float fade = exp2_approx(before[r] - finite_base(running.base[r]));
      running.total[r] *= fade;
#pragma unroll
      for (int d = 0; d < kColumns / 8; ++d) {
        running.sums[d][2 * r] *= fade;
        running.sums[d][2 * r + 1] *= fade;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float base = finite_base(running.base[r]);
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        running.total[r] += score[n][2 * r + i] =
            exp2_approx(fmaf(score[n][2 * r + i], factor, -base));
  }
}

}  // namespace msn

#include <stdexcept>

#include "cpu/check.h"
#include "cpu/tree/tree_attention_kernel.h"

namespace msn {

namespace {

struct Kernel {
  const char* isa;
  decltype(&baseline::tree_attention) run;
};

Kernel pick() {
#ifdef MSN_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return {"avx512", avx512::tree_attention};
#endif
#ifdef MSN_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {"avx2", avx2::tree_attention};
#endif
  return {"baseline", baseline::tree_attention};
}

const Kernel& kernel() {
  static const Kernel picked = pick();
  return picked;
}

}  // namespace

const char* attention_isa() { return kernel().isa; }

void TreeAttention::on_cpu() const {
  const int64_t batch = q.shape[0], nodes = q.shape[2], slots = k.shape[2];
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = lengths.as<int64_t>()[b];
    check_range("lengths", b, length, 0, slots - nodes);
    if (offsets.data) check_range("offsets", b, offsets.as<int64_t>()[b], 0, length);
  }
  kernel().run(*this);
}

}  // namespace msn

// Which kernels run on this machine.
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/layers/kernels.h"

namespace msn {

Scratch::~Scratch() { std::free(memory_); }

char* Scratch::get(size_t bytes) {
  if (bytes > size_) {
    std::free(memory_);
    size_ = (bytes + bytes / 2 + 4095) / 4096 * 4096;
    memory_ = static_cast<char*>(std::aligned_alloc(4096, size_));
    if (!memory_) throw std::bad_alloc();
  }
  return memory_;
}

const Kernels* layer_kernels(const char* isa) {
  const auto is = [isa](const char* name) { return std::strcmp(isa, name) == 0; };
#ifdef MSN_HAVE_AVX2
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (is("avx2") && avx2) return &avx2::kernels;
#endif
#ifdef MSN_HAVE_AVX512
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (is("avx512") && avx512) return &avx512::kernels;
#endif
#ifdef MSN_HAVE_AVX512_BF16
  if (is("avx512_bf16") && avx512 && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("avx512vnni"))
    return &avx512_bf16::kernels;
#endif
  return is("baseline") ? &baseline::kernels : nullptr;
}

const Kernels& layer_kernels() {
  if (const char* forced = std::getenv("MSN_ISA"); forced && *forced) {
    if (const Kernels* kernels = layer_kernels(forced)) return *kernels;
    throw std::invalid_argument(std::string("MSN_ISA is '") + forced +
                                "'; expected baseline, avx2, avx512 or avx512_bf16, one that this"
                                " machine and build have");
  }
  static const Kernels* best = [] {
    for (const char* isa : {"avx512_bf16", "avx512", "avx2"})
      if (const Kernels* kernels = layer_kernels(isa)) return kernels;
    return &baseline::kernels;
  }();
  return *best;
}

}  // namespace msn

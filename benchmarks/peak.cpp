// Multiply-adds a second of this CPU's cores together, from registers alone: what no kernel can
// exceed. Compiled and run by native.py: peak THREADS; prints the GMAC/s of float32, of bfloat16
// pairs and of int16 pairs, 0 where the CPU has no such instruction.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
#define FLOAT(i) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" #i "\n"
constexpr int kFloats = 16;
#elif defined(__AVX2__)
#define FLOAT(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n"
constexpr int kFloats = 8;
#elif defined(__aarch64__)
#define FLOAT(i) "fmla v" #i ".4s, v14.4s, v15.4s\n"
constexpr int kFloats = 4;
#endif
#if defined(__AVX512BF16__)
#define BFLOAT(i) "vdpbf16ps %%zmm30, %%zmm31, %%zmm" #i "\n"
#endif
#if defined(__AVX512VNNI__)
#define INT16(i) "vpdpwssd %%zmm30, %%zmm31, %%zmm" #i "\n"
#endif
// As many sums side by side as hide the instructions' latency: those of AVX-512 have room for twice
// as many, which vdpbf16ps needs on a Zen 5.
#define TWELVE(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11)
#if defined(__AVX512F__)
#define SUMS(M) TWELVE(M) M(12) M(13) M(14) M(15) M(16) M(17) M(18) M(19) M(20) M(21) M(22) M(23)
constexpr double kSums = 24;
#define CHANGED                                                                                 \
  "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10",      \
      "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", \
      "zmm21", "zmm22", "zmm23"
#else
#define SUMS(M) TWELVE(M)
constexpr double kSums = 12;
#if defined(__aarch64__)
#define CHANGED "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11"
#else
#define CHANGED \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11"
#endif
#endif
constexpr long kRounds = 2000000;

template <typename F>
double best_seconds(int threads, F work) {
  double best = 1e9;
  for (int round = 0; round < 5; ++round) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> team;
    for (int t = 0; t < threads; ++t) team.emplace_back(work);
    for (std::thread& one : team) one.join();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    best = taken.count() < best ? taken.count() : best;
  }
  return best;
}

#define GMACS(M, lanes)                                                    \
  (kSums * 1e-9 * kRounds * (lanes) * threads / best_seconds(threads, [] { \
     for (long i = 0; i < kRounds; ++i) asm volatile(SUMS(M)::: CHANGED);  \
   }))

int main(int, char** arguments) {
  const int threads = std::atoi(arguments[1]);
  double floats = 0, bfloats = 0, int16s = 0;
#ifdef FLOAT
  floats = GMACS(FLOAT, kFloats);
#endif
#ifdef BFLOAT
  bfloats = GMACS(BFLOAT, 32);
#endif
#ifdef INT16
  int16s = GMACS(INT16, 32);
#endif
  std::printf("%.1f %.1f %.1f\n", floats, bfloats, int16s);
}

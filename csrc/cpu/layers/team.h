// Threads that go through the stages of a pass together.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif
#include <sched.h>

#include <atomic>
#include <memory>

namespace msn {

inline void pause_thread() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads wait here for each other: spinning, since stages take microseconds, and after a while
// they give way to what else runs on this machine.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      pause_thread();
      if (spins > 2000) sched_yield();
    }
  }

 private:
  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

// Calls work(t, threads, barrier) on `wanted` threads at once, or on as many as OpenMP gives. An
// exception leaves no thread waiting only if all threads throw it before the first barrier.
template <typename Work>
void with_team(int wanted, Work work) {
#ifdef _OPENMP
  std::unique_ptr<Barrier> barrier;
#pragma omp parallel num_threads(wanted) if (wanted > 1)
  {
#pragma omp single
    barrier.reset(new Barrier(omp_get_num_threads()));
    work(omp_get_thread_num(), omp_get_num_threads(), *barrier);
  }
#else
  Barrier alone(1);
  work(0, 1, alone);
  (void)wanted;
#endif
}

}  // namespace msn

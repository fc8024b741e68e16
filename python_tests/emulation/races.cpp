// Finds races of the emulated kernels. They are compiled with -fsanitize=thread, of which only the
// calls at every load and store are used: this file is what they call.
//
// An access is ordered before another one of its block if both are of one thread, if all threads
// passed a barrier between them, or the warp __syncwarp (shuffles and votes order no memory). It is
// ordered before one of another block if a __threadfence came after it, then an atomic operation on
// some counter, then one on the same counter in the other block, then a __threadfence, then the
// other access; in either block a barrier may stand between, as long as the order holds. Two
// accesses to the same bytes of which one writes and that nothing orders end the process, whatever
// values they saw. An access to shared memory that the launch did not ask for does, too.
//
// Not modelled: shared memory across another block that goes first; order that goes through a third
// block; atomic operations on global memory as
// accesses of their own; reads but the last one of a place; local memory and parameters. One launch
// in kOneIn is watched.
#include <cuda_runtime.h>
#include <unistd.h>

#include <unordered_map>

// Where this module lies.
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[], _end[];

namespace emulation {

namespace {

using Time = uint32_t;  // ticks at barriers, fences and atomic operations

// The last accesses to four bytes.
struct Access {
  uint32_t block;
  Time time;
  uint16_t thread;
  uint8_t bytes;
  bool atomic;
};
struct Cell {
  Access write, read;
};

struct Fence {
  int thread;
  Time time, block_time, warp_time;  // of the barriers before it
};

// What a block had made visible to others when it did something to a counter: of each of its
// threads the accesses before this time.
struct Release {
  uint32_t block;
  std::vector<Time> before;
};
struct Acquire {
  int thread;
  Time time;
  const void* counter;
  size_t releases;  // that the counter had seen
};

constexpr int kOneIn = 4;  // launches is watched, which takes four times as long
bool watching;
constexpr size_t kHostStack = 8 << 20;
const char* host_stack;
const void* heap_end;  // everything before is the program's and malloc's
Time now = 1, launch_start;
size_t shared_size;
// A block under way.
struct Watched {
  uint32_t block;
  bool otherwise;  // its threads order themselves by what is not known here
  Time start, time;
  int passes[kMaxThreads], most_passes, warp_operations[kMaxThreads / kWarp];
  Time warp_time[kMaxThreads / kWarp];
  std::vector<Fence> fences;
  std::vector<Acquire> seen, acquired;  // before a fence, after it
} watched[kBlocks];
std::unordered_map<const void*, std::vector<Release>> counters;

constexpr uintptr_t kCell = 4, kPage = 4096, kCached = 1024;
struct Page {
  uintptr_t number;
  Cell cells[kPage / kCell];
};
std::vector<std::unique_ptr<Page>> pages;  // of earlier launches, too: their times are over
size_t used;
std::unordered_map<uintptr_t, Page*> by_number;
Page* cached[kCached];

Cell& cell_of(uintptr_t at) {
  const uintptr_t number = at / kPage;
  Page*& page = cached[number % kCached];
  if (!page || page->number != number) {
    Page*& found = by_number[number];
    if (!found) {
      if (used == pages.size()) pages.emplace_back(new Page());
      found = pages[used++].get();
      found->number = number;
    }
    page = found;
  }
  return page->cells[at % kPage / kCell];
}

bool within(uintptr_t at, const void* from, const void* to) {
  return at >= reinterpret_cast<uintptr_t>(from) && at < reinterpret_cast<uintptr_t>(to);
}

Watched& here() { return watched[block_running]; }

// Of a thread of this block, before what the running thread does now.
bool ordered_here(int thread, Time time) {
  return thread == running || time < here().time ||
         (thread / kWarp == running / kWarp && time < here().warp_time[running / kWarp]);
}

bool ordered(const Access& before) {
  if (before.block == here().block)
    return here().otherwise || ordered_here(before.thread, before.time);
  for (const Acquire& acquire : here().acquired) {
    if (!ordered_here(acquire.thread, acquire.time)) continue;
    const std::vector<Release>& releases = counters[acquire.counter];
    for (size_t i = 0; i < acquire.releases; ++i)
      if (releases[i].block == before.block && before.time < releases[i].before[before.thread])
        return true;
  }
  return false;
}

[[noreturn]] void report(const Access& before, bool wrote, bool writes, bool shared) {
  char text[200];
  std::snprintf(text, sizeof text,
                "a race in %s memory: thread %d %s what thread %d of block %u %s, and no %s orders "
                "them",
                shared ? "shared" : "global", running, writes ? "writes" : "reads", before.thread,
                before.block, wrote ? "wrote" : "read",
                before.block == here().block ? "barrier" : "fences around an atomic operation");
  fail(text);
}

enum Kind { kRead, kWrite, kAtomic };

void touch(uintptr_t at, uint8_t bytes, Kind kind, bool shared) {
  Cell& cell = cell_of(at);
  const uint32_t block = here().block;
  const Time since = shared ? here().start : launch_start;
  const auto check = [&](const Access& before, bool wrote) {
    if (shared && before.block != block) return;  // while this one let others go first
    if (before.time >= since && before.bytes & bytes && !(before.atomic && kind == kAtomic) &&
        !ordered(before))
      report(before, wrote, kind != kRead, shared);
  };
  check(cell.write, true);
  if (kind != kRead) check(cell.read, false);
  if (kind == kAtomic && !shared) return;
  (kind == kRead ? cell.read : cell.write) = {block, now, static_cast<uint16_t>(running), bytes,
                                              kind == kAtomic};
}

void watch(const void* pointer, size_t size, Kind kind) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
  const char* stack = fibers[running].stack.get();
  // The scheduler's own, a thread's own, the process's own.
  if (!within(reinterpret_cast<uintptr_t>(__builtin_frame_address(0)), stack, stack + kStack))
    return;
  if (within(at, stack, stack + kStack)) return;
  const bool shared = is_shared(pointer);
  if (within(at, dynamic_shared, std::end(dynamic_shared)) &&
      at + size > reinterpret_cast<uintptr_t>(dynamic_shared) + shared_size)
    fail("an access to shared memory that the launch did not ask for");
  if (!shared && (within(at, __ehdr_start, _end) || within(at, nullptr, heap_end) ||
                  within(at, host_stack - kHostStack, host_stack + kHostStack)))
    return;
  for (uintptr_t byte = at; byte < at + size;) {
    const uintptr_t first = byte % kCell, count = std::min(kCell - first, at + size - byte);
    touch(byte, static_cast<uint8_t>(((1u << count) - 1) << first), kind, shared);
    byte += count;
  }
}

inline void access(const void* pointer, size_t size, Kind kind) {
  if (watching) watch(pointer, size, kind);
}

}  // namespace

void launch_begins(size_t shared_bytes) {
  watching = order() % kOneIn == 0;
  if (!watching) return;
  launch_start = ++now;
  shared_size = shared_bytes;
  heap_end = sbrk(0);
  host_stack = static_cast<const char*>(__builtin_frame_address(0));
  counters.clear();
  by_number.clear();
  std::fill(std::begin(cached), std::end(cached), nullptr);
  used = 0;
}

void block_begins() {
  Watched& its = here();
  its.start = its.time = ++now;
  its.block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  its.most_passes = 0;
  its.otherwise = false;
  std::fill(std::begin(its.passes), std::end(its.passes), 0);
  std::fill(std::begin(its.warp_operations), std::end(its.warp_operations), -1);
  std::fill(std::begin(its.warp_time), std::end(its.warp_time), its.time);
  its.fences.clear();
  its.seen.clear();
  its.acquired.clear();
}

void ordered_otherwise() { here().otherwise = true; }

void barrier_passed() {
  Watched& its = here();
  if (++its.passes[running] <= its.most_passes) return;
  its.most_passes = its.passes[running];
  its.time = ++now;
}

void warp_barrier_passed() {
  int& last = here().warp_operations[running / kWarp];
  if (last == fibers[running].operations) return;
  last = fibers[running].operations;
  here().warp_time[running / kWarp] = ++now;
}

void fence_passed() {
  if (!watching) return;
  Watched& its = here();
  ++now;
  its.fences.push_back({running, now, its.time, its.warp_time[running / kWarp]});
  for (const Acquire& acquire : its.seen)
    if (ordered_here(acquire.thread, acquire.time))
      its.acquired.push_back({running, now, acquire.counter, acquire.releases});
  ++now;
}

void before_atomic(const void* at) {
  if (!watching) return;
  watch(at, sizeof(int), kAtomic);
  ++now;
  if (within(reinterpret_cast<uintptr_t>(at), __ehdr_start, _end)) return;  // in shared memory
  std::vector<Release>& releases = counters[at];
  Watched& its = here();
  its.seen.push_back({running, now, at, releases.size()});
  if (its.fences.empty()) return;
  Release release{its.block, std::vector<Time>(blockDim.x, 0)};
  for (const Fence& fence : its.fences) {
    if (!ordered_here(fence.thread, fence.time)) continue;
    for (int i = 0; i < static_cast<int>(blockDim.x); ++i) {
      const Time time = i == fence.thread ? fence.time
                        : i / kWarp == fence.thread / kWarp
                            ? std::max(fence.warp_time, fence.block_time)
                            : fence.block_time;
      release.before[i] = std::max(release.before[i], time);
    }
  }
  releases.push_back(std::move(release));
  ++now;
}

}  // namespace emulation

// What the compiler calls.
using emulation::access;
using emulation::kRead;
using emulation::kWrite;
extern "C" {
#define MSN_SIZE(size)                                                      \
  void __tsan_read##size(void* at) { access(at, size, kRead); }             \
  void __tsan_write##size(void* at) { access(at, size, kWrite); }           \
  void __tsan_unaligned_read##size(void* at) { access(at, size, kRead); }   \
  void __tsan_unaligned_write##size(void* at) { access(at, size, kWrite); } \
  void __tsan_volatile_read##size(void* at) { access(at, size, kRead); }    \
  void __tsan_volatile_write##size(void* at) { access(at, size, kWrite); }
MSN_SIZE(1)
MSN_SIZE(2)
MSN_SIZE(4)
MSN_SIZE(8)
MSN_SIZE(16)
void __tsan_read_range(void* at, size_t size) { access(at, size, kRead); }
void __tsan_write_range(void* at, size_t size) { access(at, size, kWrite); }
// Of the host's code: the guards of statics, counts of shared pointers.
uint8_t __tsan_atomic8_load(const volatile uint8_t* at, int) { return *at; }
uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* at, uint32_t value, int) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
}

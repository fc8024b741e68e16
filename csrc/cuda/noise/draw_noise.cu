// The places and the tokens of noise in every sample of a batch: one block a sample, one segment
// after the other. Its threads count the places where a segment may still start, the draw picks one
// of them by its rank, and one thread a place draws the tokens. A sample or given start outside
// its row counts as empty. Bytes per sample: reads 16 a token per segment (L1 after the first),
// writes 8 (1 + L) S.
#include "cuda/common.cuh"
#include "noise.h"
#include "noise_ops.h"

namespace msn {

namespace {

constexpr int kThreads = 256;

struct Batch {
  const int64_t *input_ids, *labels, *samples, *keep;
  int64_t rows, columns, kept;
};

// The sum over the block, in every thread; `scratch` may be used again at once.
__device__ uint64_t block_sum(uint64_t value, uint64_t (&scratch)[kThreads / kWarp]) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) value += scratch[warp];
  __syncthreads();
  return value;
}

__global__ void __launch_bounds__(kThreads, 2)
    draw_noise_kernel(Batch batch, NoiseOptions options, int64_t* starts, int64_t* noise) {
  __shared__ uint64_t scratch[kThreads / kWarp];
  __shared__ int64_t chosen[kMaxSegments], sizes[kMaxSegments], found;
  const int64_t* sample = batch.samples + 3 * int64_t{blockIdx.x};
  starts += blockIdx.x * options.segments;
  noise += blockIdx.x * options.segments * options.length;
  const int64_t row = sample[0];
  const bool inside = row >= 0 && row < batch.rows;
  const int64_t end = inside ? clamp(sample[2], 0, batch.columns) : 0,
                begin = clamp(sample[1], 0, end);
  const int64_t first = inside ? row * batch.columns : 0;
  const Sample in{batch.input_ids + first, batch.labels + first, begin, end};

  uint64_t part = 0;
  for (int64_t at = begin + threadIdx.x; at < end; at += kThreads)
    part += identity_of(in.tokens[at], at - begin);
  const int64_t key = static_cast<int64_t>(splitmix64(static_cast<uint64_t>(options.seed)) ^
                                           block_sum(part, scratch));

  int64_t count = 0;  // of segments so far
  const auto open = [&](int64_t at) {
    if (at >= end || !may_start(in, at, options.length)) return false;
    for (int64_t other = 0; other < count; ++other)
      if (clashes(in, at, chosen[other], sizes[other], options)) return false;
    return true;
  };
  for (int64_t segment = 0; segment < options.segments; ++segment) {
    int64_t start = starts[segment];
    if (start < 0) {
      uint64_t places = 0;
      for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) places += open(at);
      places = block_sum(places, scratch);
      if (places > 0) {
        int64_t rank = counter_bits(key, segment, 0, 0) % static_cast<int64_t>(places);
        for (int64_t chunk = begin; rank >= 0; chunk += kThreads) {
          const bool mine = open(chunk + threadIdx.x);
          const unsigned votes = __ballot_sync(kWholeWarp, mine);
          if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = __popc(votes);
          __syncthreads();
          int64_t before = __popc(votes & ((1u << threadIdx.x % kWarp) - 1));
          int64_t all = 0;
          for (int warp = 0; warp < kThreads / kWarp; ++warp) {
            if (warp < static_cast<int>(threadIdx.x) / kWarp) before += scratch[warp];
            all += scratch[warp];
          }
          if (mine && before == rank) found = chunk + threadIdx.x;
          rank -= all;
          __syncthreads();
        }
        start = found;
      }
    }
    const int64_t size = start < 0 ? 0 : segment_size(in, start, options.length);
    for (int64_t i = threadIdx.x; i < options.length; i += kThreads)
      noise[segment * options.length + i] =
          i < size ? draw_token(in, start + i, key, segment, i, options, batch.keep, batch.kept)
                   : -1;
    __syncthreads();  // everyone has read `found`, and the start that was given
    if (threadIdx.x == 0) starts[segment] = size > 0 ? start : -1;
    if (size == 0) continue;
    if (threadIdx.x == 0) {
      chosen[count] = start;
      sizes[count] = size;
    }
    ++count;
    __syncthreads();
  }
}

}  // namespace

void DrawNoise::on_cuda(void* stream) const {
  if (samples.shape[0] == 0) return;
  const DeviceGuard guard("draw_noise", input_ids);
  Batch batch{};
  batch.input_ids = input_ids.as<int64_t>();
  batch.labels = labels.as<int64_t>();
  batch.samples = samples.as<int64_t>();
  batch.keep = keep.as<int64_t>();
  batch.rows = input_ids.shape[0];
  batch.columns = input_ids.shape[1];
  batch.kept = keep.shape[0];
  launch("draw_noise", draw_noise_kernel, grid_x("draw_noise", samples.shape[0]), kThreads, 0,
         stream, batch, options, starts.as<int64_t>(), noise.as<int64_t>());
}

}  // namespace msn

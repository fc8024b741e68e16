#include <algorithm>
#include <vector>

#include "cpu/check.h"
#include "noise.h"
#include "noise_ops.h"

namespace msn {

void DrawNoise::on_cpu() const {
  const int64_t rows = input_ids.shape[0], columns = input_ids.shape[1];
  const int64_t* sorted = keep.as<int64_t>();
  std::vector<int64_t> open;  // where a segment may still start
  for (int64_t d = 0; d < samples.shape[0]; ++d) {
    const int64_t *sample = samples.as<int64_t>() + 3 * d, row = sample[0];
    check_range("row of samples", d, row, 0, rows - 1);
    check_range("end of samples", d, sample[2], 0, columns);
    check_range("begin of samples", d, sample[1], 0, sample[2]);
    const Sample in{input_ids.as<int64_t>() + row * columns, labels.as<int64_t>() + row * columns,
                    sample[1], sample[2]};
    uint64_t identity = 0;
    open.clear();
    for (int64_t at = in.begin; at < in.end; ++at) {
      identity += identity_of(in.tokens[at], at - in.begin);
      if (may_start(in, at, options.length)) open.push_back(at);
    }
    const int64_t key =
        static_cast<int64_t>(splitmix64(static_cast<uint64_t>(options.seed)) ^ identity);
    for (int64_t segment = 0; segment < options.segments; ++segment) {
      int64_t& start = starts.as<int64_t>()[d * options.segments + segment];
      int64_t* out = noise.as<int64_t>() + (d * options.segments + segment) * options.length;
      std::fill(out, out + options.length, -1);
      if (start < 0 && !open.empty())
        start = open[counter_bits(key, segment, 0, 0) % static_cast<int64_t>(open.size())];
      if (start < 0) continue;
      if (!in_response(in, start))
        throw std::invalid_argument("starts[" + std::to_string(d) + ", " + std::to_string(segment) +
                                    "] is " + std::to_string(start) +
                                    "; expected -1 or a place in the sample's response");
      const int64_t size = segment_size(in, start, options.length);
      for (int64_t i = 0; i < size; ++i)
        out[i] = draw_token(in, start + i, key, segment, i, options, sorted, keep.shape[0]);
      open.erase(std::remove_if(open.begin(), open.end(),
                                [&](int64_t at) { return clashes(in, at, start, size, options); }),
                 open.end());
    }
  }
}

}  // namespace msn

// The bindings of the ops in noise_ops.h.
#include "noise.h"
#include "best_first.h"
#include "bindings/checks.h"
#include "bindings/define.h"
#include "noise_ops.h"

namespace py = pybind11;

namespace msn {

namespace {

void draw_noise(const Argument& input_ids, const Argument& labels, const Argument& samples,
                const Argument& keep, int64_t seed, double random, int64_t vocabulary, bool apart,
                const Argument& starts, const Argument& noise) {
  expect_dims(input_ids, 2);
  expect_dims(samples, 2);
  expect_dims(keep, 1);
  expect_dims(noise, 3);
  const NoiseOptions options{seed, noise.shape[2], noise.shape[1], random, vocabulary, apart};
  const int64_t count = samples.shape[0];
  expect_range("length", options.length, 1, kMaxSegment);
  expect_range("segments", options.segments, 1, kMaxSegments);
  if (!(random >= 0 && random <= 1)) refuse("random is ", random, "; expected 0 to 1");
  if (random > 0) expect_range("vocabulary", vocabulary, 1, kMaxVocabulary);
  expect_dense(input_ids, DType::kInt64, {input_ids.shape[0], input_ids.shape[1]}, input_ids);
  expect_dense(labels, DType::kInt64, {input_ids.shape[0], input_ids.shape[1]}, input_ids);
  expect_dense(samples, DType::kInt64, {count, 3}, input_ids);
  expect_dense(keep, DType::kInt64, {keep.shape[0]}, input_ids);
  expect_dense(starts, DType::kInt64, {count, options.segments}, input_ids);
  expect_dense(noise, DType::kInt64, {count, options.segments, options.length}, input_ids);
  run(input_ids, DrawNoise{input_ids, labels, samples, keep, options, starts, noise});
}

}  // namespace

void define_noise(py::module_& m) {
  define(m, "draw_noise", &draw_noise,
         {"input_ids", "labels", "samples", "keep_token_ids", "seed", "random", "vocabulary",
          "apart", "starts", "noise"});

  // The constants that Python shares, from the headers that own them.
  m.attr("NO_LABEL") = kNoLabel;
  m.attr("ATTEMPTS") = kAttempts;
}

}  // namespace msn

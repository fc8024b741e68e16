// Linear layers and tree attention as they run on the machine that this program runs on, against
// plain loops: prints the instruction sets that were picked, and fails where a number is off.
// test_other_machines.py runs it on older and other machines, emulated.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/layers/kernels.h"
#include "tree_ops.h"

using namespace msn;

namespace {

// Multiples of 1/8 in [-2, 2), which every format but int8 holds exactly.
std::vector<float> numbers(int64_t count, uint32_t seed) {
  std::vector<float> x(count);
  for (float& value : x) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(seed >> 27) / 8 - 2;
  }
  return x;
}

bool same(const char* what, double got, double expected, double tolerance) {
  if (std::fabs(got - expected) <= tolerance) return true;
  std::printf("%s: %.9g; expected %.9g\n", what, got, expected);
  return false;
}

template <typename T>
bool check_linear(const Kernels& kernels, Weights kind, int64_t rows, int64_t outputs,
                  int64_t inputs, double tolerance) {
  const std::vector<float> w = numbers(outputs * inputs, 1), values = numbers(rows * inputs, 2);
  const std::vector<T> x(values.begin(), values.end());
  const int64_t panels = (outputs + kernels.width - 1) / kernels.width;
  std::vector<const char*> order(panels * kernels.width, nullptr);
  for (int64_t o = 0; o < outputs; ++o)
    order[o] = reinterpret_cast<const char*>(w.data() + o * inputs);
  std::vector<char> packed(panels * kernels.panel_bytes(kind, inputs) + 64);
  char* data = packed.data() + 64 - reinterpret_cast<uintptr_t>(packed.data()) % 64;
  kernels.pack(kind, {order.data(), panels * kernels.width, inputs, 1, DType::kFloat32}, data);

  std::vector<T> out(rows * outputs);
  Linear stage;
  stage.rows = rows;
  stage.x = x.data();
  stage.x_stride = inputs;
  stage.weights = {data, outputs, inputs};
  stage.out = out.data();
  stage.out_stride = outputs;
  Scratch scratch;
  for (int t = 0; t < 2; ++t) kernels.linear(kind, stage, t, 2, scratch);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = 0;
      for (int64_t k = 0; k < inputs; ++k)
        sum += static_cast<double>(values[r * inputs + k]) * w[o * inputs + k];
      if (!same("linear", out[r * outputs + o], sum, tolerance)) return false;
    }
  return true;
}

Tensor tensor(void* data, DType dtype, int size, std::initializer_list<int64_t> shape) {
  Tensor t;
  t.data = data, t.dtype = dtype, t.item_size = size;
  for (const int64_t n : shape) t.shape[t.ndim++] = n;
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; stride *= t.shape[i--]) t.strides[i] = stride;
  return t;
}

// A chain of nodes behind a prefix: node i attends to slots 0 to prefix + i.
bool check_attention() {
  constexpr int64_t kNodes = 5, kPrefix = 77, kSlots = 90, kSize = 20;
  std::vector<float> q = numbers(kNodes * kSize, 3), k = numbers(kSlots * kSize, 4),
                     v = numbers(kSlots * kSize, 5), out(kNodes * kSize);
  int64_t lengths[] = {kPrefix}, ancestors[kNodes];
  for (int64_t i = 0; i < kNodes; ++i) ancestors[i] = (int64_t{2} << i) - 1;
  TreeAttention op;
  op.q = tensor(q.data(), DType::kFloat32, 4, {1, 1, kNodes, kSize});
  op.k = tensor(k.data(), DType::kFloat32, 4, {1, 1, kSlots, kSize});
  op.v = tensor(v.data(), DType::kFloat32, 4, {1, 1, kSlots, kSize});
  op.lengths = tensor(lengths, DType::kInt64, 8, {1});
  op.ancestors = tensor(ancestors, DType::kInt64, 8, {kNodes, 1});
  op.scale = 0.25;
  op.out = tensor(out.data(), DType::kFloat32, 4, {1, kNodes, 1, kSize});
  op.on_cpu();
  for (int64_t i = 0; i < kNodes; ++i) {
    double total = 0, sums[kSize] = {};
    for (int64_t s = 0; s <= kPrefix + i; ++s) {
      double score = 0;
      for (int64_t d = 0; d < kSize; ++d) score += double{q[i * kSize + d]} * k[s * kSize + d];
      const double weight = std::exp(0.25 * score);
      total += weight;
      for (int64_t d = 0; d < kSize; ++d) sums[d] += weight * v[s * kSize + d];
    }
    for (int64_t d = 0; d < kSize; ++d)
      if (!same("attention", out[i * kSize + d], sums[d] / total, 1e-5)) return false;
  }
  return true;
}

}  // namespace

int main() {
  const Kernels& kernels = layer_kernels();
  for (const int64_t rows : {1, 7, 13}) {
    // Products of multiples of 1/8 add up exactly; a number in int8 is off by half of 2 / 127.
    for (const Weights kind : {Weights::kFloat32, Weights::kBFloat16, Weights::kFloat16})
      if (!check_linear<float>(kernels, kind, rows, 37, 301, 0)) return 1;
    if (!check_linear<float>(kernels, Weights::kInt8, rows, 37, 301, 301 * 2 * 1.01 / 127))
      return 1;
    if (!check_linear<double>(kernels, Weights::kFloat64, rows, 37, 301, 0)) return 1;
  }
  if (!check_attention()) return 1;
  std::printf("layers %s, attention %s\n", kernels.isa, attention_isa());
}

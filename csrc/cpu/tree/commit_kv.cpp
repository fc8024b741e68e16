#include <cstring>

#include "cpu/check.h"
#include "tree_ops.h"

namespace msn {

namespace {

void move_slot(const Tensor& cache, int64_t row, int64_t from, int64_t to) {
  const int64_t size = cache.shape[3], item = cache.item_size;
  for (int64_t head = 0; head < cache.shape[1]; ++head) {
    char* base = cache.as<char>() + (row * cache.strides[0] + head * cache.strides[1]) * item;
    char* source = base + from * cache.strides[2] * item;
    char* target = base + to * cache.strides[2] * item;
    if (cache.strides[3] == 1) {
      std::memcpy(target, source, size * item);
    } else {
      for (int64_t d = 0; d < size; ++d)
        std::memcpy(target + d * cache.strides[3] * item, source + d * cache.strides[3] * item,
                    item);
    }
  }
}

void check_moves(const std::vector<Tensor>& caches, const Tensor& lengths, const Tensor& path,
                 const Tensor& accept_length) {
  const int64_t batch = path.shape[0], width = path.shape[1];
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t start = lengths.as<int64_t>()[b], accepted = accept_length.as<int64_t>()[b];
    const int64_t* nodes = path.as<int64_t>() + b * width;
    check_range("lengths", b, start, 0, INT64_MAX / 2);
    check_range("accept_length", b, accepted, 0, width);
    for (int64_t i = 0; i < accepted; ++i)
      check_range("path", b, nodes[i], i ? nodes[i - 1] + 1 : 0, INT64_MAX / 2);
    for (const Tensor& cache : caches)
      if (accepted > 0)
        check_range("lengths + path", b, start + nodes[accepted - 1], 0, cache.shape[2] - 1);
  }
}

}  // namespace

void CommitKV::on_cpu() const {
  check_moves(caches, lengths, path,
              accept_length);  // all of them first: a refused call moves nothing
  const int64_t batch = path.shape[0], width = path.shape[1];
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t start = lengths.as<int64_t>()[b], accepted = accept_length.as<int64_t>()[b];
    const int64_t* nodes = path.as<int64_t>() + b * width;
    // Sources increase and never lie before their target, so moving in order loses nothing.
    for (const Tensor& cache : caches)
      for (int64_t i = 0; i < accepted; ++i)
        if (nodes[i] != i) move_slot(cache, b, start + nodes[i], start + i);
  }
}

}  // namespace msn

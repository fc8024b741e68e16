// The rules of a draft tree, one node at a time: what an ancestor is, what is accepted, what a
// node may attend to. Inline for host and device, so that the CUDA kernels run the very code
// that the CPU tests exercise.
//
// A tree of n nodes (n <= 256) is its `parents`: node 0 is the root (parents[0] == -1), a live
// node has 0 <= parents[i] < i, and a padding node, which never counts, has parents[i] == -1.
// A descendant of a padding node is dead too. Every walk goes from a node to a smaller one, so
// it ends whatever the array holds.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace msn {

constexpr int kMaxNodes = 256;
constexpr int kWordBits = 64;
constexpr int kMaxWords = kMaxNodes / kWordBits;

MSN_HD int words_for(int nodes) { return (nodes + kWordBits - 1) / kWordBits; }

// A value that `parents[node]` may hold.
MSN_HD bool well_formed(int32_t parent, int node) {
  return parent == -1 || (parent >= 0 && parent < node);
}

// The parent of `node` to walk to, or -1 at the root, at padding and at anything malformed.
MSN_HD int parent_of(const int32_t* parents, int node) {
  const int32_t parent = parents[node];
  return parent >= 0 && parent < node ? parent : -1;
}

MSN_HD void set_bit(uint64_t* words, int node) {
  words[node / kWordBits] |= uint64_t{1} << (node % kWordBits);
}

MSN_HD bool has_bit(const uint64_t* words, int node) {
  return (words[node / kWordBits] >> (node % kWordBits)) & 1;
}

MSN_HD int popcount(uint64_t word) {
#ifdef __CUDA_ARCH__
  return __popcll(word);
#else
  return __builtin_popcountll(word);
#endif
}

// Place of the lowest bit that is set; -1: none.
MSN_HD int lowest_bit(uint64_t word) {
#ifdef __CUDA_ARCH__
  return __ffsll(static_cast<long long>(word)) - 1;
#else
  return word ? __builtin_ctzll(word) : -1;
#endif
}

// Depth of a live node (root 0), from the bits of its ancestors and itself; -1 for a dead one.
MSN_HD int depth_from_bits(const uint64_t* words, int n_words) {
  int bits = 0;
  for (int w = 0; w < n_words; ++w) bits += popcount(words[w]);
  return bits - 1;
}

// Writes the bits of `node` and its ancestors; returns its depth. A dead node has no bits and -1.
MSN_HD int ancestors_of(const int32_t* parents, int node, uint64_t* words, int n_words) {
  for (int w = 0; w < n_words; ++w) words[w] = 0;
  int depth = 0, at = node;
  for (; at > 0; ++depth) {
    set_bit(words, at);
    at = parent_of(parents, at);
  }
  if (at == 0) {
    set_bit(words, 0);
    return depth;
  }
  for (int w = 0; w < n_words; ++w) words[w] = 0;
  return -1;
}

// Depth of `node` if every token on its path is the target of the node above, else -1.
// The root is always accepted.
MSN_HD int accepted_depth(const int32_t* parents, const int64_t* tokens, const int64_t* targets,
                          int node) {
  int depth = 0;
  while (node > 0) {
    const int parent = parent_of(parents, node);
    if (parent < 0 || tokens[node] != targets[parent]) return -1;
    node = parent;
    ++depth;
  }
  return depth;
}

// Edges from `top` down to `node`; 0 where `node` does not lie below `top`.
MSN_HD int depth_below(const int32_t* parents, int node, int top) {
  int depth = 0;
  while (node > top) {
    node = parent_of(parents, node);
    ++depth;
  }
  return node == top ? depth : 0;
}

// "Deepest wins, lowest index breaks ties", as one number to maximise. depth >= -1.
MSN_HD int64_t path_key(int depth, int node) {
  return static_cast<int64_t>(depth) * (int64_t{1} << 32) + (kMaxNodes - 1 - node);
}
MSN_HD int key_node(int64_t key) { return kMaxNodes - 1 - static_cast<int>(key & 0xffffffff); }
MSN_HD int key_depth(int64_t key) { return static_cast<int>(key >> 32); }

// Writes the `length` nodes that lead down to `node` (itself last); the ones above are left out.
MSN_HD void write_path(const int32_t* parents, int node, int length, int64_t* out) {
  for (int i = length - 1; i >= 0; --i) {
    out[i] = node;
    node = parent_of(parents, node);
  }
}

// The slots of one row's keys: the prefix in slots [first, first + prefix), then
// the tree's nodes. Logical position 0 is slot `first` (what is before it is left padding).
struct RowLayout {
  int64_t first;   // left padding
  int64_t prefix;  // tokens whose keys are cached and accepted
  MSN_HD int64_t tree_slot(int node) const { return first + prefix + node; }
};

// First logical position that a query at `position` may attend to (window <= 0: no window).
MSN_HD int64_t window_start(int64_t position, int64_t window) {
  return window > 0 && position >= window ? position - window + 1 : 0;
}

// Bits [from, from + 64) of `words`, without the `dropped` lowest that are set; bits below 0 are 0.
MSN_HD uint64_t bits_from(const uint64_t* words, int n_words, int from, int64_t dropped) {
  uint64_t found = 0;
  for (int w = 0; w < n_words; ++w) {
    uint64_t word = words[w];
    for (; dropped > 0 && word; --dropped) word &= word - 1;
    const int shift = w * kWordBits - from;
    if (shift >= 0 && shift < kWordBits) found |= word << shift;
    if (shift < 0 && shift > -kWordBits) found |= word >> -shift;
  }
  return found;
}

// Of the 64 keys from `key` on (counted from the row's first: the prefix, then the nodes), those
// that a node with these ancestor bits may see, as bits: the prefix from `start` on, and of its
// ancestors and itself, which are one deeper each, those from position `start` on. `end`: keys that
// exist.
MSN_HD uint64_t visible_keys(const uint64_t* words, int n_words, int64_t key, int64_t prefix,
                             int64_t end, int64_t start) {
  const auto below = [key](int64_t limit) {  // the keys before `limit`
    const int64_t count = limit - key;
    return count <= 0 ? 0 : count >= kWordBits ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
  };
  uint64_t seen = below(prefix) & ~below(start);
  if (key + kWordBits > prefix)
    seen |= bits_from(words, n_words, static_cast<int>(key - prefix), start - prefix) & below(end);
  return seen;
}

// The tiles of a row's keys that each block of a split computes: the same number, the last one
// fewer.
struct Split {
  int tiles;   // of a block
  int blocks;  // that have any; at least one, so that a row without keys is written too
  MSN_HD Split(int all, int most_blocks, int least_tiles) {
    tiles = (all + most_blocks - 1) / most_blocks;
    if (tiles < least_tiles) tiles = least_tiles;
    blocks = (all + tiles - 1) / tiles;
    if (blocks < 1) blocks = 1;
  }
};

}  // namespace msn

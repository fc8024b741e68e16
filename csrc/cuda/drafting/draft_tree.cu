// The most valuable nodes of the tree of everything that is guessed: one block a row. What waits to
// become a node lies sorted in shared memory, and no more of it than there are nodes to come. What
// may follow a candidate depends on its path alone, so it is found out before it is the candidate's
// turn: in a round each warp expands another candidate, by tables and texts, the ones that wait
// first and then the likeliest one after each of them, and after that. Nodes are then made one
// after the other, each the first that waits, until one has not been expanded; to make one is to
// merge what may follow it into the rest. What is expanded and never made costs nothing but its
// place. So nodes, order, sums and products are those of the specification, whatever is expanded
// when; compiled without fused multiply-add. A length outside [1, C] counts as the nearest one
// inside. Factors out of range give some tree. Bytes per expansion: reads about 1 KB (3 + 8 slots
// of the tables, at most 60 tokens of the text; with a corpus up to 8 slots and 60 tokens of it
// more); writes 24 N. A round waits for two loads, one after the other: the slots, then the texts
// there. There are about as many rounds as the tree is deep, and a barrier a node.
#include "best_first.h"
#include "cuda/common.cuh"
#include "drafting_ops.h"

namespace msn {

namespace {

constexpr int64_t kEnd = -1;   // bits of what follows the last of some values
constexpr int kExpanders = 8;  // warps that expand, a candidate each
constexpr int kKept = 6;       // candidates that keep their expansions when there is little room
constexpr int kAtOnce = 4;     // nodes, at most
constexpr int kChildren = 2 * kWarp;      // threads for what may follow a node
constexpr int kMostExpansions = 30;       // kept at once: a bit each of a positive number
constexpr size_t kMostShared = 99 << 10;  // bytes; every GPU from sm_80 on has them

// The newest tokens of a path, the newest first, and the hashes of 1, 2, .. of them.
struct Place {
  int64_t context[kContext];
  uint64_t hashes[kContext];
};

// What waits to become a node, but for its value.
struct alignas(16) Candidate {
  double probability;  // of the whole path
  int64_t token;
  int32_t parent, depth, source;
  int32_t expansion;  // -1: none yet
};

// What may follow a candidate, the most valuable first.
struct alignas(16) Expansion {
  Place place;
  double value[kListed + 8];
  int64_t token[kListed];
  int32_t order[kListed + 8];  // while it is made
  uint8_t source[kListed];
  double likeliest_probability;  // the others' is their value
  int32_t likeliest;             // which one of them
  int32_t count, depth;
  int32_t next;  // the expansion of the likeliest one; -1: none yet
  int32_t last;  // of what waits: the expansion that next, and its next, .. end in
};

// A candidate to expand; `place` is that of its parent.
struct Target {
  int64_t token;
  double above;  // its probability
  const Place* place;
  int32_t depth, expansion;
};

struct Tree {
  int64_t* tokens;
  int32_t* parents;
  double* probability;
  int32_t* sources;
};

struct Limits {
  int nodes, depth, expansions;
  double foresight;
};

// The threads before this one have a waiting candidate each, the others kChildren for each node.
__host__ __device__ constexpr int first_child(int nodes) {
  return (nodes + kWarp - 1) / kWarp * kWarp;
}
// Of values of candidates, with what is read after them.
__host__ __device__ constexpr int room_for(int nodes) {
  return (nodes > 64 ? kMaxNodes : 64) + kAtOnce + 16;
}
constexpr int most_threads(int nodes) {
  const int merging = first_child(nodes) + kAtOnce * kChildren;
  return merging > kExpanders * kWarp ? merging : kExpanders * kWarp;
}

// Shared memory, of which there is as much as the nodes need. The waiting candidates have two
// lists; to make a node is to write one from the other.
struct Shared {
  int nodes;
  Expansion* expansions;
  Candidate* candidates;
  Place* places;  // of the nodes
  double *values, *factors;

  __device__ Shared(void* memory, const Limits& limits) : nodes(limits.nodes) {
    expansions = static_cast<Expansion*>(memory);
    candidates = reinterpret_cast<Candidate*>(expansions + limits.expansions);
    places = reinterpret_cast<Place*>(candidates + 2 * nodes);
    values = reinterpret_cast<double*>(places + nodes);
    factors = values + 2 * room_for(nodes);
  }
  __device__ Candidate* waiting(int list) const { return candidates + list * nodes; }
  __device__ double* value(int list) const { return values + list * room_for(nodes); }
  static size_t bytes(int nodes, int expansions) {
    return expansions * sizeof(Expansion) + nodes * (2 * sizeof(Candidate) + sizeof(Place)) +
           (2 * room_for(nodes) + kFactors) * sizeof(double);
  }
};

// What is shared beside: the expansions that are free, as bits, and what the warps expand next.
struct Round {
  int free, targets;
  int spare[kExpanders];  // the first that are free
  Target target[kExpanders];
};

__device__ __forceinline__ int lane_of() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int first_bit(unsigned bits) {
  return kWarp - 1 - __clz(static_cast<int>(bits & (0 - bits)));
}
__device__ __forceinline__ int below(unsigned bits, int lane) {
  return __popc(bits & ((1u << lane) - 1));
}

// ---- a warp expands a candidate
// ------------------------------------------------------------------

// The place of a candidate: a lane a token and its hash.
__device__ __forceinline__ void reach(const Sources& from, const Target& target, int64_t& token,
                                      uint64_t& hash, Place& place) {
  const int lane = lane_of(), before = lane > 0 ? lane - 1 : 0;
  token = 0, hash = 0;
  if (target.place) {
    if (lane < kContext) {
      token = lane ? target.place->context[before] : target.token;
      hash = extend_hash(lane ? target.place->hashes[before] : 0, target.token);
    }
  } else {  // the root
    if (lane < kContext && lane < from.length) token = from.history[from.length - 1 - lane];
#pragma unroll 1
    for (int n = kContext; n > 0; --n) {
      const int64_t next = __shfl_sync(kWholeWarp, token, n - 1);
      if (n <= lane + 1) hash = extend_hash(hash, next);
    }
  }
  if (lane < kContext) {
    place.context[lane] = token;
    place.hashes[lane] = hash;
  }
}

// The tokens of all n-grams, compared in two goes: the lanes of 16, 12 and 4 tokens, then those of
// 8, 6, 3, 2 and 1.
__device__ __forceinline__ int first_lane(int level) {
  return static_cast<int>(0x001000081c0e1113ull >> (8 * level) & 0xff);
}
__device__ __forceinline__ int level_compared(int go, int lane) {
  if (go == 0) return lane < 16 ? 7 : lane < 28 ? 6 : 3;
  return lane < 8 ? 5 : lane < 14 ? 4 : lane < 17 ? 2 : lane < 19 ? 1 : 0;
}

// What a lane reads of a text to compare n-grams.
template <typename Token>
struct Compared {
  bool reads[2] = {};
  Token token[2] = {};

  // Lane `first + level` has the place that its n-gram ends before; 0: none.
  __device__ __forceinline__ void read(const Token* text, int end, int first) {
#pragma unroll
    for (int go = 0; go < 2; ++go) {
      const int level = level_compared(go, lane_of()), i = lane_of() - first_lane(level);
      const int at = __shfl_sync(kWholeWarp, end, first + level);
      reads[go] = at > 0 && i < suffix_length(level);
      token[go] = text[reads[go] ? at - 1 - i : 0];
    }
  }
  // The n-grams, as bits, all of whose tokens are as wanted.
  __device__ __forceinline__ unsigned same(const int64_t (&wanted)[2]) const {
    const unsigned first = __ballot_sync(kWholeWarp, reads[0] && token[0] == wanted[0]);
    const unsigned second = __ballot_sync(kWholeWarp, reads[1] && token[1] == wanted[1]);
    const int level = lane_of() % kSuffixes;
    const unsigned all = ((1u << suffix_length(level)) - 1) << first_lane(level);
    const unsigned equal = level == 7 || level == 6 || level == 3 ? first : second;
    return __ballot_sync(kWholeWarp, (equal & all) == all);
  }
};

// What the tables list, a lane a place: a guess, in lane s < kSuffixes also the token after the
// n-gram that is the s-th from the longest on; -1: none.
struct Found {
  int32_t guess;
  int64_t next;
  int highest, longest;  // as in Known
};

// The token after each n-gram of a path, whose newest tokens lanes have, the longest first: where a
// lane's n-gram of `end` stands, in the text, else in the corpus.
__device__ __forceinline__ int64_t next_tokens(const Sources& from, int end, int64_t newest) {
  const int lane = lane_of(), level = kSuffixes - 1 - lane % kSuffixes;
  // All that is read is asked for before any of it is looked at.
  const bool has_corpus = from.corpus_slots > 0 && from.corpus_length > 0;
  const int64_t next = from.history[lane < kSuffixes ? end : 0];
  int32_t after = -1;
  Compared<int64_t> text;
  Compared<int32_t> corpus;
  text.read(from.history, end, 0);
  if (has_corpus) {
    after = from.corpus[lane < kSuffixes ? 0 : end];
    corpus.read(from.corpus, end, kSuffixes);
  }
  int64_t wanted[2];
#pragma unroll
  for (int go = 0; go < 2; ++go)
    wanted[go] = __shfl_sync(kWholeWarp, newest, lane - first_lane(level_compared(go, lane)));
  const bool in_text = text.same(wanted) >> level & 1;
  const bool in_corpus = has_corpus && corpus.same(wanted) >> level & 1;
  const int64_t of_text = __shfl_sync(kWholeWarp, next, level);
  const int32_t of_corpus = __shfl_sync(kWholeWarp, after, kSuffixes + level);
  if (lane >= kSuffixes) return -1;
  return in_text ? of_text : in_corpus ? of_corpus : -1;
}

// look_up by a warp. Lanes of the slots: the n-grams in the text, those in the corpus, the contexts
// of each order, the same in the habits.
__device__ __forceinline__ Found look_up_together(const Sources& from, int depth, int64_t token,
                                                  uint64_t hash) {
  constexpr int kFirst = 2 * kSuffixes;  // the lane of the first order
  const int lane = lane_of(), level = lane % kSuffixes;
  const bool of_text = lane < kSuffixes, of_corpus = !of_text && lane < kFirst;
  const bool of_order = lane >= kFirst && lane < kFirst + 2 * kOrders;
  const bool of_habit = of_order && lane >= kFirst + kOrders;
  const int order = lane - kFirst - (of_habit ? kOrders : 0);
  const int64_t all = from.length + depth;
  const int count = static_cast<int>(all < kContext ? all : kContext);
  const unsigned gaps = __ballot_sync(kWholeWarp, lane < count && token < 0);
  const int tokens = gaps ? first_bit(gaps) : count;  // before what stands between texts

  const int n = of_order ? order + 1 : suffix_length(level);
  const uint64_t ngram = __shfl_sync(kWholeWarp, hash, n - 1);
  const int64_t slots = of_text     ? from.suffix_slots
                        : of_corpus ? from.corpus_slots
                        : of_habit  ? from.habit_slots
                        : of_order  ? from.adjacency_slots
                                    : 0;
  const bool asks = slots > 0 && n <= (of_corpus ? tokens : count);
  const int64_t slot = (of_order ? order : level) * slots + (asks ? slot_of(ngram, slots) : 0);
  const int32_t* table = of_text ? from.suffixes + slot
                         : of_corpus
                             ? from.corpus_suffixes + slot
                             : (of_habit ? from.habits : from.adjacency) + slot * (1 + kGuesses);
  const int32_t entry = asks ? *table : 0;

  Found found{-1, -1, 0, 0};
  const int group = lane / kGuesses - 1;  // the order that this lane has a guess of; -1: denoised
  const unsigned asked = __ballot_sync(kWholeWarp, asks);
  const int mine = kFirst + (group < 0 ? 0 : group);
  const int64_t row = __shfl_sync(kWholeWarp, slot, mine);
  const int64_t habit_row = __shfl_sync(kWholeWarp, slot, mine + kOrders);
  int32_t habit = -1;
  if (group < 0) {
    if (depth < from.depths) found.guess = from.denoised[depth * kGuesses + lane];
  } else {
    if (asked >> mine & 1) found.guess = from.adjacency[row * (1 + kGuesses) + 1 + lane % kGuesses];
    if (asked >> (mine + kOrders) & 1)
      habit = from.habits[habit_row * (1 + kGuesses) + 1 + lane % kGuesses];
  }
  const bool same = of_order && asks && entry == hash_check(ngram);
  const unsigned have = __ballot_sync(kWholeWarp, same) >> kFirst;  // orders, then habits
  if (group >= 0 && !(have >> group & 1)) found.guess = have >> (kOrders + group) & 1 ? habit : -1;
  found.highest = kWarp - __clz(have & ((1u << kOrders) - 1));  // of what is remembered

  const int64_t length = of_text ? from.length : from.corpus_length;
  const bool inside = (of_text || of_corpus) && entry >= n && entry < length;
  found.next = next_tokens(from, inside ? entry : 0, token);
  const unsigned followed = __ballot_sync(kWholeWarp, found.next >= 0);
  found.longest = followed ? kSuffixes - first_bit(followed) : 0;
  return found;
}

// A token that counts at this lane's place, the first that lists it; source 0: none.
struct Scored {
  double score;
  int64_t token;
  int32_t source;
};

// No token of a guess, which has 27 bits.
constexpr int32_t kNone = 0x3fffffff;

// Places of guesses of this lane's token, kGuesses bits for each source; `guesses`: of all lanes.
// Without predicates, of which there are too few: that of an equal one less 1 is negative.
__device__ __forceinline__ void places_of(int32_t token, const int32_t* guesses,
                                          unsigned (&places)[kWarp / kGuesses]) {
#pragma unroll
  for (int i = 0; i < kWarp / kGuesses; ++i) {
    unsigned same = 0;
#pragma unroll
    for (int half = 1; half >= 0; --half) {
      const uint4 four = reinterpret_cast<const uint4*>(guesses)[2 * i + half];
      const unsigned mine = static_cast<unsigned>(token);
      same = same << 1 | ((four.w ^ mine) - 1) >> 31;
      same = same << 1 | ((four.z ^ mine) - 1) >> 31;
      same = same << 1 | ((four.y ^ mine) - 1) >> 31;
      same = same << 1 | ((four.x ^ mine) - 1) >> 31;
    }
    places[i] = same;
  }
}

// `product` times the factors at these places, in their order. A source seldom lists a token twice:
// one factor of each, 1 for none, whose loads do not wait for each other.
__device__ __forceinline__ double times(double product, const unsigned (&places)[kWarp / kGuesses],
                                        const double* factor) {
  constexpr int kSources = kWarp / kGuesses;
  double factors[kSources];
  unsigned twice = 0;
#pragma unroll
  for (int i = 0; i < kSources; ++i) {
    factors[i] = factor[places[i] ? i * kGuesses + first_bit(places[i]) : kWarp];
    twice |= places[i] & (places[i] - 1);
  }
  if (twice) {
    for (int i = 0; i < kSources; ++i)
#pragma unroll 1
      for (unsigned rest = places[i]; rest; rest &= rest - 1)
        product *= factor[i * kGuesses + first_bit(rest)];
    return product;
  }
#pragma unroll
  for (int i = 0; i < kSources; ++i) product *= factors[i];
  return product;
}

// The products of the factors of each token: of one that is guessed, and of one that only follows
// n-grams. `expansion` is room to share what is read by others.
__device__ __forceinline__ void score_tokens(const Found& found, int depth, const double* factors,
                                             Expansion& expansion, Scored (&scored)[2]) {
  const int lane = lane_of();
  const int32_t token = found.guess >= 0 ? found.guess >> 4 : kNone;
  int32_t* guesses = reinterpret_cast<int32_t*>(expansion.token);
  int64_t* followers = expansion.token + kWarp / 2;
  double* factor = expansion.value;
  const int level = guess_level(found.guess);
  guesses[lane] = token;
  if (lane < kSuffixes) followers[lane] = found.next;
  factor[lane] = factors[lane < kGuesses ? denoised_at(depth, found.highest, level)
                                         : adjacency_at(lane / kGuesses - 1, found.highest, level)];
  if (lane == 0) factor[kWarp] = 1.0;
  __syncwarp();

  unsigned places[kWarp / kGuesses];
  places_of(token, guesses, places);
  unsigned before = 0;  // places of the same token
#pragma unroll
  for (int i = 0; i < kWarp / kGuesses; ++i) before |= places[i] << i * kGuesses;
  const bool first = token != kNone && first_bit(before) == lane;
  int suffix = kSuffixes;         // the lane of the longest n-gram that this lane's guess follows
  unsigned guessed = 0;           // lanes of n-grams that any guess follows
  bool counts = found.next >= 0;  // no longer n-gram has the same
#pragma unroll
  for (int i = kSuffixes - 1; i >= 0; --i) {
    const int64_t next = followers[i];
    const bool equal = next == token && token != kNone;
    if (equal) suffix = i;
    if (__ballot_sync(kWholeWarp, equal)) guessed |= 1u << i;
    if (i < lane && next == found.next) counts = false;
  }
  const unsigned different = __ballot_sync(kWholeWarp, counts);

  const double bias = factors[bias_at(found.highest, found.longest)];
  const auto of_suffix = [&](int ngram) {
    return factors[suffix_at(kSuffixes - 1 - ngram, below(different, ngram), found.highest)];
  };
  const bool follows = suffix < kSuffixes;
  const double product = times(bias, places, factor), followed = of_suffix(suffix % kSuffixes);
  scored[0] = {follows ? product * followed : product, token, 0};
  if (first)
    scored[0].source = (places[0] ? kDenoised : 0) | (before >> kGuesses ? kAdjacency : 0) |
                       (follows ? kSuffix : 0);
  scored[1] = {bias * of_suffix(lane % kSuffixes), found.next,
               counts && !(guessed >> lane & 1) ? kSuffix : 0};
  __syncwarp();
}

// The likeliest one, the values and their places by comparisons of all with all. `room`: for
// `count` numbers.
template <int kEach>
__device__ __forceinline__ void order_slowly(int count, const double (&score)[kEach],
                                             const double (&probability)[kEach], double ahead,
                                             double (&value)[kEach], bool (&likeliest)[kEach],
                                             unsigned (&place)[kEach], double* room) {
  const auto places = [&](const double (&number)[kEach]) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (lane_of() + i * kWarp < count) room[lane_of() + i * kWarp] = number[i];
      place[i] = 0;
    }
    __syncwarp();
#pragma unroll 1
    for (int other = 0; other < count; ++other) {
      const double theirs = room[other];
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        place[i] += theirs > number[i] || (theirs == number[i] && other < lane_of() + i * kWarp);
    }
    __syncwarp();
  };
  places(score);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    likeliest[i] = place[i] == 0;
    value[i] = likeliest[i] ? probability[i] + ahead : probability[i];
  }
  places(value);
}

template <int kEach>
__device__ __forceinline__ void weigh(int count, double above, double ahead, Expansion& expansion) {
  const int lane = lane_of();
  double score[kEach];
  int64_t token[kEach];
  int32_t key[kEach];
  uint8_t source[kEach];
  unsigned place[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = lane + i * kWarp;
    score[i] = at < count ? expansion.value[at] : 0.0;
    token[i] = at < count ? expansion.token[at] : -1;
    source[i] = at < count ? expansion.source[at] : 0;
    key[i] = at < count ? expansion.order[at] : 0;
    place[i] = 0;
  }
  double total = 1.0, next[4];
  int32_t next_keys[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    next[k] = expansion.value[k];
    next_keys[k] = expansion.order[k];
  }
#pragma unroll 1
  for (int first = 4; first < count + 4; first += 4) {
    double theirs[4];
    int32_t keys[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      theirs[k] = next[k];
      keys[k] = next_keys[k];
      next[k] = expansion.value[first + k];
      next_keys[k] = expansion.order[first + k];
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      total += theirs[k];
#pragma unroll
      for (int i = 0; i < kEach; ++i) place[i] += static_cast<unsigned>(key[i] - keys[k]) >> 31;
    }
  }
  __syncwarp();

  // The places are those of the keys: of the scores, and of the values, unless two nearly are
  // equal.
  double probability[kEach];
  bool wrong = false;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = lane + i * kWarp;
    if (at >= count) continue;
    expansion.value[place[i]] = score[i];
    expansion.order[place[i]] = at;
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = lane + i * kWarp, one_before = place[i] ? place[i] - 1 : 0;
    const double before = expansion.value[one_before], share = score[i] / total;
    const bool later = expansion.order[one_before] > at;
    // Against NaN, of factors out of range, which has no place in an order.
    probability[i] = fmax(above * (kCeiling < share ? kCeiling : share), 0.0);
    wrong |= at < count && (before < score[i] || probability[i] < 1e-290 ||
                            (later && before * (1 - 1e-12) <= score[i]));
  }
  double value[kEach];
  bool likeliest[kEach];
  if (__ballot_sync(kWholeWarp, wrong)) {
    order_slowly<kEach>(count, score, probability, ahead, value, likeliest, place, expansion.value);
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      likeliest[i] = place[i] == 0;
      value[i] = likeliest[i] ? probability[i] + ahead : probability[i];
    }
    __syncwarp();
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (lane + i * kWarp >= count) continue;
    expansion.value[place[i]] = value[i];
    expansion.token[place[i]] = token[i];
    expansion.source[place[i]] = source[i];
    if (!likeliest[i]) continue;
    expansion.likeliest = place[i];
    expansion.likeliest_probability = probability[i];
  }
  if (lane < 8) expansion.value[count + lane] = __longlong_as_double(kEnd);
}

// Writes what may follow a candidate of probability `above`, the most valuable first, of equals as
// listed.
__device__ __forceinline__ void rank_tokens(const Scored (&scored)[2], double above,
                                            double foresight, Expansion& expansion) {
  const int lane = lane_of();
  const unsigned guesses = __ballot_sync(kWholeWarp, scored[0].source != 0);
  const unsigned others = __ballot_sync(kWholeWarp, scored[1].source != 0);
  const int count = __popc(guesses) + __popc(others);
  const double ahead = above * foresight;
  if (count == 0) {
    if (lane < 8) expansion.value[lane] = lane || !(ahead > 0) ? __longlong_as_double(kEnd) : ahead;
    if (lane) return;
    expansion.count = ahead > 0;
    expansion.likeliest = 0;
    expansion.likeliest_probability = 0.0;
    expansion.source[0] = kNoise;
    return;
  }
  const int at[2] = {below(guesses, lane), __popc(guesses) + below(others, lane)};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!scored[i].source) continue;
    // Of factors out of range it may be anything.
    const double score = scored[i].score > 0 ? scored[i].score : 0.0;
    const int32_t upper = static_cast<int32_t>(__double_as_longlong(score) >> 32);
    expansion.value[at[i]] = score;
    expansion.order[at[i]] = (upper & ~63) | (63 - at[i]);
    expansion.token[at[i]] = scored[i].token;
    expansion.source[at[i]] = static_cast<uint8_t>(scored[i].source);
  }
  if (lane < 8) {
    expansion.value[count + lane] = 0.0;
    expansion.order[count + lane] = 0;
  }
  if (lane == 0) expansion.count = count;
  __syncwarp();
  if (count <= kWarp)
    weigh<1>(count, above, ahead, expansion);
  else
    weigh<2>(count, above, ahead, expansion);
}

__device__ __forceinline__ void expand(const Sources& from, const Target& target, double foresight,
                                       const double* factors, Expansion& expansion) {
  int64_t token;
  uint64_t hash;
  reach(from, target, token, hash, expansion.place);
  const Found found = look_up_together(from, target.depth, token, hash);
  Scored scored[2];
  score_tokens(found, target.depth, factors, expansion, scored);
  rank_tokens(scored, target.above, foresight, expansion);
  if (lane_of() == 0) expansion.depth = target.depth;
}

// ---- the nodes ----------------------------------------------------------------------------------

// Gives an expansion back, and those of what may follow.
__device__ __forceinline__ void release(const Shared& shared, int expansion, Round& round) {
  for (; expansion >= 0; expansion = shared.expansions[expansion].next)
    atomicAdd(&round.free, 1 << expansion);
}

// The first warp picks what all expand next: of each candidate that waits, from the first on, the
// candidate itself, or the likeliest one after the last of its expansions, where it can still
// become a node and have another one after it. `left`: nodes to come.
__device__ __forceinline__ void choose_targets(const Shared& shared, int now, int size, int left,
                                               const Limits& limits, Round& round) {
  const int lane = lane_of();
  Candidate* waiting = shared.waiting(now);
  // Of what has been expanded for nothing so far, what is far from its turn makes room; at last
  // all.
  for (int kept = kKept; __popc(round.free) < kExpanders; kept = 0) {
    __syncwarp();
    for (int i = kept + lane; i < size; i += kWarp) {
      release(shared, waiting[i].expansion, round);
      waiting[i].expansion = -1;
    }
    __syncwarp();
    if (kept == 0 || round.free) break;
  }
  int free = round.free;
  __syncwarp();
  const bool is_free = free >> lane & 1;
  const int nth = below(free, lane);
  if (is_free && nth < kExpanders) round.spare[nth] = lane;
  __syncwarp();
  Target target{};
  bool wanted = false;
  Expansion *head = nullptr, *last = nullptr;
  if (lane < size && lane < left - 1) {
    const Candidate& candidate = waiting[lane];
    if (candidate.expansion < 0) {
      const Place* place = candidate.parent < 0 ? nullptr : shared.places + candidate.parent;
      target = {candidate.token, candidate.probability, place, candidate.depth, -1};
      wanted = true;
    } else {
      head = shared.expansions + candidate.expansion;
      last = shared.expansions + head->last;
      const int likeliest = last->likeliest;
      target = {last->token[likeliest], last->likeliest_probability, &last->place, last->depth + 1,
                -1};
      wanted = last->count > 0 && last->source[likeliest] != kNoise &&
               (size < left || last->value[likeliest] >= shared.value(now)[left - 1]);
    }
    wanted &= target.depth < limits.depth;
  }
  const int at = below(__ballot_sync(kWholeWarp, wanted), lane);
  wanted &= at < kExpanders && at < __popc(free);
  if (wanted) {
    target.expansion = round.spare[at];
    round.target[at] = target;
    Expansion& expansion = shared.expansions[target.expansion];
    expansion.next = -1;
    expansion.last = target.expansion;
    if (last) {
      last->next = target.expansion;
      head->last = target.expansion;
    } else {
      waiting[lane].expansion = target.expansion;
    }
  }
  const int targets = __popc(__ballot_sync(kWholeWarp, wanted));
  free = static_cast<int>(__ballot_sync(kWholeWarp, is_free && nth >= targets));
  if (lane == 0) {
    round.targets = targets;
    round.free = free;
  }
}

// 1 where another value is larger, by bits, which order what is not negative: without predicates,
// so that comparisons do not wait for each other.
__device__ __forceinline__ int is_larger(double other, int64_t value) {
  return static_cast<int>(static_cast<uint64_t>(value - __double_as_longlong(other)) >> 63);
}

// How many of at most kStep * kStep values, the largest first, are larger than another one; after
// the last of them there is kEnd, so far as is read. A warp calls it together.
template <int kStep>
__device__ __forceinline__ int larger(const double* values, int64_t value) {
  double read[kStep];
#pragma unroll
  for (int i = 0; i < kStep; ++i) read[i] = values[i * kStep + kStep - 1];
  __syncwarp();  // all loads have begun
  int steps = 0;
#pragma unroll
  for (int i = 0; i < kStep; ++i) steps += is_larger(read[i], value);
#pragma unroll
  for (int i = 0; i < kStep - 1; ++i) read[i] = values[steps * kStep + i];
  __syncwarp();
  int found = steps * kStep;
#pragma unroll
  for (int i = 0; i < kStep - 1; ++i) found += is_larger(read[i], value);
  return found;
}
// The same of all of a few values, eight at a time.
__device__ __forceinline__ int larger_of(const double* values, int count, int64_t value) {
  int found = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += 8) {
    double read[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) read[i] = values[first + i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; ++i) found += is_larger(read[i], value);
  }
  return found;
}

// What makes the first that wait nodes: how many become nodes now, and of lane i that of the i-th.
struct Ready {
  int made, expansion, count;
};

// Each of them has been expanded, if need be, and nothing that may follow those before it comes
// before it. `most`: at once. Every warp finds out.
__device__ __forceinline__ Ready ready(const Shared& shared, int now, int size, int node, int most,
                                       const Limits& limits) {
  const int lane = lane_of();
  const bool waits = lane < most && lane < size && node + lane < limits.nodes;
  // Loads that do not wait for each other, of whatever lies there where nothing waits.
  const int one = lane % kAtOnce;
  const Candidate candidate = shared.waiting(now)[one < limits.nodes ? one : 0];
  const double value = shared.value(now)[one];
  Ready ready{0, waits ? candidate.expansion : -1, 0};
  const Expansion& expansion = shared.expansions[ready.expansion < 0 ? 0 : ready.expansion];
  const int count = expansion.count;
  const double first = expansion.value[0];
  __syncwarp();
  if (ready.expansion >= 0) ready.count = count;
  const double follows = ready.count ? first : -1.0;
  const bool expands = candidate.depth < limits.depth && node + lane + 1 < limits.nodes;
  bool stops = !waits || (ready.expansion < 0 && expands);
#pragma unroll
  for (int i = 0; i + 1 < kAtOnce; ++i) {
    const double other = __shfl_sync(kWholeWarp, follows, i);
    if (i < lane && other > value) stops = true;
  }
  ready.made = first_bit(__ballot_sync(kWholeWarp, stops));
  return ready;
}

// Merges what may follow the first `made` that wait, which are nodes from `node` on now, into the
// others; keeps as many as there are nodes to come, and returns how many. Of equals those that wait
// already come first, whose parents are earlier nodes, then what follows the earlier node, then as
// in its expansion.
__device__ __forceinline__ int merge(const Sources& from, const Shared& shared, int now, int size,
                                     int node, const Ready& ready, const Limits& limits,
                                     Round& round) {
  const Candidate* waiting = shared.waiting(now);
  const int made = ready.made, left = limits.nodes - node - made, thread = threadIdx.x;
  const double* values = shared.value(now) + made;
  const int group = (thread - first_child(limits.nodes)) / kChildren;
  const int at = (thread - first_child(limits.nodes)) % kChildren;
  const bool waits = thread + made < size, follows = thread >= first_child(limits.nodes);
  const int own = __shfl_sync(kWholeWarp, ready.expansion, group % kAtOnce);
  const int own_count = __shfl_sync(kWholeWarp, ready.count, group % kAtOnce);
  Candidate mine{};
  double value = -1.0;
  int place = kMaxNodes, grown = size - made;
  if (waits) {
    mine = waiting[thread + made];
    value = values[thread];
    place = thread;
  } else if (follows && group < made && own >= 0) {
    const Expansion& expansion = shared.expansions[own];
    const int one = at < kListed ? at : 0, source = expansion.source[one];
    const int likeliest = expansion.likeliest, depth = expansion.depth + 1;
    const int next = expansion.next, last = expansion.last;
    const double probability = expansion.likeliest_probability, worth = expansion.value[one];
    const int64_t token = expansion.token[one];
    __syncwarp();  // all loads have begun
    if (at < own_count) {
      value = worth;
      mine = {at == likeliest ? probability : value,
              source == kNoise ? noise_token(from, depth, node + group) : token,
              node + group,
              depth,
              source,
              at == likeliest ? next : -1};
      if (mine.expansion >= 0) shared.expansions[mine.expansion].last = last;
    }
    __syncwarp();
    const int64_t less = __double_as_longlong(value) - 1;  // than what is as large
    place = at + (limits.nodes > 64 ? larger<16>(values, less) : larger<8>(values, less));
  }
  int expansions[kAtOnce], counts[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    expansions[i] = __shfl_sync(kWholeWarp, ready.expansion, i);
    counts[i] = __shfl_sync(kWholeWarp, ready.count, i);
  }
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    if (i >= made || expansions[i] < 0) continue;
    grown += counts[i];
    if (follows && i == group) continue;
    const bool first = follows && i < group;  // of equals
    place += larger_of(shared.expansions[expansions[i]].value, counts[i],
                       __double_as_longlong(value) - first);
  }
  grown = grown < left ? grown : left;
  if (value >= 0) {
    if (place < left) {
      shared.waiting(1 - now)[place] = mine;
      shared.value(1 - now)[place] = value;
    } else {
      release(shared, mine.expansion, round);
    }
  }
  if (!follows && thread >= grown) shared.value(1 - now)[thread] = __longlong_as_double(kEnd);
  return grown;
}

// Makes the first `made` that wait nodes: writes them out, and keeps their places for those after
// them.
__device__ __forceinline__ void make_nodes(const Shared& shared, int now, int64_t first, int node,
                                           int made, const Tree& tree, Round& round) {
  const int thread = static_cast<int>(blockDim.x - 1 - threadIdx.x), at = thread / kContext;
  if (at >= made) return;
  const Candidate& best = shared.waiting(now)[at];
  if (best.expansion >= 0) {
    const Place& place = shared.expansions[best.expansion].place;
    shared.places[node + at].context[thread % kContext] = place.context[thread % kContext];
    shared.places[node + at].hashes[thread % kContext] = place.hashes[thread % kContext];
  }
  if (thread % kContext) return;
  tree.tokens[first + node + at] = best.token;
  tree.parents[first + node + at] = best.parent;
  tree.probability[first + node + at] = best.probability;
  tree.sources[first + node + at] = best.source;
  if (best.expansion >= 0) atomicAdd(&round.free, 1 << best.expansion);
}

__global__ void __launch_bounds__(most_threads(kMaxNodes), 1)
    draft_tree_kernel(Sources first_row, const int64_t* lengths, int64_t capacity, Limits limits,
                      Tree tree) {
  extern __shared__ uint4 memory[];
  __shared__ Round round;
  const Shared shared(memory, limits);
  const int64_t row = blockIdx.x, first = row * limits.nodes;
  const int thread = threadIdx.x;
  for (int i = thread + 1; i < 2 * room_for(limits.nodes); i += blockDim.x)
    shared.value(0)[i] = __longlong_as_double(kEnd);
  const int64_t length = clamp(lengths[row], 1, capacity);
  const Sources from = sources_of_row(first_row, row, capacity, length);
  for (int i = blockDim.x - 1 - thread; i < kFactors; i += blockDim.x)
    shared.factors[i] = from.factors[i];
  if (thread == 0) {
    shared.waiting(0)[0] = {1.0, from.history[length - 1], -1, 0, 0, -1};  // the root
    shared.value(0)[0] = 1.0;
    round.free = static_cast<int>((1u << limits.expansions) - 1);
  }
  __syncthreads();

  int node = 0, now = 0;
  const int most = (static_cast<int>(blockDim.x) - first_child(limits.nodes)) / kChildren;
  for (int size = 1; node < limits.nodes && size > 0;) {
    Ready first_ones = ready(shared, now, size, node, most, limits);
    if (first_ones.made == 0) {
      __syncthreads();  // all have seen that
      if (thread < kWarp) choose_targets(shared, now, size, limits.nodes - node, limits, round);
      __syncthreads();
      if (thread / kWarp < round.targets) {
        const Target target = round.target[thread / kWarp];
        expand(from, target, limits.foresight, shared.factors, shared.expansions[target.expansion]);
      }
      __syncthreads();
      first_ones = ready(shared, now, size, node, most, limits);
    }
    make_nodes(shared, now, first, node, first_ones.made, tree, round);
    size = merge(from, shared, now, size, node, first_ones, limits, round);
    now = 1 - now;
    node += first_ones.made;
    __syncthreads();
  }

  for (node += thread; node < limits.nodes; node += blockDim.x) {  // nothing left to guess
    tree.tokens[first + node] = from.history[length - 1];
    tree.parents[first + node] = -1;
    tree.probability[first + node] = 0.0;
    tree.sources[first + node] = 0;
  }
}

}  // namespace

void DraftTree::on_cuda(void* stream) const {
  const int64_t batch = history.shape[0], capacity = history.shape[1];
  const int nodes = static_cast<int>(tokens.shape[1]);
  if (batch == 0) return;
  if (capacity == 0)
    throw std::invalid_argument("history has room for 0 tokens; expected at least 1");
  const DeviceGuard guard("draft_tree", history);
  const Sources row_0 = first_row();
  const Tree tree{tokens.as<int64_t>(), parents.as<int32_t>(), probability.as<double>(),
                  sources.as<int32_t>()};
  Limits limits{nodes, static_cast<int>(max_depth), kMostExpansions, foresight};
  while (Shared::bytes(nodes, limits.expansions) + sizeof(Round) > kMostShared) --limits.expansions;
  // For every size, as what a kernel gets unasked is less what it declares.
  check("draft_tree",
        cudaFuncSetAttribute(draft_tree_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(kMostShared - sizeof(Round))));
  launch("draft_tree", draft_tree_kernel, grid_x("draft_tree", batch), most_threads(nodes),
         Shared::bytes(nodes, limits.expansions), stream, row_0, lengths.as<int64_t>(), capacity,
         limits, tree);
}

}  // namespace msn

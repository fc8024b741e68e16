// The size of a tree: the time of a step, learned while decoding, against what its nodes are
// expected to gain. msn_ext/decoding/sizing.py says what is asked of these two; a plain form of
// them is python_tests/helpers/sizing.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace msn {

// Seconds of a step by the tokens that it computes.
class StepTimes {
 public:
  // `curve`: tokens and seconds of measured steps, by tokens; none: they are learned. `slope` and
  // `kink`: a first guess of what a token adds to a step, and of what one token alone takes of it.
  StepTimes(std::vector<std::pair<int64_t, double>> curve, double slope, double kink)
      : curve_(curve.begin(), curve.end()), slope_(slope), kink_(kink) {
    // More tokens never take less time: what says so is noise.
    for (size_t i = 1; i < curve_.size(); ++i)
      curve_[i].seconds = std::max(curve_[i].seconds, curve_[i - 1].seconds);
  }

  // The expected seconds; before anything was measured or seen, in units of their own.
  double of(int64_t tokens) const {
    if (!curve_.empty()) return along(curve_, tokens);
    if (seen_.empty()) return guess(tokens);
    const Point& smallest = seen_.front();
    if (tokens == smallest.tokens || (seen_.size() > 1 && tokens > smallest.tokens))
      return along(seen_, tokens);
    return smallest.seconds * guess(tokens) / guess(smallest.tokens);
  }

  // The fewest seconds that what was seen leaves possible, near enough. More tokens take no less
  // time; fewer than were ever seen take at least as much as the square root of their share. After
  // the largest size seen the line goes on; more than twice as many tokens cost as much as was
  // guessed before anything was seen, so that sizes are tried one after the other.
  double at_best(int64_t tokens) const {
    if (!curve_.empty() || seen_.empty()) return of(tokens);
    const auto at = first_from(seen_, tokens);
    if (at == seen_.end()) {
      const Point& largest = seen_.back();
      double below = largest.seconds;
      if (tokens > 2 * largest.tokens) below *= guess(tokens) / guess(largest.tokens);
      return seen_.size() > 1 ? std::max(below, of(tokens)) : below;
    }
    if (at->tokens == tokens) {
      const auto by_seconds = [](const Point& a, const Point& b) { return a.seconds < b.seconds; };
      const double least = std::min_element(at, seen_.end(), by_seconds)->seconds;
      return least * std::max(0.5, 1 - kDoubt / at->steps);
    }
    if (at != seen_.begin()) return (at - 1)->seconds;
    return at->seconds * std::sqrt(static_cast<double>(tokens) / static_cast<double>(at->tokens));
  }

  // Learns that a step of `tokens` took `seconds`.
  void observe(int64_t tokens, double seconds) {
    if (!curve_.empty()) return;
    if (cold_) {  // the first step of all warms up, and says nothing
      cold_ = false;
      return;
    }
    for (Point& other : seen_)
      if (other.tokens != tokens) other.steps *= kForget;
    const auto at = seen_.begin() + (first_from(seen_, tokens) - seen_.cbegin());
    if (at == seen_.end() || at->tokens != tokens) {
      seen_.insert(at, {tokens, seconds, 1});
      return;
    }
    at->steps += 1;
    const double ratio = std::clamp(seconds / at->seconds, 1 / kOutlier, kOutlier);
    const double its = std::max(kNewest, 1 / at->steps);
    for (Point& other : seen_)
      other.seconds *= 1 + (other.tokens == tokens ? its : kDrift) * (ratio - 1);
  }

 private:
  // What a step counts at least against those of its size before, and against those of the other
  // sizes: all get slower where the machine does.
  static constexpr double kNewest = 0.1, kDrift = 0.05;
  // What is left of the steps that a size was seen in, after one of another size.
  static constexpr double kForget = 0.99;
  // How much faster a size may be than the one step that it was seen in.
  static constexpr double kDoubt = 0.1;
  // A step that took so many times what was expected counts as one that took just that.
  static constexpr double kOutlier = 2;

  struct Point {
    Point(int64_t n, double s, double count) : tokens(n), seconds(s), steps(count) {}
    Point(const std::pair<int64_t, double>& measured) : Point(measured.first, measured.second, 1) {}
    int64_t tokens;
    double seconds;
    double steps;  // that it was seen in, with slow forgetting
  };
  using Points = std::vector<Point>;  // by tokens

  static Points::const_iterator first_from(const Points& points, int64_t tokens) {
    const auto before = [](const Point& point, int64_t n) { return point.tokens < n; };
    return std::lower_bound(points.begin(), points.end(), tokens, before);
  }

  // Linear between the points, the first one's before them, on the line of the last two after them,
  // which does not fall.
  static double along(const Points& points, int64_t tokens) {
    auto right = first_from(points, tokens);
    if (right == points.begin()) return right->seconds;
    const bool behind = right == points.end();
    if (behind) --right;
    if (right == points.begin()) return right->seconds;
    const Point& left = *(right - 1);
    double slope =
        (right->seconds - left.seconds) / static_cast<double>(right->tokens - left.tokens);
    if (behind) slope = std::max(slope, 0.0);
    return right->seconds + slope * static_cast<double>(tokens - right->tokens);
  }

  double guess(int64_t tokens) const {
    return (1 + slope_ * static_cast<double>(tokens)) * (tokens == 1 ? kink_ : 1);
  }

  Points curve_, seen_;
  double slope_, kink_;
  bool cold_ = true;
};

// Chooses the size of the next tree, and learns from what came of the ones before.
class TreeSizer {
 public:
  // `rows`: of the batch. `lesson`: tokens that a tree of one node is worth for later steps.
  TreeSizer(StepTimes& times, int64_t rows, double lesson)
      : times_(times), rows_(rows), lesson_(lesson) {}

  // The size of `sizes` with the most tokens a second, where expected[n] guesses are accepted of
  // n + 1 nodes per row.
  int64_t choose(const std::vector<double>& expected, const std::vector<int64_t>& sizes) {
    const double trust = accepted_ / expected_;
    double best = -1;
    for (const int64_t size : sizes) {
      if (size > static_cast<int64_t>(expected.size())) break;
      const double later = lesson_ * std::sqrt(static_cast<double>(size));
      const double gain = 1 + trust * (expected[size - 1] + later);
      const double rate = gain / times_.at_best(rows_ * size);
      if (rate > best) best = rate, size_ = size;
    }
    return size_;
  }

  // Learns from a step with a tree of so many nodes: of `expected` accepted guesses per row,
  // `accepted` were.
  void observe(int64_t nodes, double expected, double accepted, double seconds) {
    times_.observe(rows_ * nodes, seconds);
    expected_ += expected - 0.02 * expected_;
    accepted_ += accepted - 0.02 * accepted_;
  }

  int64_t size() const { return size_; }  // that was chosen last

 private:
  StepTimes& times_;
  int64_t rows_;
  double lesson_;
  double expected_ = 10, accepted_ = 10;  // guesses, with slow forgetting
  int64_t size_ = 1;
};

}  // namespace msn

#pragma once
#include <stdexcept>
#include <string>

#include "tree.h"

namespace msn {

inline void check_parents(const int32_t* parents, int nodes) {
  for (int i = 0; i < nodes; ++i) {
    if (well_formed(parents[i], i)) continue;
    const std::string expected =
        i == 0 ? "-1" : "-1 or a node in [0, " + std::to_string(i - 1) + "]";
    throw std::invalid_argument("parents[" + std::to_string(i) + "] is " +
                                std::to_string(parents[i]) + "; expected " + expected);
  }
}

// Raises where name[row] lies outside [low, high].
inline void check_range(const char* name, int64_t row, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    throw std::invalid_argument(std::string(name) + "[" + std::to_string(row) + "] is " +
                                std::to_string(value) + "; expected " + std::to_string(low) +
                                " to " + std::to_string(high));
}

}  // namespace msn

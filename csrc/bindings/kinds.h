// The names of norms and activations.
#pragma once
#include <string>

#include "bindings/checks.h"
#include "layers_ops.h"

namespace msn {

template <size_t kCount>
int one_of(const char* argument, const std::string& name, const char* const (&names)[kCount]) {
  std::string all;
  for (size_t i = 0; i < kCount; ++i) {
    if (name == names[i]) return static_cast<int>(i);
    all += std::string(i ? ", " : "") + names[i];
  }
  refuse(argument, " is '", name, "'; expected one of ", all);
}

inline Norm::Kind norm_named(const char* argument, const std::string& name) {
  constexpr const char* kNames[] = {"none", "rms", "layer"};
  return static_cast<Norm::Kind>(one_of(argument, name, kNames));
}

inline Activation activation_named(const std::string& name) {
  constexpr const char* kNames[] = {"silu", "gelu", "gelu_tanh", "relu"};
  return static_cast<Activation>(one_of("activation", name, kNames));
}

inline void expect_finite(const char* name, double value) {
  if (!(value >= 0 && value <= 1e300)) refuse(name, " is ", value, "; expected 0 or more");
}

}  // namespace msn

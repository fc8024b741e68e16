// What draft_tree reads beside the text: checked for the op and for who calls it in steps.
#pragma once
#include "bindings/checks.h"

namespace msn {

// Tables of so many rows, on the device of `like`; factors, whose shape depends on the caller, are
// not among them. Then how a tree grows.
void expect_tables(const Argument& denoised, const Argument& adjacency, const Argument& habits,
                   const Argument& suffixes, const Argument& corpus,
                   const Argument& corpus_suffixes, int64_t batch, const Tensor& like);
void expect_growth(int64_t max_depth, double foresight);

}  // namespace msn

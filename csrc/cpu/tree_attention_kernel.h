// One entry per instruction set; tree_attention.cpp picks one at run time.
#pragma once
#include "../ops.h"

namespace msn::cpu {

#define MSN_DECLARE_ATTENTION(isa)                                                              \
  namespace isa {                                                                               \
  void tree_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths, \
                      const Tensor& offsets, const Tensor& ancestors, const Tensor& sinks,      \
                      const AttentionOptions& options, const Tensor& out);                      \
  }
MSN_DECLARE_ATTENTION(baseline)
MSN_DECLARE_ATTENTION(avx2)
MSN_DECLARE_ATTENTION(avx512)
#undef MSN_DECLARE_ATTENTION

}  // namespace msn::cpu

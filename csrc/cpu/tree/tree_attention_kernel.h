// One entry per instruction set; tree_attention.cpp picks one at run time.
#pragma once
#include "tree_ops.h"

namespace msn {

namespace baseline {
void tree_attention(const TreeAttention& op);
}
namespace avx2 {
void tree_attention(const TreeAttention& op);
}
namespace avx512 {
void tree_attention(const TreeAttention& op);
}

}  // namespace msn

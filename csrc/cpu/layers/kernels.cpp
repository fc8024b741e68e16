// The kernels of kernels.h, compiled once per instruction set (MSN_ISA). Here is no function that
// other files might share: the linker would keep one of them, for any instruction set.
#include "cpu/layers/kernels.h"

#include "cpu/layers/attention.h"
#include "cpu/layers/functions.h"
#include "cpu/layers/linear.h"
#include "cpu/layers/narrow.h"
#include "cpu/layers/packing.h"
#include "cpu/layers/screen.h"

namespace msn::MSN_ISA {

namespace {

// f(P{}) for the way that panels of a kind of weights are stored.
template <typename F>
auto with_panels(Weights kind, F f) {
  switch (kind) {
    case Weights::kFloat64: return f(Floats<double, kWeightWidth, kSumBlock>{});
    case Weights::kFloat32: return f(Floats<float, kWeightWidth, kSumBlock>{});
    case Weights::kBFloat16: return f(WeightBFloats{});
    case Weights::kFloat16: return f(Halfs<kWeightWidth, kSumBlock>{});
    default: return f(Int8s<kWeightWidth>{});
  }
}

// The same for matrices that may be coded.
template <typename F>
auto with_stored(Weights kind, F f) {
#if defined(__AVX512BF16__)
  if (kind == Weights::kCodedBFloat16) return f(CodedBFloats{});
#endif
#if defined(__AVX512F__)
  if (kind == Weights::kCodedFloat32) return f(ShortFloats{});
#endif
  return with_panels(kind, f);
}

// f(S{}) for the type that keys and values are stored in.
template <typename F>
auto with_cache(Weights kind, F f) {
  switch (kind) {
    case Weights::kFloat64: return f(double{});
    case Weights::kFloat32: return f(float{});
    case Weights::kFloat16: return f(Half{});
    default: return f(BFloat16{});
  }
}

int64_t panel_bytes_of(Weights kind, int64_t inputs) {
  return with_stored(kind, [&](auto panels) { return decltype(panels)::bytes(inputs); });
}

void pack_rows(Weights kind, const Unpacked& source, void* to) {
  with_panels(kind, [&](auto panels) { pack<decltype(panels)>(source, static_cast<char*>(to)); });
}

void unpack_row(Weights kind, const Packed& from, int64_t row, void* to) {
  with_stored(kind, [&](auto panels) {
    using P = decltype(panels);
    unpack<P>(from, row, static_cast<typename P::Sum*>(to));
  });
}

void embed_rows(Weights kind, const Embed& stage, int t, int threads) {
  with_panels(kind, [&](auto panels) { embed<decltype(panels)>(stage, t, threads); });
}

bool prepare_rows(Weights kind, const Linear& stage, int t, int threads, Scratch& scratch) {
  return with_stored(
      kind, [&](auto panels) { return prepare<decltype(panels)>(stage, t, threads, scratch); });
}

void linear_rows(Weights kind, const Linear& stage, int t, int threads, Scratch& scratch) {
  with_stored(kind, [&](auto panels) { linear<decltype(panels)>(stage, t, threads, scratch); });
}

bool has_codes([[maybe_unused]] Weights kind) {
#if defined(__AVX512BF16__)
  if (kind == Weights::kBFloat16) return true;
#endif
#if defined(__AVX512F__)
  if (kind == Weights::kFloat32) return true;
#endif
  return false;
}

int64_t bytes_behind([[maybe_unused]] Weights kind, [[maybe_unused]] const void* panel,
                     [[maybe_unused]] int64_t inputs) {
#if defined(__AVX512BF16__)
  if (kind == Weights::kBFloat16) return 4 * count_other_pairs(panel, inputs);
#endif
#if defined(__AVX512F__)
  if (kind == Weights::kFloat32) return is_short(panel, inputs) ? 0 : -1;
#endif
  return -1;
}

void code([[maybe_unused]] Weights kind, [[maybe_unused]] const void* panel,
          [[maybe_unused]] int64_t inputs, [[maybe_unused]] char* coded,
          [[maybe_unused]] char* behind) {
#if defined(__AVX512BF16__)
  if (kind == Weights::kBFloat16)
    code_panel(panel, inputs, coded, reinterpret_cast<uint32_t*>(behind));
#endif
#if defined(__AVX512F__)
  if (kind == Weights::kFloat32) shorten_panel(panel, inputs, coded);
#endif
}

#if defined(__AVX512VNNI__)
// f(P{}) for panels that can be screened, else `otherwise`.
template <typename R, typename F>
R with_screened(Weights kind, R otherwise, F f) {
  switch (kind) {
    case Weights::kFloat32: return f(Floats<float, kWeightWidth, kSumBlock>{});
    case Weights::kBFloat16: return f(WeightBFloats{});
    case Weights::kFloat16: return f(Halfs<kWeightWidth, kSumBlock>{});
    default: return otherwise;
  }
}

int64_t screen_bytes_of(Weights kind, const Packed& head) {
  return with_screened(kind, int64_t{0}, [&](auto) {
    return (head.outputs + kScreenWidth - 1) / kScreenWidth * ScreenPanel::bytes(head.inputs);
  });
}

bool pack_screen_panel(Weights kind, const Packed& head, int64_t panel, void* screen) {
  return with_screened(kind, false, [&](auto panels) {
    char* to = static_cast<char*>(screen) + panel * ScreenPanel::bytes(head.inputs);
    return pack_screen<decltype(panels)>(head, panel, to);
  });
}

void largest_rows(Weights kind, const Linear& stage, int t, int threads, Scratch& scratch) {
  const bool done = with_screened(kind, false, [&](auto panels) {
    return screened<decltype(panels)>(stage, t, threads, scratch);
  });
  if (!done) linear_rows(kind, stage, t, threads, scratch);
}
#else
int64_t screen_bytes_of(Weights, const Packed&) { return 0; }
bool pack_screen_panel(Weights, const Packed&, int64_t, void*) { return false; }
void largest_rows(Weights kind, const Linear& stage, int t, int threads, Scratch& scratch) {
  linear_rows(kind, stage, t, threads, scratch);
}
#endif

void narrow_linear_rows(Weights kind, const NarrowLinear& stage, Scratch& scratch) {
  switch (kind) {
    case Weights::kFloat64: return narrow_linear<double>(stage, scratch);
    case Weights::kFloat32:
    case Weights::kFloat16: return narrow_linear<float>(stage, scratch);
    default: return narrow_linear<BFloat16>(stage, scratch);
  }
}

void add_norm_rows(Weights kind, const AddNorm& stage, int t, int threads) {
  if (kind == Weights::kFloat64)
    add_norm<double>(stage, t, threads);
  else
    add_norm<float>(stage, t, threads);
}

void rotary_write_rows(Weights kind, const RotaryWrite& stage, int t, int threads) {
  with_cache(kind, [&](auto stored) { rotary_write<decltype(stored)>(stage, t, threads); });
}

void attention_rows(Weights kind, const CachedAttention& stage, int t, int threads,
                    Scratch& scratch) {
  with_cache(kind, [&](auto stored) { attend<decltype(stored)>(stage, t, threads, scratch); });
}

void move_slot(Weights kind, const Cache& cache, const Heads& heads, int64_t batch, int64_t from,
               int64_t to) {
  with_cache(kind, [&](auto stored) {
    for (int64_t head = 0; head < heads.kv; ++head)
      HeadCache<decltype(stored)>(cache, heads, batch, head).move(from, to);
  });
}

#define MSN_TEXT_OF(x) #x
#define MSN_TEXT(x) MSN_TEXT_OF(x)

}  // namespace

const Kernels kernels = {MSN_TEXT(MSN_ISA),  kWeightWidth,      WeightBFloats::kPairs,
                         panel_bytes_of,     pack_rows,         unpack_row,
                         has_codes,          bytes_behind,      code,
                         embed_rows,         prepare_rows,      linear_rows,
                         screen_bytes_of,    pack_screen_panel, largest_rows,
                         narrow_linear_rows, add_norm_rows,     rotary_write_rows,
                         attention_rows,     move_slot};

}  // namespace msn::MSN_ISA

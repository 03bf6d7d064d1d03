// One row of the gradient of dora_linear's columns, which have a factor each.
#pragma once

#include "trifuse/dora_linear.h"
#include "trifuse/simd.h"

namespace trifuse::cpu {
namespace {
namespace dora {

// Columns [from, from + columns) of row m: dplain = factors * dy, and dy * plain is added to some[0 .. columns), if
// that is asked for. `dy` is where the first of them lies.
template <class T, class S>
TRIFUSE_INLINE void scale_row(const DoraParams& p, const S* dy, int64_t m, int64_t from, int64_t columns, T* some) {
  constexpr int64_t lanes = kLanes<T>;
  const T* factors = static_cast<const T*>(p.factors) + from;
  const S* plain = static_cast<const S*>(p.plain) + m * p.columns + from;
  S* dplain = static_cast<S*>(p.dplain) + m * p.columns + from;
  int64_t c = 0;
  for (; c + lanes <= columns; c += lanes) {
    const Vec<T> g = load_as<T>(dy + c);
    __builtin_prefetch(dy + p.columns + c);  // the next row
    __builtin_prefetch(dplain + p.columns + c, 1);
    if (some) __builtin_prefetch(plain + p.columns + c);
    store_as<T>(dplain + c, load<T>(factors + c) * g);
    if (some) store<T>(some + c, load<T>(some + c) + g * load_as<T>(plain + c));
  }
  for (; c < columns; ++c) {
    const T g = scalar_as<T>(dy[c]);
    dplain[c] = scalar_from<S>(factors[c] * g);
    if (some) some[c] += g * scalar_as<T>(plain[c]);
  }
}

}  // namespace dora
}  // namespace
}  // namespace trifuse::cpu

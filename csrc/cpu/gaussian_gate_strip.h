// One strip of a gate: the statistics and parameters of its lanes, and the gate of a vector of entries.
#pragma once

#include <vector>

#include "slices_moments.h"
#include "trifuse/gaussian_gate.h"

namespace trifuse::cpu {
namespace {

// exp(-z^2 / 2), exactly 0 far out.
template <class E>
TRIFUSE_INLINE Vec<E> bell(Vec<E> z) {
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 4) {
    const Vec<E> c = at_most<E>(at_least<E>(z, E(-64)), E(64));
    return exp2_product<E>(c * splat(E(-kLog2e / 2)), c);
  }
#endif
  return exp2_by_shift<E>(z * z * splat(E(-kLog2e / 2)));
}

template <class E>
struct GateStrip {
  // The mean is mean + rest: far from zero its rounding would be that of every distance from it.
  alignas(64) E mean[kLanes<E>], rest[kLanes<E>], inverse[kLanes<E>], base[kLanes<E>], amplitude[kLanes<E>];
  int64_t row[kLanes<E>];
  std::vector<E> offset, scale;  // (gaussians, lanes); scale: 1 / (width sqrt(v))
  int lanes = 0;                 // slices

  GateStrip() = default;

  void slices(const SliceGroup<E>& group, int w) {
    lanes = group.columns ? int(std::min<int64_t>(group.width - w * kLanes<E>, kLanes<E>)) : 1;
  }
  // Lanes that have no slice of their own do as the last does.
  void fill(E* values) const {
    for (int i = lanes; i < kLanes<E>; ++i) values[i] = values[lanes - 1];
  }
  // The statistics of the slices are there already.
  void take_parameters(const GaussianGateShape& p, const SliceGroup<E>& group, int w) {
    constexpr int n = kLanes<E>;
    const E* alphas = static_cast<const E*>(p.alpha);
    offset.resize(p.gaussians * n);
    scale.resize(p.gaussians * n);
    for (int i = 0; i < lanes; ++i) {
      row[i] = p.row_of(group.head, group.outer, group.inner + w * n + i);
      base[i] = alphas ? 1 : 0;
      amplitude[i] = alphas ? E(alphas[row[i]] * p.alpha_scale()) : 1;
      for (int64_t k = 0; k < p.gaussians; ++k) {
        const double width = static_cast<const E*>(p.width)[row[i] * p.gaussians + k];
        offset[k * n + i] = static_cast<const E*>(p.offset)[row[i] * p.gaussians + k];
        scale[k * n + i] = E(double(inverse[i]) / (p.squared ? std::sqrt(width) : width));
      }
    }
    for (E* values : {mean, rest, inverse, base, amplitude}) fill(values);
    for (int64_t k = 0; k < p.gaussians; ++k) {
      fill(&offset[k * n]);
      fill(&scale[k * n]);
    }
  }
  // -d(scale) / d(width) over the scale.
  double width_slope(const GaussianGateShape& p, int i, int64_t k) const {
    return (p.squared ? 0.5 : 1.0) / double(static_cast<const E*>(p.width)[row[i] * p.gaussians + k]);
  }
  // Where lane i's statistics stand in one part of `stats`.
  static int64_t place(const GaussianGateShape& p, const SliceGroup<E>& group, int w, int i) {
    const int64_t inner = group.inner + (group.columns ? w * kLanes<E> + i : 0);
    return (group.head * p.outer + group.outer) * p.inner + inner;
  }
};

}  // namespace
}  // namespace trifuse::cpu

// The forward pass of gaussian_gate: a group of slices at a time, its statistics and then its gates, both from a copy
// in cache where a slice fits; a longer one is read twice.
#pragma once

#include "gaussian_gate_strip.h"

namespace trifuse::cpu {
namespace {

template <class E, class S>
class GateForward {
 public:
  GateForward(const GaussianGateParams& p, const SlicePlan<E>& plan)
      : p_(p), plan_(plan), x_(plan.block_size()), keep_(plan.block_size()) {}

  void run(int64_t index) {
    const SliceGroup<E> group(plan_, index);
    if (p_.mask.ptr || group.ragged()) {
      run<true>(group);
    } else {
      run<false>(group);
    }
  }

 private:
  template <bool kMasked>
  void run(const SliceGroup<E>& group) {
    const int64_t blocks = group.blocks();
    LaneMoments<E> moments[kMaxStrips];
    for (int64_t b = 0; b < blocks; ++b) {
      const SliceBlock<E> block(group, b);
      read<kMasked>(block);
      for (int w = 0; w < group.strips; ++w) {
        const int64_t at = block.place(0, w);
        moments[w].template add<kMasked>(&x_[at], &keep_[at], block.steps, group.columns);
      }
    }
    for (int w = 0; w < group.strips; ++w) finish(moments[w], group, w);
    for (int64_t b = 0; b < blocks; ++b) {
      const SliceBlock<E> block(group, b);
      if (blocks > 1) read<kMasked>(block);
      if (p_.gaussians == 1) {
        write<kMasked, true>(block);
      } else {
        write<kMasked, false>(block);
      }
    }
  }

  template <bool kMasked>
  void read(const SliceBlock<E>& block) {
    if (kMasked) block.read_keep(p_.mask, keep_.data());
    block.template read<S>(p_.x, kMasked ? keep_.data() : nullptr, x_.data());
  }

  void finish(const LaneMoments<E>& moments, const SliceGroup<E>& group, int w) {
    GateStrip<E>& strip = strips_[w];
    strip.slices(group, w);
    for (int i = 0; i < strip.lanes; ++i) {
      const double divisor = std::max(moments.count[i] - (p_.alpha ? 1 : 0), 1.0);
      strip.mean[i] = E(moments.mean[i]);
      strip.rest[i] = E(moments.mean[i] - double(strip.mean[i]));
      strip.inverse[i] = E(1 / std::sqrt(moments.squares[i] / divisor + p_.eps));
    }
    strip.take_parameters(p_, group, w);
    E* stats = static_cast<E*>(p_.stats);
    for (int i = 0; i < strip.lanes; ++i) {
      const int64_t at = strip.place(p_, group, w, i);
      const int64_t part = p_.heads * p_.outer * p_.inner;
      stats[at] = strip.mean[i];
      stats[part + at] = strip.rest[i];
      stats[2 * part + at] = strip.inverse[i];
    }
  }

  template <bool kMasked, bool kOne>
  void write(const SliceBlock<E>& block) {
    constexpr int lanes = kLanes<E>;
    for (int64_t from = 0; from < block.steps; from += kChunk) {
      for (int w = 0; w < block.group.strips; ++w) {
        const GateStrip<E>& strip = strips_[w];
        const Vec<E> mean = load<E>(strip.mean), rest = load<E>(strip.rest), base = load<E>(strip.base),
                     amplitude = load<E>(strip.amplitude);
        const Vec<E> offset = load<E>(strip.offset.data()), scale = load<E>(strip.scale.data());
        block.template write<S>(p_.out, from, std::min(from + kChunk, block.steps), w, [&](int64_t n) {
          const int64_t at = block.place(n, w);
          const Vec<E> x = load<E>(&x_[at]), d = (x - mean) - rest;
          Vec<E> sum = bell<E>((d - offset) * scale);
          if (!kOne) {
            for (int64_t k = 1; k < p_.gaussians; ++k) {
              sum += bell<E>((d - load<E>(&strip.offset[k * lanes])) * load<E>(&strip.scale[k * lanes]));
            }
          }
          Vec<E> y = base + amplitude * sum;
          if (kMasked) y *= load<E>(&keep_[at]);
          return p_.multiply ? x * y : y;
        });
      }
    }
  }

  const GaussianGateParams& p_;
  const SlicePlan<E>& plan_;
  std::vector<E> x_, keep_;
  GateStrip<E> strips_[kMaxStrips];
};

}  // namespace
}  // namespace trifuse::cpu

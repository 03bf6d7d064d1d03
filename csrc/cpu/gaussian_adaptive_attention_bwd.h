// The backward pass of gaussian_adaptive_attention over one tile of slices: mean and weights again and the mean of
// their gradients; gradients of the exponents and their moments; gradient of x. A tile that fits into the cache is read
// from memory once, one that does not four times.
#pragma once

#include "gaussian_adaptive_attention_slices.h"

namespace trifuse::cpu {
namespace {

// Sums over slices of what the gradients of a head's Gaussians are made of. With s the gradients of the exponents and
// e = x - mean - beta: sum s e^2 / v, sum s e / v, sum s / v, sum s. About beta, as what is narrow is close to it:
// about the mean the small squares of the narrowest Gaussian, which has the largest gradient, would be differences of
// large ones.
struct CurveGradient {
  double second = 0, first = 0, zeroth = 0, log_scale = 0;

  void add(const CurveGradient& other) {
    second += other.second;
    first += other.first;
    zeroth += other.zeroth;
    log_scale += other.log_scale;
  }
};

// kMasked: some entries take no part. kPadded: some are a sentinel (then kMasked too).
// Scratch, all [step][kWide]: g = dout, w the weights, s = dL/dw and then the gradient of the exponents.
template <class E, bool kRows, bool kMasked, bool kPadded>
struct BackwardSteps {
  using Numbers = PerSlice<E, E, kRows>;
  using Wide = PerSlice<double, E, kRows>;
  using Input = Entries<E>;

  static constexpr auto sum = sum_entries<E, kRows, kMasked, kPadded>;

  // Weights before their normalisation and their gradients (dweights, if given, is already in s), the sums of the
  // former and of their products.
  static void weights(const Input& in, const Input& g, int64_t steps, bool one, const Curve<E, kRows>& curve,
                      const Numbers& least, bool dweights, E* w, E* s, Wide& sum, Wide& products) {
    Sums<E, kRows> sums[2];
    for (int64_t begin = 0; begin < steps; begin += kChunk) {
      Vec<E> m[2][kWide] = {};
      for (int64_t t = begin; t < std::min(begin + kChunk, steps); ++t) {
        TRIFUSE_EACH_VECTOR {
          const int64_t i = (t * kWide + u) * kLanes<E>;
          const Vec<E> x = in.at(t, u);
          const Vec<E> e = x - spread<E, kRows>(curve.mean, u) - spread<E, kRows>(curve.beta, u);
          Vec<E> weight = weight_of<E, kPadded>(e, spread<E, kRows>(curve.rate, u), spread<E, kRows>(least, u));
          Vec<E> change = x * g.at(t, u);
          if (kMasked) weight = where<E>(in.counted[t * kWide + u], weight);
          if (kPadded) change = where<E>(in.multiplied[t * kWide + u], change);
          if (dweights) change = change + load(s + i);
          if (kMasked) change = where<E>(in.counted[t * kWide + u], change);
          m[0][u] = m[0][u] + weight;
          m[1][u] = m[1][u] + weight * change;
          store(w + i, weight);
          store(s + i, change);
        }
      }
      for (int k = 0; k < 2; ++k) sums[k].add(m[k]);
    }
    sums[0].get(sum, one);
    sums[1].get(products, one);
  }

  // The numbers of a slice that its moments are made with: e less `shift`, e^2 less `least`. The gradients
  // of the exponents sum to zero, mostly, so what all entries have in common is left out before it is rounded.
  struct About {
    Numbers scale, mean, shift, least;
  };
  // Sums of the gradients of the exponents, of these times e - shift and e^2 - least, and of the weights times those.
  static void moments(const Input& in, int64_t steps, bool one, const Curve<E, kRows>& curve, const About& about,
                      const E* w, E* s, Wide& count, Wide* moments) {
    Sums<E, kRows> counts, sums[5];
    for (int64_t begin = 0; begin < steps; begin += kChunk) {
      Vec<E> n[kWide] = {}, m[5][kWide] = {};
      for (int64_t t = begin; t < std::min(begin + kChunk, steps); ++t) {
        TRIFUSE_EACH_VECTOR {
          const int64_t i = (t * kWide + u) * kLanes<E>;
          Vec<E> e = in.at(t, u) - spread<E, kRows>(curve.mean, u) - spread<E, kRows>(curve.beta, u);
          const Vec<E> square = rounded_square<E>(e) - spread<E, kRows>(about.least, u);
          e = e - spread<E, kRows>(about.shift, u);
          const Vec<E> weight = load(w + i) * spread<E, kRows>(about.scale, u);
          const Vec<E> change = weight * (load(s + i) - spread<E, kRows>(about.mean, u));
          if (kMasked) n[u] = n[u] + where<E>(in.counted[t * kWide + u], splat(E(1)));
          m[0][u] = m[0][u] + change;
          m[1][u] = m[1][u] + change * e;
          m[2][u] = m[2][u] + change * square;
          m[3][u] = m[3][u] + weight * e;
          m[4][u] = m[4][u] + weight * square;
          store(s + i, change);
        }
      }
      for (int k = 0; k < 5; ++k) sums[k].add(m[k]);
      if (kMasked) counts.add(n);
    }
    for (int k = 0; k < 5; ++k) sums[k].get(moments[k], one);
    if (kMasked) counts.get(count, one);
  }

  // dx = g w scale + slope e s + offset + spread d, with d = x - mean and e = d - beta (which holds what the mean was
  // rounded by).
  struct Line {
    Numbers scale, slope, offset, spread;
  };
  template <class S>
  static void outputs(const Input& in, const Input& g, int64_t steps, const Curve<E, kRows>& curve, const Line& line,
                      const E* w, const E* s, const Writer<E, S, kRows>& dx) {
    for (int64_t t = 0; t < steps; ++t) {
      if (dx.whole()) {
        TRIFUSE_EACH_VECTOR dx.put_whole(t, u, output(in, g, t, u, curve, line, w, s));
      } else {
        for (int u = 0; u < kWide; ++u) dx.put(t, u, output(in, g, t, u, curve, line, w, s));
      }
    }
  }

 private:
  static TRIFUSE_INLINE Vec<E> output(const Input& in, const Input& g, int64_t t, int u, const Curve<E, kRows>& curve,
                                      const Line& line, const E* w, const E* s) {
    const int64_t i = (t * kWide + u) * kLanes<E>;
    const Vec<E> d = in.at(t, u) - spread<E, kRows>(curve.mean, u), e = d - spread<E, kRows>(curve.beta, u);
    const Vec<E> direct = g.at(t, u) * (load(w + i) * spread<E, kRows>(line.scale, u));
    const Vec<E> through = load(s + i) * (e * spread<E, kRows>(line.slope, u));
    Vec<E> common = d * spread<E, kRows>(line.spread, u) + spread<E, kRows>(line.offset, u);
    if (kPadded) {
      const IVec<E> multiplied = in.multiplied[t * kWide + u];
      return where<E>(multiplied, direct, g.at(t, u)) + through + where<E>(multiplied, common);
    }
    if (kMasked) common = where<E>(in.counted[t * kWide + u], common);
    return direct + through + common;
  }
};

// Everything between the passes over a tile: the numbers of its slices.
template <class E, class S, bool kRows>
class BackwardTile {
 public:
  using Params = GaussianAdaptiveAttentionBwdParams;
  using Numbers = PerSlice<E, E, kRows>;
  using Wide = PerSlice<double, E, kRows>;
  static constexpr int kCount = kSlices<E, kRows>;

  BackwardTile(const Params& p, const Cutting<E, kRows>& cutting)
      : p_(p), cutting_(cutting), scratch_(cutting.scratch_steps() * kWide, 6) {}

  void run(const Head& head, int64_t h, int64_t group, CurveGradient& sums) {
    take(head, h, group);
    const int64_t blocks = cutting_.blocks(group, h);
    for (int64_t k = 0; k < blocks; ++k) {
      load(group, h, k);
      with_steps([&](auto steps) { find_mean(steps, k); });
    }
    for (int i = 0; i < kCount; ++i) curve_.set_mean(head, i, mean_[i]);
    for (int64_t k = 0; k < blocks; ++k) {
      if (blocks > 1) load(group, h, k);
      with_steps([&](auto steps) { find_weights(steps); });
    }
    finish_weights();
    for (int64_t k = 0; k < blocks; ++k) {
      if (blocks > 1) load(group, h, k);
      with_steps([&](auto steps) { find_moments(steps, blocks > 1); });
    }
    finish(head, cutting_.slices(group), sums);
    for (int64_t k = 0; k < blocks; ++k) {
      if (blocks > 1) load(group, h, k);
      with_steps([&](auto steps) { output(steps, blocks > 1); });
    }
  }

 private:
  void load(int64_t group, int64_t h, int64_t k) {
    tile_ = cutting_.tile(group, h, k);
    in_ = loader_.load(p_, tile_, scratch_);
    g_.step = kWide * kLanes<E>;
    if (p_.dout.ptr && reads_in_place<E, S, kRows>(tile_, p_.dout)) {
      g_.step = tile_.step(p_.dout);
      for (int u = 0; u < kWide; ++u) g_.x[u] = static_cast<const E*>(p_.dout.ptr) + tile_.offset(p_.dout, u);
    } else {
      copy_gradient<E, S, kRows>(tile_, p_.dout, scratch_.part(3));
      for (int u = 0; u < kWide; ++u) g_.x[u] = scratch_.part(3) + u * kLanes<E>;
    }
    if (p_.dweights.ptr) copy_gradient<E, S, kRows>(tile_, p_.dweights, changes());
  }
  template <class F>
  void with_steps(F&& f) const {
    loader_.with_masks(p_, [&](auto masked, auto padded) {
      f(BackwardSteps<E, kRows, decltype(masked)::value, decltype(padded)::value>());
    });
  }
  E* weights() { return scratch_.part(4); }
  E* changes() { return scratch_.part(5); }

  void take(const Head& head, int64_t h, int64_t group) {
    const Statistics<E> stats(p_, p_.stats, h, cutting_.first_slice(group));
    const int64_t n = cutting_.slices(group);
    for (int i = 0; i < kCount; ++i) {
      // The parts of one slice share its numbers; columns that are not there count as zeros.
      const bool there = kRows || i < n;
      const int64_t from = kRows && n == 1 ? 0 : i;
      const E signed_inverse = there ? stats.inverse_variance[from] : E(1);
      clamped_[i] = signed_inverse < 0;
      inverse_variance_[i] = std::fabs(signed_inverse);
      curve_.set_rate(head, i, inverse_variance_[i]);
      least_[i] = there ? stats.least[from] : E(0);
      floor_[i] = clamped_[i] ? E(0) : least_[i];
      shift_[i] = std::copysign(std::sqrt(floor_[i]), E(-head.beta));
      sum_[i] = products_[i] = count_[i] = 0;
      for (Wide& moment : moments_) moment[i] = 0;
    }
    if (p_.clamped) clamped_scale<E, kRows>(head, p_.eps, curve_, inverse_variance_, least_, scale_);
  }

  // The mean of a block's entries, joined with those before it: found again as it was before its rounding.
  template <class Steps>
  void find_mean(Steps steps, int64_t k) {
    Wide sum, count;
    for (int i = 0; i < kCount; ++i) count[i] = double(Cutting<E, kRows>::entries(tile_));
    steps.sum(in_, tile_.steps, tile_.one, sum, count);
    for (int i = 0; i < kCount; ++i) {
      const double before = k == 0 ? 0 : seen_[i], mean = sum[i] / std::max(count[i], 1.0);
      mean_[i] = k == 0 ? mean : mean_[i] + (mean - mean_[i]) * count[i] / std::max(before + count[i], 1.0);
      seen_[i] = before + count[i];
    }
  }

  template <class Steps>
  void find_weights(Steps steps) {
    Wide sum, products;
    steps.weights(in_, g_, tile_.steps, tile_.one, curve_, least_, p_.dweights.ptr, weights(), changes(), sum,
                  products);
    for (int i = 0; i < kCount; ++i) {
      sum_[i] += sum[i];
      products_[i] += products[i];
    }
  }

  void finish_weights() {
    for (int i = 0; i < kCount; ++i) {
      mean_change_[i] = E(clamped_[i] || sum_[i] == 0 ? 0 : products_[i] / sum_[i]);
      if (!clamped_[i]) scale_[i] = E(sum_[i] == 0 ? 0 : 1 / sum_[i]);
    }
  }

  template <class Steps>
  void find_moments(Steps steps, bool again) {
    Wide count, moments[5];
    if (again) redo_weights(steps);
    for (int i = 0; i < kCount; ++i) count[i] = double(Cutting<E, kRows>::entries(tile_));
    steps.moments(in_, tile_.steps, tile_.one, curve_, {scale_, mean_change_, shift_, floor_}, weights(), changes(),
                  count, moments);
    for (int i = 0; i < kCount; ++i) {
      count_[i] += count[i];
      for (int k = 0; k < 5; ++k) moments_[k][i] += moments[k][i];
    }
  }

  template <class Steps>
  void redo_weights(Steps steps) {
    Wide sum, products;
    steps.weights(in_, g_, tile_.steps, tile_.one, curve_, least_, p_.dweights.ptr, weights(), changes(), sum,
                  products);
  }

  void finish(const Head& head, int64_t slices, CurveGradient& sums) {
    for (int i = 0; i < kCount; ++i) {
      // Where the weights sum to one their exponents' gradients sum to zero. What is left is the rounding of their
      // mean: it stands in the other sums times the weights.
      const double s0 = clamped_[i] ? moments_[0][i] : 0, rounding = clamped_[i] ? 0 : moments_[0][i];
      const double s1 = moments_[1][i] - rounding * moments_[3][i], s2 = moments_[2][i] - rounding * moments_[4][i];
      const double inverse = inverse_variance_[i], count = std::max(count_[i], 1.0);
      const double variance = 0.5 * inverse * inverse * (head.a * s2 + head.rest * s0);
      slope_[i] = E(-head.a * inverse);
      const double along = 2 * variance / std::max(count - 1, 1.0);
      spread_[i] = E(along);
      offset_[i] = E(head.a * inverse * s1 / count + along * curve_.mean_error(head, i));
      if (i >= slices) continue;
      sums.add({s2 * inverse, s1 * inverse, s0 * inverse, s0});
    }
  }

  template <class Steps>
  void output(Steps steps, bool again) {
    if (again) {
      Wide count, unused[5];
      redo_weights(steps);
      steps.moments(in_, tile_.steps, tile_.one, curve_, {scale_, mean_change_, shift_, floor_}, weights(), changes(),
                    count, unused);
    }
    const Writer<E, S, kRows> dx(tile_, p_, p_.dx);
    steps.template outputs<S>(in_, g_, tile_.steps, curve_, {scale_, slope_, offset_, spread_}, weights(), changes(),
                              dx);
  }

  const Params& p_;
  const Cutting<E, kRows>& cutting_;
  Scratch<E> scratch_;
  Loader<E, S, kRows> loader_;
  Tile<E, kRows> tile_;
  Entries<E> in_, g_;
  Curve<E, kRows> curve_;
  bool clamped_[kCount];  // where the clamp acts the gradients of the exponents do not sum to zero
  Wide mean_, seen_, count_, sum_, products_, moments_[5];
  Numbers inverse_variance_, least_, mean_change_, scale_, shift_, floor_, slope_, offset_, spread_;
};

}  // namespace
}  // namespace trifuse::cpu

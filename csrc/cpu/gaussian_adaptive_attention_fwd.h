// The forward pass of gaussian_adaptive_attention over one tile of slices: mean; variance and largest exponent;
// weights and their sum; output. A tile that fits into the cache is read from memory once; one that does not is read
// once for its moments, once for the sum of its weights and once for its output.
#pragma once

#include "gaussian_adaptive_attention_slices.h"

namespace trifuse::cpu {
namespace {

// kMasked: some entries take no part. kPadded: some are a sentinel (then kMasked too).
template <class E, bool kRows, bool kMasked, bool kPadded>
struct ForwardSteps {
  using Numbers = PerSlice<E, E, kRows>;
  using Wide = PerSlice<double, E, kRows>;
  using Input = Entries<E>;

  static constexpr auto sum = sum_entries<E, kRows, kMasked, kPadded>;

  // Sums of squares about the mean, and the least e^2.
  static void squares(const Input& in, int64_t steps, bool one, const Curve<E, kRows>& curve, Wide& squares,
                      Numbers& least) {
    Sums<E, kRows> sums;
    Vec<E> low[kWide];
    TRIFUSE_EACH_VECTOR low[u] = splat(std::numeric_limits<E>::max());
    for (int64_t begin = 0; begin < steps; begin += kChunk) {
      Vec<E> s[kWide] = {};
      for (int64_t t = begin; t < std::min(begin + kChunk, steps); ++t) {
        TRIFUSE_EACH_VECTOR {
          const Vec<E> x = in.at(t, u);
          const Vec<E> mean = spread<E, kRows>(curve.mean, u);
          Vec<E> d = x - mean;
          Vec<E> square = rounded_square<E>(d - spread<E, kRows>(curve.beta, u));
          if (kPadded) {
            d = where<E>(in.multiplied[t * kWide + u], x) - mean;
            square = at_most<E>(square, E(kFarthest));
          }
          if (kMasked) {
            const IVec<E> counted = in.counted[t * kWide + u];
            d = where<E>(counted, d);
            square = where<E>(counted, square, splat(std::numeric_limits<E>::max()));
          }
          s[u] = s[u] + d * d;
          low[u] = smaller<E>(low[u], square);
        }
      }
      sums.add(s);
    }
    sums.get(squares, one);
    lowest(low, one, least);
  }

  // Weights before their normalisation, [step][kWide], and their sums.
  static void weights(const Input& in, int64_t steps, bool one, const Curve<E, kRows>& curve, const Numbers& least,
                      E* w, Wide& sum) {
    Sums<E, kRows> sums;
    for (int64_t begin = 0; begin < steps; begin += kChunk) {
      Vec<E> s[kWide] = {};
      for (int64_t t = begin; t < std::min(begin + kChunk, steps); ++t) {
        TRIFUSE_EACH_VECTOR {
          const Vec<E> e = in.at(t, u) - spread<E, kRows>(curve.mean, u) - spread<E, kRows>(curve.beta, u);
          Vec<E> p = weight_of<E, kPadded>(e, spread<E, kRows>(curve.rate, u), spread<E, kRows>(least, u));
          if (kMasked) p = where<E>(in.counted[t * kWide + u], p);
          s[u] = s[u] + p;
          store(w + (t * kWide + u) * kLanes<E>, p);
        }
      }
      sums.add(s);
    }
    sums.get(sum, one);
  }

  template <class S>
  static void outputs(const Input& in, int64_t steps, const E* w, const Numbers& scale, const Writer<E, S, kRows>& out,
                      const Writer<E, S, kRows>* weights) {
    const bool whole = out.whole() && !weights;
    for (int64_t t = 0; t < steps; ++t) {
      if (whole) {
        TRIFUSE_EACH_VECTOR out.put_whole(t, u, output(in, t, u, weight_at(w, t, u, scale)));
        continue;
      }
      for (int u = 0; u < kWide; ++u) {
        const Vec<E> weight = weight_at(w, t, u, scale);
        out.put(t, u, output(in, t, u, weight));
        if (weights) weights->put(t, u, weight);
      }
    }
  }

 private:
  static TRIFUSE_INLINE Vec<E> weight_at(const E* w, int64_t t, int u, const Numbers& scale) {
    return load(w + (t * kWide + u) * kLanes<E>) * spread<E, kRows>(scale, u);
  }
  static TRIFUSE_INLINE Vec<E> output(const Input& in, int64_t t, int u, Vec<E> weight) {
    const Vec<E> x = in.at(t, u);
    if (kPadded) return where<E>(in.multiplied[t * kWide + u], x * weight, x);
    return x * weight;
  }
  static void lowest(const Vec<E>* low, bool one, Numbers& least) {
    if constexpr (kRows) {
      TRIFUSE_EACH_VECTOR least[u] = fold_lanes<E, false>(low[u]);
      if (one) least[0] = least[1] = least[2] = least[3] = std::min({least[0], least[1], least[2], least[3]});
    } else {
      TRIFUSE_EACH_VECTOR store(least.at + u * kLanes<E>, low[u]);
    }
  }
};

// Everything between the passes over a tile: the numbers of its slices.
template <class E, class S, bool kRows>
class ForwardTile {
 public:
  using Params = GaussianAdaptiveAttentionParams;
  using Numbers = PerSlice<E, E, kRows>;
  using Wide = PerSlice<double, E, kRows>;
  static constexpr int kCount = kSlices<E, kRows>;

  ForwardTile(const Params& p, const Cutting<E, kRows>& cutting)
      : p_(p), cutting_(cutting), scratch_(cutting.scratch_steps() * kWide, 4) {}

  void run(const Head& head, int64_t h, int64_t group) {
    blocks_ = cutting_.blocks(group, h);
    for (int64_t k = 0; k < blocks_; ++k) {
      load(group, h, k);
      with_steps([&](auto steps) { moments(head, steps, k); });
    }
    finish_variance(head);
    for (int64_t k = 0; k < blocks_; ++k) {
      if (blocks_ > 1) load(group, h, k);
      with_steps([&](auto steps) { sum_of_weights(steps, k); });
    }
    finish_sum(head);
    keep(h, group);
    for (int64_t k = 0; k < blocks_; ++k) {
      if (blocks_ > 1) load(group, h, k);
      with_steps([&](auto steps) { output(steps); });
    }
  }

 private:
  void load(int64_t group, int64_t h, int64_t k) {
    tile_ = cutting_.tile(group, h, k);
    in_ = loader_.load(p_, tile_, scratch_);
  }
  template <class F>
  void with_steps(F&& f) const {
    loader_.with_masks(p_, [&](auto masked, auto padded) {
      f(ForwardSteps<E, kRows, decltype(masked)::value, decltype(padded)::value>());
    });
  }
  E* weights() { return scratch_.part(3); }

  // Mean and squares of one block, joined with those before it.
  template <class Steps>
  void moments(const Head& head, Steps steps, int64_t k) {
    Wide sum, count, squares;
    for (int i = 0; i < kCount; ++i) count[i] = double(Cutting<E, kRows>::entries(tile_));
    steps.sum(in_, tile_.steps, tile_.one, sum, count);
    Wide mean;
    for (int i = 0; i < kCount; ++i) mean[i] = sum[i] / std::max(count[i], 1.0);
    for (int i = 0; i < kCount; ++i) curve_.set_mean(head, i, mean[i]);
    steps.squares(in_, tile_.steps, tile_.one, curve_, squares, least_);
    for (int i = 0; i < kCount; ++i) {
      const double error = mean[i] - double(curve_.mean[i]);
      squares[i] = std::max(squares[i] - count[i] * error * error, 0.0);
    }
    if (k == 0) {
      mean_ = mean;
      count_ = count;
      squares_ = squares;
      return;
    }
    for (int i = 0; i < kCount; ++i) {
      const double total = std::max(count_[i] + count[i], 1.0), away = mean[i] - mean_[i];
      mean_[i] += away * count[i] / total;
      squares_[i] += squares[i] + away * away * count_[i] * count[i] / total;
      count_[i] += count[i];
    }
  }

  void finish_variance(const Head& head) {
    for (int i = 0; i < kCount; ++i) {
      inverse_variance_[i] = E(1 / (squares_[i] / std::max(count_[i] - 1, 1.0) + p_.eps));
      if (blocks_ > 1) curve_.set_mean(head, i, mean_[i]);
      curve_.set_rate(head, i, inverse_variance_[i]);
    }
  }

  // The sum of a block's weights, joined with those before it.
  template <class Steps>
  void sum_of_weights(Steps steps, int64_t k) {
    if (blocks_ == 1) return steps.weights(in_, tile_.steps, tile_.one, curve_, least_, weights(), sum_);
    Wide squares, sum;
    Numbers least;
    steps.squares(in_, tile_.steps, tile_.one, curve_, squares, least);
    steps.weights(in_, tile_.steps, tile_.one, curve_, least, weights(), sum);
    for (int i = 0; i < kCount; ++i) {
      const E both = k == 0 ? least[i] : std::min(least_[i], least[i]);
      const double rate = curve_.rate[i];
      const double before = k == 0 ? 0 : sum_[i] * std::exp2(rate * (double(both) - double(least_[i])));
      sum_[i] = before + sum[i] * std::exp2(rate * (double(both) - double(least[i])));
      least_[i] = both;
    }
  }

  void finish_sum(const Head& head) {
    for (int i = 0; i < kCount; ++i) scale_[i] = E(sum_[i] == 0 ? 0 : 1 / sum_[i]);  // 0: nothing takes part
    if (p_.clamped) clamp(head);
  }

  // Where the sum of the products is below eps they are divided by eps.
  void clamp(const Head& head) {
    Numbers sum, log, scale;
    for (int i = 0; i < kCount; ++i) sum[i] = E(sum_[i]);
    for (int i = 0; i < Numbers::kCount; i += kLanes<E>) store(log.at + i, log_normal<E>(trifuse::load(sum.at + i)));
    clamped_scale<E, kRows>(head, p_.eps, curve_, inverse_variance_, least_, scale);
    const double log_eps = std::log(p_.eps);
    for (int i = 0; i < kCount; ++i) {
      const double log_sum = double(log[i]) - double(curve_.rate[i]) * double(least_[i]) * kLn2;
      if (sum_[i] == 0 || !(log_sum < clamped_normaliser(head, log_eps, inverse_variance_[i]))) continue;
      inverse_variance_[i] = -inverse_variance_[i];
      scale_[i] = scale[i];
    }
  }

  void keep(int64_t h, int64_t group) const {
    const Statistics<E> stats(p_, p_.stats, h, cutting_.first_slice(group));
    const int64_t n = cutting_.slices(group);
    for (int i = 0; i < n; ++i) {
      stats.mean[i] = curve_.mean[i];
      stats.inverse_variance[i] = inverse_variance_[i];
      stats.least[i] = least_[i];
    }
  }

  template <class Steps>
  void output(Steps steps) {
    if (blocks_ > 1) {
      Wide sum;
      steps.weights(in_, tile_.steps, tile_.one, curve_, least_, weights(), sum);
    }
    const Writer<E, S, kRows> out(tile_, p_, p_.out), weight(tile_, p_, p_.weights ? p_.weights : p_.out);
    steps.outputs(in_, tile_.steps, weights(), scale_, out, p_.weights ? &weight : nullptr);
  }

  const Params& p_;
  const Cutting<E, kRows>& cutting_;
  Scratch<E> scratch_;
  Loader<E, S, kRows> loader_;
  Tile<E, kRows> tile_;
  Entries<E> in_;
  int64_t blocks_ = 0;
  Curve<E, kRows> curve_;
  Wide mean_, count_, squares_, sum_;
  Numbers inverse_variance_, least_, scale_;
};

}  // namespace
}  // namespace trifuse::cpu

// What gaussian_adaptive_attention computes once per slice, and how slices become tiles.
#pragma once

#include <vector>

#include "gaussian_adaptive_attention_tile.h"

namespace trifuse::cpu {
namespace {

using AttentionShape = GaussianAdaptiveAttentionShape;

// The product of a head's Gaussians, which is one: log p = -(d - beta)^2 a / (2 v) - rest / (2 v) + log_scale.
struct Head {
  double a = 0, beta = 0;  // sum 1/c^2; (sum delta/c^2) / a
  double rest = 0, log_scale = 0;
};

template <class E>
Head head_of(const AttentionShape& p, int64_t head) {
  constexpr double log_two_pi = 1.83787706640934548356;
  const E* delta = static_cast<const E*>(p.mean_offset) + head * p.gaussians;
  const E* c = static_cast<const E*>(p.width) + head * p.gaussians;
  Head h;
  for (int64_t k = 0; k < p.gaussians; ++k) {
    const double d = delta[k], inverse = 1 / (double(c[k]) * double(c[k]));
    h.a += inverse;
    h.beta += d * inverse;
    if (p.clamped) h.log_scale -= 0.5 * log_two_pi + std::log(std::fabs(double(c[k])));
  }
  h.beta /= h.a;
  for (int64_t k = 0; k < p.gaussians; ++k) {
    const double d = double(delta[k]) - h.beta;
    h.rest += d * d / (double(c[k]) * double(c[k]));
  }
  return h;
}

// What the exponents of a slice are made of: log2 of its unnormalised weight is -rate e^2, e = x - mean - beta. Both
// passes compute them from the numbers as they are stored, so they compute the same weights.
template <class E, bool kRows>
struct Curve {
  PerSlice<E, E, kRows> mean, rate, beta;

  // `mean` and `beta` are rounded so that their sum is not: what the smaller one loses the larger one's rest would
  // drown, and beta's own rounding, left alone, would be an error common to all slices.
  void set_mean(const Head& h, int i, double mean_of) {
    mean[i] = E(mean_of + (h.beta - double(E(h.beta))));
    beta[i] = E(mean_of + h.beta - double(mean[i]));
  }
  // How far the rounded mean is from the mean.
  double mean_error(const Head& h, int i) const { return h.beta - double(beta[i]); }

  void set_rate(const Head& h, int i, E inverse_variance) {
    constexpr double limit = sizeof(E) == 4 ? 1e30 : 1e250;  // a product with a square stays finite
    rate[i] = E(std::min(h.a * double(inverse_variance) * (0.5 * kLog2e), limit));
  }
};

// Sums of the entries, and how many they are (as before where none is masked).
template <class E, bool kRows, bool kMasked, bool kPadded>
void sum_entries(const Entries<E>& in, int64_t steps, bool one, PerSlice<double, E, kRows>& sum,
                 PerSlice<double, E, kRows>& count) {
  Sums<E, kRows> sums, counts;
  // What is summed up is the distance from an entry, small where all are large: the middle one of three, as the first
  // may be far from all others.
  PerSlice<E, E, kRows> near;
  TRIFUSE_EACH_VECTOR {
    const auto entry = [&](int64_t t) {
      const Vec<E> x = in.at(t, u);
      return kPadded ? where<E>(in.multiplied[t * kWide + u], x) : x;
    };
    const Vec<E> a = entry(0), b = entry(steps / 2), c = entry(steps - 1);
    const Vec<E> less = smaller<E>(a, b), more = -smaller<E>(-a, -b), x = -smaller<E>(-less, -smaller<E>(more, c));
    if constexpr (kRows) {
      near[u] = one && u > 0 ? near[0] : x[0];
    } else {
      store(near.at + u * kLanes<E>, x);
    }
  }
  for (int64_t begin = 0; begin < steps; begin += kChunk) {
    Vec<E> s[kWide] = {}, n[kWide] = {};
    for (int64_t t = begin; t < std::min(begin + kChunk, steps); ++t) {
      TRIFUSE_EACH_VECTOR {
        Vec<E> x = in.at(t, u);
        if (kPadded) x = where<E>(in.multiplied[t * kWide + u], x);
        x = x - spread<E, kRows>(near, u);
        if (kMasked) x = where<E>(in.counted[t * kWide + u], x);
        if (kMasked) n[u] = n[u] + where<E>(in.counted[t * kWide + u], splat(E(1)));
        s[u] = s[u] + x;
      }
    }
    sums.add(s);
    if (kMasked) counts.add(n);
  }
  sums.get(sum, one);
  if (kMasked) counts.get(count, one);
  for (int i = 0; i < kSlices<E, kRows>; ++i) sum[i] += count[i] * double(near[i]);
}

// exp2(rate * away), zero where it is far below any sum of weights that has a 1 in it: numbers too small to be normal
// cost a hundred times as much, here and wherever they are multiplied.
template <class E>
TRIFUSE_INLINE Vec<E> exp2_or_zero(Vec<E> rate, Vec<E> away) {
  constexpr E least = sizeof(E) == 4 ? E(-100) : E(-900);
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 4) {
    const __m512 magic = _mm512_set1_ps(kSixteenths);
    const __m512 t = _mm512_fmadd_ps((__m512)rate, (__m512)away, magic), s = _mm512_sub_ps(t, magic);
    const __m512 r = _mm512_fmsub_ps((__m512)rate, (__m512)away, s);
    const __m512 q =
        _mm512_fmadd_ps(r, _mm512_set1_ps(float(kLn2 * kLn2 * kLn2 / 6)), _mm512_set1_ps(float(kLn2 * kLn2 / 2)));
    const __m512 p = _mm512_mul_ps(_mm512_fmadd_ps(q, r, _mm512_set1_ps(float(kLn2))), r);
    const __m512 step = _mm512_permutexvar_ps(_mm512_castps_si512(t), sixteenths());
    const __mmask16 large = _mm512_cmp_ps_mask(s, _mm512_set1_ps(least), _CMP_NLT_UQ);  // a NaN stays one
    return (Vec<E>)_mm512_maskz_scalef_ps(large, _mm512_fmadd_ps(p, step, step), s);
  }
#endif
  const IVec<E> small = rate * away < splat(least);
  return (Vec<E>)(~small & (IVec<E>)exp2_product<E>(rate, away));
}

constexpr double kFarthest = 1e30;  // of squares: a sentinel may be infinite

// An entry's weight before the normalisation; that of the least square is 1.
template <class E, bool kPadded>
TRIFUSE_INLINE Vec<E> weight_of(Vec<E> e, Vec<E> rate, Vec<E> least) {
  Vec<E> square = rounded_square<E>(e);
  if (kPadded) square = at_most<E>(square, E(kFarthest));
  return exp2_or_zero<E>(rate, least - square);
}

// The log of what the sum of weights is at least divided by when clamped: eps over the greatest product's factor.
inline double clamped_normaliser(const Head& h, double log_eps, double inverse_variance) {
  return log_eps + 0.5 * h.rest * inverse_variance - h.log_scale;
}

// What weights are multiplied with where the clamp acts.
template <class E, bool kRows>
void clamped_scale(const Head& h, double eps, const Curve<E, kRows>& curve,
                   const PerSlice<E, E, kRows>& inverse_variance, const PerSlice<E, E, kRows>& least,
                   PerSlice<E, E, kRows>& scale) {
  const double log_eps = std::log(eps);
  for (int i = 0; i < kSlices<E, kRows>; ++i) {
    const double normaliser = clamped_normaliser(h, log_eps, inverse_variance[i]);
    scale[i] = E(-double(curve.rate[i]) * double(least[i]) - normaliser * kLog2e);
  }
  for (int i = 0; i < PerSlice<E, E, kRows>::kCount; i += kLanes<E>) {
    const Vec<E> exponent = at_most<E>(at_least<E>(load(scale.at + i), E(-4096)), E(0));
    store(scale.at + i, exp2_product<E>(exponent, splat(E(1))));
  }
}

// How one head's slices are cut into tiles, and tiles that are too long for the cache into blocks of steps. Nothing
// here depends on the number of threads.
template <class E, bool kRows>
class Cutting {
 public:
  static constexpr int64_t kLane = kLanes<E>;
  static constexpr int64_t kMaxSteps = kRows ? 256 : 512;
  static constexpr int64_t kLongRow = 128;  // steps from which a row is worth a tile of its own

  explicit Cutting(const AttentionShape& p) : p_(p) {
    const int64_t longest = p.length > 0 ? p.head_length(p.heads - 1) : 0;
    fours_ = (longest + kLane - 1) / kLane <= kLongRow ? p.slices() / kWide : 0;
    strips_ = (p.inner + kWide * kLane - 1) / (kWide * kLane);
  }

  int64_t groups() const { return kRows ? fours_ + p_.slices() - kWide * fours_ : p_.outer * strips_; }

  // Groups side by side in memory.
  int64_t strips() const { return std::max<int64_t>(strips_, 1); }

  // Slices of a group, and where the first of their numbers stands in (outer, inner).
  int64_t first_slice(int64_t group) const {
    if (!kRows) return group / strips_ * p_.inner + group % strips_ * kWide * kLane;
    return group < fours_ ? group * kWide : kWide * fours_ + (group - fours_);
  }
  int64_t slices(int64_t group) const {
    if (kRows) return group < fours_ ? kWide : 1;
    return std::min(kWide * kLane, p_.inner - group % strips_ * kWide * kLane);
  }

  int64_t blocks(int64_t group, int64_t head) const {
    const int64_t entries = entries_of_a_block(group);
    return (p_.head_length(head) + entries - 1) / entries;
  }
  Tile<E, kRows> tile(int64_t group, int64_t head, int64_t block) const {
    const int64_t begin = block * entries_of_a_block(group), slice = first_slice(group);
    const int64_t length = std::min(p_.head_length(head) - begin, entries_of_a_block(group));
    Tile<E, kRows> tile;
    tile.one = kRows && group >= fours_;
    const int64_t each = kRows ? kLane * (tile.one ? kWide : 1) : 1;
    tile.steps = (length + each - 1) / each;
    for (int u = 0; u < kWide; ++u) {
      const int64_t one = kRows ? slice + (tile.one ? 0 : u) : slice, skip = tile.one ? u * tile.steps * kLane : 0;
      tile.outer[u] = one / p_.inner;
      tile.inner[u] = one % p_.inner + (kRows ? 0 : u * kLane);
      tile.rest[u] = std::max<int64_t>(0, kRows ? length - skip : p_.inner - tile.inner[u]);
      // A vector without entries reads nothing; its pointers stay inside the tensor.
      if (tile.rest[u] == 0) tile.inner[u] = one % p_.inner;
      tile.first[u] = p_.head_begin(head) + begin + (tile.rest[u] ? skip : 0);
    }
    return tile;
  }
  // Entries of every slice that a block of this tile holds.
  static int64_t entries(const Tile<E, kRows>& tile) { return kRows ? tile.rest[0] : tile.steps; }
  int64_t scratch_steps() const {
    int64_t most = 0;
    for (int64_t head : {int64_t(0), p_.heads - 1}) {
      const int64_t length = p_.head_length(head), each = kRows ? kLane * (fours_ ? 1 : kWide) : 1;
      most = std::max(most, std::min(kMaxSteps, (length + each - 1) / each));
    }
    return most;
  }

 private:
  int64_t entries_of_a_block(int64_t group) const {
    return kRows ? kMaxSteps * kLane * (group >= fours_ ? kWide : 1) : kMaxSteps;
  }

  const AttentionShape& p_;
  int64_t fours_ = 0, strips_ = 0;
};

// A slice's place among the statistics that are kept.
template <class E>
struct Statistics {
  E* mean;
  E* inverse_variance;
  E* least;

  Statistics(const AttentionShape& p, const void* stats, int64_t head, int64_t slice) {
    const int64_t all = p.heads * p.slices();
    mean = static_cast<E*>(const_cast<void*>(stats)) + head * p.slices() + slice;
    inverse_variance = mean + all;
    least = inverse_variance + all;
  }
};

// Memory for vectors, aligned to them.
template <class E>
class Scratch {
 public:
  Scratch(int64_t vectors_each, int count) : each_(vectors_each), held_((vectors_each * count + 1) * kLanes<E>) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(held_.data());
    begin_ = held_.data() + (kVectorBytes - at % kVectorBytes) % kVectorBytes / sizeof(E);
  }
  E* part(int i) { return begin_ + i * each_ * kLanes<E>; }
  IVec<E>* masks(int i) { return reinterpret_cast<IVec<E>*>(part(i)); }

 private:
  int64_t each_;
  std::vector<E> held_;
  E* begin_;
};

// The entries of one tile in the cache, or where they lie in memory if they can be read there.
template <class E, class S, bool kRows>
class Loader {
 public:
  // x in part 0 of the scratch, masks in parts 1 and 2.
  Entries<E> load(const AttentionShape& p, const Tile<E, kRows>& tile, Scratch<E>& scratch) {
    Entries<E> in;
    masked_ = p.mask.ptr || p.padded || (kRows && !tile.whole());
    if (reads_in_place<E, S, kRows>(tile, p.x) && !masked_) {
      for (int u = 0; u < kWide; ++u) in.x[u] = static_cast<const E*>(p.x.ptr) + tile.offset(p.x, u);
      in.step = tile.step(p.x);
      return in;
    }
    copy_entries<E, S, kRows>(tile, p.x, scratch.part(0));
    for (int u = 0; u < kWide; ++u) in.x[u] = scratch.part(0) + u * kLanes<E>;
    in.step = kWide * kLanes<E>;
    if (masked_) {
      in.counted = scratch.masks(1);
      in.multiplied = scratch.masks(2);
      find_masks<E, S, kRows>(tile, p, scratch.part(0), scratch.masks(1), scratch.masks(2));
    }
    return in;
  }
  // Calls f with the masks that the entries loaded last have, as types.
  template <class F>
  void with_masks(const AttentionShape& p, F&& f) const {
    using No = std::false_type;
    using Yes = std::true_type;
    if (!masked_) return f(No(), No());
    if (!p.padded) return f(Yes(), No());
    f(Yes(), Yes());
  }

 private:
  bool masked_ = false;
};

}  // namespace
}  // namespace trifuse::cpu

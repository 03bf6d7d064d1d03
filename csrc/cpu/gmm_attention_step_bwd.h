// The backward pass of gmm_attention_step: one walk over the values gives the alignment's gradient and theirs, one over
// the positions of each Gaussian the gradients of its parameters.
#pragma once

#include "gmm_attention_step_fwd.h"
#include "pages.h"

namespace trifuse::cpu {
namespace {
namespace gmm {

constexpr int64_t kRowsOfTask = 16;

// g[j] = values[j] . dcontext + dalignment[j], 0 where a position takes no part; dvalues[j] = alignment[j] dcontext.
template <class T, class S>
class RowGradients {
 public:
  RowGradients(const GmmAttentionBwdParams& p, T* g)
      : p_(p), g_(g), reached_(p.length), dcontext_(padded<T>(p.width)) {}

  void start(int64_t b) {
    b_ = b;
    reached_.clear();
    for (int64_t k = 0; k < p_.components; ++k) {
      reached_.add(
          Bell<T>(static_cast<const T*>(p_.mean_new)[b * p_.components + k], at<T>(p_.sigma, b, k), p_.length));
    }
    reached_.remove_padding(p_, b);
    if (!p_.dcontext) return;
    const S* from = static_cast<const S*>(p_.dcontext) + b * p_.width;
    for (int64_t e = 0; e < p_.width; ++e) dcontext_[e] = scalar_as<T>(from[e]);
  }

  void row(int64_t j) {
    S* dvalues = p_.dvalues ? static_cast<S*>(p_.dvalues) + (b_ * p_.length + j) * p_.width : nullptr;
    T& g = g_[b_ * padded<T>(p_.length) + j];
    if (!reached_[j]) {
      g = 0;
      if (dvalues) std::memset(static_cast<void*>(dvalues), 0, p_.width * sizeof(S));
      return;
    }
    g = p_.dalignment ? static_cast<const T*>(p_.dalignment)[b_ * p_.length + j] : T(0);
    if (!p_.dcontext) return;
    const S* values = static_cast<const S*>(p_.values.ptr) + b_ * p_.values.batch + j * p_.values.time;
    const T weight = static_cast<const T*>(p_.alignment)[b_ * p_.length + j];
    const bool subnormal = weight != T(0) && std::fabs(weight) < std::numeric_limits<T>::min();
    if (p_.values.dim != 1 && p_.width > 1) {
      g += strided_row(values, dvalues, weight);
    } else if (!dvalues) {
      g += dense_row<Product::kNone>(values, dvalues, weight);
    } else if (subnormal) {
      g += dense_row<Product::kSubnormal>(values, dvalues, weight * T(0x1p64));
    } else {
      g += dense_row<Product::kPlain>(values, dvalues, weight);
    }
  }

 private:
  // What dvalues is: not asked for, weight dcontext, or that of a subnormal weight, given times 2^64.
  enum class Product { kNone, kPlain, kSubnormal };

  template <Product kProduct>
  TRIFUSE_INLINE void store_product(S* to, Vec<T> w, Vec<T> d) {
    if constexpr (kProduct == Product::kPlain) store_as<T>(to, w * d);
    if constexpr (kProduct == Product::kSubnormal) store_as<T>(to, lowered<T, 64>(w * d));
  }

  template <Product kProduct>
  T dense_row(const S* values, S* dvalues, T weight) {
    constexpr int kSums = 4, lanes = kLanes<T>;
    constexpr T down = kProduct == Product::kSubnormal ? T(0x1p-64) : T(1);
    const T* dc = dcontext_.data();
    const Vec<T> w = splat(weight);
    Vec<T> sums[kSums];
    for (auto& sum : sums) sum = splat(T(0));
    int64_t e = 0;
    for (; e + kSums * lanes <= p_.width; e += kSums * lanes) {
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) {
        const Vec<T> d = load<T>(dc + e + i * lanes);
        sums[i] += load_as<T>(values + e + i * lanes) * d;
        store_product<kProduct>(dvalues + e + i * lanes, w, d);
      }
    }
    for (; e + lanes <= p_.width; e += lanes) {
      const Vec<T> d = load<T>(dc + e);
      sums[0] += load_as<T>(values + e) * d;
      store_product<kProduct>(dvalues + e, w, d);
    }
    T rest = 0;
    for (; e < p_.width; ++e) {
      rest += scalar_as<T>(values[e]) * dc[e];
      if (kProduct != Product::kNone) dvalues[e] = scalar_from<S>(weight * dc[e] * down);
    }
    return sum_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
  }

  T strided_row(const S* values, S* dvalues, T weight) {
    constexpr int kSums = 8;
    T sums[kSums] = {};
    for (int64_t e = 0; e < p_.width; ++e) {
      sums[e % kSums] += scalar_as<T>(values[e * p_.values.dim]) * dcontext_[e];
      if (dvalues) dvalues[e] = scalar_from<S>(weight * dcontext_[e]);
    }
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  }

  const GmmAttentionBwdParams& p_;
  T* g_;
  Reached reached_;
  std::vector<T> dcontext_;
  int64_t b_ = 0;
};

// Sums over a Gaussian's window of g e, g e y and g e (z^2 - 1), with e its lifted shape.
struct Moments {
  double plain = 0, slope = 0, spread = 0;
};
template <class T>
Moments moments_of(const Bell<T>& bell, const T* g) {
  constexpr int64_t block = 32 * kLanes<T>;  // added up in T; blocks are in double
  const Vec<T> counting = count_up<T>(), zero = splat(T(0));
  Moments total;
  for (int64_t begin = bell.first / kLanes<T> * kLanes<T>; begin < bell.last; begin += block) {
    Vec<T> plain = zero, slope = zero, spread = zero;
    for (int64_t j = begin; j < std::min(begin + block, bell.last); j += kLanes<T>) {
      const Vec<T> y = distances(bell, j, counting);
      const Vec<T> e = lifted_bell<T>(y) * load<T>(g + j);
      const Vec<T> near = at_least<T>(at_most<T>(y, T(64)), T(-64));  // further out e is 0, and y may overflow
      plain += e;
      slope += e * near;
      spread += e * (near * near * splat(T(2 * kLn2)) - splat(T(1)));
    }
    total.plain += double(sum_lanes<T>(plain));
    total.slope += double(sum_lanes<T>(slope));
    total.spread += double(sum_lanes<T>(spread));
  }
  return total;
}

template <class T>
void mixture_gradients(const GmmAttentionBwdParams& p, const T* g, int64_t b, int64_t k, double slope) {
  const int64_t place = b * p.components + k;
  const Bell<T> bell(static_cast<const T*>(p.mean_new)[place], at<T>(p.sigma, b, k), p.length);
  const Moments sums = moments_of(bell, g + b * padded<T>(p.length));
  const double height = bell.height * double(kUnlift<T>), weight = double(at<T>(p.weight, b, k)) * height;
  const double z_of_y = 1.17741002251547469101;  // sqrt(2 ln 2)
  double dmean = weight * sums.slope * z_of_y * bell.inverse;
  if (p.dmean_new) dmean += double(static_cast<const T*>(p.dmean_new)[place]);
  static_cast<T*>(p.dweight)[place] = T(height * sums.plain);
  static_cast<T*>(p.dsigma)[place] = T(weight * sums.spread * bell.inverse);
  static_cast<T*>(p.dmean)[place] = T(dmean);
  static_cast<T*>(p.ddelta)[place] = T(dmean * slope);
}

template <class T, class S>
void backward(const GmmAttentionBwdParams& p, const Threads& threads) {
  const int64_t stride = padded<T>(p.length), blocks = (p.length + kRowsOfTask - 1) / kRowsOfTask;
  std::vector<T> g(p.batch * stride);
  if (p.dvalues) prefer_large_pages(p.dvalues, p.batch * p.length * p.width * int64_t(sizeof(S)));
  const auto rows = [&](int64_t begin, int64_t end) {
    RowGradients<T, S> state(p, g.data());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks, first = task % blocks * kRowsOfTask;
      if (task == begin || first == 0) state.start(b);
      for (int64_t j = first; j < std::min(first + kRowsOfTask, p.length); ++j) state.row(j);
    }
  };
  const auto mixtures = [&](int64_t begin, int64_t end) {
    std::vector<double> step(p.components), slope(p.components);
    for (int64_t b = begin; b < end; ++b) {
      softplus_of<T>(p.delta, b, p.components, step.data(), slope.data());
      for (int64_t k = 0; k < p.components; ++k) mixture_gradients<T>(p, g.data(), b, k, slope[k]);
    }
  };
  if (p.batch * p.length * (p.width + p.components) < kSmallWork) {
    rows(0, p.batch * blocks);
    mixtures(0, p.batch);
  } else {
    parallel(threads, p.batch * blocks, rows);
    parallel(threads, p.batch, mixtures);
  }
}

}  // namespace gmm
}  // namespace
}  // namespace trifuse::cpu

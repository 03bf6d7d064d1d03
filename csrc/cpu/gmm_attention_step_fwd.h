// The forward pass of gmm_attention_step: the alignment of a sequence, then its values summed with it.
#pragma once

#include "gmm_attention_step_bells.h"
#include "isa.h"

namespace trifuse::cpu {
namespace {
namespace gmm {

constexpr int64_t kSmallWork = 1 << 14;  // elements below which a second thread costs more than it brings

// Positions that take part and their weights, in order.
template <class T>
struct Rows {
  std::vector<int64_t> position;
  std::vector<T> weight;
  int64_t count = 0;

  explicit Rows(int64_t most) : position(most), weight(most) {}
  TRIFUSE_INLINE void add(int64_t j, T w) {
    position[count] = j;
    weight[count++] = w;
  }
};

// sum[0 .. n) += the sum of kRows rows with their weights: those first, so that rounding errors of long sums stay
// small.
template <int kRows, class T, class S>
TRIFUSE_INLINE void add_rows(T* sum, const S* values, int64_t row, const int64_t* position, const T* weight,
                             int64_t n) {
  const S* from[kRows];
  Vec<T> w[kRows];
  for (int i = 0; i < kRows; ++i) {
    from[i] = values + position[i] * row;
    w[i] = splat(weight[i]);
  }
  int64_t e = 0;
  for (; e + kLanes<T> <= n; e += kLanes<T>) {
    Vec<T> x = w[0] * load_as<T>(from[0] + e);
#pragma GCC unroll 8
    for (int i = 1; i < kRows; ++i) x += w[i] * load_as<T>(from[i] + e);
    store<T>(sum + e, load<T>(sum + e) + x);
  }
  for (; e < n; ++e) {
    T x = 0;
    for (int i = 0; i < kRows; ++i) x += weight[i] * scalar_as<T>(from[i][e]);
    sum[e] += x;
  }
}

// The same of `count` rows where neighbours in memory are positions, or nothing is.
template <class T, class S>
void add_strided(T* sum, const S* values, int64_t row, int64_t column, const int64_t* position, const T* weight,
                 int64_t count, int64_t n) {
  constexpr int kSums = 8;
  for (int64_t e = 0; e < n; ++e) {
    T x[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= count; i += kSums) {
#pragma GCC unroll 8
      for (int s = 0; s < kSums; ++s) x[s] += weight[i + s] * scalar_as<T>(values[position[i + s] * row + e * column]);
    }
    for (; i < count; ++i) x[0] += weight[i] * scalar_as<T>(values[position[i] * row + e * column]);
    sum[e] += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
  }
}

// total[0 .. n) = the sum of all rows with their weights. `part` holds the sum of one block: n numbers.
template <class T, class S>
void sum_rows(T* total, T* part, const S* values, int64_t row, int64_t column, const Rows<T>& rows, int64_t n) {
  constexpr int64_t block = 512;
  std::fill(total, total + n, T(0));
  for (int64_t begin = 0; begin < rows.count; begin += block) {
    const int64_t count = std::min(block, rows.count - begin);
    const int64_t* position = rows.position.data() + begin;
    const T* weight = rows.weight.data() + begin;
    T* sum = begin ? part : total;
    if (begin) std::fill(part, part + n, T(0));
    if (column != 1 && n > 1) {
      add_strided(sum, values, row, column, position, weight, count, n);
    } else {
      int64_t i = 0;
      for (; i + 8 <= count; i += 8) add_rows<8>(sum, values, row, position + i, weight + i, n);
      for (; i + 4 <= count; i += 4) add_rows<4>(sum, values, row, position + i, weight + i, n);
      for (; i < count; ++i) add_rows<1>(sum, values, row, position + i, weight + i, n);
    }
    for (int64_t e = 0; begin && e < n; ++e) total[e] += part[e];
  }
}

template <class T, class S>
class Forward {
 public:
  explicit Forward(const GmmAttentionParams& p)
      : p_(p),
        lifted_(padded<T>(p.length)),
        reached_(p.length),
        step_(p.components),
        slope_(p.components),
        sum_(p.width),
        part_(p.width),
        small_sum_(p.width),
        rows_(p.length),
        small_(p.length) {}

  // The alignment of batch item b, stored if asked for, and the rows to sum.
  void align(int64_t b, bool store_it) {
    softplus_of<T>(p_.delta, b, p_.components, step_.data(), slope_.data());
    std::fill(lifted_.begin(), lifted_.end(), T(0));
    reached_.clear();
    bells_.clear();
    double tallest = 0;
    for (int64_t k = 0; k < p_.components; ++k) {
      const T mean = T(double(at<T>(p_.mean, b, k)) + step_[k]);
      if (store_it) static_cast<T*>(p_.mean_new)[b * p_.components + k] = mean;
      bells_.emplace_back(mean, at<T>(p_.sigma, b, k), p_.length);
      tallest = std::max(tallest, std::fabs(bells_[k].height * double(at<T>(p_.weight, b, k))));
    }
    // Heights that lifting would take beyond the largest number are lowered first.
    const bool low = tallest < std::ldexp(1.0, std::numeric_limits<T>::max_exponent - 2 * kLift<T>);
    unlift_ = low ? kUnlift<T> : T(1);
    for (int64_t k = 0; k < p_.components; ++k) {
      const double height = bells_[k].height * double(at<T>(p_.weight, b, k));
      add_bell(bells_[k], T(low ? height : height * double(kUnlift<T>)));
      reached_.add(bells_[k]);
    }
    reached_.remove_padding(p_, b);
    collect(store_it ? static_cast<T*>(p_.alignment) + b * p_.length : nullptr);
  }

  // context[b][begin .. end) of the rows found last.
  void sum(int64_t b, int64_t begin, int64_t end) {
    const S* values = static_cast<const S*>(p_.values.ptr) + b * p_.values.batch + begin * p_.values.dim;
    S* context = static_cast<S*>(p_.context) + b * p_.width + begin;
    const int64_t n = end - begin;
    sum_rows(sum_.data(), part_.data(), values, p_.values.time, p_.values.dim, rows_, n);
    if (small_.count) {
      sum_rows(small_sum_.data(), part_.data(), values, p_.values.time, p_.values.dim, small_, n);
      for (int64_t e = 0; e < n; ++e) sum_[e] += small_sum_[e] * unlift_;
    }
    int64_t e = 0;
    for (; e + kLanes<T> <= n; e += kLanes<T>) store_as<T>(context + e, load<T>(sum_.data() + e));
    for (; e < n; ++e) context[e] = scalar_from<S>(sum_[e]);
  }

 private:
  void add_bell(const Bell<T>& bell, T height) {
    const Vec<T> counting = count_up<T>(), tall = splat(height);
    for (int64_t j = bell.first / kLanes<T> * kLanes<T>; j < bell.last; j += kLanes<T>) {
      const Vec<T> density = tall * lifted_bell<T>(distances(bell, j, counting));
      store<T>(lifted_.data() + j, load<T>(lifted_.data() + j) + density);
    }
  }

  void collect(T* alignment) {
    constexpr T smallest = sizeof(T) == 4 ? T(0x1p-100) : T(0x1p-960);
    rows_.count = small_.count = 0;
    const bool low = unlift_ != T(1);
    for (int64_t begin = 0; begin < p_.length; begin += kLanes<T>) {
      const Vec<T> lifted = load<T>(lifted_.data() + begin), weight = low ? lowered<T, kLift<T>>(lifted) : lifted;
      for (int64_t j = begin; j < std::min(begin + kLanes<T>, p_.length); ++j) {
        const bool taken = reached_[j];
        if (alignment) alignment[j] = taken ? weight[j - begin] : T(0);
        if (!taken) continue;
        if (low && std::fabs(lifted[j - begin]) < smallest / kUnlift<T>) {
          small_.add(j, lifted[j - begin]);
        } else {
          rows_.add(j, weight[j - begin]);
        }
      }
    }
  }

  const GmmAttentionParams& p_;
  std::vector<T> lifted_;
  Reached reached_;
  std::vector<Bell<T>> bells_;
  std::vector<double> step_, slope_;
  std::vector<T> sum_, part_, small_sum_;
  T unlift_ = 1;
  Rows<T> rows_, small_;  // the small ones' weights are lifted: products with what they are would be subnormal
};

template <class T, class S>
void forward(const GmmAttentionParams& p, const Threads& threads) {
  constexpr int64_t least_piece = 64;
  const int64_t work = p.batch * p.length * (p.width + p.components);
  const int64_t pieces = pieces_of(p.batch, threads.count, std::max<int64_t>(p.width / least_piece, 1));
  const int64_t vectors = (p.width + least_piece - 1) / least_piece;
  const auto edge = [&](int64_t piece) { return std::min(vectors * piece / pieces * least_piece, p.width); };
  const auto body = [&](int64_t begin, int64_t end) {
    Forward<T, S> state(p);
    while (begin < end) {
      const int64_t b = begin / pieces, piece = begin % pieces;
      const int64_t stop = std::min(pieces, piece + end - begin);
      state.align(b, piece == 0);
      state.sum(b, edge(piece), edge(stop));
      begin += stop - piece;
    }
  };
  if (work < kSmallWork) {
    body(0, p.batch * pieces);
  } else {
    parallel(threads, p.batch * pieces, body);
  }
}

}  // namespace gmm
}  // namespace
}  // namespace trifuse::cpu

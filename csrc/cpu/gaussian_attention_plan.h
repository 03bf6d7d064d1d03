// What every part of gaussian_attention needs to know: sequences, sizes, the mean key, and which blocks of keys are too
// far away to matter.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "dtypes.h"
#include "isa.h"
#include "rows.h"
#include "trifuse/gaussian_attention.h"

namespace trifuse::cpu {
namespace {
namespace attention {

// Keys that are looked at together: their transposed rows and their values, 16 KB each for heads of 64, stay in the
// first cache while the queries pass by.
template <class T>
constexpr int64_t kKeys = sizeof(T) == 4 ? 64 : 32;

template <class T>
constexpr T kNever = -std::numeric_limits<T>::infinity();

// The queries and keys of one batch item, or of one packed sequence.
struct Sequence {
  int64_t batch = 0;
  int64_t q_begin = 0, queries = 0;
  int64_t k_begin = 0, keys = 0;
  int64_t first_block = 0;  // of its keys, among those of all sequences
};

// Runs work(worker, task) for every task, each on the next thread that is free; a worker is made once per thread.
template <class Worker>
class Pool {
 public:
  explicit Pool(const Threads& threads) : threads_(threads), workers_(std::max<int64_t>(threads.count, 1)) {}

  template <class Make, class Work>
  void run(int64_t tasks, const Make& make, const Work& work) {
    std::atomic<int64_t> next{0};
    parallel(threads_, std::min<int64_t>(tasks, int64_t(workers_.size())), [&](int64_t slot, int64_t) {
      std::unique_ptr<Worker>& worker = workers_[slot];
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        if (!worker) worker = make();
        work(*worker, task);
      }
    });
  }

 private:
  const Threads& threads_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

template <class S>
const S* at(const AttentionView& view, int64_t b, int64_t h, int64_t row) {
  return static_cast<const S*>(view.ptr) + b * view.batch + h * view.head + row * view.row;
}

// Rows [first, first + n) of one head, as acc numbers, less the mean key if there is one.
template <class T, class S>
void load_centred(T* to, int64_t ld, const AttentionView& view, const S* from, int64_t n, int64_t columns,
                  const T* mean) {
  if (!mean) return load_rows<T>(to, ld, from, view.row, view.column, n, columns);
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t r = 0; r < n; ++r, to += ld, from += view.row) {
    int64_t c = 0;
    if (view.column == 1) {
      for (; c + lanes <= columns; c += lanes) store<T>(to + c, load_as<T>(from + c) - load<T>(mean + c));
    }
    for (; c < columns; ++c) to[c] = scalar_as<T>(from[c * view.column]) - mean[c];
    for (; c < ld; ++c) to[c] = 0;
  }
}

template <class T, class S>
class Problem {
 public:
  const GaussianAttentionParams& p;
  const bool rbf, window;
  const int64_t group;              // query heads per key head
  const int64_t head_ld, value_ld;  // padded to whole vectors
  std::vector<Sequence> sequences;

  Problem(const GaussianAttentionParams& params, const Threads& threads)
      : p(params),
        rbf(params.gamma),
        window(params.sigma.ptr),
        group(params.heads / std::max<int64_t>(params.kv_heads, 1)),
        head_ld(padded<T>(params.head_dim)),
        value_ld(padded<T>(params.value_dim)) {
    int64_t blocks = 0;
    const auto add = [&](int64_t batch, int64_t q_begin, int64_t q_end, int64_t k_begin, int64_t k_end) {
      sequences.push_back({batch, q_begin, q_end - q_begin, k_begin, k_end - k_begin, blocks});
      blocks += block_count(sequences.back());
    };
    if (p.cu_seqlens_q) {
      for (int64_t s = 0; s < p.num_seqs; ++s) {
        add(0, p.cu_seqlens_q[s], p.cu_seqlens_q[s + 1], p.cu_seqlens_k[s], p.cu_seqlens_k[s + 1]);
      }
    } else {
      for (int64_t b = 0; b < p.batch; ++b) add(b, 0, p.queries, 0, p.keys);
    }
    if (rbf) mean_.resize(units() * head_ld);
    if (window) block_norm_.resize(blocks * p.kv_heads), largest_norm_.resize(units());
    if (rbf || window) look_at_keys(threads);
  }

  // A unit is one key head of one sequence.
  int64_t units() const { return int64_t(sequences.size()) * p.kv_heads; }
  const Sequence& sequence_of(int64_t unit) const { return sequences[unit / p.kv_heads]; }
  int64_t kv_head_of(int64_t unit) const { return unit % p.kv_heads; }
  static int64_t block_count(const Sequence& s) { return (s.keys + kKeys<T> - 1) / kKeys<T>; }

  // The logits are factor * q.k, or by distance factor * (-|q - k|^2 / 2), before window and mask.
  T factor(int64_t h) const { return rbf ? 2 * static_cast<const T*>(p.gamma)[h] : T(p.scale); }
  // The mean key (head_ld), or null: distances are those of queries and keys moved by it, which cancel less.
  const T* mean(int64_t unit) const { return rbf ? mean_.data() + unit * head_ld : nullptr; }

  T block_norm(int64_t unit, int64_t block) const {
    return block_norm_[(sequence_of(unit).first_block + block) * p.kv_heads + kv_head_of(unit)];
  }
  T largest_norm(int64_t unit) const { return largest_norm_[unit]; }

  bool is_padding(const Sequence& s, int64_t key) const {
    return p.padding && p.padding[s.batch * p.padding_batch + (s.k_begin + key) * p.padding_key];
  }
  T center(const Sequence& s, int64_t h, int64_t i) const {
    return p.center.ptr ? *at<T>(p.center, s.batch, h, s.q_begin + i) : T(i);
  }
  T sigma(const Sequence& s, int64_t h, int64_t i) const { return *at<T>(p.sigma, s.batch, h, s.q_begin + i); }
  // 1 / (2 sigma^2), finite: next to it only the key at the centre itself is left.
  T weight(const Sequence& s, int64_t h, int64_t i) const {
    const double width = sigma(s, h, i), w = 0.5 / (width * width);
    return T(std::min(w, double(std::numeric_limits<T>::max())));
  }

  // Blocks whose logits all lie this far below a row's logsumexp, or a lower bound of it, are left out: all of them
  // together make at most exp(-24) = 4e-11 of a row's sum (exp(-46) = 1e-20 in double).
  T cutoff(const Sequence& s) const { return std::log(T(std::max<int64_t>(s.keys, 1))) + (sizeof(T) == 4 ? 24 : 46); }

 private:
  // The mean of the keys that are no padding, and how long those less the mean are at most, by blocks.
  void look_at_keys(const Threads& threads) {
    parallel(threads, units(), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::bytes_of<T>(head_ld) + Scratch::bytes_of<double>(head_ld));
      T* row = scratch.take<T>(head_ld);
      double* sum = scratch.take<double>(head_ld);
      for (int64_t unit = begin; unit < end; ++unit) {
        if (rbf) find_mean(unit, row, sum);
        if (window) find_norms(unit, row);
      }
    });
  }

  void load_key(T* to, int64_t unit, int64_t key, const T* mean) const {
    const Sequence& s = sequence_of(unit);
    load_centred<T, S>(to, head_ld, p.k, at<S>(p.k, s.batch, kv_head_of(unit), s.k_begin + key), 1, p.head_dim, mean);
  }

  void find_mean(int64_t unit, T* row, double* sum) {
    const Sequence& s = sequence_of(unit);
    std::fill(sum, sum + head_ld, 0.0);
    int64_t counted = 0;
    for (int64_t j = 0; j < s.keys; ++j) {
      if (is_padding(s, j)) continue;
      load_key(row, unit, j, nullptr);
      for (int64_t c = 0; c < head_ld; ++c) sum[c] += row[c];
      ++counted;
    }
    for (int64_t c = 0; c < head_ld; ++c) mean_[unit * head_ld + c] = counted ? T(sum[c] / double(counted)) : T(0);
  }

  void find_norms(int64_t unit, T* row) {
    const Sequence& s = sequence_of(unit);
    T largest = 0;
    for (int64_t block = 0; block < block_count(s); ++block) {
      T squared = 0;
      for (int64_t j = block * kKeys<T>; j < std::min(s.keys, (block + 1) * kKeys<T>); ++j) {
        if (is_padding(s, j)) continue;
        load_key(row, unit, j, mean(unit));
        const T length = dot(row, row, head_ld);
        if (!(length <= squared)) squared = length;  // a NaN stays: no tile is left out then
      }
      const T norm = std::sqrt(squared);
      block_norm_[(s.first_block + block) * p.kv_heads + kv_head_of(unit)] = norm;
      if (!(norm <= largest)) largest = norm;
    }
    largest_norm_[unit] = largest;
  }

  std::vector<T> mean_;          // (units, head_ld)
  std::vector<T> block_norm_;    // (blocks, kv_heads)
  std::vector<T> largest_norm_;  // (units)
};

// Bounds for a few neighbouring queries of one head, all of which hold for each of them.
template <class T>
struct Reach {
  T norm = 0;                                                                                    // of a query, at most
  T lowest = std::numeric_limits<T>::infinity(), highest = -std::numeric_limits<T>::infinity();  // centres
  T weight = std::numeric_limits<T>::infinity();                                                 // at least
  T floor = std::numeric_limits<T>::infinity();  // the logsumexp of a row is at least this

  void add(T q_norm, T center, T w, T row_floor) {
    const bool known = std::isfinite(center) && w >= 0;
    norm = std::max(norm, q_norm);
    lowest = known ? std::min(lowest, center) : kNever<T>;
    highest = known ? std::max(highest, center) : -kNever<T>;
    weight = known ? std::min(weight, w) : T(0);
    floor = std::min(floor, row_floor == row_floor ? row_floor : kNever<T>);
  }
  void add(const Reach& other) {
    norm = std::max(norm, other.norm);
    lowest = std::min(lowest, other.lowest);
    highest = std::max(highest, other.highest);
    weight = std::min(weight, other.weight);
    floor = std::min(floor, other.floor);
  }

  // Whether keys [first, last], none longer than key_norm, lie below floor - cutoff for all these queries. A product
  // is at most factor * norm * key_norm, a distance at least 0.
  bool misses(bool rbf, T factor, T key_norm, int64_t first, int64_t last, T cutoff) const {
    const T content = rbf ? T(0) : std::abs(factor) * norm * key_norm;
    const T away = std::max({T(0), T(first) - highest, lowest - T(last)});
    return content - weight * away * away < floor - cutoff;
  }
};

// The least that the logsumexp of a row can be when no mask takes keys away: the logit of the key next to its centre.
template <class T>
T least_logsumexp(bool rbf, T factor, T q_norm, T key_norm, T center, T weight, int64_t last_key) {
  const T away = std::max({T(0.5), -center, center - T(last_key)});
  const T far = q_norm + key_norm;
  const T content = rbf ? factor / 2 * far * far : std::abs(factor) * q_norm * key_norm;
  return -content - weight * away * away;
}

}  // namespace attention
}  // namespace
}  // namespace trifuse::cpu

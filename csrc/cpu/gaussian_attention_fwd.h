// Forward pass of gaussian_attention on the CPU. A task takes some queries of one head past the keys, block by block:
// products in a register tile, logits, exponentials below the running maximum, and their products with the values.
#pragma once

#include "gaussian_attention_blocks.h"
#include "pages.h"

namespace trifuse::cpu {
namespace {
namespace attention {

// The maximum that exponentials are taken below is raised only when a logit exceeds it by this: nothing overflows, and
// sums are rescaled a few times per row in place of once per block.
template <class T>
constexpr T kSlack = 8;

template <class T>
TRIFUSE_INLINE bool any_above(Vec<T> x, Vec<T> limit) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)x, (__m512)limit, _CMP_GT_OQ) != 0;
  if constexpr (sizeof(T) == 8) return _mm512_cmp_pd_mask((__m512d)x, (__m512d)limit, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_movemask_ps((__m256)(x > limit)) != 0;
  if constexpr (sizeof(T) == 8) return _mm256_movemask_pd((__m256d)(x > limit)) != 0;
#endif
  bool any = false;
  for (int i = 0; i < kLanes<T>; ++i) any |= x[i] > limit[i];
  return any;
}
template <class T>
TRIFUSE_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_max_ps((__m512)a, (__m512)b);
#endif
  return a > b ? a : b;
}

// The running sums of some rows.
template <class T>
struct RowSums {
  T* top;    // exponentials are of logits less this
  T* limit;  // top + kSlack; -inf before the first key
  T* total;  // (rows, kLanes)
  T* keep;   // what the sums so far are multiplied by

  static int64_t bytes(int64_t rows) {
    return 3 * 2 * Scratch::bytes_of<T>(rows) + Scratch::bytes_of<T>(rows * kLanes<T>);
  }
  RowSums(Scratch& scratch, int64_t rows)
      : top(scratch.take<T>(rows)),
        limit(scratch.take<T>(rows)),
        total(scratch.take<T>(rows * kLanes<T>)),
        keep(scratch.take<T>(rows)) {}

  void clear(int64_t rows) {
    std::fill(top, top + rows, T(0));
    std::fill(limit, limit + rows, kNever<T>);
    std::fill(total, total + rows * kLanes<T>, T(0));
  }
  __attribute__((noinline)) void raise(int64_t r, const T* largest) {
    const T highest = *std::max_element(largest, largest + kLanes<T>);
    keep[r] = limit[r] == kNever<T> ? T(0) : std::exp(top[r] - highest);
    top[r] = highest;
    limit[r] = highest + kSlack<T>;
    for (int64_t i = 0; i < kLanes<T>; ++i) total[r * kLanes<T> + i] *= keep[r];
  }
};

// Turns the products of `count` queries, from row `r` on, with a block of keys into exponentials.
template <class T, bool kRbf, bool kWindow, bool kBias>
__attribute__((noinline)) void exponentials(T* scores, const QueryRows<T>& queries, int64_t first, int64_t count,
                                            const KeyBlock<T>& keys, T factor, const T* bias, RowSums<T>& sums) {
  constexpr int64_t width = KeyBlock<T>::width;
  constexpr int lanes = kLanes<T>, vectors = width / lanes;
  LogitTerms<T> terms{factor, T(0), T(0), T(0), keys.half_norm, keys.position, bias};
  for (int64_t r = first; r < first + count; ++r, scores += width, terms.bias += kBias ? width : 0) {
    if constexpr (kRbf) terms.half_norm = queries.half_norm[r];
    if constexpr (kWindow) terms.center = queries.center[r], terms.weight = queries.weight[r];
    Vec<T> x[vectors];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      x[v] = logit<T, kRbf, kWindow, kBias>(terms, load<T>(scores + v * lanes), v * lanes).value;
    }
    Vec<T> largest = x[0];
#pragma GCC unroll 16
    for (int v = 1; v < vectors; ++v) largest = larger<T>(largest, x[v]);
    sums.keep[r] = T(1);
    if (__builtin_expect(any_above<T>(largest, splat(sums.limit[r])), 0)) {
      T numbers[lanes];
      store<T>(numbers, largest);
      sums.raise(r, numbers);
    }
    const Vec<T> top = splat(sums.top[r]);
    Vec<T> total = load<T>(sums.total + r * lanes);
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      const Vec<T> e = exp_or_zero<T>(x[v] - top);
      total += e;
      store<T>(scores + v * lanes, e);
    }
    store<T>(sums.total + r * lanes, total);
  }
}

template <class T, class S>
class ForwardWorker {
 public:
  static constexpr int64_t width = KeyBlock<T>::width;

  ForwardWorker(const Problem<T, S>& problem, int64_t rows)
      : problem_(problem),
        scratch_(KeyBlock<T>::bytes(problem.head_ld, problem.value_ld) + QueryRows<T>::bytes(rows, problem.head_ld) +
                 RowSums<T>::bytes(rows) + Scratch::bytes_of<T>(rows * problem.value_ld) +
                 2 * Scratch::bytes_of<T>(rows) + 2 * Scratch::bytes_of<T>(kTileRows * width)),
        keys_(scratch_, problem.head_ld, problem.value_ld),
        queries_(scratch_, rows, problem.head_ld),
        sums_(scratch_, rows),
        out_(scratch_.take<T>(rows * problem.value_ld)),
        lse_(scratch_.take<T>(rows)),
        rest_(scratch_.take<T>(rows)),
        scores_(scratch_.take<T>(kTileRows * width)),
        bias_(scratch_.take<T>(kTileRows * width)) {
    to_scores_.columns = to_scores_.c_ld = width;
    to_scores_.c = scores_;
    to_scores_.f = {nullptr, problem.head_ld, 1, keys_.transposed, width, problem.p.head_dim};
    to_out_.columns = to_out_.c_ld = problem.value_ld;
    to_out_.f = {scores_, width, 1, keys_.values, problem.value_ld, 0};
  }

  // Output and lse of queries [begin, begin + n) of head h.
  void run(int64_t unit, int64_t h, int64_t begin, int64_t n) {
    rows(unit, h, begin, n);
    const GaussianAttentionParams& p = problem_.p;
    const Sequence& s = problem_.sequence_of(unit);
    const int64_t row = (s.batch * p.heads + h) * p.queries + s.q_begin + begin;
    T *lse = static_cast<T*>(p.lse) + row, *rest = static_cast<T*>(p.lse_rest) + row;
    for (int64_t r = 0; r < n; ++r) {
      store_row(const_cast<S*>(at<S>(p.out, s.batch, h, s.q_begin + begin + r)), out_ + r * problem_.value_ld,
                p.value_dim);
      lse[r] = lse_[r];
      rest[r] = rest_[r];
    }
  }
  // The same output before it is rounded, (n, value_ld).
  const T* rows(int64_t unit, int64_t h, int64_t begin, int64_t n) {
    unit_ = unit;
    h_ = h;
    factor_ = problem_.factor(h);
    const Sequence& s = problem_.sequence_of(unit);
    queries_.pack(problem_, unit, h, begin, n);
    sums_.clear(n);
    std::fill(out_, out_ + n * problem_.value_ld, T(0));
    const int64_t keys = problem_.p.is_causal ? std::min(s.keys, begin + n) : s.keys;
    const int64_t blocks = (keys + width - 1) / width;
    if (problem_.window && blocks > 0) {
      find_reach();
      // From the centre outwards: what is far is then seen to be of no weight.
      const T middle = (queries_.center[n / 2]) / T(width);
      const int64_t start = middle > 0 ? int64_t(std::min(middle, T(blocks - 1))) : 0;
      for (int64_t block = start; block < blocks; ++block) visit(block);
      for (int64_t block = start - 1; block >= 0; --block) visit(block);
    } else {
      for (int64_t block = 0; block < blocks; ++block) visit(block);
    }
    finish();
    return out_;
  }

 private:
  void find_reach() {
    const Sequence& s = problem_.sequence_of(unit_);
    const GaussianAttentionParams& p = problem_.p;
    const bool all_take_part = p.mask_kind == AttentionMask::kNone && !p.padding;
    const T key_norm = problem_.largest_norm(unit_);
    least_.clear();
    for (int64_t r = 0; r < queries_.count; ++r) {
      const int64_t last = p.is_causal ? std::min(s.keys - 1, queries_.first + r) : s.keys - 1;
      least_.push_back(all_take_part && s.keys > 0 ? least_logsumexp(problem_.rbf, factor_, norm(r), key_norm,
                                                                     queries_.center[r], queries_.weight[r], last)
                                                   : kNever<T>);
    }
    reach_.assign((queries_.count + kTileRows - 1) / kTileRows, Reach<T>());
    for (int64_t tile = 0; tile < int64_t(reach_.size()); ++tile) update_reach(tile);
    whole_ = Reach<T>();
    for (const Reach<T>& one : reach_) whole_.add(one);
  }
  T norm(int64_t r) const { return std::sqrt(2 * queries_.half_norm[r]); }
  void update_reach(int64_t tile) {
    Reach<T> reach;
    for (int64_t r = tile * kTileRows; r < std::min(queries_.count, (tile + 1) * kTileRows); ++r) {
      const T reached = sums_.limit[r] == kNever<T> ? least_[r] : std::max(least_[r], sums_.top[r]);
      reach.add(norm(r), queries_.center[r], queries_.weight[r], reached);
    }
    reach_[tile] = reach;
  }
  bool misses(const Reach<T>& reach, int64_t block) const {
    if (!problem_.window || problem_.p.mask_kind == AttentionMask::kAdded) return false;
    const Sequence& s = problem_.sequence_of(unit_);
    return reach.misses(problem_.rbf, factor_, problem_.block_norm(unit_, block), block * width,
                        std::min(s.keys, (block + 1) * width) - 1, problem_.cutoff(s));
  }

  void visit(int64_t block) {
    if (misses(whole_, block)) return;
    bool packed = false;
    for (int64_t r = 0; r < queries_.count; r += kTileRows) {
      const int64_t n = std::min<int64_t>(kTileRows, queries_.count - r);
      if (problem_.p.is_causal && queries_.first + r + n - 1 < block * width) continue;
      if (problem_.window && misses(reach_[r / kTileRows], block)) continue;
      if (!packed) keys_.pack(problem_, unit_, block, false);
      packed = true;
      tile(r, n);
      if (problem_.window) update_reach(r / kTileRows);
    }
    if (!packed || !problem_.window) return;
    whole_ = Reach<T>();
    for (const Reach<T>& one : reach_) whole_.add(one);
  }

  void tile(int64_t r, int64_t n) {
    const bool biased = needs_bias(problem_, queries_.first + r, keys_);
    if (biased && !fill_bias(bias_, problem_, unit_, h_, queries_.first + r, n, keys_)) return;
    to_scores_.rows = n;
    to_scores_.f.a = queries_.rows + r * problem_.head_ld;
    long_product(to_scores_);
    with_flags(problem_.rbf, problem_.window, biased, [&](auto rbf, auto window, auto bias) {
      exponentials<T, decltype(rbf)::value, decltype(window)::value, decltype(bias)::value>(
          scores_, queries_, r, n, keys_, factor_, bias_, sums_);
    });
    to_out_.rows = n;
    to_out_.f.depth = keys_.count;
    to_out_.c = out_ + r * problem_.value_ld;
    to_out_.row_scale = sums_.keep + r;
    block_product<T, Into::kRescaled>(to_out_);
  }

  void finish() {
    for (int64_t r = 0; r < queries_.count; ++r) {
      const T total = sum_lanes<T>(load<T>(sums_.total + r * kLanes<T>));
      const bool none = sums_.limit[r] == kNever<T> && total == 0;
      const T scale = none ? T(0) : problem_.p.normalized ? 1 / total : std::exp(sums_.top[r]);
      T* row = out_ + r * problem_.value_ld;
      for (int64_t c = 0; c < problem_.value_ld; c += kLanes<T>) store<T>(row + c, load<T>(row + c) * splat(scale));
      const T log_total = std::log(total), lse = sums_.top[r] + log_total;
      lse_[r] = none ? kNever<T> : lse;
      rest_[r] = none ? T(0) : (sums_.top[r] - lse) + log_total;
    }
  }

  const Problem<T, S>& problem_;
  Scratch scratch_;
  KeyBlock<T> keys_;
  QueryRows<T> queries_;
  RowSums<T> sums_;
  T* out_;     // (rows, value_ld)
  T* lse_;     // (rows)
  T* rest_;    // (rows)
  T* scores_;  // (kTileRows, width)
  T* bias_;    // likewise
  BlockProduct<T> to_scores_, to_out_;
  std::vector<T> least_;
  std::vector<Reach<T>> reach_;  // by tiles of rows
  Reach<T> whole_;
  int64_t unit_ = 0, h_ = 0;
  T factor_ = 0;
};

template <class T, class S>
void forward(const GaussianAttentionParams& p, const Threads& threads) {
  if (p.batch * p.heads * p.queries == 0) return;
  prefer_large_pages(p.out.ptr, p.batch * p.heads * p.queries * p.value_dim * int64_t(sizeof(S)));
  const Problem<T, S> problem(p, threads);
  // Packing a block of keys is paid for by the rows that pass it; many threads want many tasks.
  int64_t rows = 384;
  while (rows > 48 && p.batch * p.heads * (p.queries / rows) < 64) rows /= 2;
  struct Task {
    int64_t unit, h, begin, count;
  };
  std::vector<Task> tasks;
  for (int64_t unit = 0; unit < problem.units(); ++unit) {
    const int64_t n = problem.sequence_of(unit).queries;
    for (int64_t g = 0; g < problem.group; ++g) {
      const int64_t h = problem.kv_head_of(unit) * problem.group + g;
      for (int64_t r = 0; r < n; r += rows) tasks.push_back({unit, h, r, std::min(rows, n - r)});
    }
  }
  Pool<ForwardWorker<T, S>> pool(threads);
  pool.run(
      int64_t(tasks.size()), [&] { return std::make_unique<ForwardWorker<T, S>>(problem, rows); },
      [&](ForwardWorker<T, S>& worker, int64_t i) {
        worker.run(tasks[i].unit, tasks[i].h, tasks[i].begin, tasks[i].count);
      });
}

}  // namespace attention
}  // namespace
}  // namespace trifuse::cpu

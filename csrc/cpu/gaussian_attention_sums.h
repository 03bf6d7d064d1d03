// What the backward pass of gaussian_attention sums into, and what it knows of every row before it starts.
#pragma once

#include "gaussian_attention_blocks.h"
#include "gaussian_attention_fwd.h"
#include "pages.h"

namespace trifuse::cpu {
namespace {
namespace attention {

constexpr int64_t kQueryRows = 64;                 // queries that meet a block of keys at a time
constexpr int64_t kPreparedRows = 3 * kQueryRows;  // queries that are prepared at a time
constexpr int64_t kWaveBytes = int64_t(32) << 20;  // of acc sums of gradients in half precision

// Sums over the keys of one query that the gradients of gamma, center and sigma are made of: of dS, of dS times the
// content -|q - k|^2 / 2, times the offset j - center and its square, and of the weights times the same.
enum RowTotal { kGradient, kGradientContent, kContent, kGradientOffset, kGradientSquare, kOffset, kSquare, kRowTotals };
constexpr bool row_total_exists(int i, bool rbf, bool window) {
  return i == kGradient ? rbf || window : i <= kContent ? rbf : window;
}

template <class T>
TRIFUSE_INLINE void add_row(T* to, const T* from, T scale, int64_t n) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t c = 0;
  for (; c + lanes <= n; c += lanes) store<T>(to + c, load<T>(to + c) + splat(scale) * load<T>(from + c));
  for (; c < n; ++c) to[c] += scale * from[c];
}

template <class T, class S>
class Backward {
 public:
  const GaussianAttentionBwdParams& p;
  const Problem<T, S> problem;
  int64_t piece = 1024;  // queries, and keys, of a task

  Backward(const GaussianAttentionBwdParams& params, const Threads& threads)
      : p(params), problem(params, threads), pool_(threads), threads_(threads) {
    const auto all_pieces = [&] {
      int64_t n = 0;
      for (int64_t unit = 0; unit < problem.units(); unit += p.kv_heads) n += pieces(unit) * p.kv_heads;
      return n;
    };
    while (piece > 128 && all_pieces() < 32) piece /= 2;
    offset_.resize(p.batch * p.heads * p.queries);
    int64_t rows = 0;
    for (const Sequence& s : problem.sequences) {
      first_rows_.push_back(rows);
      rows += (s.queries + kQueryRows - 1) / kQueryRows;
    }
    if (problem.window) reach_.resize(rows * p.heads);
    if (problem.rbf || problem.window) totals_.resize(offset_.size() * kRowTotals);
    if constexpr (kDirect) {
      prefer_large_pages(p.dq, p.batch * p.heads * p.queries * p.head_dim * int64_t(sizeof(T)));
      prefer_large_pages(p.dk, p.batch * p.kv_heads * p.keys * p.head_dim * int64_t(sizeof(T)));
      prefer_large_pages(p.dv, p.batch * p.kv_heads * p.keys * p.value_dim * int64_t(sizeof(T)));
    }
  }

  // Pieces of queries and keys of a unit: as many as there are of the more numerous.
  int64_t pieces(int64_t unit) const {
    const Sequence& s = problem.sequence_of(unit);
    return s.queries == 0 || s.keys == 0 ? 0 : (std::max(s.queries, s.keys) + piece - 1) / piece;
  }

  bool misses(int64_t unit, int64_t h, int64_t rows, int64_t block) const {
    if (!problem.window || p.mask_kind == AttentionMask::kAdded) return false;
    const Sequence& s = problem.sequence_of(unit);
    const int64_t first = block * kKeys<T>;
    return reach(unit, h, rows)
        .misses(problem.rbf, problem.factor(h), problem.block_norm(unit, block), first,
                std::min(s.keys, first + kKeys<T>) - 1, problem.cutoff(s));
  }
  bool may_meet(int64_t unit, int64_t key_piece, int64_t query_piece) const {
    const Sequence& s = problem.sequence_of(unit);
    const int64_t q0 = query_piece * piece, q1 = std::min(s.queries, q0 + piece);
    const int64_t k0 = key_piece * piece, k1 = std::min(s.keys, k0 + piece);
    if (q0 >= q1 || k0 >= k1 || (p.is_causal && q1 - 1 < k0)) return false;
    if (!problem.window || p.mask_kind == AttentionMask::kAdded) return true;
    for (int64_t g = 0; g < problem.group; ++g) {
      for (int64_t q = q0; q < q1; q += kQueryRows) {
        for (int64_t k = k0; k < k1; k += kKeys<T>) {
          if (!misses(unit, head(unit, g), q / kQueryRows, k / kKeys<T>)) return true;
        }
      }
    }
    return false;
  }
  int64_t head(int64_t unit, int64_t g) const { return problem.kv_head_of(unit) * problem.group + g; }

  // Prepares units from `begin` on, as many as there is memory for, and returns the first that is left.
  int64_t open_wave(int64_t begin) {
    int64_t end = begin, size = 0;
    place_.clear();
    for (; end < problem.units(); ++end) {
      const int64_t more = kDirect ? 0 : sums_size(problem.sequence_of(end));
      if (end > begin && (size + more) * int64_t(sizeof(T)) > kWaveBytes) break;
      place_.push_back(size);
      size += more;
    }
    wave_ = begin;
    if (int64_t(memory_.size()) < size) memory_.resize(size);
    prepare(begin, end);
    return end;
  }
  // Gradients in half precision are rounded once, when their sums are complete.
  void close_wave(int64_t begin, int64_t end) {
    if constexpr (!kDirect) {
      parallel(threads_, end - begin, [&](int64_t from, int64_t to) {
        for (int64_t unit = begin + from; unit < begin + to; ++unit) {
          const Sequence& s = problem.sequence_of(unit);
          for (int64_t g = 0; g < problem.group; ++g) {
            const int64_t h = head(unit, g);
            store_row(static_cast<S*>(p.dq) + q_row(s, h) * p.head_dim, dq(unit, h), s.queries * p.head_dim);
          }
          store_row(static_cast<S*>(p.dk) + k_row(unit) * p.head_dim, dk(unit), s.keys * p.head_dim);
          store_row(static_cast<S*>(p.dv) + k_row(unit) * p.value_dim, dv(unit), s.keys * p.value_dim);
        }
      });
    } else {
      (void)begin, (void)end;
    }
  }
  // Lanes that a piece needs for one of the row totals.
  int64_t total_lanes(int64_t i) const {
    return row_total_exists(int(i), problem.rbf, problem.window) ? piece * kLanes<T> : 0;
  }

  // Gradients of gamma, center and sigma, when all pieces have met. The gradients dS of a row sum to dlse, but for the
  // rounding of D: what that would add is the same sum over the weights, which may be large where all keys are far.
  void finish_parameters() {
    if (!totals_.empty()) {
      parallel(threads_, problem.units() * problem.group, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          finish_rows(i / problem.group, head(i / problem.group, i % problem.group));
      });
    }
    finish_gamma();
  }

  // dout, lse and D of queries [begin, begin + n).
  void load_incoming(int64_t unit, int64_t h, int64_t begin, int64_t n, T* dout, T* lse, T* rest, T* offset) const {
    const Sequence& s = problem.sequence_of(unit);
    const T* saved = static_cast<const T*>(p.lse) + q_row(s, h) + begin;
    std::copy_n(static_cast<const T*>(p.lse_rest) + q_row(s, h) + begin, n, rest);
    load_dout(unit, h, begin, n, dout);
    std::copy_n(offset_.data() + q_row(s, h) + begin, n, offset);
    for (int64_t r = 0; r < n; ++r) {
      lse[r] = saved[r] == kNever<T> ? -kNever<T> : saved[r];
      if (p.normalized) continue;
      // The weights are normalised all the same, and what multiplies them is not.
      const Vec<T> size = splat(T(std::exp(double(saved[r]) + double(rest[r]))));
      T* row = dout + r * problem.value_ld;
      for (int64_t c = 0; c < problem.value_ld; c += kLanes<T>) store<T>(row + c, load<T>(row + c) * size);
    }
  }
  void add_queries(int64_t unit, int64_t h, const QueryRows<T>& queries, const T* sums, T* const* lanes) {
    const Sequence& s = problem.sequence_of(unit);
    const T factor = problem.factor(h);
    for (int64_t r = 0; r < queries.count; ++r) {
      const int64_t i = queries.first + r;
      T* row = dq(unit, h) + i * p.head_dim;
      add_row(row, sums + r * problem.head_ld, factor, p.head_dim);
      if (totals_.empty()) continue;
      T now[kRowTotals] = {};
      for (int64_t k = 0; k < kRowTotals; ++k) {
        if (!row_total_exists(int(k), problem.rbf, problem.window)) continue;
        now[k] = sum_lanes<T>(load<T>(lanes[k] + r * kLanes<T>));
        totals_[(q_row(s, h) + i) * kRowTotals + k] += now[k];
      }
      // With what the row's dS do sum to here, dq is a sum of differences q - k.
      if (problem.rbf) add_row(row, queries.rows + r * problem.head_ld, -factor * now[kGradient], p.head_dim);
    }
  }
  void add_keys(int64_t unit, const KeyBlock<T>& keys, T factor, const T* dk_sums, const T* dv_sums,
                const T* key_sums) const {
    for (int64_t j = 0; j < keys.count; ++j) {
      T* row = dk(unit) + (keys.first + j) * p.head_dim;
      add_row(row, dk_sums + j * problem.head_ld, factor, p.head_dim);
      if (problem.rbf) add_row(row, keys.rows + j * problem.head_ld, -factor * key_sums[j], p.head_dim);
      add_row(dv(unit) + (keys.first + j) * p.value_dim, dv_sums + j * problem.value_ld, T(1), p.value_dim);
    }
  }

 private:
  T incoming_lse(const Sequence& s, int64_t h, int64_t i) const {
    return p.dlse.ptr ? *at<T>(p.dlse, s.batch, h, s.q_begin + i) : T(0);
  }
  void finish_rows(int64_t unit, int64_t h) {
    const Sequence& s = problem.sequence_of(unit);
    for (int64_t i = 0; i < s.queries; ++i) {
      const int64_t place = q_row(s, h) + i;
      T* total = totals_.data() + place * kRowTotals;
      const bool none = static_cast<const T*>(p.lse)[place] == kNever<T>;
      const T excess = none || !p.normalized ? T(0) : total[kGradient] - incoming_lse(s, h, i);
      total[kGradientContent] -= excess * total[kContent];
      if (!problem.window) continue;
      const T width = problem.sigma(s, h, i);
      const T center_sum = total[kGradientOffset] - excess * total[kOffset];
      const T sigma_sum = total[kGradientSquare] - excess * total[kSquare];
      static_cast<T*>(p.dsigma)[place] = sigma_sum == 0 ? T(0) : sigma_sum / width / width / width;
      if (p.dcenter) static_cast<T*>(p.dcenter)[place] = center_sum == 0 ? T(0) : center_sum / width / width;
    }
  }
  void finish_gamma() const {
    for (int64_t h = 0; p.dgamma && h < p.heads; ++h) {
      double sum = 0;
      for (int64_t b = 0; b < p.batch; ++b) {
        const T* total = totals_.data() + (b * p.heads + h) * p.queries * kRowTotals + kGradientContent;
        for (int64_t i = 0; i < p.queries; ++i) sum += double(total[i * kRowTotals]);
      }
      static_cast<T*>(p.dgamma)[h] = T(2 * sum);
    }
  }

  static constexpr bool kDirect = std::is_same_v<T, S>;  // sums stand in the outputs

  int64_t q_row(const Sequence& s, int64_t h) const { return (s.batch * p.heads + h) * p.queries + s.q_begin; }
  int64_t k_row(int64_t unit) const {
    const Sequence& s = problem.sequence_of(unit);
    return (s.batch * p.kv_heads + problem.kv_head_of(unit)) * p.keys + s.k_begin;
  }
  int64_t sums_size(const Sequence& s) const {
    return problem.group * s.queries * p.head_dim + s.keys * (p.head_dim + p.value_dim);
  }
  T* sums(int64_t unit) const { return const_cast<T*>(memory_.data()) + place_[unit - wave_]; }
  T* dq(int64_t unit, int64_t h) const {
    const Sequence& s = problem.sequence_of(unit);
    if constexpr (kDirect) return static_cast<T*>(p.dq) + q_row(s, h) * p.head_dim;
    return sums(unit) + h % problem.group * s.queries * p.head_dim;
  }
  T* dk(int64_t unit) const {
    if constexpr (kDirect) return static_cast<T*>(p.dk) + k_row(unit) * p.head_dim;
    return sums(unit) + problem.group * problem.sequence_of(unit).queries * p.head_dim;
  }
  T* dv(int64_t unit) const {
    if constexpr (kDirect) return static_cast<T*>(p.dv) + k_row(unit) * p.value_dim;
    return dk(unit) + problem.sequence_of(unit).keys * p.head_dim;
  }
  const Reach<T>& reach(int64_t unit, int64_t h, int64_t rows) const {
    return reach_[(first_rows_[unit / p.kv_heads] + rows) * p.heads + h];
  }
  void load_dout(int64_t unit, int64_t h, int64_t begin, int64_t n, T* dout) const {
    const Sequence& s = problem.sequence_of(unit);
    load_rows<T>(dout, problem.value_ld, at<S>(p.dout, s.batch, h, s.q_begin + begin), p.dout.row, p.dout.column, n,
                 p.value_dim);
  }

  // Scratch memory of one thread that prepares rows.
  struct Preparer {
    Scratch scratch;
    QueryRows<T> queries;
    T *out, *dout;  // (kPreparedRows, value_ld)
    T* transposed;  // (value_ld, kLanes)
    T* products;    // (kLanes, kLanes)
    ForwardWorker<T, S> again;

    explicit Preparer(const Problem<T, S>& problem)
        : scratch(QueryRows<T>::bytes(kPreparedRows, problem.head_ld) +
                  2 * Scratch::bytes_of<T>(kPreparedRows * problem.value_ld) +
                  Scratch::bytes_of<T>(kLanes<T> * problem.value_ld) + Scratch::bytes_of<T>(kLanes<T> * kLanes<T>)),
          queries(scratch, kPreparedRows, problem.head_ld),
          out(scratch.take<T>(kPreparedRows * problem.value_ld)),
          dout(scratch.take<T>(kPreparedRows * problem.value_ld)),
          transposed(scratch.take<T>(kLanes<T> * problem.value_ld)),
          products(scratch.take<T>(kLanes<T> * kLanes<T>)),
          again(problem, kDirect ? 0 : kPreparedRows) {}
  };

  void prepare(int64_t begin, int64_t end) {
    struct Task {
      int64_t unit, g, first;
    };
    std::vector<Task> tasks;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = problem.sequence_of(unit).queries;
      for (int64_t g = 0; g <= problem.group; ++g) {
        if (g == problem.group) tasks.push_back({unit, g, 0});
        for (int64_t r = 0; g < problem.group && r < n; r += kPreparedRows) tasks.push_back({unit, g, r});
      }
    }
    pool_.run(
        int64_t(tasks.size()), [&] { return std::make_unique<Preparer>(problem); },
        [&](Preparer& preparer, int64_t i) {
          const Task task = tasks[i];
          const Sequence& s = problem.sequence_of(task.unit);
          if (task.g < problem.group) {
            const int64_t n = std::min(kPreparedRows, s.queries - task.first);
            return prepare_rows(preparer, task.unit, head(task.unit, task.g), task.first, n);
          }
          std::fill_n(dk(task.unit), s.keys * p.head_dim, T(0));
          std::fill_n(dv(task.unit), s.keys * p.value_dim, T(0));
        });
  }

  void prepare_rows(Preparer& w, int64_t unit, int64_t h, int64_t begin, int64_t n) {
    const Sequence& s = problem.sequence_of(unit);
    const int64_t row = q_row(s, h) + begin;
    const T* lse = static_cast<const T*>(p.lse) + row;
    T* offset = offset_.data() + row;
    if (p.normalized) {
      find_row_dots(w, unit, h, begin, n, offset);
    } else {
      std::fill_n(offset, n, T(0));
    }
    if (problem.window) w.queries.pack(problem, unit, h, begin, n);
    std::fill_n(dq(unit, h) + begin * p.head_dim, n * p.head_dim, T(0));
    for (int64_t r = 0; r < n; ++r) {
      offset[r] -= incoming_lse(s, h, begin + r);
      if (lse[r] == kNever<T>) offset[r] = T(0);
      if (!problem.window) continue;
      Reach<T>& reach = reach_[(first_rows_[unit / p.kv_heads] + (begin + r) / kQueryRows) * p.heads + h];
      if (lse[r] == kNever<T>) continue;
      reach.add(std::sqrt(2 * w.queries.half_norm[r]), w.queries.center[r], w.queries.weight[r], lse[r]);
    }
  }

  // dout . out of every row, summed in the order of dout V^T: their difference is 0 where there is one key. In half
  // precision `out` is too coarse for that difference, and is made again.
  void find_row_dots(Preparer& w, int64_t unit, int64_t h, int64_t begin, int64_t n, T* dots) {
    constexpr int64_t lanes = kLanes<T>;
    const Sequence& s = problem.sequence_of(unit);
    const int64_t ld = problem.value_ld;
    load_dout(unit, h, begin, n, w.dout);
    const T* out = w.out;
    if constexpr (kDirect) {
      load_rows<T>(w.out, ld, at<S>(p.out, s.batch, h, s.q_begin + begin), p.out.row, p.out.column, n, p.value_dim);
    } else {
      out = w.again.rows(unit, h, begin, n);
    }
    for (int64_t r = 0; r < n; r += lanes) {
      const int64_t rows = std::min(lanes, n - r);
      transpose_rows(w.transposed, lanes, out + r * ld, ld, rows, ld);
      BlockProduct<T> product;
      product.rows = rows;
      product.columns = product.c_ld = lanes;
      product.f = {w.dout + r * ld, ld, 1, w.transposed, lanes, p.value_dim};
      product.c = w.products;
      long_product(product);
      for (int64_t i = 0; i < rows; ++i) dots[r + i] = w.products[i * lanes + i];
    }
  }

  Pool<Preparer> pool_;
  const Threads& threads_;
  std::vector<T> offset_;  // (batch, heads, queries): D
  std::vector<T> totals_;  // (batch, heads, queries, kRowTotals)
  std::vector<int64_t> first_rows_;
  std::vector<Reach<T>> reach_;  // (groups of kQueryRows queries, heads)
  std::vector<T> memory_;        // of a wave's sums
  std::vector<int64_t> place_;   // of a unit of the wave in it
  int64_t wave_ = 0;
};

}  // namespace attention
}  // namespace
}  // namespace trifuse::cpu

// Backward pass of gaussian_attention on the CPU. With P the weights and D = sum of dout * out - dlse of a row,
//   dS = P (dout V^T - D),   dV = P^T dout,   dK = factor dS^T Q,   dQ = factor dS K
// and by distance the sums of dS times what the norms give. Queries and keys are cut into pieces; in step t key piece i
// meets query piece i + t, so that no two tasks of a step touch the same gradients, and each of these is summed in an
// order that the shape alone decides. Every weight is computed once: five products.
#pragma once

#include "gaussian_attention_blocks.h"
#include "gaussian_attention_sums.h"
#include "pages.h"

namespace trifuse::cpu {
namespace {
namespace attention {

// What turns the products of some queries with a block of keys into weights and their gradients.
template <class T>
struct GradientRows {
  T* lse;                 // (piece); infinite for rows without a key
  T* rest;                // (piece): what it was rounded by
  T* offset;              // D
  T* weights;             // (kQueryRows, width): products, then P
  T* gradients;           // (kQueryRows, width): dout V^T, then dS
  T* key_sums;            // (width): sums of dS, by distance
  T* totals[kRowTotals];  // (piece, kLanes): sums over the keys, lane by lane
};

template <class T, bool kRbf, bool kWindow, bool kBias>
__attribute__((noinline)) void weights_and_gradients(GradientRows<T>& g, const QueryRows<T>& queries, int64_t first,
                                                     int64_t count, const KeyBlock<T>& keys, T factor, const T* bias) {
  constexpr int64_t width = KeyBlock<T>::width;
  constexpr int lanes = kLanes<T>, vectors = width / lanes;
  LogitTerms<T> terms{factor, T(0), T(0), T(0), keys.half_norm, keys.position, bias};
  Vec<T> key_sums[vectors];
  if constexpr (kRbf) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) key_sums[v] = load<T>(g.key_sums + v * lanes);
  }
  T *weights = g.weights, *gradients = g.gradients;
  for (int64_t r = first; r < first + count; ++r, weights += width, gradients += width) {
    if constexpr (kRbf) terms.half_norm = queries.half_norm[r];
    if constexpr (kWindow) terms.center = queries.center[r], terms.weight = queries.weight[r];
    const Vec<T> lse = splat(g.lse[r]), rest = splat(g.rest[r]), offset = splat(g.offset[r]);
    Vec<T> totals[kRowTotals];
#pragma GCC unroll 8
    for (int i = 0; i < kRowTotals; ++i) totals[i] = splat(T(0));
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      const Logit<T> x = logit<T, kRbf, kWindow, kBias>(terms, load<T>(weights + v * lanes), v * lanes);
      const Vec<T> weight = exp_or_zero<T>((x.value - lse) - rest);
      const Vec<T> gradient = weight * (load<T>(gradients + v * lanes) - offset);
      store<T>(weights + v * lanes, weight);
      store<T>(gradients + v * lanes, gradient);
      if constexpr (kRbf || kWindow) totals[kGradient] += gradient;
      if constexpr (kRbf) {
        key_sums[v] += gradient;
        totals[kGradientContent] += gradient * x.content;
        totals[kContent] += weight * x.content;
      }
      if constexpr (kWindow) {
        const Vec<T> square = x.offset * x.offset;
        totals[kGradientOffset] += gradient * x.offset;
        totals[kGradientSquare] += gradient * square;
        totals[kOffset] += weight * x.offset;
        totals[kSquare] += weight * square;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRowTotals; ++i) {
      if (!row_total_exists(i, kRbf, kWindow)) continue;
      T* total = g.totals[i] + r * lanes;
      store<T>(total, load<T>(total) + totals[i]);
    }
    if constexpr (kBias) terms.bias += width;
  }
  if constexpr (kRbf) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) store<T>(g.key_sums + v * lanes, key_sums[v]);
  }
}

// Queries of one piece and keys of one piece.
template <class T, class S>
class BackwardWorker {
 public:
  static constexpr int64_t width = KeyBlock<T>::width;

  explicit BackwardWorker(Backward<T, S>& all)
      : all_(all),
        problem_(all.problem),
        scratch_(bytes(all)),
        keys_(scratch_, problem_.head_ld, problem_.value_ld),
        queries_(scratch_, all.piece, problem_.head_ld),
        dout_(scratch_.take<T>(all.piece * problem_.value_ld)),
        dq_(scratch_.take<T>(all.piece * problem_.head_ld)),
        dk_(scratch_.take<T>(width * problem_.head_ld)),
        dv_(scratch_.take<T>(width * problem_.value_ld)),
        bias_(scratch_.take<T>(kQueryRows * width)) {
    g_.lse = scratch_.take<T>(all.piece);
    g_.rest = scratch_.take<T>(all.piece);
    g_.offset = scratch_.take<T>(all.piece);
    for (T*& total : g_.totals) total = scratch_.take<T>(all.total_lanes(&total - g_.totals));
    g_.weights = scratch_.take<T>(kQueryRows * width);
    g_.gradients = scratch_.take<T>(kQueryRows * width);
    g_.key_sums = scratch_.take<T>(width);
  }

  void run(int64_t unit, int64_t key_piece, int64_t query_piece) {
    const Sequence& s = problem_.sequence_of(unit);
    unit_ = unit;
    const int64_t q0 = query_piece * all_.piece, q1 = std::min(s.queries, q0 + all_.piece);
    const int64_t k0 = key_piece * all_.piece, k1 = std::min(s.keys, k0 + all_.piece);
    if (q0 >= q1 || k0 >= k1) return;
    for (int64_t g = 0; g < problem_.group; ++g) {
      h_ = problem_.kv_head_of(unit) * problem_.group + g;
      factor_ = problem_.factor(h_);
      bool packed = false;
      for (int64_t block = k0 / width; block * width < k1; ++block) run_block(block, q0, q1, packed);
      if (!packed) continue;
      all_.add_queries(unit, h_, queries_, dq_, g_.totals);
    }
  }

 private:
  static int64_t bytes(const Backward<T, S>& all) {
    const int64_t head_ld = all.problem.head_ld, value_ld = all.problem.value_ld;
    return KeyBlock<T>::bytes(head_ld, value_ld) + QueryRows<T>::bytes(all.piece, head_ld) +
           Scratch::bytes_of<T>(all.piece * value_ld) + Scratch::bytes_of<T>(all.piece * head_ld) +
           Scratch::bytes_of<T>(width * head_ld) + Scratch::bytes_of<T>(width * value_ld) +
           3 * Scratch::bytes_of<T>(kQueryRows * width) + 3 * Scratch::bytes_of<T>(all.piece) +
           kRowTotals * Scratch::bytes_of<T>(all.piece * kLanes<T>) + Scratch::bytes_of<T>(width);
  }

  void pack_queries(int64_t q0, int64_t q1) {
    queries_.pack(problem_, unit_, h_, q0, q1 - q0);
    all_.load_incoming(unit_, h_, q0, q1 - q0, dout_, g_.lse, g_.rest, g_.offset);
    std::fill(dq_, dq_ + (q1 - q0) * problem_.head_ld, T(0));
    for (int i = 0; i < kRowTotals; ++i)
      std::fill_n(g_.totals[i], std::min(all_.total_lanes(i), (q1 - q0) * kLanes<T>), T(0));
  }

  void run_block(int64_t block, int64_t q0, int64_t q1, bool& queries_packed) {
    bool packed = false;
    for (int64_t q = q0; q < q1; q += kQueryRows) {
      const int64_t n = std::min(kQueryRows, q1 - q);
      if (problem_.p.is_causal && q + n - 1 < block * width) continue;
      if (all_.misses(unit_, h_, q / kQueryRows, block)) continue;
      if (!queries_packed) pack_queries(q0, q1);
      queries_packed = true;
      if (!packed) {
        keys_.pack(problem_, unit_, block, true);
        std::fill(dk_, dk_ + width * problem_.head_ld, T(0));
        std::fill(dv_, dv_ + width * problem_.value_ld, T(0));
        std::fill(g_.key_sums, g_.key_sums + width, T(0));
        packed = true;
      }
      meet(q - q0, n);
    }
    if (packed) all_.add_keys(unit_, keys_, factor_, dk_, dv_, g_.key_sums);
  }

  // Queries [r, r + n) of the piece and the block of keys.
  void meet(int64_t r, int64_t n) {
    const bool biased = needs_bias(problem_, queries_.first + r, keys_);
    if (biased && !fill_bias(bias_, problem_, unit_, h_, queries_.first + r, n, keys_)) return;
    const int64_t head_ld = problem_.head_ld, value_ld = problem_.value_ld;
    const T *q = queries_.rows + r * head_ld, *dout = dout_ + r * value_ld;
    BlockProduct<T> product;
    product.rows = n;
    product.columns = width;
    product.c_ld = width;
    product.f = {q, head_ld, 1, keys_.transposed, width, problem_.p.head_dim};
    product.c = g_.weights;
    long_product(product);
    product.f = {dout, value_ld, 1, keys_.values_transposed, width, problem_.p.value_dim};
    product.c = g_.gradients;
    long_product(product);
    with_flags(problem_.rbf, problem_.window, biased, [&](auto rbf, auto window, auto bias) {
      weights_and_gradients<T, decltype(rbf)::value, decltype(window)::value, decltype(bias)::value>(
          g_, queries_, r, n, keys_, factor_, bias_);
    });
    product.rows = keys_.count;
    product.columns = product.c_ld = value_ld;
    product.f = {g_.weights, 1, width, dout, value_ld, n};
    product.c = dv_;
    block_product<T, Into::kAdded>(product);
    product.columns = product.c_ld = head_ld;
    product.f = {g_.gradients, 1, width, q, head_ld, n};
    product.c = dk_;
    block_product<T, Into::kAdded>(product);
    product.rows = n;
    product.f = {g_.gradients, width, 1, keys_.rows, head_ld, keys_.count};
    product.c = dq_ + r * head_ld;
    block_product<T, Into::kAdded>(product);
  }

  Backward<T, S>& all_;
  const Problem<T, S>& problem_;
  Scratch scratch_;
  KeyBlock<T> keys_;
  QueryRows<T> queries_;
  T* dout_;  // (piece, value_ld)
  T* dq_;    // (piece, head_ld), without the factor
  T* dk_;    // (width, head_ld), without the factor
  T* dv_;    // (width, value_ld)
  T* bias_;  // (kQueryRows, width)
  GradientRows<T> g_;
  int64_t unit_ = 0, h_ = 0;
  T factor_ = 0;
};

template <class T, class S>
void backward(const GaussianAttentionBwdParams& p, const Threads& threads) {
  Backward<T, S> all(p, threads);
  Pool<BackwardWorker<T, S>> pool(threads);
  struct Task {
    int64_t unit, key_piece, query_piece;
  };
  std::vector<Task> tasks;
  for (int64_t begin = 0, end = 0; begin < all.problem.units(); begin = end) {
    end = all.open_wave(begin);
    int64_t steps = 0;
    for (int64_t unit = begin; unit < end; ++unit) steps = std::max(steps, all.pieces(unit));
    for (int64_t t = 0; t < steps; ++t) {
      tasks.clear();
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t n = all.pieces(unit);
        for (int64_t i = 0; i < (t < n ? n : 0); ++i) {
          if (all.may_meet(unit, i, (i + t) % n)) tasks.push_back({unit, i, (i + t) % n});
        }
      }
      pool.run(
          int64_t(tasks.size()), [&] { return std::make_unique<BackwardWorker<T, S>>(all); },
          [&](BackwardWorker<T, S>& worker, int64_t i) {
            worker.run(tasks[i].unit, tasks[i].key_piece, tasks[i].query_piece);
          });
    }
    all.close_wave(begin, end);
  }
  all.finish_parameters();
}

}  // namespace attention
}  // namespace
}  // namespace trifuse::cpu

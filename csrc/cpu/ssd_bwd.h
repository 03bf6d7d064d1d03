// Backward pass of ssd on the CPU, in two passes over chunks. The first walks back in time, head by head, and
// leaves the gradient of the state after every chunk (ssd_state_grads.h). The second takes chunks in any order:
// all heads of a group in one chunk are one item, so every sum over heads stays inside an item, and results
// depend on no number of threads. (Where chunks are few, the heads are taken in parts that the shape decides.)
#pragma once

#include "ssd_state_grads.h"

namespace trifuse::cpu {
namespace {
namespace ssd {

// row += x and column[lane] += x[lane], in double.
template <class T>
TRIFUSE_INLINE void add_wide(Vec<T> x, Vec<double>& row, double* column) {
  if constexpr (sizeof(T) == 8) {
    row += x;
    store<double>(column, load<double>(column) + x);
  } else {
    typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
    constexpr int lanes = kLanes<double>;
    Half halves[2];
    __builtin_memcpy(halves, &x, sizeof x);
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const Vec<double> wide = __builtin_convertvector(halves[k], Vec<double>);
      row += wide;
      store<double>(column + k * lanes, load<double>(column + k * lanes) + wide);
    }
  }
}

// Gradients of one group in one chunk.
template <class T, class S>
class ChunkGradients {
 public:
  static int64_t scratch_bytes(const SsdBwdParams& p, const Sizes<T>& n, bool states) {
    const int64_t square = Scratch::bytes_of<T>(n.q * n.q_ld), rows = Scratch::bytes_of<T>(n.q * n.headdim_ld);
    const int64_t state_rows = Scratch::bytes_of<T>(n.q * n.dstate_ld);
    const int64_t state = states ? Scratch::bytes_of<T>(n.headdim_ld * n.dstate_ld) : 0;
    return GroupBlock<T>::bytes(n) + Steps<T>::bytes(n.q) + 3 * square + 3 * state_rows + (p.z.ptr ? 6 : 3) * rows +
           Scratch::bytes_of<T>(n.headdim * n.q_ld) + 4 * state + 5 * Scratch::bytes_of<T>(n.q_ld) +
           2 * Scratch::bytes_of<double>(n.q_ld) + Scratch::bytes_of<T>(n.headdim_ld);
  }
  ChunkGradients(const SsdBwdParams& p, const Sizes<T>& n, const Workspace<T>& workspace, bool states)
      : p_(p),
        n_(n),
        workspace_(workspace),
        scratch_(scratch_bytes(p, n, states)),
        group_(scratch_, n),
        steps_(scratch_, n.q) {
    for (T** square : {&dCB_, &G_, &scores_}) *square = scratch_.take<T>(n.q * n.q_ld);
    for (T** rows : {&dB_, &dC_, &product_}) *rows = scratch_.take<T>(n.q * n.dstate_ld);
    for (T** rows : {&x_, &dy_, &u_}) *rows = scratch_.take<T>(n.q * n.headdim_ld);
    for (T** rows : {&z_, &y_, &stepped_}) *rows = p.z.ptr ? scratch_.take<T>(n.q * n.headdim_ld) : nullptr;
    xt_ = scratch_.take<T>(n.headdim * n.q_ld);
    for (T** state : {&h_, &dh_, &ht_, &dht_}) {
      *state = states ? scratch_.take<T>(n.headdim_ld * n.dstate_ld) : nullptr;
    }
    for (T** vector : {&direct_, &entering_, &leaving_, &ddt_, &shared_}) {
      *vector = scratch_.take<T>(n.q_ld);
    }
    for (double** vector : {&row_, &column_}) *vector = scratch_.take<double>(n.q_ld);
    dD_ = scratch_.take<T>(n.headdim_ld);
  }

  // Of the heads of a group, those of one part.
  void run(const Blocks& blocks, int64_t b, int64_t c, int64_t g, int64_t part) {
    const int64_t heads = p_.heads / p_.groups, chunk = b * p_.n_chunks + c;
    const int64_t first = g * heads + heads * part / workspace_.parts();
    const int64_t last = g * heads + heads * (part + 1) / workspace_.parts();
    for (int64_t h = first; h < last; ++h) workspace_.sums(p_, chunk, h).clear();
    for (int64_t k = blocks.first[chunk]; k < blocks.first[chunk + 1]; ++k) {
      const Block& block = blocks.list[k];
      const int64_t q = block.end - block.begin;
      group_.template load<S>(p_, b, g, block);
      std::fill_n(dCB_, q * n_.q_ld, T(0));
      std::fill_n(dB_, q * n_.dstate_ld, T(0));
      std::fill_n(dC_, q * n_.dstate_ld, T(0));
      for (int64_t h = first; h < last; ++h) head(block, b, c, h);
      finish_group(block, b, g, part, q);
    }
  }

 private:
  void head(const Block& block, int64_t b, int64_t c, int64_t h) {
    const int64_t q = block.end - block.begin;
    const Sums sums = workspace_.sums(p_, b * p_.n_chunks + c, h);
    steps_.template compute<true>(p_, b, h, block.begin, q);
    load_rows<T>(x_, n_.headdim_ld, at<S>(p_.x, b, block.begin, h), p_.x.time, p_.x.last, q, p_.headdim);
    load_output_gradient<T, S>(p_, n_, b, h, block, dy_, z_, q);
    const T* state = state_before(block, b, c, h);
    const T* dstate = workspace_.gradient_after(p_, n_, block, b, c, h, dh_);
    scores(q, block, b, h);
    inputs(block, b, h, q, dstate, sums);
    double carried = 0;
    if (state && dstate) {
      carried = double(steps_.total) * double(dot<T>(state, dstate, p_.headdim * n_.dstate_ld));
    }
    outer(q, state, dy_, group_.C, dC_, entering_, [&](int64_t i) { return steps_.from_start[i]; });
    outer(q, dstate, x_, group_.B, dB_, leaving_, [&](int64_t i) { return T(steps_.to_end[i] * steps_.step[i]); });
    if (p_.z.ptr) gate(block, b, h, q, state);
    finish_steps(block, b, h, q, carried, sums);
  }

  // The state that a block starts from, (headdim, dstate_ld), or null for zero.
  const T* state_before(const Block& block, int64_t b, int64_t c, int64_t h) {
    const T* from = nullptr;
    const int64_t size = p_.headdim * p_.dstate;
    if (block.source == kContinues) {
      from = static_cast<const T*>(p_.chunk_states) + ((b * p_.n_chunks + c) * p_.heads + h) * size;
    } else if (block.source >= 0 && p_.initial_states) {
      from = static_cast<const T*>(p_.initial_states) + (block.source * p_.heads + h) * size;
    }
    return pad_state<T>(from, p_, n_, h_);
  }

  // scores = C B^T * L; the part of this head in the gradient of C B^T; and of every pair of positions j < i
  // the gradient of the logarithm of L[i][j], summed over j and over i. The difference of these sums is what
  // counts, and what they share must vanish from it: they are in double.
  void scores(int64_t q, const Block& block, int64_t b, int64_t h) {
    constexpr int64_t lanes = kLanes<T>;
    transpose_rows<T>(xt_, n_.q_ld, x_, n_.headdim_ld, q, p_.headdim);
    Product<T> product;
    product.rows = q;
    product.columns = padded<T>(q);
    product.c = G_;
    product.c_ld = n_.q_ld;
    product.second = {dy_, n_.headdim_ld, 1, xt_, n_.q_ld, p_.headdim};
    multiply<T>(product, true);
    std::fill_n(column_, n_.q_ld, 0.0);
    using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    IVec<T> lane;
    for (int64_t k = 0; k < lanes; ++k) lane[k] = Lane(k);
    Vec<double> row = splat(0.0);
    const int64_t next = h + 1 < p_.heads ? h + 1 : h;
    const S *next_x = at<S>(p_.x, b, block.begin, next), *next_dout = at<S>(p_.dout, b, block.begin, next);
    for_decays<T>(steps_, q, static_cast<const T*>(nullptr), shared_, [&](int64_t i, int64_t v, Vec<T> L, bool last) {
      const int64_t k = i * n_.q_ld + v * lanes;
      if (last) prefetch_row(next_x + i * p_.x.time, p_.headdim);
      if (last) prefetch_row(next_dout + i * p_.dout.time, p_.headdim);
      const Vec<T> score = load<T>(group_.CB + k) * L;
      const Vec<T> gradient = load<T>(G_ + k) * load<T>(steps_.step + v * lanes);
      store<T>(scores_ + k, score);
      store<T>(dCB_ + k, load<T>(dCB_ + k) + gradient * L);
      Vec<T> pair = gradient * score;
      if (last) pair = lane < Lane(i - v * lanes) ? pair : splat(T(0));
      if (v == 0) row = splat(0.0);
      add_wide<T>(pair, row, column_ + v * lanes);
      if (last) row_[i] = sum_lanes<double>(row);
    });
  }

  // dx, dD, and what reaches a step as the weight of its input.
  void inputs(const Block& block, int64_t b, int64_t h, int64_t q, const T* dstate, const Sums& sums) {
    Product<T> product;
    product.rows = q;
    product.columns = n_.headdim_ld;
    product.c = u_;
    product.c_ld = n_.headdim_ld;
    if (dstate) {
      transpose_rows<T>(dht_, n_.headdim_ld, dstate, n_.dstate_ld, p_.headdim, p_.dstate);
      product.first = {group_.B, n_.dstate_ld, 1, dht_, n_.headdim_ld, p_.dstate};
      product.row_scale = steps_.to_end;
    }
    product.second = {scores_, 1, n_.q_ld, dy_, n_.headdim_ld, q};
    product.band = Band::kUpper;
    multiply<T>(product);
    const T* D = static_cast<const T*>(p_.D);
    std::fill_n(dD_, n_.headdim_ld, T(0));
    for (int64_t i = 0; i < q; ++i) {
      T* u = u_ + i * n_.headdim_ld;
      const T *x = x_ + i * n_.headdim_ld, *dy = dy_ + i * n_.headdim_ld;
      direct_[i] = dot<T>(u, x, n_.headdim_ld);
      const Vec<T> step = splat(steps_.step[i]);
      for (int64_t k = 0; k < n_.headdim_ld; k += kLanes<T>) {
        store<T>(u + k, step * load<T>(u + k));
        if (D) store<T>(dD_ + k, load<T>(dD_ + k) + load<T>(x + k) * load<T>(dy + k));
      }
      if (D) {
        for (int64_t k = 0; k < p_.headdim; ++k) u[k] += D[p_.D_has_dim ? h * p_.headdim + k : h] * dy[k];
      }
      store_row<T>(const_cast<S*>(at<S>(p_.dx, b, block.begin + i, h)), u, p_.headdim);
    }
    if (D) {
      for (int64_t k = 0; k < p_.headdim; ++k) sums.D[p_.D_has_dim ? k : 0] += double(dD_[k]);
    }
  }

  // Adds weight[i] * (rows state) to `to` (dC from dy and the state before, dB from x and the gradient of the
  // state after), and leaves in `decay` what the same product gives for the decay it passed through.
  template <class Weight>
  void outer(int64_t q, const T* state, const T* rows, const T* other, T* to, T* decay, Weight&& weight) {
    std::fill_n(decay, n_.q_ld, T(0));
    if (!state) return;
    Product<T> product;
    product.rows = q;
    product.columns = n_.dstate_ld;
    product.c = product_;
    product.c_ld = n_.dstate_ld;
    product.second = {rows, n_.headdim_ld, 1, state, n_.dstate_ld, p_.headdim};
    multiply<T>(product);
    for (int64_t i = 0; i < q; ++i) {
      const Vec<T> scale = splat(T(weight(i)));
      Vec<T> sum = splat(T(0));
      for (int64_t k = i * n_.dstate_ld; k < (i + 1) * n_.dstate_ld; k += kLanes<T>) {
        const Vec<T> value = scale * load<T>(product_ + k);
        store<T>(to + k, load<T>(to + k) + value);
        sum += value * load<T>(other + k);
      }
      decay[i] = sum_lanes<T>(sum);
    }
  }

  // dz = dout * y * silu'(z), with y computed again.
  void gate(const Block& block, int64_t b, int64_t h, int64_t q, const T* state) {
    for (int64_t i = 0; i < q; ++i) {
      const Vec<T> step = splat(steps_.step[i]);
      for (int64_t k = i * n_.headdim_ld; k < (i + 1) * n_.headdim_ld; k += kLanes<T>) {
        store<T>(stepped_ + k, step * load<T>(x_ + k));
      }
    }
    if (state) transpose_rows<T>(ht_, n_.headdim_ld, state, n_.dstate_ld, p_.headdim, p_.dstate);
    block_outputs<T>(n_, q, group_, steps_, state ? ht_ : nullptr, scores_, stepped_, y_);
    add_skip<T>(p_, h, n_, q, x_, y_);
    for (int64_t i = 0; i < q; ++i) {
      T *y = y_ + i * n_.headdim_ld, *dout = u_;
      load_rows<T>(dout, n_.headdim_ld, at<S>(p_.dout, b, block.begin + i, h), 0, p_.dout.last, 1, p_.headdim);
      for (int64_t k = 0; k < n_.headdim_ld; k += kLanes<T>) {
        const Vec<T> z = load<T>(z_ + i * n_.headdim_ld + k), open = sigmoid<T>(z);
        const Vec<T> slope = open * (splat(T(1)) + z * (splat(T(1)) - open));
        store<T>(y + k, load<T>(dout + k) * load<T>(y + k) * slope);
      }
      store_row<T>(const_cast<S*>(at<S>(p_.dz, b, block.begin + i, h)), y, p_.headdim);
    }
  }

  // A decay of step k is passed by all that goes from before k to k or after: pairs of positions, the state
  // before the block on its way to position i >= k, inputs j < k on their way to the state after, and the
  // state that passes all of the block.
  void finish_steps(const Block& block, int64_t b, int64_t h, int64_t q, double carried, const Sums& sums) {
    double before = carried, dA = 0, dbias = 0;
    for (int64_t j = 0; j < q; ++j) before += double(leaving_[j]);
    double from = 0;  // of positions k and after
    const double rate = double(static_cast<const T*>(p_.A)[h]);
    for (int64_t k = q - 1; k >= 0; --k) {
      from += row_[k] - column_[k] + double(entering_[k]);
      before -= double(leaving_[k]);
      const double decay = from + before;
      dA += decay * double(steps_.step[k]);
      const double ddt = (double(direct_[k]) + rate * decay) * double(steps_.slope[k]);
      dbias += ddt;
      ddt_[k] = T(ddt);
    }
    *sums.A += dA;
    *sums.dt_bias += dbias;
    with_dt_dtype(p_.dt_dtype, [&](auto* type) {
      using Dt = std::remove_pointer_t<decltype(type)>;
      Dt* to = const_cast<Dt*>(at<Dt>(p_.ddt, b, block.begin, h));
      for (int64_t i = 0; i < q; ++i) to[i * p_.ddt.time] = narrow<Dt>(ddt_[i]);
    });
  }
  template <class To>
  static To narrow(T x) {
    if constexpr (sizeof(To) < 4) {
      return scalar_from<To>(float(x));
    } else {
      return To(x);
    }
  }

  void finish_group(const Block& block, int64_t b, int64_t g, int64_t part, int64_t q) {
    Product<T> product;
    product.rows = q;
    product.columns = product.c_ld = product.init_ld = n_.dstate_ld;
    product.init = product.c = dC_;
    product.second = {dCB_, n_.q_ld, 1, group_.B, n_.dstate_ld, q};
    product.band = Band::kLower;
    multiply<T>(product);
    product.init = product.c = dB_;
    product.second = {dCB_, 1, n_.q_ld, group_.C, n_.dstate_ld, q};
    product.band = Band::kUpper;
    multiply<T>(product);
    for (int64_t i = 0; i < q; ++i) {
      const int64_t t = block.begin + i;
      const T *dB = dB_ + i * n_.dstate_ld, *dC = dC_ + i * n_.dstate_ld;
      if (workspace_.parts() > 1) {
        std::copy_n(dB, p_.dstate, workspace_.part(p_, 0, part, b, t, g));
        std::copy_n(dC, p_.dstate, workspace_.part(p_, 1, part, b, t, g));
      } else {
        store_row<T>(const_cast<S*>(at<S>(p_.dB, b, t, g)), dB, p_.dstate);
        store_row<T>(const_cast<S*>(at<S>(p_.dC, b, t, g)), dC, p_.dstate);
      }
    }
  }

  const SsdBwdParams& p_;
  const Sizes<T>& n_;
  const Workspace<T>& workspace_;
  Scratch scratch_;
  GroupBlock<T> group_;
  Steps<T> steps_;
  T *dCB_, *G_, *scores_;          // (q, q_ld), at and left of the diagonal
  T *dB_, *dC_, *product_;         // (q, dstate_ld)
  T *x_, *dy_, *u_;                // (q, headdim_ld)
  T *z_, *y_, *stepped_;           // the same, null without z
  T* xt_;                          // (headdim, q_ld)
  T *h_, *dh_;                     // (headdim, dstate_ld)
  T *ht_, *dht_;                   // (dstate, headdim_ld)
  double *row_, *column_;          // by position: sums over pairs of the gradient of log L
  T* direct_;                      // of the step as a weight
  T *entering_, *leaving_, *ddt_;  // of log from_start, of log to_end; of dt
  T *shared_, *dD_;
};

template <class T, class S>
void zero_gradients(const SsdBwdParams& p) {
  const int64_t coefficients = p.batch * p.seqlen * p.groups * p.dstate;
  std::fill_n(static_cast<S*>(p.dB.ptr), coefficients, S{});
  std::fill_n(static_cast<S*>(p.dC.ptr), coefficients, S{});
  std::fill_n(static_cast<T*>(p.dA), p.heads, T(0));
  if (p.dD) std::fill_n(static_cast<T*>(p.dD), p.D_has_dim ? p.heads * p.headdim : p.heads, T(0));
  if (p.ddt_bias) std::fill_n(static_cast<T*>(p.ddt_bias), p.heads, T(0));
}

// dB and dC from their parts, added up in order.
template <class T, class S>
void add_parts(const SsdBwdParams& p, const Workspace<T>& workspace, int64_t b, int64_t t, int64_t g) {
  for (int64_t which = 0; which < 2; ++which) {
    T* total = workspace.part(p, which, 0, b, t, g);
    for (int64_t part = 1; part < workspace.parts(); ++part) {
      const T* one = workspace.part(p, which, part, b, t, g);
      for (int64_t k = 0; k < p.dstate; ++k) total[k] += one[k];
    }
    store_row<T>(const_cast<S*>(at<S>(which ? p.dC : p.dB, b, t, g)), total, p.dstate);
  }
}

template <class T, class S>
void backward(const SsdBwdParams& p, const Threads& all_threads) {
  copy_empty<T>(p, p.dfinal_states, p.dinitial_states);
  if (p.batch * p.seqlen * p.heads == 0) return zero_gradients<T, S>(p);
  const Threads threads = worthwhile(p, all_threads);
  const int64_t sequence = p.batch * p.seqlen * p.heads * p.headdim * int64_t(sizeof(S));
  prefer_large_pages(p.dx.ptr, sequence);
  if (p.dz.ptr) prefer_large_pages(p.dz.ptr, sequence);
  const Blocks blocks(p);
  const Sizes<T> n(p);
  const Workspace<T> workspace(p);
  prefer_large_pages(p.workspace, workspace.bytes());
  state_gradients<T, S>(p, n, blocks, workspace, threads);
  const bool states = p.initial_states || p.dfinal_states || p.n_chunks > 1;
  const int64_t parts = workspace.parts();
  parallel(threads, p.batch * p.n_chunks * p.groups * parts, [&](int64_t begin, int64_t end) {
    ChunkGradients<T, S> item(p, n, workspace, states);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t chunk = k / (p.groups * parts);
      item.run(blocks, chunk / p.n_chunks, chunk % p.n_chunks, k / parts % p.groups, k % parts);
    }
  });
  if (parts > 1) {
    parallel(threads, p.batch * p.seqlen, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin * p.groups; k < end * p.groups; ++k) {
        add_parts<T, S>(p, workspace, k / (p.seqlen * p.groups), k / p.groups % p.seqlen, k % p.groups);
      }
    });
  }
  parallel(threads, p.heads, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) workspace.finish(p, h);
  });
}

}  // namespace ssd
}  // namespace
}  // namespace trifuse::cpu

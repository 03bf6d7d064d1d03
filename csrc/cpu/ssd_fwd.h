// Forward pass of ssd on the CPU. In a block of positions, with L[i][j] the decay from j to i,
//   y = decay from the block's start * (C h^T) + ((C B^T) * L * step) x      and then      h = total h + B^T x''.
// C B^T is shared by the heads of a group; the state stands as (dstate, headdim) while it travels through time.
#pragma once

#include "isa.h"
#include "pages.h"
#include "ssd_product.h"
#include "ssd_rows.h"

namespace trifuse::cpu {
namespace {
namespace ssd {

template <class S>
const S* at(const SsdView& view, int64_t b, int64_t t, int64_t h) {
  return static_cast<const S*>(view.ptr) + b * view.batch + t * view.time + h * view.head;
}

// Sizes of the scratch matrices: vectors along headdim, dstate and positions.
template <class T>
struct Sizes {
  int64_t q, headdim, dstate;           // q: positions of the longest block
  int64_t q_ld, headdim_ld, dstate_ld;  // padded to whole vectors

  explicit Sizes(const SsdParams& p)
      : q(std::min(p.chunk_size, p.seqlen)),
        headdim(p.headdim),
        dstate(p.dstate),
        q_ld(padded<T>(q)),
        headdim_ld(padded<T>(headdim)),
        dstate_ld(padded<T>(dstate)) {}
};

// B, C and C B^T of one group in one block.
template <class T>
struct GroupBlock {
  const Sizes<T>& n;
  T *B, *C;  // (q, dstate_ld)
  T* Bt;     // (dstate, q_ld)
  T* CB;     // (q, q_ld), at and left of the diagonal

  static int64_t bytes(const Sizes<T>& n) {
    return 2 * Scratch::bytes_of<T>(n.q * n.dstate_ld) + Scratch::bytes_of<T>(n.dstate * n.q_ld) +
           Scratch::bytes_of<T>(n.q * n.q_ld);
  }
  GroupBlock(Scratch& scratch, const Sizes<T>& n)
      : n(n),
        B(scratch.take<T>(n.q * n.dstate_ld)),
        C(scratch.take<T>(n.q * n.dstate_ld)),
        Bt(scratch.take<T>(n.dstate * n.q_ld)),
        CB(scratch.take<T>(n.q * n.q_ld)) {}

  template <class S>
  void load(const SsdParams& p, int64_t b, int64_t g, const Block& block) {
    const int64_t q = block.end - block.begin;
    load_rows<T>(B, n.dstate_ld, at<S>(p.B, b, block.begin, g), p.B.time, p.B.last, q, n.dstate);
    load_rows<T>(C, n.dstate_ld, at<S>(p.C, b, block.begin, g), p.C.time, p.C.last, q, n.dstate);
    transpose_rows<T>(Bt, n.q_ld, B, n.dstate_ld, q, n.dstate);
    Product<T> product;
    product.rows = q;
    product.columns = padded<T>(q);
    product.c = CB;
    product.c_ld = n.q_ld;
    product.first = {C, n.dstate_ld, 1, Bt, n.q_ld, n.dstate};
    multiply<T>(product, true);
  }
};

// y = from_start * (C h^T) + scores x, h null for zero.
template <class T>
void block_outputs(const Sizes<T>& n, int64_t q, const GroupBlock<T>& group, const Steps<T>& steps, const T* state,
                   const T* scores, const T* x, T* y) {
  Product<T> product;
  product.rows = q;
  product.columns = n.headdim_ld;
  product.c = y;
  product.c_ld = n.headdim_ld;
  if (state) {
    product.first = {group.C, n.dstate_ld, 1, state, n.headdim_ld, n.dstate};
    product.row_scale = steps.from_start;
  }
  product.second = {scores, n.q_ld, 1, x, n.headdim_ld, q};
  product.band = Band::kLower;
  multiply<T>(product);
}

// y += D x
template <class T>
void add_skip(const SsdParams& p, int64_t h, const Sizes<T>& n, int64_t q, const T* x, T* y) {
  const T* D = static_cast<const T*>(p.D);
  if (!D) return;
  for (int64_t i = 0; i < q; ++i) {
    for (int64_t k = 0; k < p.headdim; ++k) {
      y[i * n.headdim_ld + k] += D[p.D_has_dim ? h * p.headdim + k : h] * x[i * n.headdim_ld + k];
    }
  }
}

template <class T, class S>
class ForwardItem {
 public:
  static int64_t scratch_bytes(const Sizes<T>& n, int64_t heads) {
    return GroupBlock<T>::bytes(n) + Steps<T>::bytes(n.q) + Scratch::bytes_of<T>(n.q * n.q_ld) +
           3 * Scratch::bytes_of<T>(n.q * n.headdim_ld) + Scratch::bytes_of<T>(n.headdim_ld) +
           Scratch::bytes_of<T>(n.q_ld) + heads * Scratch::bytes_of<T>(n.dstate * n.headdim_ld);
  }
  ForwardItem(const SsdParams& p, const Sizes<T>& n, int64_t heads)
      : p_(p),
        n_(n),
        scratch_(scratch_bytes(n, heads)),
        group_(scratch_, n),
        steps_(scratch_, n.q),
        scores_(scratch_.take<T>(n.q * n.q_ld)),
        x_(scratch_.take<T>(n.q * n.headdim_ld)),
        weighted_(scratch_.take<T>(n.q * n.headdim_ld)),
        y_(scratch_.take<T>(n.q * n.headdim_ld)),
        z_(scratch_.take<T>(n.headdim_ld)),
        shared_(scratch_.take<T>(n.q_ld)),
        states_(scratch_.take<T>(heads * n.dstate * n.headdim_ld)) {}

  // All time of heads [first, last) of group g.
  void run(const Blocks& blocks, int64_t b, int64_t g, int64_t first, int64_t last) {
    for (int64_t c = 0; c < p_.n_chunks; ++c) {
      const int64_t from = blocks.first[b * p_.n_chunks + c], to = blocks.first[b * p_.n_chunks + c + 1];
      for (int64_t k = from; k < to; ++k) {
        const Block& block = blocks.list[k];
        group_.template load<S>(p_, b, g, block);
        for (int64_t h = first; h < last; ++h) {
          T* state = states_ + (h - first) * n_.dstate * n_.headdim_ld;
          head(block, b, h, state, k == from ? chunk_state(b, c, h) : nullptr);
        }
      }
    }
  }

 private:
  T* chunk_state(int64_t b, int64_t c, int64_t h) const {
    if (!p_.chunk_states) return nullptr;
    return static_cast<T*>(p_.chunk_states) + ((b * p_.n_chunks + c) * p_.heads + h) * p_.headdim * p_.dstate;
  }

  void head(const Block& block, int64_t b, int64_t h, T* state, T* save) {
    const int64_t q = block.end - block.begin, size = p_.headdim * p_.dstate;
    const T* initial = static_cast<const T*>(p_.initial_states);
    if (block.source >= 0 && initial) {
      const T* from = initial + (block.source * p_.heads + h) * size;
      transpose_rows<T>(state, n_.headdim_ld, from, p_.dstate, p_.headdim, p_.dstate);
    }
    const bool starts = block.source == kContinues || (block.source >= 0 && initial);
    if (save && starts) transpose_rows<T>(save, p_.dstate, state, n_.headdim_ld, p_.dstate, p_.headdim);
    if (save && !starts) std::fill(save, save + size, T(0));

    steps_.template compute<false>(p_, b, h, block.begin, q);
    load_rows<T>(x_, n_.headdim_ld, at<S>(p_.x, b, block.begin, h), p_.x.time, p_.x.last, q, p_.headdim);
    const S* next = h + 1 < p_.heads ? at<S>(p_.x, b, block.begin, h + 1) : at<S>(p_.x, b, block.begin, h);
    for_decays<T>(steps_, q, steps_.step, shared_, [&](int64_t i, int64_t v, Vec<T> decay, bool last) {
      if (last) prefetch_row(next + i * p_.x.time, p_.headdim);
      const int64_t k = i * n_.q_ld + v * kLanes<T>;
      store<T>(scores_ + k, load<T>(group_.CB + k) * decay);
    });
    block_outputs<T>(n_, q, group_, steps_, starts ? state : nullptr, scores_, x_, y_);
    add_skip<T>(p_, h, n_, q, x_, y_);
    write(block, b, h, q);

    const bool wanted = block.target == kContinues || (block.target >= 0 && p_.final_states);
    if (!wanted) return;
    advance(q, starts, state);
    if (block.target >= 0) {
      T* to = static_cast<T*>(p_.final_states) + (block.target * p_.heads + h) * size;
      transpose_rows<T>(to, p_.dstate, state, n_.headdim_ld, p_.dstate, p_.headdim);
    }
  }

  // state = total * state + B^T (to_end * step * x)
  void advance(int64_t q, bool starts, T* state) {
    for (int64_t i = 0; i < q; ++i) {
      const Vec<T> weight = splat(T(steps_.to_end[i] * steps_.step[i]));
      for (int64_t k = i * n_.headdim_ld; k < (i + 1) * n_.headdim_ld; k += kLanes<T>) {
        store<T>(weighted_ + k, weight * load<T>(x_ + k));
      }
    }
    Product<T> product;
    product.rows = n_.dstate;
    product.columns = n_.headdim_ld;
    product.c = state;
    product.c_ld = product.init_ld = n_.headdim_ld;
    product.init = starts ? state : nullptr;
    product.scale = steps_.total;
    product.second = {group_.B, 1, n_.dstate_ld, weighted_, n_.headdim_ld, q};
    multiply<T>(product);
  }

  void write(const Block& block, int64_t b, int64_t h, int64_t q) {
    for (int64_t i = 0; i < q; ++i) {
      T* y = y_ + i * n_.headdim_ld;
      if (p_.z.ptr) {
        load_rows<T>(z_, n_.headdim_ld, at<S>(p_.z, b, block.begin + i, h), 0, p_.z.last, 1, p_.headdim);
        for (int64_t k = 0; k < n_.headdim_ld; k += kLanes<T>) {
          const Vec<T> z = load<T>(z_ + k);
          store<T>(y + k, load<T>(y + k) * (z * sigmoid<T>(z)));
        }
      }
      store_row<T>(const_cast<S*>(at<S>(p_.out, b, block.begin + i, h)), y, p_.headdim);
    }
  }

  const SsdParams& p_;
  const Sizes<T>& n_;
  Scratch scratch_;
  GroupBlock<T> group_;
  Steps<T> steps_;
  T *scores_, *x_, *weighted_, *y_, *z_, *shared_, *states_;
};

// Copies the states of sequences without positions, or zeros.
template <class T>
void copy_empty(const SsdParams& p, const void* from, void* to) {
  if (!to) return;
  const int64_t size = p.heads * p.headdim * p.dstate;
  for_empty_sequences(p, [&](int64_t row) {
    T* target = static_cast<T*>(to) + row * size;
    if (from) {
      std::copy_n(static_cast<const T*>(from) + row * size, size, target);
    } else {
      std::fill_n(target, size, T(0));
    }
  });
}

// Of the heads of a group, how many share one pass over time: as many as there are threads left for, and as
// their states fit into a core's cache.
template <class T>
int64_t heads_per_item(const SsdParams& p, const Sizes<T>& n, int64_t pieces) {
  const int64_t heads = p.heads / p.groups;
  const int64_t fit =
      std::max<int64_t>(1, (int64_t(1) << 20) / std::max<int64_t>(1, n.dstate * n.headdim_ld * sizeof(T)));
  const int64_t wanted = (pieces + p.batch * p.groups - 1) / (p.batch * p.groups);
  const int64_t splits = std::min(heads, std::max(wanted, (heads + fit - 1) / fit));
  return (heads + splits - 1) / splits;
}

// The threads that a call is worth: waking them takes longer than small calls do.
inline Threads worthwhile(const SsdParams& p, Threads threads) {
  const int64_t products = p.batch * p.seqlen * p.heads * p.headdim * (p.dstate + std::min(p.chunk_size, p.seqlen));
  if (products < (int64_t(1) << 18)) threads.count = 1;
  return threads;
}

template <class T, class S>
void forward(const SsdParams& p, const Threads& all_threads) {
  copy_empty<T>(p, p.initial_states, p.final_states);
  if (p.batch * p.seqlen * p.heads == 0) return;
  const Threads threads = worthwhile(p, all_threads);
  prefer_large_pages(p.out.ptr, p.batch * p.seqlen * p.heads * p.headdim * int64_t(sizeof(S)));
  const int64_t chunks = p.batch * p.n_chunks * p.heads;
  if (p.chunk_states) prefer_large_pages(p.chunk_states, chunks * p.headdim * p.dstate * int64_t(sizeof(T)));
  const Blocks blocks(p);
  const Sizes<T> n(p);
  const int64_t heads = p.heads / p.groups;
  const int64_t per_item = heads_per_item<T>(p, n, threads.count > 1 ? 2 * threads.count : 1);
  const int64_t splits = (heads + per_item - 1) / per_item;
  // A sequence that is one block, from zero and to nowhere, has no states.
  const bool states = p.initial_states || p.final_states || p.n_chunks > 1;
  parallel(threads, p.batch * p.groups * splits, [&](int64_t begin, int64_t end) {
    ForwardItem<T, S> item(p, n, states ? per_item : 0);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t b = k / (p.groups * splits), g = k / splits % p.groups, split = k % splits;
      const int64_t first = g * heads + split * per_item;
      item.run(blocks, b, g, first, std::min(first + per_item, (g + 1) * heads));
    }
  });
}

}  // namespace ssd
}  // namespace
}  // namespace trifuse::cpu

// The part of ssd's backward pass that walks back in time: the gradient of the state after every chunk. With
// the workspace that it and the sums over chunks stand in.
#pragma once

#include "ssd_fwd.h"

namespace trifuse::cpu {
namespace {
namespace ssd {

// (headdim, dstate) as (headdim, dstate_ld): the rows themselves, or a padded copy in `copy`. Null stays null.
template <class T>
const T* pad_state(const T* from, const SsdParams& p, const Sizes<T>& n, T* copy) {
  if (!from || n.dstate == n.dstate_ld) return from;
  load_rows<T>(copy, n.dstate_ld, from, n.dstate, 1, p.headdim, n.dstate);
  return copy;
}

// Gradients of one head's weights, from one chunk.
struct Sums {
  double *A, *dt_bias, *D;
  int64_t D_size;
  void clear() const { std::fill(A, D + D_size, 0.0); }
};

// Parts that the heads of a group are taken in, where chunks alone are too few items to share out. A matter of
// shape and not of threads: every number of threads adds up the same parts.
inline int64_t head_parts(const SsdBwdParams& p) {
  const int64_t items = p.batch * p.n_chunks * p.groups, enough = 8, fewest_heads = 6;
  if (items == 0) return 1;
  return std::max<int64_t>(1, std::min(p.heads / p.groups / fewest_heads, (enough + items - 1) / items));
}

template <class T>
class Workspace {
 public:
  explicit Workspace(const SsdBwdParams& p)
      : parts_(head_parts(p)),
        coefficients_(parts_ > 1 ? p.batch * p.seqlen * p.groups * p.dstate : 0),
        D_size_(!p.D          ? 0
                : p.D_has_dim ? p.headdim
                              : 1),
        sums_(p.batch * p.n_chunks * p.heads * (2 + D_size_)),
        states_(p.n_chunks > 1 ? p.batch * p.n_chunks * p.heads * p.headdim * padded<T>(p.dstate) : 0),
        memory_(static_cast<char*>(p.workspace)) {}

  int64_t bytes() const {
    return Scratch::bytes_of<T>(states_) + Scratch::bytes_of<double>(sums_) +
           Scratch::bytes_of<T>(2 * parts_ * coefficients_);
  }
  int64_t parts() const { return parts_; }

  // dB (which = 0) or dC (1) of one part at one position, (dstate) of acc; only where there are several parts.
  T* part(const SsdBwdParams& p, int64_t which, int64_t part, int64_t b, int64_t t, int64_t g) const {
    char* all = memory_ + Scratch::bytes_of<T>(states_) + Scratch::bytes_of<double>(sums_);
    return reinterpret_cast<T*>(all) + (which * parts_ + part) * coefficients_ +
           ((b * p.seqlen + t) * p.groups + g) * p.dstate;
  }

  // The gradient of the state after chunk c, (headdim, padded dstate): for the next chunk's first block to write.
  T* after(const SsdBwdParams& p, int64_t b, int64_t c, int64_t h) const {
    return reinterpret_cast<T*>(memory_) + ((b * p.n_chunks + c) * p.heads + h) * p.headdim * padded<T>(p.dstate);
  }
  // That of the state after a block, or null for zero; `copy` is room for it.
  const T* gradient_after(const SsdBwdParams& p, const Sizes<T>& n, const Block& block, int64_t b, int64_t c, int64_t h,
                          T* copy) const {
    if (block.target == kContinues) return after(p, b, c, h);
    if (block.target < 0 || !p.dfinal_states) return nullptr;
    const T* from = static_cast<const T*>(p.dfinal_states);
    return pad_state<T>(from + (block.target * p.heads + h) * p.headdim * p.dstate, p, n, copy);
  }

  Sums sums(const SsdBwdParams& p, int64_t chunk, int64_t h) const {
    double* all = reinterpret_cast<double*>(memory_ + Scratch::bytes_of<T>(states_));
    double* mine = all + (chunk * p.heads + h) * (2 + D_size_);
    return {mine, mine + 1, mine + 2, D_size_};
  }
  // Adds up the chunks' gradients of one head's weights, always in the same order.
  void finish(const SsdBwdParams& p, int64_t h) const {
    const Sums total = sums(p, 0, h);
    for (int64_t chunk = 1; chunk < p.batch * p.n_chunks; ++chunk) {
      const Sums one = sums(p, chunk, h);
      for (int64_t k = 0; k < 2 + D_size_; ++k) total.A[k] += one.A[k];
    }
    static_cast<T*>(p.dA)[h] = T(*total.A);
    if (p.ddt_bias) static_cast<T*>(p.ddt_bias)[h] = T(*total.dt_bias);
    for (int64_t k = 0; k < D_size_; ++k) static_cast<T*>(p.dD)[h * D_size_ + k] = T(total.D[k]);
  }

 private:
  int64_t parts_, coefficients_, D_size_, sums_, states_;
  char* memory_;
};

// The gradient of the output before the gate; z is left in `z` if there is one.
template <class T, class S>
void load_output_gradient(const SsdBwdParams& p, const Sizes<T>& n, int64_t b, int64_t h, const Block& block, T* dy,
                          T* z, int64_t q) {
  load_rows<T>(dy, n.headdim_ld, at<S>(p.dout, b, block.begin, h), p.dout.time, p.dout.last, q, p.headdim);
  if (!p.z.ptr) return;
  load_rows<T>(z, n.headdim_ld, at<S>(p.z, b, block.begin, h), p.z.time, p.z.last, q, p.headdim);
  for (int64_t k = 0; k < q * n.headdim_ld; k += kLanes<T>) {
    const Vec<T> gate = load<T>(z + k);
    store<T>(dy + k, load<T>(dy + k) * (gate * sigmoid<T>(gate)));
  }
}

template <class T, class S>
class StateGradients {
 public:
  static int64_t scratch_bytes(const Sizes<T>& n) {
    return Scratch::bytes_of<T>(n.q * n.dstate_ld) + 2 * Scratch::bytes_of<T>(n.q * n.headdim_ld) +
           2 * Scratch::bytes_of<T>(n.headdim * n.dstate_ld) + Steps<T>::bytes(n.q);
  }
  StateGradients(const SsdBwdParams& p, const Sizes<T>& n, const Workspace<T>& workspace)
      : p_(p),
        n_(n),
        workspace_(workspace),
        scratch_(scratch_bytes(n)),
        steps_(scratch_, n.q),
        C_(scratch_.take<T>(n.q * n.dstate_ld)),
        dy_(scratch_.take<T>(n.q * n.headdim_ld)),
        z_(scratch_.take<T>(n.q * n.headdim_ld)),
        before_(scratch_.take<T>(n.headdim * n.dstate_ld)),
        after_(scratch_.take<T>(n.headdim * n.dstate_ld)) {}

  // All time of heads [first, last) of group g, backwards.
  void run(const Blocks& blocks, int64_t b, int64_t g, int64_t first, int64_t last) {
    for (int64_t c = p_.n_chunks - 1; c >= 0; --c) {
      const int64_t from = blocks.first[b * p_.n_chunks + c], to = blocks.first[b * p_.n_chunks + c + 1];
      for (int64_t k = to - 1; k >= from; --k) {
        const Block& block = blocks.list[k];
        if (block.source == kNothing || (block.source >= 0 && !p_.dinitial_states)) continue;
        const S* C = at<S>(p_.C, b, block.begin, g);
        load_rows<T>(C_, n_.dstate_ld, C, p_.C.time, p_.C.last, block.end - block.begin, n_.dstate);
        for (int64_t h = first; h < last; ++h) head(block, b, c, h);
      }
    }
  }

 private:
  // before = total * after + (from_start dy)^T C
  void head(const Block& block, int64_t b, int64_t c, int64_t h) {
    const int64_t q = block.end - block.begin;
    steps_.template compute<false>(p_, b, h, block.begin, q);
    load_output_gradient<T, S>(p_, n_, b, h, block, dy_, z_, q);
    for (int64_t i = 0; i < q; ++i) {
      const Vec<T> weight = splat(steps_.from_start[i]);
      for (int64_t k = i * n_.headdim_ld; k < (i + 1) * n_.headdim_ld; k += kLanes<T>) {
        store<T>(dy_ + k, weight * load<T>(dy_ + k));
      }
    }
    Product<T> product;
    product.rows = p_.headdim;
    product.columns = product.c_ld = product.init_ld = n_.dstate_ld;
    product.c = block.source == kContinues ? workspace_.after(p_, b, c - 1, h) : before_;
    product.init = workspace_.gradient_after(p_, n_, block, b, c, h, after_);
    product.scale = steps_.total;
    product.second = {dy_, 1, n_.headdim_ld, C_, n_.dstate_ld, q};
    multiply<T>(product);
    if (block.source == kContinues) return;
    T* to = static_cast<T*>(p_.dinitial_states) + (block.source * p_.heads + h) * p_.headdim * p_.dstate;
    for (int64_t k = 0; k < p_.headdim; ++k) store_row<T>(to + k * p_.dstate, before_ + k * n_.dstate_ld, p_.dstate);
  }

  const SsdBwdParams& p_;
  const Sizes<T>& n_;
  const Workspace<T>& workspace_;
  Scratch scratch_;
  Steps<T> steps_;
  T *C_, *dy_, *z_, *before_, *after_;
};

template <class T, class S>
void state_gradients(const SsdBwdParams& p, const Sizes<T>& n, const Blocks& blocks, const Workspace<T>& workspace,
                     const Threads& threads) {
  if (p.n_chunks == 1 && !p.dinitial_states) return;
  const int64_t heads = p.heads / p.groups;
  const int64_t per_item = heads_per_item<T>(p, n, threads.count > 1 ? 2 * threads.count : 1);
  const int64_t splits = (heads + per_item - 1) / per_item;
  parallel(threads, p.batch * p.groups * splits, [&](int64_t begin, int64_t end) {
    StateGradients<T, S> item(p, n, workspace);
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

// Forward selective scan on a CPU. See selective_scan_tile.h for the walk and
// selective_scan_states.h for what happens inside a tile.
#pragma once

#include "pages.h"
#include "selective_scan_states.h"

namespace trifuse::cpu {
namespace {

// A variable coefficient over a span of time as [t][n], reloaded when the span or the group changes.
template <class T, class S>
class CoefficientSpan {
 public:
  CoefficientSpan(const SelectiveScanParams& p, const CoefView& view, int64_t b, T* values)
      : p_(p), view_(view), b_(b), values_(values) {}
  // The rows of a tile of the span; for a constant coefficient, the block's own values.
  const T* get(Block block, const Tile& span, const Tile& tile, const T* constant) {
    if (!view_.variable) return constant;
    const int64_t group = view_.groups == 1 ? 0 : group_of(view_, p_.dim, block.first);
    if (group != group_ || span.step != step_) {
      load_coefficient<T, S>(p_, view_, b_, group_ = group, span, values_);
      step_ = span.step;
    }
    return values_ + (tile.position - span.position) * p_.dstate * (p_.complex ? 2 : 1);
  }

 private:
  const SelectiveScanParams& p_;
  const CoefView& view_;
  int64_t b_;
  T* values_;
  int64_t group_ = -1, step_ = -1;
};

// One task: channels [begin, end) of batch item b. It keeps, per channel block, states and rates in
// lanes, and per tile the rows of the block it works on.
template <class T, class S>
class ForwardTask {
  static constexpr int64_t kL = kLanes<T>;

 public:
  ForwardTask(const SelectiveScanParams& p, int64_t b, int64_t begin, int64_t end)
      : p_(p),
        b_(b),
        begin_(begin),
        end_(end),
        count_(p.dstate * (p.complex ? 2 : 1)),
        blocks_(block_count(p, begin, end, kL)),
        span_(span_steps(p)),
        scratch_(bytes()),
        B_(p, p.B, b, scratch_.take<T>(span_ * count_)),
        C_(p, p.C, b, scratch_.take<T>(span_ * count_)) {
    block_ = scratch_.take<Block>(blocks_);
    for (int64_t i = 0, c = begin; i < blocks_; c += block_[i++].width) block_[i] = block_at(p, c, end, kL);
    h_ = scratch_.take<T>(blocks_ * count_ * kL);
    rates_ = scratch_.take<T>(blocks_ * count_ * kL);
    constants_ = scratch_.take<T>(2 * blocks_ * count_ * kL);
    elapsed_ = scratch_.take<double>(blocks_ * kL);
    for (T** rows : {&u_, &dt_, &dtu_, &y_}) *rows = scratch_.take<T>(kMaxTile * kL);
    each_block([&](int64_t i, Block block) {
      load_rates<T>(p_, block, rates_ + i * count_ * kL);
      if (!p_.B.variable) load_lanes<T>(static_cast<const T*>(p_.B.ptr), count_, block, constant(0, i));
      if (!p_.C.variable) load_lanes<T>(static_cast<const T*>(p_.C.ptr), count_, block, constant(1, i));
    });
  }

  // Run steps [first, last). The state before `first` is `enter` ((dim, dstate), or null for zero),
  // except at the start of a sequence, where it is the sequence's own.
  // With kOutput false nothing but the states is computed; see `leave`.
  template <bool kOutput>
  void run(int64_t first, int64_t last, const void* enter) {
    each_block([&](int64_t i, Block block) { load_state<T>(p_, enter, 0, block, h(i)); });
    for (int64_t i = 0; i < blocks_ * kL; ++i) elapsed_[i] = 0;
    restarted_ = false;
    for (int64_t k = 0; k < sequence_count(p_); ++k) {
      const Sequence seq = sequence(p_, b_, k);
      const int64_t from = most(seq.first_step, first), to = least(seq.last_step, last);
      if (from >= to) continue;
      if (from == seq.first_step) restart(seq);
      for (int64_t step = from; step < to;) {
        const int64_t end = least(to, (step / span_ + 1) * span_);
        const Tile span = span_at(p_, step, end), next = span_at(p_, end, least(to, end + span_));
        each_block([&](int64_t i, Block block) { run_span<kOutput>(span, next, block, i); });
        step = end;
      }
      if (kOutput && to == seq.last_step) {
        each_block([&](int64_t i, Block block) { store_state<T>(p_, p_.last_state, seq.index, block, h(i)); });
      }
    }
  }

  // After run<false> from a zero state: how the state behind the steps depends on the one before them,
  // left = decay * entered + gained, as two (dim, dstate) arrays.
  void leave(T* decay, T* gained) {
    each_block([&](int64_t i, Block block) {
      store_state<T>(p_, gained, 0, block, h(i));
      if (restarted_) {
        load_state<T>(p_, nullptr, 0, block, h(i));
      } else {
        stretch_decay<T>(p_, elapsed_ + i * kL, rates_ + i * count_ * kL, false, h(i));
      }
      store_state<T>(p_, decay, 0, block, h(i));
    });
  }

 private:
  int64_t bytes() const {
    return int64_t(sizeof(T)) * (2 * span_ * count_ + blocks_ * kL * (4 * count_ + 2) + 4 * kMaxTile * kL) +
           blocks_ * int64_t(sizeof(Block)) + 2048;
  }
  T* h(int64_t i) { return h_ + i * count_ * kL; }
  T* constant(int which, int64_t i) { return constants_ + (which * blocks_ + i) * count_ * kL; }

  template <class Visit>
  void each_block(Visit&& visit) {
    for (int64_t i = 0; i < blocks_; ++i) visit(i, block_[i]);
  }

  void restart(const Sequence& seq) {
    restarted_ = true;
    each_block([&](int64_t i, Block block) { load_state<T>(p_, p_.initial_state, seq.index, block, h(i)); });
  }

  // Neighbours in memory should be used together. If they are neighbours in time, a block is taken
  // through many tiles before the next; if they are channels, all blocks go through a tile in turn.
  static int64_t span_steps(const SelectiveScanParams& p) {
    const int64_t tile = tile_steps(p);
    if (p.u.time != 1) return tile;
    constexpr int64_t coefficients = 1 << 14;  // of B and of C each that a span may hold
    return most(least(kMaxSpan, coefficients / most(p.dstate, 1)) / tile, 1) * tile;
  }

  template <bool kOutput>
  void run_span(const Tile& span, const Tile& next, Block block, int64_t i) {
    const int64_t last = span.step + span.count;
    for (int64_t step = span.step; step < last;) {
      const Tile tile = tile_at(p_, step, last);
      step += tile.count;
      const SeqView* views[] = {&p_.u, &p_.delta, &p_.z, &p_.out};
      ahead_.clear();
      for (int j = 0; j < 4; ++j) {
        ahead_.template aim_at_rows<S>(j, *views[j], b_, begin_, end_, next, i, 1, blocks_);
        if (step < last) {
          ahead_.template aim_at_tile<S>(j, *views[j], b_, block, tile_at(p_, step, last));
        } else if (i + 1 < blocks_) {
          ahead_.template aim_at_tile<S>(j, *views[j], b_, block_[i + 1], tile_at(p_, span.step, last));
        }
      }
      run_tile<kOutput>(span, tile, block, i);
    }
  }

  template <bool kOutput>
  void run_tile(const Tile& span, const Tile& tile, Block block, int64_t i) {
    if (kOutput && p_.chunk_size && tile.step % p_.chunk_size == 0) {
      save_chunk_state<T>(p_, chunk_state<T>(p_, b_, tile.step / p_.chunk_size), block, h(i));
    }
    const bool direct =
        block.width == kL && p_.u.dim == 1 && p_.delta.dim == 1 && (!p_.z.ptr || p_.z.dim == 1) && p_.out.dim == 1;
    direct ? prepare<kOutput, true>(tile, block, i) : prepare<kOutput, false>(tile, block, i);
    StateLoop<T> loop{tile,
                      p_.dstate,
                      dt_,
                      dtu_,
                      y_,
                      rates_ + i * count_ * kL,
                      B_.get(block, span, tile, constant(0, i)),
                      kOutput ? C_.get(block, span, tile, constant(1, i)) : nullptr,
                      h(i),
                      &ahead_};
    scan_tile<T, kOutput>(loop, p_);
    if constexpr (kOutput) direct ? finish<true>(tile, block) : finish<false>(tile, block);
  }

  // A block's rows, read where they lie if its channels are neighbours, else from a transposed copy.
  template <bool kDirect>
  struct Rows {
    const S* base;
    int64_t stride;
    const T* copy;
    TRIFUSE_INLINE Vec<T> operator[](int64_t t) const {
      return kDirect ? load_as<T, S>(base + t * stride) : load<T>(copy + t * kL);
    }
  };
  template <bool kDirect>
  Rows<kDirect> rows(const SeqView& view, const Tile& tile, Block block, T* copy) const {
    if constexpr (kDirect) {
      const S* base = static_cast<const S*>(view.ptr) + b_ * view.batch + block.first + tile.position * view.time;
      return {base, view.time, nullptr};
    } else {
      load_tile<T, S>(view, b_, block, tile, copy);
      return {nullptr, 0, copy};
    }
  }

  // u and delta into dt, dt * u and the skip term.
  template <bool kOutput, bool kDirect>
  void prepare(const Tile& tile, Block block, int64_t i) {
    const Rows<kDirect> u_rows = rows<kDirect>(p_.u, tile, block, u_);
    const Rows<kDirect> delta_rows = rows<kDirect>(p_.delta, tile, block, dt_);
    const Vec<T> bias = load_channels<T>(p_.delta_bias, block, T(0));
    const Vec<T> skip = load_channels<T>(p_.D, block, T(0));
    const bool positive = p_.delta_softplus, complex = p_.complex;
    T *dt_out = dt_, *dtu_out = dtu_, *y_out = y_;
    for (int64_t t = 0; t < tile.count; ++t) {
      const Vec<T> u = u_rows[t];
      Vec<T> dt = delta_rows[t] + bias;
      if (positive) dt = softplus<T, false>(dt).value;
      store<T>(dtu_out + t * kL, dt * u);
      if constexpr (kOutput) {
        store<T>(y_out + t * kL, p_.D ? skip * u : splat(T(0)));
      } else {
        for (int64_t j = 0; j < kL; ++j) elapsed_[i * kL + j] += double(dt[j]);
      }
      store<T>(dt_out + t * kL, complex ? dt : decay_time<T>(dt));
    }
  }

  template <bool kDirect>
  void finish(const Tile& tile, Block block) {
    T* y = y_;
    S* out = static_cast<S*>(p_.out.ptr) + b_ * p_.out.batch + block.first * p_.out.dim + tile.position * p_.out.time;
    const auto put = [&](int64_t t, Vec<T> value) {
      kDirect ? store_as<T, S>(out + t * p_.out.time, value) : store<T>(y + t * kL, value);
    };
    if (p_.z.ptr) {
      const Rows<kDirect> z_rows = rows<kDirect>(p_.z, tile, block, u_);
      for (int64_t t = 0; t < tile.count; ++t) {
        const Vec<T> z = z_rows[t];
        put(t, load<T>(y + t * kL) * z * sigmoid<T>(z));
      }
    } else if (kDirect) {
      for (int64_t t = 0; t < tile.count; ++t) put(t, load<T>(y + t * kL));
    }
    if constexpr (!kDirect) store_tile<T, S>(p_.out, b_, block, tile, y);
  }

  const SelectiveScanParams& p_;
  const int64_t b_, begin_, end_, count_, blocks_, span_;
  Scratch scratch_;
  CoefficientSpan<T, S> B_, C_;
  T *h_, *rates_, *constants_, *u_, *dt_, *dtu_, *y_;
  double* elapsed_;
  Block* block_;
  bool restarted_ = false;
  Ahead<4> ahead_;
};

// enter[k] of every segment of time, from the segments' own decay and gain: a scan over few items.
template <class T>
void combine_segments(const SelectiveScanParams& p, int64_t segments, T* enter, const T* decay, const T* gained) {
  const int64_t k = p.complex ? 2 : 1, numbers = p.dim * p.dstate * k;
  for (int64_t s = 1; s < segments; ++s) {
    const T *from = enter + (s - 1) * numbers, *d = decay + (s - 1) * numbers, *g = gained + (s - 1) * numbers;
    T* to = enter + s * numbers;
    for (int64_t i = 0; i < numbers; i += k) {
      if (k == 1) {
        to[i] = d[i] * from[i] + g[i];
      } else {
        to[i] = d[i] * from[i] - d[i + 1] * from[i + 1] + g[i];
        to[i + 1] = d[i] * from[i + 1] + d[i + 1] * from[i] + g[i + 1];
      }
    }
  }
}

// With fewer blocks of channels than threads, time is cut into this many segments.
inline int64_t segment_count(const SelectiveScanParams& p, int64_t lanes, int64_t threads) {
  constexpr int64_t shortest = 256;
  const int64_t blocks = most(p.batch * block_count(p, 0, p.dim, lanes), 1);
  return most(least(threads / blocks, p.seqlen / shortest), 1);
}
inline int64_t segment_start(const SelectiveScanParams& p, int64_t k, int64_t segments) {
  const int64_t unit = p.chunk_size ? p.chunk_size : kForwardTile;
  return k == segments ? p.seqlen : divide_up(k * p.seqlen / segments, unit) * unit;
}

template <class T, class S>
void forward_in_segments(const SelectiveScanParams& p, const Partition& part, int64_t segments,
                         const Threads& threads) {
  const int64_t numbers = p.dim * p.dstate * (p.complex ? 2 : 1), each = segments * numbers;
  Scratch scratch(3 * p.batch * each * int64_t(sizeof(T)) + 256);
  T* enter = scratch.take<T>(p.batch * each);
  T* decay = scratch.take<T>(p.batch * each);
  T* gained = scratch.take<T>(p.batch * each);
  const auto on_every = [&](auto&& work) {
    const int64_t ranges = part.count();
    parallel(threads, p.batch * ranges * segments, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t s = i % segments, range = i / segments % ranges, b = i / segments / ranges;
        ForwardTask<T, S> task(p, b, part.begin(range), part.end(range));
        work(task, b * each + s * numbers, segment_start(p, s, segments), segment_start(p, s + 1, segments));
      }
    });
  };
  on_every([&](ForwardTask<T, S>& task, int64_t at, int64_t from, int64_t to) {
    if (to == p.seqlen) return;
    task.template run<false>(from, to, nullptr);
    task.leave(decay + at, gained + at);
  });
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t i = 0; i < numbers; ++i) enter[b * each + i] = 0;
    combine_segments<T>(p, segments, enter + b * each, decay + b * each, gained + b * each);
  }
  on_every([&](ForwardTask<T, S>& task, int64_t at, int64_t from, int64_t to) {
    task.template run<true>(from, to, enter + at);
  });
}

// The state after a sequence without steps is the one it started from.
template <class T>
void pass_empty_sequences(const SelectiveScanParams& p, const void* from, void* to) {
  const int64_t numbers = p.dim * p.dstate * (p.complex ? 2 : 1);
  const int64_t rows = p.cu_seqlens ? p.num_seqs : p.batch;
  for (int64_t row = 0; row < rows; ++row) {
    const bool empty = p.cu_seqlens ? p.cu_seqlens[row] == p.cu_seqlens[row + 1] : p.seqlen == 0;
    if (!empty) continue;
    T* out = static_cast<T*>(to) + row * numbers;
    for (int64_t i = 0; i < numbers; ++i) out[i] = from ? static_cast<const T*>(from)[row * numbers + i] : T(0);
  }
}

template <class T, class S>
void forward(const SelectiveScanParams& p, const Threads& threads) {
  pass_empty_sequences<T>(p, p.initial_state, p.last_state);
  if (p.batch == 0 || p.dim == 0 || p.seqlen == 0) return;
  const int64_t state_bytes = p.dim * p.dstate * (p.complex ? 2 : 1) * int64_t(sizeof(T));
  prefer_large_pages(p, p.out);
  prefer_large_pages(p.chunk_states, p.batch * p.n_chunks * state_bytes);
  // Twice as many tasks as threads, so that a thread that was held up does not hold up the rest.
  const Partition part(p, kLanes<T>, divide_up(2 * threads.count, p.batch));
  const int64_t segments = segment_count(p, kLanes<T>, threads.count);
  if (segments > 1) return forward_in_segments<T, S>(p, part, segments, threads);
  const int64_t ranges = part.count();
  parallel(threads, p.batch * ranges, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      ForwardTask<T, S> task(p, i / ranges, part.begin(i % ranges), part.end(i % ranges));
      task.template run<true>(0, p.seqlen, nullptr);
    }
  });
}

}  // namespace
}  // namespace trifuse::cpu

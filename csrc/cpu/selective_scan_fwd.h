// Forward selective scan on a CPU. See selective_scan_tile.h for the walk.
#pragma once

#include "selective_scan_tile.h"

namespace trifuse::cpu {
namespace {

// What a loop over the states of one block and tile reads and writes. All rows are [t][lane], except
// variable coefficients, which are [t][n] and the same for every lane.
template <class T>
struct StateLoop {
  Tile tile;
  int64_t dstate;
  const T* dt;     // decay_time(dt) if A is real, dt if it is complex
  const T* dtu;    // dt * u
  T* y;            // accumulated
  const T* rates;  // [n][lane]
  const T* B;      // [t][n], or [n][lane]
  const T* C;
  T* h;            // [n][lane], in and out
};

template <class T, bool kVariable>
TRIFUSE_INLINE Vec<T> coefficient(const T* values, int64_t row, int64_t dstate, int64_t n) {
  return kVariable ? splat(values[row * dstate + n]) : load<T>(values + n * kLanes<T>);
}

// States n0 .. n0 + kStates in registers, through all steps of a tile.
template <class T, int kStates, bool kVariableB, bool kVariableC, bool kOutput>
void scan_states(const StateLoop<T>& a, int64_t n0) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> h[kStates];
#pragma GCC unroll 16
  for (int i = 0; i < kStates; ++i) h[i] = load<T>(a.h + (n0 + i) * lanes);
  const T* rates = a.rates + n0 * lanes;
  for (int64_t s = 0; s < a.tile.count; ++s) {
    const int64_t t = a.tile.row(s);
    const Vec<T> dt = load<T>(a.dt + t * lanes), dtu = load<T>(a.dtu + t * lanes);
    Vec<T> y[2] = {kOutput ? load<T>(a.y + t * lanes) : dt, splat(T(0))};
#pragma GCC unroll 16
    for (int i = 0; i < kStates; ++i) {
      const Vec<T> decay = exp2_product<T>(dt, load<T>(rates + i * lanes));
      h[i] = decay * h[i] + dtu * coefficient<T, kVariableB>(a.B, t, a.dstate, n0 + i);
      if constexpr (kOutput) y[i & 1] += coefficient<T, kVariableC>(a.C, t, a.dstate, n0 + i) * h[i];
    }
    if constexpr (kOutput) store<T>(a.y + t * lanes, y[0] + y[1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kStates; ++i) store<T>(a.h + (n0 + i) * lanes, h[i]);
}

// exp(dt * (re + i im)) in lanes.
template <class T>
TRIFUSE_INLINE void complex_decay(Vec<T> dt, const T* rates, Vec<T>& re, Vec<T>& im) {
  constexpr int64_t lanes = kLanes<T>;
  const Vec<T> size = exp2_product<T>(decay_time<T>(dt), load<T>(rates));
  const Vec<T> angle = dt * load<T>(rates + lanes);
  Vec<T> sine, cosine;
  sincos<T>(angle, sine, cosine);
  re = size * cosine;
  im = size * sine;
}

template <class T, bool kVariable>
TRIFUSE_INLINE void complex_coefficient(const T* values, int64_t row, int64_t dstate, int64_t n, Vec<T>& re,
                                        Vec<T>& im) {
  if constexpr (kVariable) {
    re = splat(values[2 * (row * dstate + n)]);
    im = splat(values[2 * (row * dstate + n) + 1]);
  } else {
    re = load<T>(values + 2 * n * kLanes<T>);
    im = load<T>(values + (2 * n + 1) * kLanes<T>);
  }
}

template <class T, bool kVariableB, bool kVariableC, bool kOutput>
void scan_complex_state(const StateLoop<T>& a, int64_t n) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> h_re = load<T>(a.h + 2 * n * lanes), h_im = load<T>(a.h + (2 * n + 1) * lanes);
  for (int64_t s = 0; s < a.tile.count; ++s) {
    const int64_t t = a.tile.row(s);
    const Vec<T> dt = load<T>(a.dt + t * lanes), dtu = load<T>(a.dtu + t * lanes);
    Vec<T> re, im, b_re, b_im, c_re, c_im;
    complex_decay<T>(dt, a.rates + 2 * n * lanes, re, im);
    complex_coefficient<T, kVariableB>(a.B, t, a.dstate, n, b_re, b_im);
    const Vec<T> next = re * h_re - im * h_im + b_re * dtu;
    h_im = re * h_im + im * h_re + b_im * dtu;
    h_re = next;
    if constexpr (kOutput) {
      complex_coefficient<T, kVariableC>(a.C, t, a.dstate, n, c_re, c_im);
      T* y = a.y + t * lanes;
      store<T>(y, load<T>(y) + splat(T(2)) * (c_re * h_re - c_im * h_im));
    }
  }
  store<T>(a.h + 2 * n * lanes, h_re);
  store<T>(a.h + (2 * n + 1) * lanes, h_im);
}

// As many states at a time as leave room in the registers for the exponential.
template <class T>
constexpr int kStatesAtOnce = kVectorBytes == 64 ? 16 : 8;

template <class T, bool kVariableB, bool kVariableC, bool kOutput>
void scan_all_states(const StateLoop<T>& a, bool complex) {
  int64_t n = 0;
  if (complex) {
    for (; n < a.dstate; ++n) scan_complex_state<T, kVariableB, kVariableC, kOutput>(a, n);
    return;
  }
  for (; n + kStatesAtOnce<T> <= a.dstate; n += kStatesAtOnce<T>) {
    scan_states<T, kStatesAtOnce<T>, kVariableB, kVariableC, kOutput>(a, n);
  }
  for (; n + 4 <= a.dstate; n += 4) scan_states<T, 4, kVariableB, kVariableC, kOutput>(a, n);
  for (; n < a.dstate; ++n) scan_states<T, 1, kVariableB, kVariableC, kOutput>(a, n);
}

template <class T, bool kOutput>
void scan_tile(const StateLoop<T>& a, const SelectiveScanParams& p) {
  if (p.B.variable && p.C.variable) return scan_all_states<T, true, true, kOutput>(a, p.complex);
  if (p.B.variable) return scan_all_states<T, true, false, kOutput>(a, p.complex);
  if (p.C.variable) return scan_all_states<T, false, true, kOutput>(a, p.complex);
  return scan_all_states<T, false, false, kOutput>(a, p.complex);
}

// A variable coefficient's tile, reloaded when the channel blocks move to another group.
template <class T, class S>
class CoefficientTile {
 public:
  CoefficientTile(const SelectiveScanParams& p, const CoefView& view, int64_t b, T* values)
      : p_(p), view_(view), b_(b), values_(values) {}
  const T* get(Block block, const Tile& tile, const T* constant) {
    if (!view_.variable) return constant;
    const int64_t group = group_of(view_, p_.dim, block.first);
    if (group != group_ || tile.step != step_) {
      load_coefficient<T, S>(p_, view_, b_, group_ = group, tile, values_);
      step_ = tile.step;
    }
    return values_;
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
      : p_(p), b_(b), begin_(begin), end_(end), count_(p.dstate * (p.complex ? 2 : 1)),
        blocks_(block_count(p, begin, end, kL)), scratch_(bytes()), B_(p, p.B, b, scratch_.take<T>(kMaxTile * count_)),
        C_(p, p.C, b, scratch_.take<T>(kMaxTile * count_)) {
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
        const Tile tile = tile_at(p_, step, to);
        run_tile<kOutput>(tile);
        step += tile.count;
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
    return int64_t(sizeof(T)) * (2 * kMaxTile * count_ + blocks_ * kL * (4 * count_ + 2) + 4 * kMaxTile * kL) + 1024;
  }
  T* h(int64_t i) { return h_ + i * count_ * kL; }
  T* constant(int which, int64_t i) { return constants_ + (which * blocks_ + i) * count_ * kL; }

  template <class Visit>
  void each_block(Visit&& visit) {
    int64_t i = 0;
    for (int64_t c = begin_; c < end_; ++i) {
      const Block block = block_at(p_, c, end_, kL);
      visit(i, block);
      c += block.width;
    }
  }

  void restart(const Sequence& seq) {
    restarted_ = true;
    each_block([&](int64_t i, Block block) { load_state<T>(p_, p_.initial_state, seq.index, block, h(i)); });
  }

  template <bool kOutput>
  void run_tile(const Tile& tile) {
    const bool save = kOutput && p_.chunk_size && tile.step % p_.chunk_size == 0;
    T* chunk = save ? chunk_state<T>(p_, b_, tile.step / p_.chunk_size) : nullptr;
    each_block([&](int64_t i, Block block) {
      if (save) save_chunk_state<T>(p_, chunk, block, h(i));
      prepare<kOutput>(tile, block, i);
      StateLoop<T> loop{tile, p_.dstate, dt_, dtu_, y_, rates_ + i * count_ * kL,
                        B_.get(block, tile, constant(0, i)),
                        kOutput ? C_.get(block, tile, constant(1, i)) : nullptr, h(i)};
      scan_tile<T, kOutput>(loop, p_);
      if constexpr (kOutput) finish(tile, block);
    });
  }

  // u and delta into dt, dt * u and the skip term.
  template <bool kOutput>
  void prepare(const Tile& tile, Block block, int64_t i) {
    load_tile<T, S>(p_.u, b_, block, tile, u_);
    load_tile<T, S>(p_.delta, b_, block, tile, dt_);
    const Vec<T> bias = load_channels<T>(p_.delta_bias, block, T(0));
    const Vec<T> skip = load_channels<T>(p_.D, block, T(0));
    for (int64_t t = 0; t < tile.count; ++t) {
      const Vec<T> u = load<T>(u_ + t * kL);
      Vec<T> dt = load<T>(dt_ + t * kL) + bias;
      if (p_.delta_softplus) dt = softplus<T, false>(dt).value;
      store<T>(dtu_ + t * kL, dt * u);
      if constexpr (kOutput) {
        store<T>(y_ + t * kL, p_.D ? skip * u : splat(T(0)));
      } else {
        for (int64_t j = 0; j < kL; ++j) elapsed_[i * kL + j] += double(dt[j]);
      }
      store<T>(dt_ + t * kL, p_.complex ? dt : decay_time<T>(dt));
    }
  }

  void finish(const Tile& tile, Block block) {
    if (p_.z.ptr) {
      load_tile<T, S>(p_.z, b_, block, tile, u_);
      for (int64_t t = 0; t < tile.count; ++t) {
        const Vec<T> z = load<T>(u_ + t * kL);
        store<T>(y_ + t * kL, load<T>(y_ + t * kL) * z * sigmoid<T>(z));
      }
    }
    store_tile<T, S>(p_.out, b_, block, tile, y_);
  }

  const SelectiveScanParams& p_;
  const int64_t b_, begin_, end_, count_, blocks_;
  Scratch scratch_;
  CoefficientTile<T, S> B_, C_;
  T *h_, *rates_, *constants_, *u_, *dt_, *dtu_, *y_;
  double* elapsed_;
  bool restarted_ = false;
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

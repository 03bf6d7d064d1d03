// Backward selective scan on a CPU: tiles in reverse order of processing, see selective_scan_adjoint.h
// for what happens inside one.
#pragma once

#include "selective_scan_adjoint.h"
#include "selective_scan_partials.h"

namespace trifuse::cpu {
namespace {

template <class T, class S>
class BackwardTask {
  static constexpr int64_t kL = kLanes<T>;

 public:
  BackwardTask(const SelectiveScanBwdParams& p, const Partials<T>& partials, int64_t b, int64_t begin, int64_t end,
               int64_t share)
      : p_(p),
        partials_(partials),
        b_(b),
        begin_(begin),
        end_(end),
        share_(share),
        count_(p.dstate * (p.complex ? 2 : 1)),
        blocks_(block_count(p, begin, end, kL)),
        span_(span_steps(p, count_)),
        scratch_(bytes()),
        B_(p, p.B, b, scratch_.take<T>(span_ * count_)),
        C_(p, p.C, b, scratch_.take<T>(span_ * count_)) {
    block_ = scratch_.take<Block>(blocks_);
    for (int64_t i = 0, c = begin; i < blocks_; c += block_[i++].width) block_[i] = block_at(p, c, end, kL);
    for (T** planes : {&rates_, &carry_, &gA_, &constants_[0], &constants_[1], &gconstants_[0], &gconstants_[1]}) {
      *planes = scratch_.take<T>(blocks_ * count_ * kL);
    }
    for (T** row : {&gD_, &gbias_}) *row = scratch_.take<T>(blocks_ * kL);
    elapsed_ = scratch_.take<double>(blocks_ * kL);
    rows_ = scratch_.take<AdjointRows<T>>(2);
    for (T*& h : h_) h = scratch_.take<T>(count_ * kL);
    for (T** sums : {&gvariable_[0], &gvariable_[1]}) *sums = scratch_.take<T>(span_ * count_ * kL);
    each_block([&](int64_t i, Block block) {
      load_rates<T>(p_, block, planes(rates_, i));
      if (!p_.B.variable) load_lanes<T>(static_cast<const T*>(p_.B.ptr), count_, block, planes(constants_[0], i));
      if (!p_.C.variable) load_lanes<T>(static_cast<const T*>(p_.C.ptr), count_, block, planes(constants_[1], i));
    });
  }

  // Run steps [first, last) backwards. The gradient of the state behind them is `enter` ((dim, dstate)
  // or null for zero), except at the end of a sequence, where it is that of last_state.
  // With kGradients false only the gradient of the state is carried; see `leave`.
  template <bool kGradients>
  void run(int64_t first, int64_t last, const void* enter) {
    each_block([&](int64_t i, Block block) { load_state<T>(p_, enter, 0, block, planes(carry_, i)); });
    for (T* sums : {gA_, gconstants_[0], gconstants_[1]}) {
      for (int64_t i = 0; i < blocks_ * count_ * kL; ++i) sums[i] = 0;
    }
    for (int64_t i = 0; i < blocks_ * kL; ++i) elapsed_[i] = gD_[i] = gbias_[i] = 0;
    restarted_ = false;
    for (int64_t k = sequence_count(p_); k-- > 0;) {
      const Sequence seq = sequence(p_, b_, k);
      const int64_t from = most(seq.first_step, first), to = least(seq.last_step, last);
      if (from >= to) continue;
      if (to == seq.last_step) restart(seq);
      for (int64_t end = to; end > from;) {
        const int64_t start = most(from, (end - 1) / span_ * span_), before = most(from, start - span_);
        run_span<kGradients>(span_at(p_, start, end), span_at(p_, before, start), seq);
        end = start;
      }
      if (from == seq.first_step) finish_sequence<kGradients>(seq);
    }
  }

  void leave(T* decay, T* gained) {
    each_block([&](int64_t i, Block block) {
      store_state<T>(p_, gained, 0, block, planes(carry_, i));
      if (restarted_) {
        load_state<T>(p_, nullptr, 0, block, planes(carry_, i));
      } else {
        stretch_decay<T>(p_, elapsed_ + i * kL, planes(rates_, i), true, planes(carry_, i));
      }
      store_state<T>(p_, decay, 0, block, planes(carry_, i));
    });
  }

  // Weight gradients of this task into row `row` of the partial sums.
  void store_weights(int64_t row) {
    each_block([&](int64_t i, Block block) {
      if (!p_.complex) {  // gradients of the product decay_time(dt) * A, brought back to dt * A
        for (int64_t n = 0; n < count_; ++n) {
          T* plane = planes(gA_, i) + n * kL;
          store<T>(plane, load<T>(plane) * splat(T(kLn2)));
        }
      }
      store_lanes<T>(partials_.A + row * partials_.numbers, count_, block, planes(gA_, i));
      store_lanes<T>(partials_.D + row * p_.dim, 1, block, gD_ + i * kL);
      store_lanes<T>(partials_.bias + row * p_.dim, 1, block, gbias_ + i * kL);
      for (int c = 0; c < 2; ++c) {
        if (!partials_.constant[c]) continue;
        store_lanes<T>(partials_.constant[c] + row * partials_.numbers, count_, block, planes(gconstants_[c], i));
      }
    });
  }

 private:
  int64_t bytes() const {
    const int64_t per_block = 7 * count_ + 4;
    return int64_t(sizeof(T)) * (2 * span_ * count_ * (1 + kL) + kL * (blocks_ * per_block + 2 * count_)) +
           2 * int64_t(sizeof(AdjointRows<T>)) + blocks_ * int64_t(sizeof(Block)) + 4096;
  }
  T* planes(T* base, int64_t i) const { return base + i * count_ * kL; }

  template <class Visit>
  void each_block(Visit&& visit) {
    for (int64_t i = 0; i < blocks_; ++i) visit(i, block_[i]);
  }

  void restart(const Sequence& seq) {
    restarted_ = true;
    each_block([&](int64_t i, Block block) { load_state<T>(p_, p_.dlast_state, seq.index, block, planes(carry_, i)); });
  }

  template <bool kGradients>
  void finish_sequence(const Sequence& seq) {
    if (!kGradients || !p_.dinitial_state) return;
    each_block(
        [&](int64_t i, Block block) { store_state<T>(p_, p_.dinitial_state, seq.index, block, planes(carry_, i)); });
  }

  // As in the forward pass, a block is taken through many tiles before the next if neighbours in memory are
  // neighbours in time; the sums of dB and dC over the channels are then kept for all of these tiles.
  static int64_t span_steps(const SelectiveScanBwdParams& p, int64_t count) {
    if (p.u.time != 1) return p.chunk_size;
    constexpr int64_t sums = 1 << 13;  // of dB and of dC each that a span may hold
    return most(least(kMaxSpan, sums / most(count, 1)) / p.chunk_size, 1) * p.chunk_size;
  }

  template <bool kGradients>
  void run_span(const Tile& span, const Tile& next, const Sequence& seq) {
    int64_t groups[2] = {-1, -1};
    for (int64_t i = 0, count; i < blocks_; i += count) {
      count = kGradients ? blocks_at_once(i) : 1;
      for (int64_t end = span.step + span.count; end > span.step;) {
        const Tile tile = tile_before(span, end);
        look_ahead(i, count, span, tile, next);
        run_tile<kGradients>(i, count, span, tile, seq, groups);
        end = tile.step;
      }
    }
    if constexpr (kGradients) {
      store_group(p_.B, 0, groups[0], span);
      store_group(p_.C, 1, groups[1], span);
    }
  }

  // The tile of a span that ends before step `end`.
  Tile tile_before(const Tile& span, int64_t end) const {
    return tile_at(p_, most(span.step, (end - 1) / p_.chunk_size * p_.chunk_size), end);
  }

  template <bool kGradients>
  void run_tile(int64_t i, int64_t count, const Tile& span, const Tile& tile, const Sequence& seq, int64_t* groups) {
    AdjointLoop<T> loops[2];
    for (int64_t k = 0; k < count; ++k) {
      const Block block = block_[i + k];
      prepare<kGradients>(tile, block, i + k, rows_[k]);
      loops[k] = loop_at(span, tile, i + k, rows_[k], h_[k]);
      if constexpr (!kGradients) continue;
      enter_group(p_.B, 0, block, span, groups);
      enter_group(p_.C, 1, block, span, groups);
      if (tile.step == seq.first_step) {
        load_state<T>(p_, p_.initial_state, seq.index, block, h_[k]);
      } else {
        load_chunk_state<T>(p_, chunk_state<T>(p_, b_, tile.step / p_.chunk_size), block, h_[k]);
      }
    }
    if constexpr (!kGradients) {
      carry_tile(loops[0]);
    } else {
      p_.z.ptr ? adjoint_tile<T, true>(loops, count, p_) : adjoint_tile<T, false>(loops, count, p_);
      for (int64_t k = 0; k < count; ++k) finish(tile, block_[i + k], i + k, rows_[k]);
    }
  }

  // How many blocks from the i-th on go through a tile together.
  int64_t blocks_at_once(int64_t i) const {
    if (p_.complex || !p_.B.variable || !p_.C.variable || i + 1 == blocks_) return 1;
    for (const CoefView* view : {&p_.B, &p_.C}) {
      if (group_of(*view, p_.dim, block_[i].first) != group_of(*view, p_.dim, block_[i + 1].first)) return 1;
    }
    return 2;
  }

  AdjointLoop<T> loop_at(const Tile& span, const Tile& tile, int64_t i, AdjointRows<T>& rows, T* h) {
    const int64_t from = (tile.position - span.position) * count_ * kL;
    AdjointLoop<T> loop;
    loop.tile = tile;
    loop.dstate = p_.dstate;
    loop.dt = rows.dt;
    loop.dtu = rows.dtu;
    loop.y = rows.y;
    loop.rates = planes(rates_, i);
    loop.B = B_.get(block_[i], span, tile, planes(constants_[0], i));
    loop.C = C_.get(block_[i], span, tile, planes(constants_[1], i));
    loop.h = h;
    loop.ahead = nullptr;
    loop.beside = &ahead_;
    loop.rows = &rows;
    loop.carry = planes(carry_, i);
    loop.gA = planes(gA_, i);
    loop.gB = p_.B.variable ? gvariable_[0] + from : planes(gconstants_[0], i);
    loop.gC = p_.C.variable ? gvariable_[1] + from : planes(gconstants_[1], i);
    return loop;
  }

  // The channels of `count` blocks from the i-th on.
  Block joined(int64_t i, int64_t count) const {
    if (i >= blocks_) return {0, 0};
    const Block last = block_[least(i + count, blocks_) - 1];
    return {block_[i].first, last.first + last.width - block_[i].first};
  }

  void look_ahead(int64_t i, int64_t count, const Tile& span, const Tile& tile, const Tile& next) {
    const SeqView* views[] = {&p_.u, &p_.delta, &p_.dout, &p_.z, &p_.du, &p_.ddelta, &p_.dz};
    const bool same = tile.step > span.step;  // the same blocks have tiles left in the span
    const Block block = same ? joined(i, count) : joined(i + count, count);
    const Tile after = tile_before(span, same ? tile.step : span.step + span.count);
    ahead_.clear();
    for (int j = 0; j < 7; ++j) {
      ahead_.template aim_at_rows<S>(j, *views[j], b_, begin_, end_, next, i, count, blocks_);
      if (block.width) ahead_.template aim_at_tile<S>(j, *views[j], b_, block, after);
    }
  }

  // Variable dB and dC are summed over the channels of a group in lanes, and over lanes at its end.
  void enter_group(const CoefView& view, int which, Block block, const Tile& tile, int64_t* groups) {
    if (!view.variable) return;
    const int64_t group = group_of(view, p_.dim, block.first);
    if (group == groups[which]) return;
    store_group(view, which, groups[which], tile);
    groups[which] = group;
    for (int64_t i = 0; i < tile.count * count_ * kL; ++i) gvariable_[which][i] = 0;
  }
  void store_group(const CoefView& view, int which, int64_t group, const Tile& tile) {
    if (group < 0) return;
    T* out = partials_.variable[which] + share_ * partials_.coefficient_size[which] +
             ((b_ * view.groups + group) * p_.seqlen + tile.position) * count_;
    for (int64_t i = 0; i < tile.count * count_; ++i) out[i] = sum_lanes<T>(load<T>(gvariable_[which] + i * kL));
  }

  template <bool kGradients>
  void prepare(const Tile& tile, Block block, int64_t i, AdjointRows<T>& rows) {
    load_tile<T, S>(p_.u, b_, block, tile, rows.u);
    load_tile<T, S>(p_.delta, b_, block, tile, rows.dt);
    load_tile<T, S>(p_.dout, b_, block, tile, rows.dout);
    if (p_.z.ptr) load_tile<T, S>(p_.z, b_, block, tile, rows.z);
    const Vec<T> bias = load_channels<T>(p_.delta_bias, block, T(0));
    const Vec<T> skip = load_channels<T>(p_.D, block, T(0));
    const Vec<T> zero = splat(T(0)), one = splat(T(1));
    for (int64_t t = 0; t < tile.count; ++t) {
      const int64_t row = t * kL;
      const Vec<T> u = load<T>(rows.u + row);
      Softplus<T> dt{load<T>(rows.dt + row) + bias, one};
      if (p_.delta_softplus) dt = softplus<T, kGradients>(dt.value);
      if constexpr (!kGradients) {
        for (int64_t j = 0; j < kL; ++j) elapsed_[i * kL + j] += double(dt.value[j]);
      }
      Vec<T> gy = load<T>(rows.dout + row);
      if (p_.z.ptr) {
        const Vec<T> z = load<T>(rows.z + row);
        const Vec<T> gate = sigmoid<T>(z);
        store<T>(rows.gate + row, gate);
        gy = gy * z * gate;
      }
      store<T>(rows.dtu + row, dt.value * u);
      store<T>(rows.step + row, dt.value);
      store<T>(rows.dt + row, p_.complex ? dt.value : decay_time<T>(dt.value));
      store<T>(rows.slope + row, dt.slope);
      store<T>(rows.gy + row, gy);
      store<T>(rows.y + row, p_.D ? skip * u : zero);
      store<T>(rows.gdtu + row, zero);
      store<T>(rows.gdt + row, zero);
    }
  }

  // From the gradients of dt * u, of the decay's dt and of y to those of the arguments.
  void finish(const Tile& tile, Block block, int64_t i, AdjointRows<T>& rows) {
    const Vec<T> skip = load_channels<T>(p_.D, block, T(0));
    const Vec<T> one = splat(T(1));
    Vec<T> gD = splat(T(0)), gbias = splat(T(0));
    for (int64_t t = 0; t < tile.count; ++t) {
      const int64_t row = t * kL;
      const Vec<T> u = load<T>(rows.u + row), gy = load<T>(rows.gy + row), gdtu = load<T>(rows.gdtu + row);
      if (p_.z.ptr) {
        const Vec<T> z = load<T>(rows.z + row), s = load<T>(rows.gate + row);
        store<T>(rows.z + row, load<T>(rows.dout + row) * load<T>(rows.y + row) * s * (one + z * (one - s)));
      }
      const Vec<T> gdelta = (load<T>(rows.gdt + row) + gdtu * u) * load<T>(rows.slope + row);
      gbias += gdelta;
      gD += gy * u;
      store<T>(rows.gdt + row, gdelta);
      const Vec<T> gu = gdtu * load<T>(rows.step + row);
      store<T>(rows.u + row, p_.D ? gu + skip * gy : gu);
    }
    accumulate<T>(gD_ + i * kL, gD);
    accumulate<T>(gbias_ + i * kL, gbias);
    store_tile<T, S>(p_.du, b_, block, tile, rows.u);
    store_tile<T, S>(p_.ddelta, b_, block, tile, rows.gdt);
    if (p_.z.ptr) store_tile<T, S>(p_.dz, b_, block, tile, rows.z);
  }

  // Only the carried gradient, for the first pass over segments of time.
  void carry_tile(const AdjointLoop<T>& a) {
    for (int64_t n = 0; n < p_.dstate; ++n) {
      for (int64_t s = a.tile.count; s-- > 0;) {
        const int64_t t = a.tile.row(s);
        const Vec<T> gy = load<T>(a.rows->gy + t * kL), dt = load<T>(a.dt + t * kL);
        if (p_.complex) {
          Complex<T> c, decay;
          const Complex<T> carry = load_complex<T>(a.carry + 2 * n * kL);
          if (p_.C.variable) {
            complex_coefficient<T, true>(a.C, t, p_.dstate, n, c.re, c.im);
          } else {
            complex_coefficient<T, false>(a.C, t, p_.dstate, n, c.re, c.im);
          }
          complex_decay<T>(dt, a.rates + 2 * n * kL, decay.re, decay.im);
          const Vec<T> two = splat(T(2));
          const Complex<T> g = {carry.re + two * gy * c.re, carry.im - two * gy * c.im};
          store_complex<T>(a.carry + 2 * n * kL, conj_times<T>(decay, g));
        } else {
          const Vec<T> c = p_.C.variable ? coefficient<T, true>(a.C + t * p_.dstate, n) : coefficient<T, false>(a.C, n);
          const Vec<T> g = load<T>(a.carry + n * kL) + gy * c;
          store<T>(a.carry + n * kL, exp2_product<T>(dt, load<T>(a.rates + n * kL)) * g);
        }
      }
    }
  }

  const SelectiveScanBwdParams& p_;
  const Partials<T>& partials_;
  const int64_t b_, begin_, end_, share_, count_, blocks_, span_;
  Scratch scratch_;
  CoefficientSpan<T, S> B_, C_;
  T *rates_, *carry_, *gA_, *constants_[2], *gconstants_[2], *gD_, *gbias_;
  double* elapsed_;
  Block* block_;
  AdjointRows<T>* rows_;
  T *h_[2], *gvariable_[2];
  bool restarted_ = false;
  Ahead<7> ahead_;
};

template <class T>
Partition backward_partition(const SelectiveScanBwdParams& p, int64_t threads) {
  return Partition(p, kLanes<T>, divide_up(2 * threads, most(p.batch, 1)));
}

template <class T>
int64_t backward_workspace_bytes(const SelectiveScanBwdParams& p, int64_t threads) {
  return Partials<T>(p, backward_partition<T>(p, threads), segment_count(p, kLanes<T>, threads)).bytes;
}

// enter[s] of every segment, from behind: the adjoint of combine_segments.
template <class T>
void combine_segments_backwards(const SelectiveScanBwdParams& p, int64_t segments, T* enter, const T* decay,
                                const T* gained) {
  const int64_t k = p.complex ? 2 : 1, numbers = p.dim * p.dstate * k;
  for (int64_t s = segments - 1; s-- > 0;) {
    const T *from = enter + (s + 1) * numbers, *d = decay + (s + 1) * numbers, *g = gained + (s + 1) * numbers;
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

template <class T, class S>
void backward_tasks(const SelectiveScanBwdParams& p, const Partials<T>& partials, const Partition& part,
                    int64_t segments, const Threads& threads) {
  const int64_t ranges = part.count(), numbers = partials.numbers, each = segments * numbers;
  const auto on_every = [&](auto&& work) {
    parallel(threads, p.batch * ranges * segments, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t s = i % segments, range = i / segments % ranges, b = i / segments / ranges;
        BackwardTask<T, S> task(p, partials, b, part.begin(range), part.end(range), part.share(range));
        work(task, b, s, segment_start(p, s, segments), segment_start(p, s + 1, segments));
      }
    });
  };
  if (segments == 1) {
    on_every([&](BackwardTask<T, S>& task, int64_t b, int64_t, int64_t from, int64_t to) {
      task.template run<true>(from, to, nullptr);
      task.store_weights(b);
    });
    return;
  }
  Scratch scratch(3 * p.batch * each * int64_t(sizeof(T)) + 256);
  T* enter = scratch.take<T>(p.batch * each);
  T* decay = scratch.take<T>(p.batch * each);
  T* gained = scratch.take<T>(p.batch * each);
  on_every([&](BackwardTask<T, S>& task, int64_t b, int64_t s, int64_t from, int64_t to) {
    if (s == 0) return;
    task.template run<false>(from, to, nullptr);
    task.leave(decay + b * each + s * numbers, gained + b * each + s * numbers);
  });
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t i = 0; i < numbers; ++i) enter[b * each + (segments - 1) * numbers + i] = 0;
    combine_segments_backwards<T>(p, segments, enter + b * each, decay + b * each, gained + b * each);
  }
  on_every([&](BackwardTask<T, S>& task, int64_t b, int64_t s, int64_t from, int64_t to) {
    task.template run<true>(from, to, enter + b * each + s * numbers);
    task.store_weights(b * segments + s);
  });
}

template <class T, class S>
void backward(const SelectiveScanBwdParams& p, const Threads& threads) {
  if (p.dinitial_state) pass_empty_sequences<T>(p, p.dlast_state, p.dinitial_state);
  const Partition part = backward_partition<T>(p, threads.count);
  const bool nothing = p.batch == 0 || p.dim == 0 || p.seqlen == 0;
  const int64_t segments = segment_count(p, kLanes<T>, threads.count);
  const Partials<T> partials(p, part, segments);
  for (const SeqView* output : {&p.du, &p.ddelta, &p.dz}) prefer_large_pages(p, *output);
  prefer_large_pages(p.workspace, partials.bytes);
  partials.clear_groups_of_other_shares(p, part);
  if (!nothing) backward_tasks<T, S>(p, partials, part, segments, threads);
  const int64_t rows = nothing ? 0 : partials.weight_rows;
  sum_rows<T>(partials.A, rows, partials.numbers, static_cast<T*>(p.dA));
  if (p.dD) sum_rows<T>(partials.D, rows, p.dim, static_cast<T*>(p.dD));
  if (p.ddelta_bias) sum_rows<T>(partials.bias, rows, p.dim, static_cast<T*>(p.ddelta_bias));
  const CoefView *views[2] = {&p.B, &p.C}, *grads[2] = {&p.dB, &p.dC};
  for (int i = 0; i < 2; ++i) {
    if (!views[i]->variable) {
      sum_rows<T>(partials.constant[i], rows, partials.numbers, static_cast<T*>(grads[i]->ptr));
    } else if (!nothing) {
      sum_shares<T>(p, partials, *grads[i], i, threads);
    }
  }
}

}  // namespace
}  // namespace trifuse::cpu

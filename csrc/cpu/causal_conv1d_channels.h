// The causal convolution with channels in vector lanes, for inputs whose channels are neighbours in memory, and,
// number by number, for any other strides. A task takes a block of channels through a piece of time.
//
// Rows of time lie far apart, so a pass reads a few of them side by side and goes along the channels: memory is
// walked in long runs, and an input that serves several outputs is loaded once.
#pragma once

#include "causal_conv1d_plan.h"

namespace trifuse::cpu {
namespace {

constexpr int kRows = 4;                // of outputs in one pass
constexpr int64_t kChannelPiece = 256;  // positions of a task: a constant, so that sums do not depend on threads
constexpr int64_t kBlockBytes = 2048;   // of one row of one block of channels, in the accumulation dtype
constexpr int64_t kRing = 8;            // rows of gradients that are kept: the position and width - 1 after it

// Blocks of channels: whole vectors each, and the last takes what is left. Where fewer than a vector of channels
// remain inside a block its last vector starts earlier and computes some channels twice, to the same result.
template <class T>
struct ChannelBlocks {
  static constexpr int64_t lanes = kLanes<T>, size = kBlockBytes / int64_t(sizeof(T));
  int64_t dim, count;
  explicit ChannelBlocks(int64_t dim_) : dim(dim_), count(most(1, dim_ / size)) {}
  int64_t begin(int64_t i) const { return i * size; }
  int64_t end(int64_t i) const { return i + 1 == count ? dim : (i + 1) * size; }
};

// A vector's worth of channels of a block.
struct Lane {
  int64_t channel, count, slot;
};
template <class T>
TRIFUSE_INLINE Lane lane_at(int64_t begin, int64_t end, int64_t j) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t count = least(lanes, end - begin);
  return {least(begin + j * lanes, end - count), count, j * lanes};
}

// The taps that count at one position: where the inputs of the block's channels stand.
template <class T, class S>
struct RowTaps {
  int count = 0;
  const S* input[kMaxWidth];  // of channel 0
  int64_t stride[kMaxWidth];
  int k[kMaxWidth];

  RowTaps(const CausalConv1dParams& p, const Plan<T>& plan, int64_t b, int64_t t) {
    const unsigned own = plan.own_row(b)[t], left = plan.left_row(b)[t];
    const int64_t row = left ? row_of(p, b, t) : 0;
    for (int i = 0; i < p.width; ++i) {
      if (own >> i & 1) {
        add(i, at<S>(p.x, b, 0, t - i), p.x.dim);
      } else if (left >> i & 1) {
        const int64_t j = t - i - plan.spans[row].start + p.width - 1;
        add(i, state_at<S>(p, p.initial_states, row, 0, j), p.width - 1);
      }
    }
  }
  TRIFUSE_INLINE Vec<T> load(int i, const Lane& lane) const {
    return load_some<T, S>(input[i] + lane.channel * stride[i], stride[i], lane.count);
  }

 private:
  void add(int tap, const S* from, int64_t apart) {
    input[count] = from;
    stride[count] = apart;
    k[count++] = tap;
  }
};

template <class T, class S>
TRIFUSE_INLINE Vec<T> weighted_sum(const CausalConv1dParams& p, const Plan<T>& plan, const RowTaps<T, S>& taps,
                                   const Lane& lane) {
  Vec<T> z = load_some<T, T>(plan.bias + lane.channel, 1, lane.count);
  for (int i = 0; i < taps.count; ++i) {
    z += load_some<T, T>(plan.taps + taps.k[i] * p.dim + lane.channel, 1, lane.count) * taps.load(i, lane);
  }
  return z;
}

// Whether positions t .. t + count - 1 have all their taps, inside x.
template <class T>
TRIFUSE_INLINE bool all_full(const Plan<T>& plan, const uint8_t* own, int64_t t, int64_t count) {
  unsigned all = plan.full;
  for (int64_t i = 0; i < count; ++i) all &= own[t + i];
  return all == plan.full;
}

template <class T, class S>
void forward_row(const CausalConv1dParams& p, const Plan<T>& plan, int64_t b, int64_t t, int64_t begin, int64_t end) {
  const RowTaps<T, S> taps(p, plan, b, t);
  S* y = at<S>(p.y, b, 0, t);
  for (int64_t j = 0; j * kLanes<T> < end - begin; ++j) {
    const Lane lane = lane_at<T>(begin, end, j);
    Vec<T> z = splat(T(0));
    if (taps.count) {
      z = weighted_sum<T, S>(p, plan, taps, lane);
      if (p.silu) z = silu<T>(z);
    }
    store_some<S, T>(y + lane.channel * p.y.dim, z, p.y.dim, lane.count);
  }
}

// Positions t .. t + kRows - 1, all taps inside x, channels dense.
template <class T, class S, int kWidth, bool kSilu>
void forward_rows(const CausalConv1dParams& p, const Plan<T>& plan, int64_t b, int64_t t, int64_t begin, int64_t end) {
  const S* x = at<S>(p.x, b, 0, t - (kWidth - 1));
  S* y = at<S>(p.y, b, 0, t);
  const int64_t x_time = p.x.time, y_time = p.y.time, dim = p.dim;
  for (int64_t j = 0; j * kLanes<T> < end - begin; ++j) {
    const int64_t c = lane_at<T>(begin, end, j).channel;
    Vec<T> in[kRows + kWidth - 1], tap[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kRows + kWidth - 1; ++i) in[i] = load_sequence<T, S>(x + i * x_time + c);
#pragma GCC unroll 8
    for (int k = 0; k < kWidth; ++k) tap[k] = load<T>(plan.taps + k * dim + c);
    const Vec<T> bias = load<T>(plan.bias + c);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Vec<T> z = bias;
#pragma GCC unroll 8
      for (int k = 0; k < kWidth; ++k) z += tap[k] * in[r + kWidth - 1 - k];
      if constexpr (kSilu) z = silu<T>(z);
      store_sequence<S, T>(y + r * y_time + c, z);
    }
  }
}

template <class T, class S>
using ForwardRows = void (*)(const CausalConv1dParams&, const Plan<T>&, int64_t, int64_t, int64_t, int64_t);

// null: none for this width or these strides.
template <class T, class S>
ForwardRows<T, S> forward_rows_of(const CausalConv1dParams& p) {
  if (p.x.dim != 1 || p.y.dim != 1 || p.dim < kLanes<T>) return nullptr;
  switch (p.width) {
    case 2: return p.silu ? forward_rows<T, S, 2, true> : forward_rows<T, S, 2, false>;
    case 3: return p.silu ? forward_rows<T, S, 3, true> : forward_rows<T, S, 3, false>;
    case 4: return p.silu ? forward_rows<T, S, 4, true> : forward_rows<T, S, 4, false>;
    default: return nullptr;
  }
}

template <class T, class S>
void forward_channels(const CausalConv1dParams& p, const Plan<T>& plan, const Threads& threads) {
  const ForwardRows<T, S> rows = forward_rows_of<T, S>(p);
  const ChannelBlocks<T> blocks(p.dim);
  const int64_t pieces = divide_up(p.seqlen, kChannelPiece);
  share(p, threads, p.batch * pieces * blocks.count, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t block = i % blocks.count, piece = i / blocks.count % pieces, b = i / blocks.count / pieces;
      const int64_t begin = blocks.begin(block), end = blocks.end(block);
      const int64_t stop = least(p.seqlen, (piece + 1) * kChannelPiece);
      for (int64_t t = piece * kChannelPiece; t < stop;) {
        if (rows && t + kRows <= stop && all_full(plan, plan.own_row(b), t, kRows)) {
          rows(p, plan, b, t, begin, end);
          t += kRows;
        } else {
          forward_row<T, S>(p, plan, b, t++, begin, end);
        }
      }
    }
  });
}

}  // namespace
}  // namespace trifuse::cpu

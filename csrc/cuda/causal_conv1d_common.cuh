// What the kernels of the causal convolution share: arguments, where sequences begin and end, and the
// way values travel between memory and registers.
//
// Tap k of position l reads x[l - k] and is multiplied by weight[width - 1 - k]. Two kinds of kernels:
// "time" ones give a row (batch item, channel) to a warp, 16 bytes along time to a lane, and pass what
// a lane's neighbours hold by shuffles; "channel" ones give neighbouring channels to neighbouring lanes
// and walk through time with the last inputs in registers. Every input is read once, every output
// written once, and no thread waits for another block.
#pragma once

#include "trifuse/causal_conv1d.h"
#include "trifuse/cuda_platform.h"

namespace trifuse::cuda::conv {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kChannels = 2;                          // of a lane of a channel kernel
constexpr int kForwardSteps = 8, kBackwardSteps = 4;  // of time that a channel kernel takes at once

// Blocks that a multiprocessor has room for, by which the compiler is given its registers.
template <int kWidth>
constexpr int kForwardBlocks = kWidth <= 4 ? 5 : 4;
template <int kWidth>
constexpr int kBackwardBlocks = kWidth <= 4 ? 4 : 3;

// (batch, dim, time) of the sequence dtype; `vectors` if whole vectors of it are aligned.
struct Sequence {
  void* ptr = nullptr;
  int64_t batch = 0, dim = 0, time = 0;
  bool vectors = false;
};

// A position's edges, where sequences begin or end: bit k, its tap k reads x; bit 8 + k, its tap k
// reads the initial states; from bit 16 on, 1 + the entry of final_states that holds it, or 0. No bit
// of the taps: padding.
using Edges = uint32_t;
constexpr int kInitialBit = 8, kFinalBit = 16;
constexpr Edges kTapBits = 0xff, kInitialBits = kTapBits << kInitialBit;

struct ConvArgs {
  int64_t batch, dim, seqlen, width;
  bool silu;
  Sequence x;
  const float *weight, *bias;  // (dim, width); (dim) or null
  const void* initial_states;  // (rows, dim, width - 1) contiguous, or null
  const int32_t* seq_idx;      // (batch, seqlen) contiguous, or null
  const int64_t* cu_seqlens;
  int64_t num_seqs;
  Edges* edges;  // (batch, seqlen); null: every row is one sequence, and nothing is added to its end

  // How the work is cut: warps, each a column (a row, or a block of channels) and a segment of time. A block
  // has `column_warps` columns, 1, 2 or 4, and as many segments as it then has warps.
  int64_t columns, segments, segment_steps;
  unsigned column_warps, column_blocks, segment_blocks;
};

struct FwdArgs : ConvArgs {
  Sequence y;
  void* final_states;  // like initial_states, or null
};

struct BwdArgs : ConvArgs {
  Sequence dy, dx;
  const void* dfinal_states;  // like final_states, or null
  void* dinitial_states;      // like initial_states, or null
  float* partials;            // (batch * segments, width + 1, dim): of dweight, then of dbias
  float *dweight, *dbias;     // (dim, width); (dim) or null
};

// A sequence's element; also what the test of 64-bit offsets calls.
TRIFUSE_HD int64_t offset(const Sequence& s, int64_t batch, int64_t channel, int64_t time) {
  return batch * s.batch + channel * s.dim + time * s.time;
}

TRIFUSE_HD int64_t state_offset(const ConvArgs& p, int64_t row, int64_t channel, int64_t entry) {
  return (row * p.dim + channel) * (p.width - 1) + entry;
}

template <typename T>
TRIFUSE_DEVICE float element(const Sequence& s, int64_t batch, int64_t channel, int64_t time) {
  return to_float(static_cast<const T*>(s.ptr)[offset(s, batch, channel, time)]);
}

// The sequence that a position belongs to: its row of the states, and where it begins and ends.
struct Span {
  int64_t row, begin, end;
};

TRIFUSE_DEVICE Span span_of(const ConvArgs& p, int64_t batch, int64_t position) {
  if (p.cu_seqlens == nullptr) return {batch, 0, p.seqlen};
  int64_t low = 0, high = p.num_seqs;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (p.cu_seqlens[middle] <= position ? low : high) = middle;
  }
  return {low, p.cu_seqlens[low], p.cu_seqlens[low + 1]};
}

TRIFUSE_DEVICE int32_t id_at(const ConvArgs& p, int64_t batch, int64_t position) {
  return p.seq_idx == nullptr ? 0 : p.seq_idx[batch * p.seqlen + position];
}

// Whether all positions from begin up to end have one id.
TRIFUSE_DEVICE bool one_run(const ConvArgs& p, int64_t batch, int64_t begin, int64_t end) {
  if (p.seq_idx == nullptr) return true;
  for (int64_t i = begin + 1; i < end; ++i) {
    if (id_at(p, batch, i) != id_at(p, batch, begin)) return false;
  }
  return true;
}

// Which entry of final_states a position is, plus one, or 0: the last run of one id ends at most
// width - 2 positions later, and nothing but padding follows it.
TRIFUSE_DEVICE Edges final_entry(const ConvArgs& p, int64_t batch, int64_t position, int64_t end) {
  const int32_t id = id_at(p, batch, position);
  int64_t after = position + 1;
  while (after < end && after - position < p.width && id_at(p, batch, after) == id) ++after;
  const int64_t run = after - position;
  if (run >= p.width) return 0;
  while (after < end && id_at(p, batch, after) < 0) ++after;
  return after == end ? Edges(p.width - run) : 0;
}

TRIFUSE_DEVICE Edges edges_of(const ConvArgs& p, int64_t batch, int64_t position) {
  const int32_t id = id_at(p, batch, position);
  if (id < 0) return 0;
  const Span span = span_of(p, batch, position);
  const int width = int(p.width);
  const int64_t into = position - span.begin;
  const bool initial = p.initial_states != nullptr && into < width - 1 && one_run(p, batch, span.begin, position + 1);
  Edges edges = 0;
  for (int k = 0; k < width; ++k) {
    if (k <= into) {
      edges |= Edges(id_at(p, batch, position - k) == id) << k;
    } else if (initial) {
      edges |= Edges(1) << (kInitialBit + k);
    }
  }
  return edges | final_entry(p, batch, position, span.end) << kFinalBit;
}

// What the taps of a position that read the initial states add to its sum. Rare, so it is no hurry that the
// sequence is searched for; a loop, since its code stands in many places.
template <typename T>
TRIFUSE_DEVICE float initial_part(const ConvArgs& p, int64_t batch, int64_t channel, int64_t position) {
  const Span span = span_of(p, batch, position);
  const int into = int(position - span.begin), width = int(p.width);
  const T* const states = static_cast<const T*>(p.initial_states) + state_offset(p, span.row, channel, into);
  const float* const weight = p.weight + channel * width;
  float sum = 0.0f;
#pragma unroll 1
  for (int w = 0; w + into < width - 1; ++w) sum = fma(weight[w], to_float(states[w]), sum);
  return sum;
}

// The same taps' share of dweight, for the gradient g of the sum.
template <typename T, int kWidth>
TRIFUSE_DEVICE void add_initial_part(const ConvArgs& p, int64_t batch, int64_t channel, int64_t position, float g,
                                     float (&dweight)[kWidth]) {
  const Span span = span_of(p, batch, position);
  const int into = int(position - span.begin);
  const T* const states = static_cast<const T*>(p.initial_states) + state_offset(p, span.row, channel, into);
#pragma unroll
  for (int w = 0; w < kWidth - 1; ++w) {
    if (w + into < kWidth - 1) dweight[w] = fma(g, to_float(states[w]), dweight[w]);
  }
}

// What arrives at a position from the final states.
template <typename T>
TRIFUSE_DEVICE float final_gradient(const BwdArgs& p, int64_t batch, int64_t channel, int64_t position, Edges edges) {
  if (p.dfinal_states == nullptr || edges >> kFinalBit == 0) return 0.0f;
  const Span span = span_of(p, batch, position);
  const int64_t at = state_offset(p, span.row, channel, int64_t(edges >> kFinalBit) - 1);
  return to_float(static_cast<const T*>(p.dfinal_states)[at]);
}

TRIFUSE_DEVICE float silu(float x) { return x * sigmoid(x); }
TRIFUSE_DEVICE float silu_slope(float x) {
  const float s = sigmoid(x);
  return s * fma(x, 1.0f - s, 1.0f);
}

template <typename T, int kLength>
struct alignas(sizeof(T) * kLength) Vector {
  T v[kLength];
};

// What a warp works on: a column (a row of x, or 32 vectors of channels) and a segment of time.
struct Task {
  int64_t batch, column, segment, begin, end;
  bool any;

  TRIFUSE_DEVICE explicit Task(const ConvArgs& p) {
    const unsigned warp = threadIdx.x / 32, rest = blockIdx.x / p.column_blocks;
    column = int64_t(blockIdx.x % p.column_blocks) * p.column_warps + warp % p.column_warps;
    segment = int64_t(rest % p.segment_blocks) * (kWarps / p.column_warps) + warp / p.column_warps;
    batch = rest / p.segment_blocks;
    begin = segment * p.segment_steps;
    end = begin + p.segment_steps < p.seqlen ? begin + p.segment_steps : p.seqlen;
    any = column < p.columns && segment < p.segments;
  }
};

template <int kWidth>
TRIFUSE_DEVICE void load_weight(const ConvArgs& p, int64_t channel, float (&weight)[kWidth], float& bias) {
#pragma unroll
  for (int w = 0; w < kWidth; ++w) weight[w] = channel < p.dim ? p.weight[channel * kWidth + w] : 0.0f;
  bias = p.bias != nullptr && channel < p.dim ? p.bias[channel] : 0.0f;
}

}  // namespace trifuse::cuda::conv

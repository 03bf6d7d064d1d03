// What the forward and the backward kernel of the selective scan share: which thread does what, how
// sequences and coefficients reach shared memory, and where packed sequences begin and end.
//
// A block of 128 threads walks through time for 64 channels, 32 steps (a tile) at a go. Four
// neighbouring lanes share two channels, each with a quarter of the (up to 16) states in registers:
// the recurrence costs one exponential and three multiply-adds per state, and no scan. Sequences are
// read and written once, by 16-byte vectors along time or by pairs of channels, whichever is
// contiguous; any other stride takes scalar accesses in the same places.
#pragma once

#include "trifuse/cuda_platform.h"
#include "trifuse/selective_scan.h"

namespace trifuse::cuda {

constexpr int kThreads = 128, kWarps = 4;
constexpr int kChannels = 64, kPairs = 32;  // of a block
constexpr int kSteps = 32;                  // of a tile; equal to a warp's lanes, for votes
constexpr int kGroup = 4;                   // steps whose sums over states are reduced together
constexpr int kGroups = kSteps / kGroup;
constexpr int kSlices = 4;  // lanes that share the states of a channel
constexpr unsigned kFullWarp = 0xffffffffu;

// (batch, dim, step) of the sequence dtype; in processing order, so step < 0 when time is reversed.
struct Sequence {
  void* ptr = nullptr;
  int64_t batch = 0, dim = 0, step = 0;
  bool vectors = false;  // whole vectors may be read or written
};

// B or C (batch, group, state, step), or (dim, dstate) float32 when not variable. For gradients
// `group` is the stride between the rows that the channel blocks write.
struct Coefficient {
  void* ptr = nullptr;
  bool variable = false;
  int64_t batch = 0, group = 0, state = 0, step = 0;
  unsigned blocks_per_group = 1;
};

struct ScanArgs {
  int64_t batch, dim, seqlen, dstate;
  bool softplus, reverse, channel_fast, coefficients_along_time;
  Sequence u, delta, z;
  Coefficient B, C;
  const float *A, *D, *delta_bias, *initial_state;
  const int64_t* cu_seqlens;
  int64_t num_seqs;

  int64_t segment;                      // channels that share their groups of B and C; no block crosses its end
  unsigned blocks_per_segment, blocks;  // blocks: per batch item and split
  // Time is split when there are too few channels to fill the device: a first pass (`local`) takes
  // every split from a zero state, the second folds what the splits before it left behind.
  unsigned splits;
  int64_t split_steps;
  bool local;
  float* split_state;   // (batch, splits, dstate, dim)
  float* split_decay;   // (batch, splits, dim, 2): sum of dt; 1 if a sequence begins in the split
  float* partial_sums;  // (parts, batch, seqlen, dim) when the states need more than one go, or null
};

// A sequence's element; also what the test of 64-bit offsets calls.
TRIFUSE_HD int64_t sequence_offset(const Sequence& s, int64_t batch, int64_t channel, int64_t step) {
  return batch * s.batch + channel * s.dim + step * s.step;
}

TRIFUSE_HD int64_t coefficient_offset(const Coefficient& c, int64_t batch, int64_t group, int64_t state, int64_t step) {
  return batch * c.batch + group * c.group + state * c.state + step * c.step;
}

struct Block {
  int64_t batch, channel0, begin, end;  // steps from begin to end
  unsigned index, split;
  int channels;

  TRIFUSE_DEVICE explicit Block(const ScanArgs& p) {
    index = blockIdx.x % p.blocks;
    const unsigned row = blockIdx.x / p.blocks;
    split = row % p.splits;
    batch = row / p.splits;
    const int64_t within = int64_t(index % p.blocks_per_segment) * kChannels;
    channel0 = index / p.blocks_per_segment * p.segment + within;
    channels = int(p.segment - within < kChannels ? p.segment - within : kChannels);
    begin = split * p.split_steps;
    end = begin + p.split_steps < p.seqlen ? begin + p.split_steps : p.seqlen;
  }
};

// Two channels times kStates states: registers [k][i] are channel `pair * 2 + (k ^ low)` and state
// `first + (i ^ permuted)`. Neighbours hold the two channels in opposite order, so that summing over
// states exchanges registers without selecting; the backward pass permutes the states of its eight
// pairs likewise, to sum over channels.
template <int kStates, bool kPermute>
struct Lane {
  int pair, low, high, slice, place, permuted, channels;
  int64_t channel0;

  TRIFUSE_DEVICE explicit Lane(const Block& block) : channels(block.channels), channel0(block.channel0) {
    const int lane = int(threadIdx.x) % 32;
    slice = lane % kSlices;
    low = lane & 1;
    high = lane >> 1 & 1;
    place = lane / kSlices;
    permuted = kPermute ? place % kStates : 0;
    pair = int(threadIdx.x) / kSlices;
  }

  // Calls f(k, i, channel, state) for the registers that stand for something.
  template <typename F>
  TRIFUSE_DEVICE void each(int64_t dstate, int64_t state0, F f) const {
    const int first = opaque(pair * 2), state = opaque(slice * kStates);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int channel = first + (k ^ low);
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const int64_t n = state0 + (state + (i ^ permuted));
        if (channel < channels && n < dstate) f(k, i, channel0 + channel, n);
      }
    }
  }
  // (dim, dstate) rows of a state tensor or a weight.
  TRIFUSE_DEVICE void load(const float* base, int64_t dstate, int64_t state0, float (&x)[2][kStates]) const {
    clear(x);
    if (base == nullptr) return;
    each(dstate, state0, [&](int k, int i, int64_t d, int64_t n) { x[k][i] = base[d * dstate + n]; });
  }
  TRIFUSE_DEVICE void store(float* base, int64_t dstate, int64_t state0, const float (&x)[2][kStates]) const {
    if (base == nullptr) return;
    each(dstate, state0, [&](int k, int i, int64_t d, int64_t n) { base[d * dstate + n] = x[k][i]; });
  }
  // (dstate, dim) planes of chunk_states and split_state.
  TRIFUSE_DEVICE void load_plane(const float* base, int64_t dim, int64_t dstate, int64_t state0,
                                 float (&x)[2][kStates]) const {
    clear(x);
    each(dstate, state0, [&](int k, int i, int64_t d, int64_t n) { x[k][i] = base[n * dim + d]; });
  }
  TRIFUSE_DEVICE void store_plane(float* base, int64_t dim, int64_t dstate, int64_t state0,
                                  const float (&x)[2][kStates]) const {
    each(dstate, state0, [&](int k, int i, int64_t d, int64_t n) { base[n * dim + d] = x[k][i]; });
  }
  TRIFUSE_DEVICE static void copy(const float (&from)[2][kStates], float (&to)[2][kStates]) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) to[0][i] = from[0][i], to[1][i] = from[1][i];
  }
  TRIFUSE_DEVICE static void clear(float (&x)[2][kStates]) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) x[0][i] = x[1][i] = 0.0f;
  }
};

// The sequences packed into one: for each step of a tile, the sequence that begins or ends there, or
// -1. In processing order; reversed, the last sequence comes first.
struct Boundaries {
  int64_t begins[kSteps], ends[kSteps];
};

TRIFUSE_DEVICE int64_t first_step(const ScanArgs& p, int64_t j) {
  return p.reverse ? p.seqlen - p.cu_seqlens[p.num_seqs - j] : p.cu_seqlens[j];
}

TRIFUSE_DEVICE void find_boundaries(const ScanArgs& p, int64_t step0, Boundaries& found) {
  const int i = int(threadIdx.x);
  if (i >= kSteps) return;
  const int64_t step = step0 + i;
  int64_t begins = -1, ends = -1;
  if (step < p.seqlen) {
    int64_t low = 0, high = p.num_seqs;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (first_step(p, middle) <= step ? low : high) = middle;
    }
    const int64_t sequence = p.reverse ? p.num_seqs - 1 - low : low;
    if (first_step(p, low) == step) begins = sequence;
    if (first_step(p, low + 1) == step + 1) ends = sequence;
  }
  found.begins[i] = begins;
  found.ends[i] = ends;
}

// The tile's steps, as a bit each, that need more than the recurrence: boundaries, and what lies past
// the end of the sequence.
TRIFUSE_DEVICE unsigned special_steps(const ScanArgs& p, const Boundaries& found, int steps) {
  const int lane = int(threadIdx.x) % 32;
  bool special = lane >= steps;
  if (p.cu_seqlens != nullptr) special = special || found.begins[lane] >= 0 || found.ends[lane] >= 0;
  return __ballot_sync(kFullWarp, special);
}

// x := what a split makes of the state x that enters it, and adds.
template <int kStates, bool kPermute>
TRIFUSE_DEVICE void through_split(const ScanArgs& p, const Block& block, const Lane<kStates, kPermute>& lane,
                                  unsigned split, int64_t state0, const float (&A2)[2][kStates],
                                  float (&x)[2][kStates]) {
  const int64_t row = block.batch * p.splits + split;
  float left[2][kStates];
  lane.load_plane(p.split_state + row * p.dstate * p.dim, p.dim, p.dstate, state0, left);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int channel = lane.pair * 2 + (k ^ lane.low);
    const float* decay = p.split_decay + (row * p.dim + block.channel0 + (channel < block.channels ? channel : 0)) * 2;
    const float sum = decay[0];
    const bool begins = decay[1] != 0.0f;
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      x[k][i] = begins ? left[k][i] : fma(exp2_fast(A2[k][i] * sum), x[k][i], left[k][i]);
    }
  }
}

}  // namespace trifuse::cuda

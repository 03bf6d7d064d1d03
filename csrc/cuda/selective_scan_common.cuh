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

  int64_t segment;  // channels that share their groups of B and C; no block crosses its end
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

TRIFUSE_HD int64_t coefficient_offset(const Coefficient& c, int64_t batch, int64_t group, int64_t state,
                                      int64_t step) {
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

// A thread's share of a tile of a sequence: kVectors vectors of kLength elements. Each thread stages,
// converts and finishes the same elements, so the staged tile needs no barrier. The positions are
// worked out anew for every tile: kept, they would take most of the registers.
template <typename T>
struct TimeFast {
  static constexpr bool kAlongTime = true;
  static constexpr int kLength = 16 / int(sizeof(T));
  static constexpr int kVectors = kSteps * kChannels / kThreads / kLength;
  static constexpr int kUnroll = 8 / kLength;     // of the loops over vectors: 8 elements in flight
  static constexpr int kPerRow = kSteps / kLength;
  const int thread = opaque(int(threadIdx.x));
  TRIFUSE_DEVICE int channel(int j) const { return (j * kThreads + thread) / kPerRow; }
  TRIFUSE_DEVICE int step(int) const { return thread % kPerRow * kLength; }
  TRIFUSE_DEVICE static int own(int j, int) { return j; }  // which of its channels an element is of
};

template <typename T>
struct ChannelFast {
  static constexpr bool kAlongTime = false;
  static constexpr int kLength = 2;
  static constexpr int kVectors = kSteps * kChannels / kThreads / kLength;
  static constexpr int kUnroll = 4;
  const int thread = opaque(int(threadIdx.x));
  TRIFUSE_DEVICE int channel(int) const { return thread % kPairs * 2; }
  TRIFUSE_DEVICE int step(int j) const { return j * (kThreads / kPairs) + thread / kPairs; }
  TRIFUSE_DEVICE static int own(int, int i) { return i; }
};

constexpr int kMaxOwnChannels = 4;

template <typename T, int kLength>
struct alignas(sizeof(T) * kLength) Vector {
  T v[kLength];
};

template <class Map>
TRIFUSE_DEVICE bool inside(const Map& map, const Block& block, int steps, int j, int i) {
  return map.step(j) + (Map::kAlongTime ? i : 0) < steps &&
         map.channel(j) + (Map::kAlongTime ? 0 : i) < block.channels;
}

template <typename T, class Map>
TRIFUSE_DEVICE T* element(const Map& map, const Sequence& s, const Block& block, int64_t step0, int j) {
  return static_cast<T*>(s.ptr) +
         sequence_offset(s, block.batch, block.channel0 + map.channel(j), step0 + map.step(j));
}

// Starts the copy of this thread's elements of a tile into its own slots. Outside: zero.
template <class Map, typename T>
TRIFUSE_DEVICE void stage(const Map& map, const Sequence& s, const Block& block, int64_t step0, int steps, T* slots) {
  constexpr int kLength = Map::kLength;
#pragma unroll Map::kUnroll
  for (int j = 0; j < Map::kVectors; ++j) {
    T* slot = slots + (j * kThreads + map.thread) * kLength;
    const T* from = element<T>(map, s, block, step0, j);
    if (s.vectors && inside(map, block, steps, j, kLength - 1)) {
      async_copy<kLength * int(sizeof(T))>(slot, from);
    } else {
      const int64_t stride = Map::kAlongTime ? s.step : s.dim;
#pragma unroll
      for (int i = 0; i < kLength; ++i) {
        slot[i] = inside(map, block, steps, j, i) ? from[i * stride] : from_float<T>(0.0f);
      }
    }
  }
}

template <class Map, typename T>
TRIFUSE_DEVICE void read_staged(const Map& map, const T* slots, int j, float (&x)[Map::kLength]) {
  using V = Vector<T, Map::kLength>;
  const V raw = *reinterpret_cast<const V*>(slots + (j * kThreads + map.thread) * Map::kLength);
#pragma unroll
  for (int i = 0; i < Map::kLength; ++i) x[i] = to_float(raw.v[i]);
}

template <typename T, class Map>
TRIFUSE_DEVICE void write_sequence(const Map& map, const Sequence& s, const Block& block, int64_t step0, int steps,
                                   int j, const float (&x)[Map::kLength]) {
  constexpr int kLength = Map::kLength;
  T* to = element<T>(map, s, block, step0, j);
  if (s.vectors && inside(map, block, steps, j, kLength - 1)) {
    Vector<T, kLength> raw;
#pragma unroll
    for (int i = 0; i < kLength; ++i) raw.v[i] = from_float<T>(x[i]);
    *reinterpret_cast<Vector<T, kLength>*>(to) = raw;
  } else {
    const int64_t stride = Map::kAlongTime ? s.step : s.dim;
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      if (inside(map, block, steps, j, i)) to[i * stride] = from_float<T>(x[i]);
    }
  }
}

// Per step and pair of channels, 16 bytes: dt and dt * u of the first channel, then of the second.
// The pair's place in its row depends on the step so that no access conflicts in its banks.
TRIFUSE_DEVICE int pair_slot(int step, int pair) { return (step * kPairs + (pair ^ (step / kGroup % 8))) * 4; }

// A per-channel weight of this thread's element, 0 without one.
template <class Map>
TRIFUSE_DEVICE float weight(const Map& map, const float* w, const Block& block, int j, int i) {
  const int channel = map.channel(j) + (Map::kAlongTime ? 0 : i);
  return w != nullptr && channel < block.channels ? w[block.channel0 + channel] : 0.0f;
}

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

// B and C of a tile in shared memory, float32: per step a row of B's copies, C's copies and a pad that
// keeps rows out of each other's banks. Copy c holds state n at place n ^ c. A constant B or C reads
// as one here and is multiplied in from registers.
template <int kStates, int kCopies>
struct CoefficientTile {
  static constexpr int kTileStates = kStates * kSlices;
  static constexpr int kRow = 2 * kCopies * kTileStates + 4;
  static constexpr int kFloats = kSteps * kRow;
};

// This thread's part of B and C of one tile: four states of one step.
template <typename T, int kStates>
struct StagedCoefficients {
  static constexpr int kQuads = kStates * kSlices / 4;
  T b[4], c[4];

  TRIFUSE_DEVICE static bool mine() { return int(threadIdx.x) < kSteps * kQuads; }
  TRIFUSE_DEVICE static int step(const ScanArgs& p) {
    return p.coefficients_along_time ? int(threadIdx.x) % kSteps : int(threadIdx.x) / kQuads;
  }
  TRIFUSE_DEVICE static int quad(const ScanArgs& p) {
    return p.coefficients_along_time ? int(threadIdx.x) / kSteps : int(threadIdx.x) % kQuads;
  }
  TRIFUSE_DEVICE static void load(const ScanArgs& p, const Coefficient& from, const Block& block, int64_t state,
                                  int64_t step, T (&x)[4]) {
    const T* base = static_cast<const T*>(from.ptr);
    if (from.variable) {
      base += coefficient_offset(from, block.batch, block.index / from.blocks_per_group, state, step);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = from_float<T>(0.0f);
      if (state + i < p.dstate && step < block.end) {
        x[i] = from.variable ? base[i * from.state] : from_float<T>(1.0f);
      }
    }
  }
  TRIFUSE_DEVICE void load(const ScanArgs& p, const Block& block, int64_t state0, int64_t step0) {
    if (!mine()) return;
    const int64_t state = state0 + opaque(quad(p)) * 4, at = step0 + opaque(step(p));
    load(p, p.B, block, state, at, b);
    load(p, p.C, block, state, at, c);
  }
  template <int kCopies>
  TRIFUSE_DEVICE void store(const ScanArgs& p, float* tile) const {
    using Tile = CoefficientTile<kStates, kCopies>;
    if (!mine()) return;
    float4* row = reinterpret_cast<float4*>(tile + step(p) * Tile::kRow) + quad(p);
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      row[copy * kQuads] =
          make_float4(to_float(b[copy]), to_float(b[1 ^ copy]), to_float(b[2 ^ copy]), to_float(b[3 ^ copy]));
      row[(kCopies + copy) * kQuads] =
          make_float4(to_float(c[copy]), to_float(c[1 ^ copy]), to_float(c[2 ^ copy]), to_float(c[3 ^ copy]));
    }
  }
};

template <int kStates>
TRIFUSE_DEVICE void read_states(const float* from, float (&x)[kStates]) {
  if constexpr (kStates == 4) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < kStates; ++i) x[i] = from[i];
  }
}

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

// Sum of dt over a split and whether a sequence begins in it, one channel to each of 16 lanes.
struct SplitDecay {
  float sum = 0.0f, begins = 0.0f;

  TRIFUSE_DEVICE static bool mine() { return int(threadIdx.x) % 32 < kChannels / kWarps; }
  TRIFUSE_DEVICE static int channel() { return int(threadIdx.x) / 32 * (kChannels / kWarps) + int(threadIdx.x) % 32; }
  TRIFUSE_DEVICE void add(const ScanArgs& p, const float* tile, const Boundaries& found, int steps) {
    if (mine()) {
      for (int t = 0; t < steps; ++t) {
        sum += tile[pair_slot(t, channel() / 2) + channel() % 2 * 2];
        if (p.cu_seqlens != nullptr && found.begins[t] >= 0) begins = 1.0f;
      }
    }
    __syncwarp();
  }
  TRIFUSE_DEVICE void store(const ScanArgs& p, const Block& block) const {
    if (!mine() || channel() >= block.channels) return;
    float* to =
        p.split_decay + ((block.batch * p.splits + block.split) * p.dim + block.channel0 + channel()) * 2;
    to[0] = sum;
    to[1] = begins;
  }
};

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

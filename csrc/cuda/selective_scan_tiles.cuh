// How sequences and the coefficients B and C travel between global memory and the tiles in shared memory.
#pragma once

#include "selective_scan_common.cuh"

namespace trifuse::cuda {

// A thread's share of a tile of a sequence: kVectors vectors of kLength elements. Each thread stages,
// converts and finishes the same elements, so the staged tile needs no barrier. The positions are
// worked out anew for every tile: kept, they would take most of the registers.
//
// TimeFast: 16 bytes along time, whose order in memory is the opposite when time is reversed.
template <typename T>
struct TimeFast {
  static constexpr bool kAlongTime = true;
  static constexpr int kLength = 16 / int(sizeof(T));
  static constexpr int kVectors = kSteps * kChannels / kThreads / kLength;
  static constexpr int kUnroll = 8 / kLength;  // of the loops over vectors: 8 elements in flight
  static constexpr unsigned kPerRow = kSteps / kLength;
  const unsigned thread = unsigned(opaque(int(threadIdx.x)));
  const bool flipped;

  TRIFUSE_DEVICE explicit TimeFast(const ScanArgs& p) : flipped(p.reverse) {}
  TRIFUSE_DEVICE int channel(int j) const { return int((unsigned(j) * kThreads + thread) / kPerRow); }
  TRIFUSE_DEVICE int step(int) const { return int(thread % kPerRow * kLength); }
  TRIFUSE_DEVICE static int64_t to_next(const Sequence& s) { return int64_t(kThreads / kPerRow) * s.dim; }
  TRIFUSE_DEVICE static int own(int j, int) { return j; }  // which of the thread's channels an element is of
};

// ChannelFast: two channels of a step.
template <typename T>
struct ChannelFast {
  static constexpr bool kAlongTime = false;
  static constexpr int kLength = 2;
  static constexpr int kVectors = kSteps * kChannels / kThreads / kLength;
  static constexpr int kUnroll = 4;
  static constexpr bool flipped = false;
  const unsigned thread = unsigned(opaque(int(threadIdx.x)));

  TRIFUSE_DEVICE explicit ChannelFast(const ScanArgs&) {}
  TRIFUSE_DEVICE int channel(int) const { return int(thread % kPairs * 2); }
  TRIFUSE_DEVICE int step(int j) const { return int(unsigned(j) * (kThreads / kPairs) + thread / kPairs); }
  TRIFUSE_DEVICE static int64_t to_next(const Sequence& s) { return int64_t(kThreads / kPairs) * s.step; }
  TRIFUSE_DEVICE static int own(int, int i) { return i; }
};

constexpr int kMaxOwnChannels = 4;

template <typename T, int kLength>
struct alignas(sizeof(T) * kLength) Vector {
  T v[kLength];
};

template <class Map>
TRIFUSE_DEVICE bool inside(const Map& map, const Block& block, int steps, int j, int i) {
  return map.step(j) + (Map::kAlongTime ? i : 0) < steps && map.channel(j) + (Map::kAlongTime ? 0 : i) < block.channels;
}

// This thread's first vector of a tile; to_next leads from each to the next.
template <typename T, class Map>
TRIFUSE_DEVICE T* first_element(const Map& map, const Sequence& s, const Block& block, int64_t step0) {
  return static_cast<T*>(s.ptr) + sequence_offset(s, block.batch, block.channel0 + map.channel(0), step0 + map.step(0));
}

// From a vector's first element to the one at the lowest address.
template <class Map>
TRIFUSE_DEVICE int64_t to_lowest(const Map& map, const Sequence& s) {
  return map.flipped ? (Map::kLength - 1) * s.step : 0;
}

template <class Map>
TRIFUSE_DEVICE void in_order(const Map& map, float (&x)[Map::kLength]) {
  if constexpr (Map::kAlongTime) {
#pragma unroll
    for (int i = 0; i < Map::kLength / 2; ++i) {
      const float swapped = x[i];
      x[i] = map.flipped ? x[Map::kLength - 1 - i] : x[i];
      x[Map::kLength - 1 - i] = map.flipped ? swapped : x[Map::kLength - 1 - i];
    }
  }
}

// Starts the copy of this thread's elements of a tile into its own slots. Outside: zero.
template <class Map, typename T>
TRIFUSE_DEVICE void stage(const Map& map, const Sequence& s, const Block& block, int64_t step0, int steps, T* slots) {
  constexpr int kLength = Map::kLength;
  const T* from = first_element<T>(map, s, block, step0);
  T* slot = slots + map.thread * kLength;
#pragma unroll Map::kUnroll
  for (int j = 0; j < Map::kVectors; ++j, from += Map::to_next(s), slot += kThreads * kLength) {
    if (s.vectors && inside(map, block, steps, j, kLength - 1)) {
      async_copy<kLength* int(sizeof(T))>(slot, from + to_lowest(map, s));
    } else {
      const int64_t stride = Map::kAlongTime ? s.step : s.dim;
#pragma unroll
      for (int i = 0; i < kLength; ++i) {
        const T x = inside(map, block, steps, j, i) ? from[i * stride] : from_float<T>(0.0f);
        slot[map.flipped ? kLength - 1 - i : i] = x;
      }
    }
  }
}

template <class Map, typename T>
TRIFUSE_DEVICE void read_staged(const Map& map, const T* slots, int j, float (&x)[Map::kLength]) {
  using V = Vector<T, Map::kLength>;
  const V raw = *reinterpret_cast<const V*>(slots + (unsigned(j) * kThreads + map.thread) * Map::kLength);
#pragma unroll
  for (int i = 0; i < Map::kLength; ++i) x[i] = to_float(raw.v[i]);
  in_order(map, x);
}

// Writes a vector, whose first element is `to`; changes x.
template <class Map, typename T>
TRIFUSE_DEVICE void write_vector(const Map& map, const Sequence& s, const Block& block, int steps, int j, T* to,
                                 float (&x)[Map::kLength]) {
  constexpr int kLength = Map::kLength;
  if (s.vectors && inside(map, block, steps, j, kLength - 1)) {
    in_order(map, x);
    Vector<T, kLength> raw;
#pragma unroll
    for (int i = 0; i < kLength; ++i) raw.v[i] = from_float<T>(x[i]);
    *reinterpret_cast<Vector<T, kLength>*>(to + to_lowest(map, s)) = raw;
  } else {
    const int64_t stride = Map::kAlongTime ? s.step : s.dim;
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      if (inside(map, block, steps, j, i)) to[i * stride] = from_float<T>(x[i]);
    }
  }
}

// A per-channel weight of this thread's elements, 0 without one; to be loaded before each vector.
template <class Map>
struct Weight {
  float w[Map::kAlongTime ? 1 : 2];

  TRIFUSE_DEVICE Weight(const Map& map, const float* from, const Block& block) {
    if constexpr (!Map::kAlongTime) {
#pragma unroll
      for (int i = 0; i < 2; ++i) w[i] = one(from, block, map.channel(0) + i);
    }
  }
  TRIFUSE_DEVICE void load(const Map& map, const float* from, const Block& block, int j) {
    if constexpr (Map::kAlongTime) w[0] = one(from, block, map.channel(j));
  }
  TRIFUSE_DEVICE static float one(const float* from, const Block& block, int channel) {
    return from != nullptr && channel < block.channels ? from[block.channel0 + channel] : 0.0f;
  }
  TRIFUSE_DEVICE float of(int i) const { return w[Map::kAlongTime ? 0 : i]; }
};

// Per step and pair of channels, 16 bytes: dt and dt * u of the first channel, then of the second.
// The pair's place in its row depends on the step so that no access conflicts in its banks.
TRIFUSE_DEVICE int pair_slot(int step, int pair) {
  return (step * kPairs + (pair ^ int(unsigned(step) / kGroup % 8))) * 4;
}

// dt and dt * u of a vector to the tile.
template <class Map>
TRIFUSE_DEVICE void write_pairs(const Map& map, int j, const float (&dt)[Map::kLength],
                                const float (&drive)[Map::kLength], float* tile) {
  const int step = map.step(j), channel = map.channel(j);
  if constexpr (Map::kAlongTime) {
#pragma unroll
    for (int i = 0; i < Map::kLength; ++i) {
      float* slot = tile + pair_slot(step + i, channel / 2) + channel % 2 * 2;
      *reinterpret_cast<float2*>(slot) = make_float2(dt[i], drive[i]);
    }
  } else {
    *reinterpret_cast<float4*>(tile + pair_slot(step, channel / 2)) = make_float4(dt[0], drive[0], dt[1], drive[1]);
  }
}

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
    float* to = p.split_decay + ((block.batch * p.splits + block.split) * p.dim + block.channel0 + channel()) * 2;
    to[0] = sum;
    to[1] = begins;
  }
};

}  // namespace trifuse::cuda

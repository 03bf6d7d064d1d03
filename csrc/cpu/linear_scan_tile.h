// Tiles of the linear scan: a few steps of a vector of lanes, whatever the layout they are read from.
// A lane is one channel of one batch item, or a piece of its time.
#pragma once

#include "isa.h"
#include "trifuse/linear_scan.h"
#include "trifuse/simd.h"

namespace trifuse::cpu {
namespace {

constexpr int kTileSteps = 16;

// E is float or double, the type of a tile; S the type in memory, of a number or of half a complex one.
template <class E, bool kComplex>
struct Tile {
  alignas(64) E part[kComplex ? 2 : 1][kTileSteps][kLanes<E>];
};

// States are computed in double: a decay of size one keeps every rounding error, and memory is waited for anyway.
template <class E>
constexpr int kParts = sizeof(double) / sizeof(E);
template <class E>
struct Wide {
  Vec<double> v[kParts<E>];
};

template <class E>
TRIFUSE_INLINE Wide<E> widen(const E* p) {
  typedef E Piece __attribute__((vector_size(kVectorBytes / kParts<E>)));
  Wide<E> x;
#pragma GCC unroll 2
  for (int i = 0; i < kParts<E>; ++i) {
    Piece piece;
    __builtin_memcpy(&piece, p + i * kLanes<double>, sizeof piece);
    x.v[i] = __builtin_convertvector(piece, Vec<double>);
  }
  return x;
}
template <class E>
TRIFUSE_INLINE void narrow(E* p, const Wide<E>& x) {
  typedef E Piece __attribute__((vector_size(kVectorBytes / kParts<E>)));
#pragma GCC unroll 2
  for (int i = 0; i < kParts<E>; ++i) {
    const Piece piece = __builtin_convertvector(x.v[i], Piece);
    __builtin_memcpy(p + i * kLanes<double>, &piece, sizeof piece);
  }
}

// Even and odd elements of two vectors, and back: real and imaginary parts.
template <class E, size_t... I>
TRIFUSE_INLINE void split_pairs(Vec<E>& x, Vec<E>& y, std::index_sequence<I...>) {
  const Vec<E> re = __builtin_shufflevector(x, y, int(2 * I)...);
  const Vec<E> im = __builtin_shufflevector(x, y, int(2 * I + 1)...);
  x = re;
  y = im;
}
template <class E, size_t... I>
TRIFUSE_INLINE void join_pairs(Vec<E>& re, Vec<E>& im, std::index_sequence<I...>) {
  constexpr int lanes = kLanes<E>;
  const Vec<E> x = __builtin_shufflevector(re, im, int(I / 2 + I % 2 * lanes)...);
  const Vec<E> y = __builtin_shufflevector(re, im, int((I + lanes) / 2 + I % 2 * lanes)...);
  re = x;
  im = y;
}

// kLanes<E> neighbours in memory as real and (of complex numbers) imaginary parts.
template <class E, bool kComplex, class S>
TRIFUSE_INLINE void load_neighbours(const S* p, Vec<E>& re, Vec<E>& im) {
  re = load_as<E>(p);
  if constexpr (kComplex) {
    im = load_as<E>(p + kLanes<E>);
    split_pairs<E>(re, im, std::make_index_sequence<kLanes<E>>());
  }
}
template <class E, bool kComplex, class S>
TRIFUSE_INLINE void store_neighbours(S* p, Vec<E> re, Vec<E> im) {
  if constexpr (kComplex) {
    join_pairs<E>(re, im, std::make_index_sequence<kLanes<E>>());
    store_as<E>(p + kLanes<E>, im);
  }
  store_as<E>(p, re);
}

// The lanes of a group: lanes [first, count) own what they compute; those before repeat lanes of the group
// before (so that a group's channels are neighbours in memory), those behind repeat lane `first`.
template <class E>
struct Lanes {
  int first = 0, count = 0;
  int64_t batch[kLanes<E>], channel[kLanes<E>], start[kLanes<E>];
  int64_t state[kLanes<E>];  // index of the lane's state
  int64_t piece[kLanes<E>];  // index of the lane's piece of time, counted over all rows
  bool inner[kLanes<E>];     // the scan comes from a piece of time before
};

// One sequence tensor as the lanes of a group see it. Offsets and strides count numbers, complex or real.
template <class E, class S, bool kComplex>
struct Operand {
  static constexpr int kSize = kComplex ? 2 : 1;
  S* base;
  int64_t time, offset[kLanes<E>];
  int first, count;
  bool side_by_side, same;

  Operand(const SeqView& view, const Lanes<E>& lanes)
      : base(static_cast<S*>(view.ptr)), time(view.time), first(lanes.first), count(lanes.count) {
    side_by_side = count == kLanes<E>;
    same = true;
    for (int i = 0; i < kLanes<E>; ++i) {
      offset[i] = lanes.batch[i] * view.batch + lanes.channel[i] * view.dim + lanes.start[i] * view.time;
      side_by_side = side_by_side && offset[i] == offset[0] + i;
      same = same && offset[i] == offset[0];
    }
  }
  // Every lane owns its number, and the numbers of a step are neighbours.
  bool neighbours() const { return side_by_side && first == 0; }
  TRIFUSE_INLINE S* at(int lane, int64_t t) const { return base + kSize * (offset[lane] + t * time); }

  TRIFUSE_INLINE void prefetch(int64_t t) const {
    const char* p = reinterpret_cast<const char*>(at(0, t));
    for (size_t i = 0; i < sizeof(S) * kSize * kLanes<E>; i += 64)
      __builtin_prefetch(p + i, 0, 2);  // rows 4096 bytes apart share a set of the first cache
  }

  // rows [row, row + n) of the tile = times t, t + 1, ... of every lane.
  TRIFUSE_INLINE void load(Tile<E, kComplex>& tile, int64_t t, int n, int row, int64_t ahead) const {
    if (n > kTileSteps - row) __builtin_unreachable();  // else GCC warns of rows past the end
    if (side_by_side) return load_rows(tile, t, n, row);
    int done = 0;
    if (time == 1 && !same) done = load_transposed(tile, t, n, row, ahead);
    for (int s = done; s < n; ++s) load_step(tile, t + s, row + s, s > 0 && time == 0);
  }
  TRIFUSE_INLINE void load_step(Tile<E, kComplex>& tile, int64_t t, int row, bool as_before) const {
    for (int k = 0; k < kSize; ++k) {
      E* to = tile.part[k][row];
      if (as_before) {
        store<E>(to, trifuse::load<E>(tile.part[k][row - 1]));
      } else if (same) {
        store<E>(to, splat<E>(scalar_as<E>(at(0, t)[k])));
      } else {
        for (int i = 0; i < kLanes<E>; ++i) to[i] = scalar_as<E>(at(i, t)[k]);
      }
    }
  }
  TRIFUSE_INLINE void load_rows(Tile<E, kComplex>& tile, int64_t t, int n, int row) const {
    for (int s = 0; s < n; ++s) {
      Vec<E> re, im;
      load_neighbours<E, kComplex>(at(0, t + s), re, im);
      store<E>(tile.part[0][row + s], re);
      if constexpr (kComplex) store<E>(tile.part[1][row + s], im);
    }
  }
  TRIFUSE_INLINE int load_transposed(Tile<E, kComplex>& tile, int64_t t, int n, int row, int64_t ahead) const {
    int s = 0;
    for (; s + kLanes<E> <= n; s += kLanes<E>) {
      Vec<E> re[kLanes<E>], im[kLanes<E>];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes<E>; ++i) {
        __builtin_prefetch(at(i, t + s + ahead));
        load_neighbours<E, kComplex>(at(i, t + s), re[i], im[i]);
      }
      transpose<E>(re);
      if constexpr (kComplex) transpose<E>(im);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes<E>; ++i) {
        store<E>(tile.part[0][row + s + i], re[i]);
        if constexpr (kComplex) store<E>(tile.part[1][row + s + i], im[i]);
      }
    }
    return s;
  }

  // The other way; only the lanes that own their numbers are written.
  TRIFUSE_INLINE void store_tile(const Tile<E, kComplex>& tile, int64_t t, int n) const {
    if (side_by_side) return store_rows(tile, t, n);
    const int done = time == 1 ? store_transposed(tile, t, n) : 0;
    for (int s = done; s < n; ++s) {
      for (int i = first; i < count; ++i) {
        for (int k = 0; k < kSize; ++k) at(i, t + s)[k] = scalar_from<S, E>(tile.part[k][s][i]);
      }
    }
  }
  TRIFUSE_INLINE void store_rows(const Tile<E, kComplex>& tile, int64_t t, int n) const {
    for (int s = 0; s < n; ++s) {
      const Vec<E> re = trifuse::load<E>(tile.part[0][s]), im = trifuse::load<E>(tile.part[kSize - 1][s]);
      if (first == 0) {
        store_neighbours<E, kComplex>(at(0, t + s), re, im);
      } else {
        S row[kSize * kLanes<E>];
        store_neighbours<E, kComplex>(row, re, im);
        std::memcpy(at(first, t + s), row + kSize * first, (kLanes<E> - first) * kSize * sizeof(S));
      }
    }
  }
  TRIFUSE_INLINE int store_transposed(const Tile<E, kComplex>& tile, int64_t t, int n) const {
    int s = 0;
    for (; s + kLanes<E> <= n; s += kLanes<E>) {
      Vec<E> re[kLanes<E>], im[kLanes<E>];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes<E>; ++i) {
        re[i] = trifuse::load<E>(tile.part[0][s + i]);
        im[i] = trifuse::load<E>(tile.part[kSize - 1][s + i]);
      }
      transpose<E>(re);
      if constexpr (kComplex) transpose<E>(im);
      for (int i = first; i < count; ++i) store_neighbours<E, kComplex>(at(i, t + s), re[i], im[i]);
    }
    return s;
  }
};

}  // namespace
}  // namespace trifuse::cpu

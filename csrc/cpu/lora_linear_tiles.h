// Register tiles of the skinny products of an adapter. The factors that are read again and again, A and B, lie packed
// in scratch memory in the accumulation type, ranks by padded columns; rows of x, y, dy and dx are read and written
// once, in their own type.
#pragma once

#include <cstring>

#include "philox.h"
#include "rows.h"
#include "trifuse/simd.h"

namespace trifuse::cpu {
namespace {
namespace lora {

template <class T>
constexpr int kDotRows = kLanes<T> >= 8 ? 4 : 2;
template <class T>
constexpr int kDotRanks = kLanes<T> / kDotRows<T>;  // a tile of sums fills one vector
template <class T>
constexpr int kRankStep = kDotRanks<T> > 4 ? kDotRanks<T> : 4;  // ranks are padded to this

template <class T, class S>
TRIFUSE_INLINE Vec<T> load_part(const S* p, int64_t count) {
  S padded[kLanes<T>] = {};
  std::memcpy(padded, p, size_t(count) * sizeof(S));
  return load_as<T>(padded);
}
template <class T, class S>
TRIFUSE_INLINE void store_part(S* p, Vec<T> v, int64_t count) {
  S padded[kLanes<T>];
  store_as<T>(padded, v);
  std::memcpy(p, padded, size_t(count) * sizeof(S));
}

// Lane i: the sum of the lanes of v[i]. Pairs are folded into one another: half the shuffles of a transposition.
template <class T, int kDistance = 1>
TRIFUSE_INLINE Vec<T> lane_sums(Vec<T>* v) {
  constexpr int lanes = kLanes<T>, left = lanes / kDistance / 2;
  constexpr auto all = std::make_index_sequence<lanes>();
#pragma GCC unroll 8
  for (int i = 0; i < left; ++i) {
    v[i] = exchange<T, kDistance, false>(v[2 * i], v[2 * i + 1], all) +
           exchange<T, kDistance, true>(v[2 * i], v[2 * i + 1], all);
  }
  if constexpr (left > 1) return lane_sums<T, 2 * kDistance>(v);
  return v[0];
}

// Lane row * kDotRanks + rank: the sum over n columns of x[row] * a[rank]. Rows `ahead` are asked for meanwhile: they
// lie pages apart, where no cache sees them come.
template <class T, class S, bool kAhead>
TRIFUSE_INLINE Vec<T> dots(const S* const* x, const T* const* a, int64_t n, const S* const* ahead) {
  constexpr int rows = kDotRows<T>, ranks = kDotRanks<T>, lanes = kLanes<T>;
  Vec<T> sum[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) sum[i] = splat(T(0));
  int64_t c = 0;
  for (; c + lanes <= n; c += lanes) {
    Vec<T> right[ranks];
#pragma GCC unroll 4
    for (int r = 0; r < ranks; ++r) right[r] = load<T>(a[r] + c);
#pragma GCC unroll 4
    for (int m = 0; m < rows; ++m) {
      const Vec<T> left = load_as<T>(x[m] + c);
      if (kAhead) __builtin_prefetch(ahead[m] + c);
#pragma GCC unroll 4
      for (int r = 0; r < ranks; ++r) sum[m * ranks + r] += left * right[r];
    }
  }
  if (c < n) {
    for (int m = 0; m < rows; ++m) {
      const Vec<T> left = load_part<T>(x[m] + c, n - c);
      for (int r = 0; r < ranks; ++r) sum[m * ranks + r] += left * load_part<T>(a[r] + c, n - c);
    }
  }
  return lane_sums<T>(sum);
}

// out[m][r] = the dots of rows x[0 .. rows) with the ranks a[0 .. ranks), added to what is there if `add`. Where rows
// or ranks do not fill a tile their last one fills in.
template <class T, class S>
void all_dots(const S* const* x, int64_t rows, const T* const* a, int64_t ranks, int64_t n, T* const* out,
              bool add = false, const S* const* next = nullptr) {
  constexpr int tile_rows = kDotRows<T>, tile_ranks = kDotRanks<T>;
  for (int64_t m = 0; m < rows; m += tile_rows) {
    const S* left[tile_rows];
    const S* ahead[tile_rows];
    for (int i = 0; i < tile_rows; ++i) {
      left[i] = x[std::min<int64_t>(m + i, rows - 1)];
      ahead[i] = next && m + tile_rows >= rows ? next[i] : x[std::min<int64_t>(m + i + tile_rows, rows - 1)];
    }
    for (int64_t r = 0; r < ranks; r += tile_ranks) {
      const T* right[tile_ranks];
      for (int i = 0; i < tile_ranks; ++i) right[i] = a[std::min<int64_t>(r + i, ranks - 1)];
      T sums[kLanes<T>];
      store<T>(sums, r == 0 ? dots<T, S, true>(left, right, n, ahead) : dots<T, S, false>(left, right, n, ahead));
      for (int64_t i = 0; i < std::min<int64_t>(tile_rows, rows - m); ++i) {
        for (int64_t j = 0; j < std::min<int64_t>(tile_ranks, ranks - r); ++j) {
          T& to = out[m + i][r + j];
          to = sums[i * tile_ranks + j] + (add ? to : T(0));
        }
      }
    }
  }
}

// What one pass does to a chunk of columns of up to kBlockRows rows: `factors` (rows, ranks) against `packed` (ranks,
// columns).
template <class T>
struct Block {
  const T* factors = nullptr;
  int64_t factors_ld = 0;
  int64_t rows = 0;
  const T* packed = nullptr;  // (ranks, ld), columns padded with zeros
  int64_t ld = 0;
  int64_t ranks = 0;
  int64_t columns = 0;
  const T* base = nullptr;         // (columns,) padded: what is added to every row, or null
  const uint64_t* kept = nullptr;  // (rows, words): what dropout keeps of every row, or null
  int64_t words = 0;
  T keep_scale = 1;
};

// out[m] = base + factors[m] packed, for kRows rows of one to kVectors vectors of columns.
template <class T, class S, int kRows, int kVectors>
TRIFUSE_INLINE void expand_tile(const Block<T>& b, S* const* out, int64_t m, int64_t c, int64_t part) {
  constexpr int lanes = kLanes<T>;
  Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Vec<T> start = b.base ? load<T>(b.base + c + v * lanes) : splat(T(0));
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) sum[i][v] = start;
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(out[m + i] + c + (v + kVectors) * lanes, 1);  // the next tile
  }
  const T* f = b.factors + m * b.factors_ld;
  const T* packed = b.packed + c;
  for (int64_t r = 0; r < b.ranks; ++r, packed += b.ld, ++f) {
    Vec<T> right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = load<T>(packed + v * lanes);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> left = splat(f[i * b.factors_ld]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] += left * right[v];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = c + v * lanes;
      Vec<T> x = sum[i][v];
      if (b.kept) x = where_kept<T>(x * splat(b.keep_scale), b.kept[(m + i) * b.words + at / 64] >> (at % 64));
      if (part) {
        store_part<T>(out[m + i] + at, x, part);
      } else {
        store_as<T>(out[m + i] + at, x);
      }
    }
  }
}

template <class T, class S, int kVectors>
void expand_columns(const Block<T>& b, S* const* out, int64_t c, int64_t part) {
  int64_t m = 0;
  for (; m + 4 <= b.rows; m += 4) expand_tile<T, S, 4, kVectors>(b, out, m, c, part);
  for (; m < b.rows; ++m) expand_tile<T, S, 1, kVectors>(b, out, m, c, part);
}

// out[m] = base + factors[m] packed, what dropout leaves of it.
template <class T, class S>
void expand(const Block<T>& b, S* const* out) {
  constexpr int lanes = kLanes<T>;
  int64_t c = 0;
  for (; c + 4 * lanes <= b.columns; c += 4 * lanes) expand_columns<T, S, 4>(b, out, c, 0);
  for (; c + lanes <= b.columns; c += lanes) expand_columns<T, S, 1>(b, out, c, 0);
  if (c < b.columns) expand_columns<T, S, 1>(b, out, c, b.columns - c);
}

// The same, a few rows after another from end to end: where nothing is read beside them, the caches see them come.
template <class T, class S, int kRows>
TRIFUSE_INLINE void expand_rows(const Block<T>& b, S* const* out, int64_t m) {
  constexpr int lanes = kLanes<T>;
  int64_t c = 0;
  for (; c + 4 * lanes <= b.columns; c += 4 * lanes) expand_tile<T, S, kRows, 4>(b, out, m, c, 0);
  for (; c + lanes <= b.columns; c += lanes) expand_tile<T, S, kRows, 1>(b, out, m, c, 0);
  if (c < b.columns) expand_tile<T, S, kRows, 1>(b, out, m, c, b.columns - c);
}
template <class T, class S>
void expand_by_rows(const Block<T>& b, S* const* out) {
  int64_t m = 0;
  for (; m + 4 <= b.rows; m += 4) expand_rows<T, S, 4>(b, out, m);
  for (; m < b.rows; ++m) expand_rows<T, S, 1>(b, out, m);
}

// sums (ranks, ld) += factors^T x for kRanks ranks and kVectors vectors of columns.
template <class T, class S, int kRanks, int kVectors, bool kPart = false>
TRIFUSE_INLINE void gather_tile(const Block<T>& b, const S* const* x, T* sums, int64_t r, int64_t c) {
  constexpr int lanes = kLanes<T>;
  Vec<T> sum[kRanks][kVectors];
  T* to = sums + r * b.ld + c;
#pragma GCC unroll 8
  for (int j = 0; j < kRanks; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[j][v] = splat(T(0));
  }
  for (int64_t m = 0; m < b.rows; ++m) {
    const T* f = b.factors + m * b.factors_ld + r;
    Vec<T> right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      right[v] = kPart ? load_part<T>(x[m] + c, b.columns - c) : load_as<T>(x[m] + c + v * lanes);
      if (!kPart) __builtin_prefetch(x[m] + c + (v + 2 * kVectors) * lanes, 0, 2);  // into the second cache
    }
#pragma GCC unroll 8
    for (int j = 0; j < kRanks; ++j) {
      const Vec<T> left = splat(f[j]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[j][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kRanks; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      T* at = to + j * b.ld + v * lanes;
      store<T>(at, load<T>(at) + sum[j][v]);
    }
  }
}

template <class T, class S, int kRanks>
void gather_ranks(const Block<T>& b, const S* const* x, T* sums, int64_t r) {
  constexpr int lanes = kLanes<T>;
  // Rows often lie a power of two apart and then share a set of the first cache: many ranks to each vector that is
  // read.
  constexpr int vectors = kVectorBytes == 64 ? (kRanks == 8 ? 3 : 4) : kRanks == 8 ? 1 : 2;
  int64_t c = 0;
  for (; c + vectors * lanes <= b.columns; c += vectors * lanes) gather_tile<T, S, kRanks, vectors>(b, x, sums, r, c);
  for (; c + lanes <= b.columns; c += lanes) gather_tile<T, S, kRanks, 1>(b, x, sums, r, c);
  if (c < b.columns) gather_tile<T, S, kRanks, 1, true>(b, x, sums, r, c);
}

// sums (ranks, ld) += factors^T x over the rows of the block, ranks from `first` on; ranks are padded to fours.
template <class T, class S>
void gather(const Block<T>& b, const S* const* x, T* sums, int64_t first) {
  int64_t r = first / 4 * 4;
  for (; r + 8 <= b.ranks; r += 8) gather_ranks<T, S, 8>(b, x, sums, r);
  if (r < b.ranks) gather_ranks<T, S, 4>(b, x, sums, r);
}

// packed[r * ld + c] = B[(c) * row + r]: columns of B, rows of the packed factor.
template <class T, class S>
void pack_columns(T* packed, int64_t ld, const S* B, int64_t row, int64_t ranks, int64_t columns) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t c = 0;
  if constexpr (sizeof(S) == sizeof(T)) {
    // A vector may run past its row into the next, but not past the last.
    const int64_t readable = (columns - 1) * row + ranks;
    for (; c + lanes <= columns && ranks > 1; c += lanes) {
      const int64_t groups = (ranks + lanes - 1) / lanes;
      if ((c + lanes - 1) * row + groups * lanes > readable) break;
      for (int64_t r = 0; r < ranks; r += lanes) {
        Vec<T> tile[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) tile[i] = load<T>(reinterpret_cast<const T*>(B) + (c + i) * row + r);
        transpose<T>(tile);
        for (int64_t i = 0; i < std::min(lanes, ranks - r); ++i) store<T>(packed + (r + i) * ld + c, tile[i]);
      }
    }
  }
  for (int64_t r = 0; r < ranks; ++r) {
    for (int64_t j = c; j < columns; ++j) packed[r * ld + j] = scalar_as<T>(B[j * row + r]);
    for (int64_t j = columns; j < ld; ++j) packed[r * ld + j] = 0;
  }
}

// One row of any type as padded T.
template <class T, class S>
TRIFUSE_INLINE void load_row(T* to, int64_t ld, const S* from, int64_t columns) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t c = 0;
  for (; c + lanes <= columns; c += lanes) store<T>(to + c, load_as<T>(from + c));
  if (c < columns) store<T>(to + c, load_part<T>(from + c, columns - c)), c += lanes;
  for (; c < ld; ++c) to[c] = 0;
}

// One row of x as dropout leaves it.
template <class T, class S>
TRIFUSE_INLINE void load_kept(T* to, const S* from, int64_t columns, const uint64_t* kept, T keep_scale) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t c = 0;
  for (; c < columns; c += lanes) {
    const Vec<T> x = c + lanes <= columns ? load_as<T>(from + c) : load_part<T>(from + c, columns - c);
    store<T>(to + c, where_kept<T>(x * splat(keep_scale), kept[c / 64] >> (c % 64)));
  }
}

}  // namespace lora
}  // namespace
}  // namespace trifuse::cpu

// Matrix products on blocks in cache: register tiles of rows by vectors, the left factor read number by number (so
// by rows or by columns alike), the right one and the result by vectors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "trifuse/simd.h"

namespace trifuse::cpu {
namespace {

// A left factor a[row * row_stride + k * k_stride] and a right factor b[k * ld + column].
template <class T>
struct Factors {
  const T* a = nullptr;
  int64_t row_stride = 0, k_stride = 0;
  const T* b = nullptr;
  int64_t ld = 0;
  int64_t depth = 0;
};

constexpr int kTileRows = 6;
constexpr int64_t kPiece = 128;  // terms that are summed one by one
constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;

template <class T, int kRows, int kVectors>
struct Tile {
  Vec<T> sum[kRows][kVectors];

  TRIFUSE_INLINE void clear() {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = splat(T(0));
    }
  }

  // Rows [kFrom, kTo) of one k.
  template <int kFrom, int kTo>
  TRIFUSE_INLINE void add(const Factors<T>& f, const T* a, const T* b) {
    Vec<T> right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) right[v] = load<T>(b + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = kFrom; r < kTo; ++r) {
      const Vec<T> left = splat(a[r * f.row_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
  }
  TRIFUSE_INLINE void add_range(const Factors<T>& f, const T* a, const T* b, int64_t from, int64_t to) {
    a += from * f.k_stride;
    b += from * f.ld;
    for (int64_t k = from; k < to; ++k, a += f.k_stride, b += f.ld) add<0, kRows>(f, a, b);
  }
  // The kRows x kRows square on the diagonal, of which only one triangle exists.
  template <bool kLower, int kK = 0>
  TRIFUSE_INLINE void add_triangle(const Factors<T>& f, const T* a, const T* b) {
    if constexpr (kK < kRows) {
      add<kLower ? kK : 0, kLower ? kRows : kK + 1>(f, a + kK * f.k_stride, b + kK * f.ld);
      add_triangle<kLower, kK + 1>(f, a, b);
    }
  }
};

// What becomes of the numbers that c holds: c = a b, c += scale * a b, c = row_scale[row] * c + a b.
enum class Into { kFresh, kAdded, kRescaled };

// c = a b in one of these ways; columns are whole vectors.
template <class T>
struct BlockProduct {
  int64_t rows = 0, columns = 0;
  Factors<T> f;
  T* c = nullptr;
  int64_t c_ld = 0;
  T scale = 1;
  const T* row_scale = nullptr;
};

// The sum of the block is made apart and added to c at once: the error of a long sum grows with its length.
template <class T, Into kInto, int kRows, int kVectors>
__attribute__((noinline)) void block_tile(const BlockProduct<T>& p, int64_t row, int64_t column) {
  constexpr int lanes = kLanes<T>;
  Tile<T, kRows, kVectors> tile;
  tile.clear();
  const Factors<T> f = p.f;
  tile.add_range(f, f.a + row * f.row_stride, f.b + column, 0, f.depth);
  T* c = p.c + row * p.c_ld + column;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r, c += p.c_ld) {
    const Vec<T> s = splat(kInto == Into::kRescaled ? p.row_scale[row + r] : p.scale);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Vec<T> x = tile.sum[r][v];
      if constexpr (kInto == Into::kAdded) x = s * x + load<T>(c + v * lanes);
      if constexpr (kInto == Into::kRescaled) x = s * load<T>(c + v * lanes) + x;
      store<T>(c + v * lanes, x);
    }
  }
}

template <class T, Into kInto, int kVectors>
void block_columns(const BlockProduct<T>& p, int64_t column) {
  int64_t row = 0;
  for (; row + kTileRows <= p.rows; row += kTileRows) block_tile<T, kInto, kTileRows, kVectors>(p, row, column);
  if (row + 4 <= p.rows) block_tile<T, kInto, 4, kVectors>(p, row, column), row += 4;
  if (row + 2 <= p.rows) block_tile<T, kInto, 2, kVectors>(p, row, column), row += 2;
  if (row < p.rows) block_tile<T, kInto, 1, kVectors>(p, row, column);
}

template <class T, Into kInto>
void block_product(const BlockProduct<T>& p) {
  constexpr int lanes = kLanes<T>;
  int64_t column = 0;
  for (; column + kTileVectors * lanes <= p.columns; column += kTileVectors * lanes) {
    block_columns<T, kInto, kTileVectors>(p, column);
  }
  if constexpr (kTileVectors == 4) {
    if (column + 2 * lanes <= p.columns) block_columns<T, kInto, 2>(p, column), column += 2 * lanes;
  }
  if (column + lanes <= p.columns) block_columns<T, kInto, 1>(p, column);
}

// c = a b of any depth, in pieces of kPiece terms.
template <class T>
void long_product(const BlockProduct<T>& whole) {
  const int64_t depth = whole.f.depth;
  if (depth <= kPiece) return block_product<T, Into::kFresh>(whole);
  BlockProduct<T> p = whole;
  p.f.depth = kPiece;
  block_product<T, Into::kFresh>(p);
  for (int64_t done = kPiece; done < depth; done += kPiece) {
    p.f.a += kPiece * p.f.k_stride;
    p.f.b += kPiece * p.f.ld;
    p.f.depth = std::min(depth - done, kPiece);
    block_product<T, Into::kAdded>(p);
  }
}

}  // namespace
}  // namespace trifuse::cpu

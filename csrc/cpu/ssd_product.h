// Matrix products of ssd on blocks in cache, with the bands and scales that its chunks need.
#pragma once

#include <algorithm>
#include <cstdint>

#include "product.h"

namespace trifuse::cpu {
namespace {
namespace ssd {

// Which of the second product's terms exist: all, those at or left of the diagonal, those at or right of it.
// The others are not read: what stands there may be anything, NaN included.
enum class Band { kAll, kLower, kUpper };

// c = scale * init + row_scale[row] * (first product) + (second product), each part optional.
// Columns are whole vectors; with a band the second product is square: k counts rows.
template <class T>
struct Product {
  int64_t rows = 0, columns = 0;
  T* c = nullptr;
  int64_t c_ld = 0;
  const T* init = nullptr;
  int64_t init_ld = 0;
  T scale = 1;
  Factors<T> first;
  const T* row_scale = nullptr;
  Factors<T> second;
  Band band = Band::kAll;
};

template <class T, int kRows, int kVectors>
__attribute__((noinline)) void multiply_tile(const Product<T>& p, int64_t row, int64_t column) {
  Tile<T, kRows, kVectors> tile;
  constexpr int lanes = kLanes<T>;
  tile.clear();
  if (p.first.depth > 0) {
    const Factors<T> f = p.first;
    tile.add_range(f, f.a + row * f.row_stride, f.b + column, 0, f.depth);
    if (p.row_scale) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> s = splat(p.row_scale[row + r]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) tile.sum[r][v] *= s;
      }
    }
  }
  if (p.init) {
    const Vec<T> s = splat(p.scale);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        tile.sum[r][v] += s * load<T>(p.init + (row + r) * p.init_ld + column + v * lanes);
      }
    }
  }
  if (p.second.depth > 0) {
    const Factors<T> f = p.second;
    const T* a = f.a + row * f.row_stride;
    const T* b = f.b + column;
    if (p.band == Band::kAll) {
      tile.add_range(f, a, b, 0, f.depth);
    } else if (p.band == Band::kLower) {
      tile.add_range(f, a, b, 0, row);
      tile.template add_triangle<true>(f, a + row * f.k_stride, b + row * f.ld);
    } else {
      tile.template add_triangle<false>(f, a + row * f.k_stride, b + row * f.ld);
      tile.add_range(f, a, b, row + kRows, f.depth);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store<T>(p.c + (row + r) * p.c_ld + column + v * lanes, tile.sum[r][v]);
  }
}

template <class T, int kVectors>
void multiply_columns(const Product<T>& p, int64_t row, int64_t column) {
  for (; row + kTileRows <= p.rows; row += kTileRows) multiply_tile<T, kTileRows, kVectors>(p, row, column);
  if (row + 4 <= p.rows) multiply_tile<T, 4, kVectors>(p, row, column), row += 4;
  if (row + 2 <= p.rows) multiply_tile<T, 2, kVectors>(p, row, column), row += 2;
  if (row < p.rows) multiply_tile<T, 1, kVectors>(p, row, column);
}

template <class T>
void multiply_once(const Product<T>& p, bool triangle) {
  constexpr int lanes = kLanes<T>;
  int64_t column = 0;
  const auto first_row = [&] { return triangle ? column : 0; };
  for (; column + kTileVectors * lanes <= p.columns; column += kTileVectors * lanes) {
    multiply_columns<T, kTileVectors>(p, first_row(), column);
  }
  if constexpr (kTileVectors == 4) {
    if (column + 2 * lanes <= p.columns) multiply_columns<T, 2>(p, first_row(), column), column += 2 * lanes;
  }
  if (column + lanes <= p.columns) multiply_columns<T, 1>(p, first_row(), column);
}

// With `triangle` only c at and left of the diagonal is made (a little beyond it too). A long first product is
// summed in pieces: the error of one sum grows with its length, and states may have a thousand numbers.
template <class T>
void multiply(Product<T> p, bool triangle = false) {
  for (Factors<T>& f = p.first; f.depth > kPiece; f.depth -= kPiece) {
    Product<T> piece = p;
    piece.first.depth = kPiece;
    piece.second.depth = 0;
    multiply_once(piece, triangle);
    f.a += kPiece * f.k_stride;
    f.b += kPiece * f.ld;
    p.init = p.c;
    p.init_ld = p.c_ld;
    p.scale = T(1);
  }
  multiply_once(p, triangle);
}

}  // namespace ssd
}  // namespace
}  // namespace trifuse::cpu

// out = round(weight + scale * B diag(p) A) on the CPU: register tiles of four rows by some vectors of columns, so that
// the weight is read once and written once, and ranks are summed in order.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "dtypes.h"
#include "isa.h"
#include "lora_update_rounding.h"
#include "pages.h"
#include "rows.h"
#include "trifuse/lora_update.h"

namespace trifuse::cpu {
namespace {
namespace update {

constexpr int kRows = 4;
constexpr int kVectors = kVectorBytes == 64 ? 4 : 2;
constexpr int64_t kBlockRows = 32;   // of a task: a multiple of kRows
constexpr int64_t kPanel = 1024;     // columns of a task: whole tiles of any instruction set
constexpr int64_t kSmall = 1 << 14;  // elements that one thread is done with before others have begun

// Four rows and some columns of the weight: `rows` of them exist.
template <class T, class S>
struct Tile {
  const S* weight;
  S* out;
  int64_t row, column;
  int64_t rows;
  const T* a;        // the columns of A
  const T* b;        // (rank, kRows): scale * B diag(p)
  int64_t part = 0;  // columns that exist, where they do not fill a vector
};

// Sums of squares, lane by lane.
template <class T>
struct Squares {
  Vec<T> update, lost;
};

template <class T, class S>
class Updater {
 public:
  // A: rows of acc numbers, `ld` apart.
  Updater(const LoraUpdateParams& p, const T* A, int64_t ld)
      : p_(p),
        A_(A),
        ld_(ld),
        seed_(p.seed ? uint64_t(*p.seed) : 0),
        factors_(kBlockRows * std::max<int64_t>(p.rank, 1)) {}

  // Rows [row, row + kBlockRows) and columns [column, column + kPanel) as far as they exist.
  template <class AdapterS>
  void block(int64_t row, int64_t column, double* sums) {
    const int64_t rows = std::min(kBlockRows, p_.rows - row);
    pack<AdapterS>(row, rows);
    if (sums) {
      walk<true>(row, rows, column, sums);
    } else {
      walk<false>(row, rows, column, nullptr);
    }
  }

 private:
  // factors[tile][rank][kRows], zero for rows that do not exist.
  template <class AdapterS>
  void pack(int64_t row, int64_t rows) {
    const AdapterS* B = static_cast<const AdapterS*>(p_.B) + row * p_.B_row;
    for (int64_t r = 0; r < p_.rank; ++r) {
      const T scale = p_.p ? T(p_.scale) * static_cast<const T*>(p_.p)[r] : T(p_.scale);
      for (int64_t i = 0; i < (rows + kRows - 1) / kRows * kRows; ++i) {
        const T b = i < rows ? scalar_as<T>(B[i * p_.B_row + r * p_.B_column]) : T(0);
        factors_[((i / kRows) * p_.rank + r) * kRows + i % kRows] = scale * b;
      }
    }
  }

  template <bool kMeasure>
  void walk(int64_t row, int64_t rows, int64_t column, double* sums) {
    if constexpr (sizeof(S) < sizeof(T)) {
      if (p_.seed)
        return p_.transposed ? tiles<kMeasure, 2>(row, rows, column, sums)
                             : tiles<kMeasure, 1>(row, rows, column, sums);
    }
    tiles<kMeasure, 0>(row, rows, column, sums);
  }

  template <bool kMeasure, int kRandom>
  void tiles(int64_t row, int64_t rows, int64_t column, double* sums) {
    constexpr int lanes = kLanes<T>;
    const int64_t end = std::min(column + kPanel, p_.columns);
    for (int64_t i = 0; i < rows; i += kRows) {
      Squares<T> squares{splat(T(0)), splat(T(0))};
      Tile<T, S> tile;
      tile.row = row + i;
      tile.rows = std::min<int64_t>(kRows, rows - i);
      tile.b = &factors_[i * p_.rank];
      int64_t c = column;
      const auto at = [&](int64_t part) {
        tile.column = c;
        tile.weight = static_cast<const S*>(p_.weight) + tile.row * p_.weight_row + c;
        tile.out = static_cast<S*>(p_.out) + tile.row * p_.out_row + c;
        tile.a = A_ + c;
        tile.part = part;
      };
      for (; c + kVectors * lanes <= end; c += kVectors * lanes)
        at(0), run<kMeasure, kRandom, kVectors, false>(tile, squares);
      for (; c + lanes <= end; c += lanes) at(0), run<kMeasure, kRandom, 1, false>(tile, squares);
      if (c < end) at(end - c), run<kMeasure, kRandom, 1, true>(tile, squares);
      if constexpr (kMeasure) {
        for (int l = 0; l < lanes; ++l) {
          sums[0] += double(squares.update[l]);
          sums[1] += double(squares.lost[l]);
        }
      }
    }
  }

  template <bool kPart, class E>
  TRIFUSE_INLINE static Vec<T> read(const E* from, int64_t part) {
    if constexpr (kPart) {
      E padded[kLanes<T>] = {};
      std::memcpy(padded, from, size_t(part) * sizeof(E));
      return load_sequence<T>(padded);
    }
    return load_sequence<T>(from);
  }

  template <bool kMeasure, int kRandom, int kWidth, bool kPart>
  TRIFUSE_INLINE void run(const Tile<T, S>& tile, Squares<T>& squares) {
    constexpr int lanes = kLanes<T>;
    Vec<T> sum[kRows][kWidth];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kWidth; ++v) sum[i][v] = splat(T(0));
    }
    const T *a = tile.a, *b = tile.b;
    for (int64_t r = 0; r < p_.rank; ++r, a += ld_, b += kRows) {
      Vec<T> right[kWidth];
#pragma GCC unroll 4
      for (int v = 0; v < kWidth; ++v) right[v] = read<kPart>(a + v * lanes, tile.part);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Vec<T> left = splat(b[i]);
#pragma GCC unroll 4
        for (int v = 0; v < kWidth; ++v) sum[i][v] += left * right[v];
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) {
      Words words[4];
      if constexpr (kRandom == 1) draw(words, seed_, tile.row, tile.column + v * lanes);
      if constexpr (kRandom == 2) draw_transposed(words, seed_, tile.row, tile.column + v * lanes);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        if (i >= tile.rows) break;
        const Vec<T> before = read<kPart>(tile.weight + i * p_.weight_row + v * lanes, tile.part);
        S padded[lanes];
        S* to = kPart ? padded : tile.out + i * p_.out_row + v * lanes;
        if constexpr (kRandom != 0) {
          store_random<S>(to, before + sum[i][v], words[i]);
        } else {
          store_sequence<S, T>(to, before + sum[i][v]);
        }
        if constexpr (kMeasure) {
          const Vec<T> lost = (load_sequence<T>(to) - before) - sum[i][v];
          squares.update += sum[i][v] * sum[i][v];
          squares.lost += lost * lost;
        }
        if constexpr (kPart) std::memcpy(tile.out + i * p_.out_row, padded, size_t(tile.part) * sizeof(S));
      }
    }
  }

  const LoraUpdateParams& p_;
  const T* A_;
  int64_t ld_;
  uint64_t seed_;
  std::vector<T> factors_;
};

// A as rows of acc numbers: where they lie, or in `packed`.
template <class T, class AdapterS>
const T* rows_of_A(const LoraUpdateParams& p, std::vector<T>& packed, int64_t& ld) {
  const AdapterS* A = static_cast<const AdapterS*>(p.A);
  if (sizeof(AdapterS) == sizeof(T) && p.A_column == 1) {
    ld = p.A_row;
    return reinterpret_cast<const T*>(A);
  }
  ld = padded<T>(p.columns);
  packed.resize(p.rank * ld);
  if (p.A_column == 1) {
    load_rows<T>(packed.data(), ld, A, p.A_row, 1, p.rank, p.columns);
  } else {
    for (int64_t c = 0; c < p.columns; ++c) {
      for (int64_t r = 0; r < p.rank; ++r) packed[r * ld + c] = scalar_as<T>(A[r * p.A_row + c * p.A_column]);
    }
  }
  return packed.data();
}

// Tasks and their sums depend on the shape alone, so a result does not depend on the number of threads.
template <class T, class S, class AdapterS>
void run(const LoraUpdateParams& p, const Threads& threads) {
  std::vector<T> packed;
  int64_t ld = 0;
  const T* A = rows_of_A<T, AdapterS>(p, packed, ld);
  if (p.out != p.weight && p.out_row == p.columns) {
    prefer_large_pages(p.out, p.rows * p.columns * int64_t(sizeof(S)));
  }
  const int64_t row_blocks = (p.rows + kBlockRows - 1) / kBlockRows, panels = (p.columns + kPanel - 1) / kPanel;
  const int64_t tasks = row_blocks * panels;
  std::vector<double> sums(p.sums ? 2 * tasks : 0);
  const auto body = [&](int64_t begin, int64_t end) {
    Updater<T, S> updater(p, A, ld);
    for (int64_t task = begin; task < end; ++task) {
      double* own = p.sums ? &sums[2 * task] : nullptr;
      updater.template block<AdapterS>(task % row_blocks * kBlockRows, task / row_blocks * kPanel, own);
    }
  };
  if (p.rows * p.columns <= kSmall) {
    body(0, tasks);
  } else {
    parallel(threads, tasks, body);
  }
  if (!p.sums) return;
  p.sums[0] = p.sums[1] = 0;
  for (int64_t task = 0; task < tasks; ++task) {
    p.sums[0] += sums[2 * task];
    p.sums[1] += sums[2 * task + 1];
  }
}

}  // namespace update
}  // namespace
}  // namespace trifuse::cpu

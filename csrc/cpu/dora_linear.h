// The columns of a matrix times their factors, the gradient of both, and the norms that factors are made of. A task is
// a group of whole rows, cut by the sizes alone; sums over rows are added group by group.
#pragma once

#include <algorithm>
#include <cmath>

#include "dora_linear_rows.h"
#include "isa.h"
#include "lora_linear_tiles.h"
#include "rows.h"
#include "trifuse/dora_linear.h"

namespace trifuse::cpu {
namespace {
namespace dora {

constexpr int64_t kGroups = 16;
constexpr int64_t kSummed = 64;  // rows that are summed one by one

inline int64_t rows_of_group(int64_t rows) { return std::max<int64_t>((rows + kGroups - 1) / kGroups, 8); }

// body(first, last) for every group of rows.
template <class Body>
void over_groups(int64_t rows, int64_t columns, const Threads& threads, const Body& body) {
  const int64_t step = rows_of_group(rows);
  Threads some = threads;
  if (rows * columns < 65536) some.count = 1;  // done before a second thread has woken up
  parallel(some, (rows + step - 1) / step, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i * step, std::min((i + 1) * step, rows));
  });
}

template <class T, class S>
void scale(const DoraParams& p, const Threads& threads) {
  constexpr int64_t lanes = kLanes<T>;
  const T* factors = static_cast<const T*>(p.factors);
  const S* bias = static_cast<const S*>(p.bias);
  over_groups(p.rows, p.columns, threads, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      const S* plain = static_cast<const S*>(p.plain) + m * p.columns;
      S* y = static_cast<S*>(p.y) + m * p.columns;
      int64_t c = 0;
      for (; c + lanes <= p.columns; c += lanes) {
        const Vec<T> start = bias ? load_as<T>(bias + c) : splat(T(0));
        store_as<T>(y + c, load<T>(factors + c) * load_as<T>(plain + c) + start);
      }
      for (; c < p.columns; ++c) {
        y[c] = scalar_from<S>(factors[c] * scalar_as<T>(plain[c]) + (bias ? scalar_as<T>(bias[c]) : T(0)));
      }
    }
  });
}

template <class T, class S>
void scale_backward(const DoraParams& p, const Threads& threads) {
  const int64_t step = rows_of_group(p.rows), groups = (p.rows + step - 1) / step;
  const int64_t ld = padded<T>(p.columns);
  Scratch memory(Scratch::bytes_of<T>(p.dfactors ? groups * 2 * ld : 0));
  T* sums = memory.take<T>(p.dfactors ? groups * 2 * ld : 0);
  over_groups(p.rows, p.columns, threads, [&](int64_t first, int64_t last) {
    T* total = p.dfactors ? sums + first / step * 2 * ld : nullptr;
    T* some = p.dfactors ? total + ld : nullptr;
    if (total) std::fill(total, total + 2 * ld, T(0));
    for (int64_t m = first; m < last; ++m) {
      scale_row<T, S>(p, static_cast<const S*>(p.dy) + m * p.columns, m, 0, p.columns, some);
      if (some && ((m - first) % kSummed == kSummed - 1 || m + 1 == last)) {
        for (int64_t c = 0; c < p.columns; ++c) total[c] += some[c], some[c] = 0;
      }
    }
  });
  if (!p.dfactors) return;
  T* dfactors = static_cast<T*>(p.dfactors);
  std::fill(dfactors, dfactors + p.columns, T(0));
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t c = 0; c < p.columns; ++c) dfactors[c] += sums[g * 2 * ld + c];
  }
}

template <class T, class S>
TRIFUSE_INLINE T sum_of_squares(const S* w, int64_t columns) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> squares[4] = {splat(T(0)), splat(T(0)), splat(T(0)), splat(T(0))};
  int64_t c = 0;
  for (; c + 4 * lanes <= columns; c += 4 * lanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec<T> x = load_as<T>(w + c + i * lanes);
      squares[i] += x * x;
    }
  }
  T total = sum_lanes<T>((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; c < columns; ++c) total += scalar_as<T>(w[c]) * scalar_as<T>(w[c]);
  return total;
}

// norm[n] = sqrt(sum w^2 + b (2 A w + A A^T b)), with b the row of B times the ranks' factors. A few rows of W at a
// time: the first cache keeps them from their products with A to their squares.
template <class T, class S, class B>
void norm(const DoraNormParams& p, const Threads& threads) {
  constexpr int group = lora::kDotRows<T>;
  const int64_t rank = p.rank, ld = padded<T>(p.columns) + kLanes<T>;
  constexpr bool convert = !std::is_same_v<T, B>;
  Scratch shared(Scratch::bytes_of<T>(convert ? rank * ld : 0) + Scratch::bytes_of<T>(rank * rank) +
                 2 * Scratch::bytes_of<const T*>(rank));
  T* packed = shared.take<T>(convert ? rank * ld : 0);
  T* gram = shared.take<T>(rank * rank);
  const T** rows_of_A = shared.take<const T*>(rank);
  T** rows_of_gram = shared.take<T*>(rank);
  for (int64_t r = 0; r < rank; ++r) {
    const B* from = static_cast<const B*>(p.A) + r * p.A_row;
    if constexpr (convert) {
      lora::load_row<T>(packed + r * ld, ld, from, p.columns);
      rows_of_A[r] = packed + r * ld;
    } else {
      rows_of_A[r] = from;
    }
    rows_of_gram[r] = gram + r * rank;
  }
  lora::all_dots<T, T>(rows_of_A, rank, rows_of_A, rank, p.columns, rows_of_gram);
  over_groups(p.rows, p.columns, threads, [&](int64_t first, int64_t last) {
    Scratch memory(Scratch::bytes_of<T>(rank) + Scratch::bytes_of<T>(group * rank));
    T* b = memory.take<T>(rank);
    T* mixed = memory.take<T>(group * rank);
    for (int64_t n = first; n < last; n += group) {
      const int64_t rows = std::min<int64_t>(group, last - n);
      const S* w[group];
      T* out[group];
      for (int64_t i = 0; i < rows; ++i) {
        w[i] = static_cast<const S*>(p.weight) + (n + i) * p.weight_row;
        out[i] = mixed + i * rank;
      }
      const S* next[group];
      for (int64_t i = 0; i < group; ++i) {
        next[i] = static_cast<const S*>(p.weight) + std::min(n + group + i, p.rows - 1) * p.weight_row;
      }
      lora::all_dots<T, S>(w, rows, rows_of_A, rank, p.columns, out, false, next);
      for (int64_t i = 0; i < rows; ++i) {
        const B* row = static_cast<const B*>(p.B) + (n + i) * p.B_row;
        for (int64_t r = 0; r < rank; ++r) {
          b[r] = scalar_as<T>(row[r]) * T(p.scale) * (p.p ? static_cast<const T*>(p.p)[r] : T(1));
        }
        T more = 0;
        for (int64_t r = 0; r < rank; ++r) {
          T of_rank = 2 * out[i][r];
          for (int64_t k = 0; k < rank; ++k) of_rank += gram[r * rank + k] * b[k];
          more += b[r] * of_rank;
        }
        const T total = sum_of_squares<T>(w[i], p.columns) + more;
        static_cast<T*>(p.norm)[n + i] = total > 0 ? std::sqrt(total) : (total == total ? T(0) : total);
      }
    }
  });
}

}  // namespace dora
}  // namespace
}  // namespace trifuse::cpu

// The columns of a matrix times their factors, the gradient of both, and the norms that factors are made of. A task is
// a group of whole rows, cut by the sizes alone; sums over rows are added group by group.
#pragma once

#include <algorithm>
#include <cmath>

#include "isa.h"
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
  constexpr int64_t lanes = kLanes<T>;
  const T* factors = static_cast<const T*>(p.factors);
  const int64_t step = rows_of_group(p.rows), groups = (p.rows + step - 1) / step;
  const int64_t ld = padded<T>(p.columns);
  Scratch memory(Scratch::bytes_of<T>(p.dfactors ? groups * 2 * ld : 0));
  T* sums = memory.take<T>(p.dfactors ? groups * 2 * ld : 0);
  over_groups(p.rows, p.columns, threads, [&](int64_t first, int64_t last) {
    T* total = p.dfactors ? sums + first / step * 2 * ld : nullptr;
    T* some = p.dfactors ? total + ld : nullptr;
    if (total) std::fill(total, total + 2 * ld, T(0));
    for (int64_t m = first; m < last; ++m) {
      const S* dy = static_cast<const S*>(p.dy) + m * p.columns;
      const S* plain = static_cast<const S*>(p.plain) + m * p.columns;
      S* dplain = static_cast<S*>(p.dplain) + m * p.columns;
      int64_t c = 0;
      for (; c + lanes <= p.columns; c += lanes) {
        const Vec<T> g = load_as<T>(dy + c);
        store_as<T>(dplain + c, load<T>(factors + c) * g);
        if (some) store<T>(some + c, load<T>(some + c) + g * load_as<T>(plain + c));
      }
      for (; c < p.columns; ++c) {
        const T g = scalar_as<T>(dy[c]);
        dplain[c] = scalar_from<S>(factors[c] * g);
        if (some) some[c] += g * scalar_as<T>(plain[c]);
      }
      if (some && ((m - first) % kSummed == kSummed - 1 || m + 1 == last)) {
        for (c = 0; c < p.columns; ++c) total[c] += some[c], some[c] = 0;
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

// norm[n] = sqrt(sum w^2 + b (2 mixed[n] + gram b)), with b the row of B times the ranks' factors.
template <class T, class S, class B>
void norm(const DoraNormParams& p, const Threads& threads) {
  constexpr int64_t lanes = kLanes<T>;
  const T *gram = static_cast<const T*>(p.gram), *mixed = static_cast<const T*>(p.mixed);
  over_groups(p.rows, p.columns, threads, [&](int64_t first, int64_t last) {
    Scratch memory(Scratch::bytes_of<T>(p.rank));
    T* b = memory.take<T>(p.rank);
    for (int64_t n = first; n < last; ++n) {
      const S* w = static_cast<const S*>(p.weight) + n * p.weight_row;
      Vec<T> squares[4] = {splat(T(0)), splat(T(0)), splat(T(0)), splat(T(0))};
      int64_t c = 0;
      for (; c + 4 * lanes <= p.columns; c += 4 * lanes) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Vec<T> x = load_as<T>(w + c + i * lanes);
          squares[i] += x * x;
        }
      }
      T total = sum_lanes<T>((squares[0] + squares[1]) + (squares[2] + squares[3]));
      for (; c < p.columns; ++c) total += scalar_as<T>(w[c]) * scalar_as<T>(w[c]);
      const B* row = static_cast<const B*>(p.B) + n * p.B_row;
      for (int64_t r = 0; r < p.rank; ++r) {
        b[r] = scalar_as<T>(row[r]) * T(p.scale) * (p.p ? static_cast<const T*>(p.p)[r] : T(1));
      }
      T more = 0;
      for (int64_t r = 0; r < p.rank; ++r) {
        T of_rank = 2 * mixed[n * p.rank + r];
        for (int64_t k = 0; k < p.rank; ++k) of_rank += gram[r * p.rank + k] * b[k];
        more += b[r] * of_rank;
      }
      total += more;
      static_cast<T*>(p.norm)[n] = total > 0 ? std::sqrt(total) : (total == total ? T(0) : total);
    }
  });
}

}  // namespace dora
}  // namespace
}  // namespace trifuse::cpu

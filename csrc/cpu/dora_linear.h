// The columns of a matrix times their factors, and the gradient of both. A task is a chunk of columns through all rows,
// so that a column is summed in one order whatever the threads.
#pragma once

#include <algorithm>
#include <memory>

#include "isa.h"
#include "rows.h"
#include "trifuse/dora_linear.h"

namespace trifuse::cpu {
namespace {
namespace dora {

constexpr int64_t kChunk = 256;
constexpr int64_t kSummed = 64;  // rows that are summed one by one

template <class Body>
void over_chunks(const DoraParams& p, const Threads& threads, const Body& body) {
  Threads some = threads;
  if (p.rows * p.columns < 65536) some.count = 1;  // done before a second thread has woken up
  parallel(some, (p.columns + kChunk - 1) / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i * kChunk, std::min((i + 1) * kChunk, p.columns));
  });
}

template <class T, class S>
void scale(const DoraParams& p, const Threads& threads) {
  constexpr int64_t lanes = kLanes<T>;
  const T* factors = static_cast<const T*>(p.factors);
  const S* bias = static_cast<const S*>(p.bias);
  over_chunks(p, threads, [&](int64_t from, int64_t to) {
    for (int64_t m = 0; m < p.rows; ++m) {
      const S* plain = static_cast<const S*>(p.plain) + m * p.columns;
      S* y = static_cast<S*>(p.y) + m * p.columns;
      int64_t c = from;
      for (; c + lanes <= to; c += lanes) {
        const Vec<T> start = bias ? load_as<T>(bias + c) : splat(T(0));
        store_as<T>(y + c, load<T>(factors + c) * load_as<T>(plain + c) + start);
      }
      for (; c < to; ++c) {
        y[c] = scalar_from<S>(factors[c] * scalar_as<T>(plain[c]) + (bias ? scalar_as<T>(bias[c]) : T(0)));
      }
    }
  });
}

template <class T, class S>
void scale_backward(const DoraParams& p, const Threads& threads) {
  constexpr int64_t lanes = kLanes<T>;
  const T* factors = static_cast<const T*>(p.factors);
  T* dfactors = static_cast<T*>(p.dfactors);
  over_chunks(p, threads, [&](int64_t from, int64_t to) {
    T sums[kChunk] = {}, some[kChunk];
    for (int64_t first = 0; first < p.rows; first += kSummed) {
      std::fill(some, some + kChunk, T(0));
      for (int64_t m = first; m < std::min(first + kSummed, p.rows); ++m) {
        const S* dy = static_cast<const S*>(p.dy) + m * p.columns;
        const S* plain = static_cast<const S*>(p.plain) + m * p.columns;
        S* dplain = static_cast<S*>(p.dplain) + m * p.columns;
        int64_t c = from;
        for (; c + lanes <= to; c += lanes) {
          const Vec<T> g = load_as<T>(dy + c);
          store_as<T>(dplain + c, load<T>(factors + c) * g);
          if (dfactors) store<T>(some + (c - from), load<T>(some + (c - from)) + g * load_as<T>(plain + c));
        }
        for (; c < to; ++c) {
          const T g = scalar_as<T>(dy[c]);
          dplain[c] = scalar_from<S>(factors[c] * g);
          some[c - from] += g * scalar_as<T>(plain[c]);
        }
      }
      for (int64_t c = 0; c < to - from; ++c) sums[c] += some[c];
    }
    if (dfactors) std::copy(sums, sums + (to - from), dfactors + from);
  });
}

}  // namespace dora
}  // namespace
}  // namespace trifuse::cpu

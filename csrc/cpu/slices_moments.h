// The mean and the variance of slices, block by block: two passes over a block in cache, the second of which also mends
// the mean, and blocks joined in double. Entries far from zero, or a first entry far from all others, cost no digits.
#pragma once

#include "slices_block.h"

namespace trifuse::cpu {
namespace {

// Of one strip; a row's stand in the first lane.
template <class E>
struct LaneMoments {
  alignas(64) double count[kLanes<E>] = {}, mean[kLanes<E>] = {}, squares[kLanes<E>] = {};

  // Adds a block of `steps` vectors, contiguous at x and keep; without kMasked every lane of it is an entry.
  template <bool kMasked>
  void add(const E* x, const E* keep, int64_t steps, bool columns) {
    LaneSums<E> sum, kept, rest, squared;
    sweep(steps, [&](int64_t from, int64_t to) {
      Vec<E> s = splat(E(0)), k = s;
      for (int64_t n = from; n < to; ++n) {
        s += load<E>(x + n * kLanes<E>);
        if (kMasked) k += load<E>(keep + n * kLanes<E>);
      }
      sum.add(s);
      kept.add(kMasked ? k : splat(E(to - from)));
    });
    if (!columns) {
      sum.join_row();
      kept.join_row();
    }
    alignas(64) E near[kLanes<E>];
    const int slices = columns ? kLanes<E> : 1;
    for (int i = 0; i < slices; ++i) near[i] = E(kept.lane[i] > 0 ? sum.lane[i] / kept.lane[i] : 0.0);
    const Vec<E> middle = columns ? load<E>(near) : splat(near[0]);
    sweep(steps, [&](int64_t from, int64_t to) {
      Vec<E> s = splat(E(0)), q = s;
      for (int64_t n = from; n < to; ++n) {
        Vec<E> d = load<E>(x + n * kLanes<E>) - middle;
        if (kMasked) d *= load<E>(keep + n * kLanes<E>);
        s += d;
        q += d * d;
      }
      rest.add(s);
      squared.add(q);
    });
    if (!columns) {
      rest.join_row();
      squared.join_row();
    }
    for (int i = 0; i < slices; ++i) {
      if (!(kept.lane[i] > 0)) continue;
      const double shift = rest.lane[i] / kept.lane[i];
      join(i, kept.lane[i], double(near[i]) + shift, squared.lane[i] - shift * rest.lane[i]);
    }
  }

 private:
  template <class F>
  TRIFUSE_INLINE static void sweep(int64_t steps, F&& f) {
    for (int64_t from = 0; from < steps; from += kChunk) f(from, std::min(from + kChunk, steps));
  }
  void join(int i, double n, double m, double q) {
    if (count[i] == 0) {
      count[i] = n;
      mean[i] = m;
      squares[i] = q > 0 || q != q ? q : 0;
      return;
    }
    const double total = count[i] + n, apart = m - mean[i];
    mean[i] += apart * (n / total);
    squares[i] += (q > 0 || q != q ? q : 0) + apart * apart * (count[i] / total * n);
    count[i] = total;
  }
};

}  // namespace
}  // namespace trifuse::cpu

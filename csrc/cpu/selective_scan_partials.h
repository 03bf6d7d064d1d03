// What the tasks of the backward selective scan leave in the workspace, and how it is summed over tasks.
#pragma once

#include "selective_scan_tile.h"

namespace trifuse::cpu {
namespace {

// Where the tasks leave what is summed over tasks: weights per batch item (or segment of time), and
// variable B and C per share of a group, both in the workspace.
template <class T>
struct Partials {
  int64_t k, numbers, weight_rows, shares;
  int64_t coefficient_size[2] = {0, 0};  // of one share
  T *A, *D, *bias, *constant[2], *variable[2];
  int64_t bytes;

  Partials(const SelectiveScanBwdParams& p, const Partition& part, int64_t segments)
      : k(p.complex ? 2 : 1), numbers(p.dim * p.dstate * k), weight_rows(p.batch * segments), shares(part.shares) {
    T* next = static_cast<T*>(p.workspace);
    const auto take = [&](int64_t count) {
      T* at = next;
      next += count;
      return at;
    };
    A = take(weight_rows * numbers);
    D = take(weight_rows * p.dim);
    bias = take(weight_rows * p.dim);
    const CoefView* views[2] = {&p.B, &p.C};
    for (int i = 0; i < 2; ++i) {
      constant[i] = views[i]->variable ? nullptr : take(weight_rows * numbers);
      if (views[i]->variable) coefficient_size[i] = p.batch * views[i]->groups * p.seqlen * p.dstate * k;
      variable[i] = take(shares * coefficient_size[i]);
    }
    bytes = (next - static_cast<T*>(p.workspace)) * int64_t(sizeof(T));
  }

  // Where B and C have different groups, a share may hold channels of some groups only; what it adds
  // to the others is zero.
  void clear_groups_of_other_shares(const SelectiveScanBwdParams& p, const Partition& part) const {
    const CoefView* views[2] = {&p.B, &p.C};
    for (int i = 0; i < 2; ++i) {
      if (!views[i]->variable || shares == 1 || views[i]->groups == part.groups) continue;
      for (int64_t j = 0; j < shares * coefficient_size[i]; ++j) variable[i][j] = 0;
    }
  }
};

// sum over rows of partial[row][i], always in the same order.
template <class T>
void sum_rows(const T* partial, int64_t rows, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) {
    T total = 0;
    for (int64_t row = 0; row < rows; ++row) total += partial[row * count + i];
    out[i] = total;
  }
}

// The shares of variable dB or dC, kept as [b][group][t][n], into the gradient's own strides.
template <class T>
void sum_shares(const SelectiveScanBwdParams& p, const Partials<T>& partials, const CoefView& view, int which,
                const Threads& threads) {
  const int64_t k = partials.k, count = p.dstate * k, size = partials.coefficient_size[which];
  parallel(threads, p.batch * view.groups, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      T* out = static_cast<T*>(view.ptr) + (row / view.groups * view.batch + row % view.groups * view.group) * k;
      const T* in = partials.variable[which] + row * p.seqlen * count;
      for (int64_t t = 0; t < p.seqlen; ++t) {
        for (int64_t i = 0; i < count; ++i) {
          T total = 0;
          for (int64_t s = 0; s < partials.shares; ++s) total += in[s * size + t * count + i];
          out[(t * view.time + i / k * view.state) * k + i % k] = total;
        }
      }
    }
  });
}

}  // namespace
}  // namespace trifuse::cpu

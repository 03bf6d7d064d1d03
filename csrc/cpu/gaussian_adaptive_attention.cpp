// The CPU entry points of gaussian_adaptive_attention for one instruction set: rows or columns, and which groups of
// slices a task takes.
#include <vector>

#include "gaussian_adaptive_attention_bwd.h"
#include "gaussian_adaptive_attention_fwd.h"
#include "isa.h"
#include "pages.h"

#ifndef TRIFUSE_ISA
#error "compile with -DTRIFUSE_ISA=<namespace of this instruction set>"
#endif

namespace trifuse::cpu {
namespace {

// Groups of slices are handed out in this many portions at most: a sum over slices is made of their sums, in their
// order, and does not depend on the number of threads. Where they are few, so are the heads handed out.
constexpr int64_t kMostPortions = 512, kFewPortions = 32, kMostNeighbours = 64;

template <class E, bool kRows>
class Portions {
 public:
  Portions(const AttentionShape& p, const Cutting<E, kRows>& cutting) : heads_(p.heads), groups_(cutting.groups()) {
    each_ = std::max<int64_t>(1, (groups_ + kMostPortions - 1) / kMostPortions);
    // Strips of columns side by side share the pages of memory that a head lies in.
    const int64_t neighbours = kRows ? 1 : std::min(cutting.strips(), kMostNeighbours);
    if (groups_ / neighbours * heads_ >= kFewPortions) each_ = std::max(each_, neighbours);
    count_ = (groups_ + each_ - 1) / each_;
    together_ = count_ >= kFewPortions;
  }
  int64_t count() const { return count_; }
  int64_t tasks() const { return together_ ? count_ : count_ * heads_; }

  // Calls body(group, head, portion) for all that a task takes.
  template <class Body>
  void each(int64_t task, Body&& body) const {
    const int64_t portion = together_ ? task : task / heads_;
    const int64_t first = together_ ? 0 : task % heads_, last = together_ ? heads_ : first + 1;
    const int64_t begin = portion * each_, end = std::min(groups_, begin + each_);
    if (kRows) {
      for (int64_t g = begin; g < end; ++g) {
        for (int64_t head = first; head < last; ++head) body(g, head, portion);
      }
    } else {
      for (int64_t head = first; head < last; ++head) {
        for (int64_t g = begin; g < end; ++g) body(g, head, portion);
      }
    }
  }

 private:
  int64_t heads_, groups_, each_, count_;
  bool together_;
};

template <class E>
std::vector<Head> heads_of(const AttentionShape& p) {
  std::vector<Head> heads;
  for (int64_t h = 0; h < p.heads; ++h) heads.push_back(head_of<E>(p, h));
  return heads;
}

template <class E, class S, bool kRows>
void forward(const GaussianAdaptiveAttentionParams& p, const Threads& threads) {
  const Cutting<E, kRows> cutting(p);
  const Portions<E, kRows> portions(p, cutting);
  const std::vector<Head> heads = heads_of<E>(p);
  parallel(threads, portions.tasks(), [&](int64_t begin, int64_t end) {
    ForwardTile<E, S, kRows> tile(p, cutting);
    for (int64_t task = begin; task < end; ++task) {
      portions.each(task, [&](int64_t group, int64_t head, int64_t) { tile.run(heads[head], head, group); });
    }
  });
}

template <class E>
void write_parameters(const GaussianAdaptiveAttentionBwdParams& p, int64_t h, const Head& head,
                      const CurveGradient& d) {
  for (int64_t k = h * p.gaussians; k < (h + 1) * p.gaussians; ++k) {
    const double away = head.beta - double(static_cast<const E*>(p.mean_offset)[k]);
    const double inverse = 1 / double(static_cast<const E*>(p.width)[k]), square = inverse * inverse;
    const double squares = d.second + away * (2 * d.first + away * d.zeroth);
    static_cast<E*>(p.dmean_offset)[k] = E((d.first + away * d.zeroth) * square);
    static_cast<E*>(p.dwidth)[k] = E((squares * square - d.log_scale) * inverse);
  }
}

template <class E, class S, bool kRows>
void backward(const GaussianAdaptiveAttentionBwdParams& p, const Threads& threads) {
  const Cutting<E, kRows> cutting(p);
  const Portions<E, kRows> portions(p, cutting);
  const std::vector<Head> heads = heads_of<E>(p);
  std::vector<CurveGradient> sums(portions.count() * p.heads);
  const int64_t tasks = p.slices() * p.length > 0 ? portions.tasks() : 0;
  parallel(threads, tasks, [&](int64_t begin, int64_t end) {
    BackwardTile<E, S, kRows> tile(p, cutting);
    for (int64_t task = begin; task < end; ++task) {
      portions.each(task, [&](int64_t group, int64_t head, int64_t portion) {
        tile.run(heads[head], head, group, sums[portion * p.heads + head]);
      });
    }
  });
  for (int64_t h = 0; h < p.heads; ++h) {
    CurveGradient total;
    for (int64_t portion = 0; portion < portions.count(); ++portion) total.add(sums[portion * p.heads + h]);
    write_parameters<E>(p, h, heads[h], total);
  }
}

// Columns fill vectors where there are enough of them.
template <class F>
void with_layout(const AttentionShape& p, F&& f) {
  with_sequence_dtype(p.dtype, [&](auto* element, auto* sequence) {
    using E = std::remove_pointer_t<decltype(element)>;
    if (p.inner >= std::max(2, kLanes<E> / 2)) return f(element, sequence, std::false_type());
    f(element, sequence, std::true_type());
  });
}

void expect_large_pages(const AttentionShape& p, void* dense) {
  const int64_t bytes = p.dtype == DType::kFloat64 ? 8 : p.dtype == DType::kFloat32 ? 4 : 2;
  if (dense) prefer_large_pages(dense, p.slices() * p.length * bytes);
}

}  // namespace

namespace TRIFUSE_ISA {

void gaussian_adaptive_attention_fwd(const GaussianAdaptiveAttentionParams& p, const Threads& threads) {
  if (p.slices() * p.length == 0) return;
  expect_large_pages(p, p.out);
  expect_large_pages(p, p.weights);
  with_layout(p, [&](auto* element, auto* sequence, auto rows) {
    using E = std::remove_pointer_t<decltype(element)>;
    using S = std::remove_pointer_t<decltype(sequence)>;
    forward<E, S, decltype(rows)::value>(p, threads);
  });
}

void gaussian_adaptive_attention_bwd(const GaussianAdaptiveAttentionBwdParams& p, const Threads& threads) {
  if (p.slices() * p.length > 0) expect_large_pages(p, p.dx);
  with_layout(p, [&](auto* element, auto* sequence, auto rows) {
    using E = std::remove_pointer_t<decltype(element)>;
    using S = std::remove_pointer_t<decltype(sequence)>;
    backward<E, S, decltype(rows)::value>(p, threads);
  });
}

}  // namespace TRIFUSE_ISA
}  // namespace trifuse::cpu

// The CPU entry points of gaussian_gate for one instruction set.
#include "dtypes.h"
#include "gaussian_gate_bwd.h"
#include "gaussian_gate_fwd.h"
#include "isa.h"
#include "pages.h"

#ifndef TRIFUSE_ISA
#error "compile with -DTRIFUSE_ISA=<namespace of this instruction set>"
#endif

namespace trifuse::cpu {
namespace {

// Groups are dealt out to parts that sum up the parameters' gradients by themselves and are added in order: the number
// of parts depends on the shape alone, so a result does not depend on the number of threads.
constexpr int64_t kSmall = 1 << 14;  // entries that one thread is done with before others have begun
constexpr int64_t kMostParts = 64, kFewestParts = 8, kPartialSums = 1 << 20;

void expect_large_pages(const GaussianGateShape& p, const SliceView& view) {
  const int64_t bytes = p.dtype == DType::kFloat64 ? 8 : p.dtype == DType::kFloat32 ? 4 : 2;
  prefer_large_pages(view.ptr, p.outer * p.length * p.inner * bytes);
}

template <class Body>
void spread(const GaussianGateShape& p, const Threads& threads, int64_t n, const Body& body) {
  if (p.outer * p.length * p.inner <= kSmall) {
    body(int64_t(0), n);
  } else {
    parallel(threads, n, body);
  }
}

template <class E, class S>
void backward(const GaussianGateBwdParams& p, const Threads& threads) {
  const SlicePlan<E> plan(p, p.heads, 3);
  const int64_t parameters = p.rows * p.gaussians, width = 2 * parameters + p.rows, groups = plan.count();
  const int64_t most = std::clamp(kPartialSums / std::max<int64_t>(width, 1), kFewestParts, kMostParts);
  const int64_t parts = std::min(groups, most);
  std::vector<double> sums(std::max<int64_t>(parts, 1) * width);
  spread(p, threads, parts, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      GateBackward<E, S> pass(p, plan, &sums[part * width]);
      for (int64_t i = groups * part / parts; i < groups * (part + 1) / parts; ++i) pass.run(i);
    }
  });
  const auto total = [&](int64_t at) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[part * width + at];
    return E(sum);
  };
  for (int64_t i = 0; i < parameters; ++i) {
    static_cast<E*>(p.doffset)[i] = total(i);
    static_cast<E*>(p.dwidth)[i] = total(parameters + i);
  }
  for (int64_t i = 0; p.dalpha && i < p.rows; ++i) {
    static_cast<E*>(p.dalpha)[i] = total(2 * parameters + i);
  }
}

}  // namespace

namespace TRIFUSE_ISA {

void gaussian_gate_fwd(const GaussianGateParams& p, const Threads& threads) {
  expect_large_pages(p, p.out);
  with_sequence_dtype(p.dtype, [&](auto* element, auto* sequence) {
    using E = std::remove_pointer_t<decltype(element)>;
    using S = std::remove_pointer_t<decltype(sequence)>;
    const SlicePlan<E> plan(p, p.heads, 1);
    spread(p, threads, plan.count(), [&](int64_t begin, int64_t end) {
      GateForward<E, S> pass(p, plan);
      for (int64_t i = begin; i < end; ++i) pass.run(i);
    });
  });
}

void gaussian_gate_bwd(const GaussianGateBwdParams& p, const Threads& threads) {
  expect_large_pages(p, p.dx);
  with_sequence_dtype(p.dtype, [&](auto* element, auto* sequence) {
    backward<std::remove_pointer_t<decltype(element)>, std::remove_pointer_t<decltype(sequence)>>(p, threads);
  });
}

}  // namespace TRIFUSE_ISA
}  // namespace trifuse::cpu

// Fresh memory in large pages: an output the size of a sequence is thousands of small pages, and the
// system takes longer to hand out and clear those one by one than a scan takes to compute.
#pragma once

#include <cstdint>

#include "trifuse/types.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace trifuse::cpu {
namespace {

// Advice only, and only for large pages that lie inside: pages that are there already stay as they are.
inline void prefer_large_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) & ~(page - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + uintptr_t(bytes)) & ~(page - 1);
  if (begin && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

// A sequence output, (batch, dim, seqlen) in either layout.
template <class Params>  // with batch, dim, seqlen and dtype
void prefer_large_pages(const Params& p, const SeqView& view) {
  const int64_t element = p.dtype == DType::kFloat64 ? 8 : p.dtype == DType::kFloat32 ? 4 : 2;
  const bool dense = view.time == 1 ? view.dim == p.seqlen : view.dim == 1 && view.time == p.dim;
  if (dense && view.batch == p.dim * p.seqlen) prefer_large_pages(view.ptr, p.batch * view.batch * element);
}

}  // namespace
}  // namespace trifuse::cpu

// Who computes a slice of the Gaussian gates, and which of its entries a thread has.
//
// A warp takes a row, a block a longer one, or, where slices lie side by side, a block as many columns as fill a sector
// of memory. A thread takes its entries in batches: where there is one batch it stays in registers, otherwise each is
// read again in every pass, out of the caches.
#pragma once

#include "trifuse/cuda_platform.h"
#include "trifuse/gaussian_gate.h"

namespace trifuse::cuda {
namespace {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kFwdBatch = 16, kBwdBatch = 8;  // going backward there is twice as much to hold
constexpr int kMostColumns = 16;

// The ways, integers because the names of kernels are made of them.
constexpr int kWarpEach = 0, kBlockEach = 1, kColumns = 2;

// Threads per slice.
template <typename S, int kWay>
constexpr int kTeam = kWay == kWarpEach    ? 32
                      : kWay == kBlockEach ? kThreads
                                           : kThreads * int(sizeof(S)) / 32;
template <typename S, int kWay>
constexpr int kSlices = kThreads / kTeam<S, kWay>;

struct GateArgs : GaussianGateShape {
  SliceView x, dout, out;  // out: x's gradient going backward
  float* stats;
  float* partials;  // (items, slots): of each slice, for every k the gradients of offset and of width; of alpha
  int64_t part, last_part, tiles, slots;
};

// Sums over a team; every thread of it gets the same bits.
template <typename S, int kWay, int kCount>
TRIFUSE_DEVICE void sum(float (&v)[kCount], unsigned char* memory) {
  constexpr int kSideBySide = kWay == kColumns ? kSlices<S, kWay> : 1;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, column = lane % kSideBySide;
#pragma unroll
  for (int by = kSideBySide; by < 32; by *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += __shfl_xor_sync(kFullWarp, v[i], by);
  }
  if constexpr (kWay != kWarpEach) {
    float* const shared = reinterpret_cast<float*>(memory);  // (warps, columns, count)
    if (lane < kSideBySide) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) shared[(warp * kSideBySide + column) * kCount + i] = v[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = 0.0f;
    for (int w = 0; w < kWarps; ++w) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] += shared[(w * kSideBySide + column) * kCount + i];
    }
    __syncthreads();
  }
}
constexpr int64_t kSharedBytes = int64_t(kWarps) * kMostColumns * 2 * int64_t(sizeof(float));

// A thread's own sum of batches' sums: in double where there are many.
template <bool kHeld>
struct Sum {
  float all = 0.0f;
  TRIFUSE_DEVICE void add(float x) { all += x; }
  TRIFUSE_DEVICE float total() const { return all; }
};
template <>
struct Sum<false> {
  double all = 0.0;
  TRIFUSE_DEVICE void add(float x) { all += double(x); }
  TRIFUSE_DEVICE float total() const { return float(all); }
};

// Where a thread's slice lies, and which entries are its own: `count` of them from `first` on, a team apart.
template <typename S, int kWay>
struct Place {
  static constexpr int kApart = kTeam<S, kWay>;
  int64_t outer, inner, slot, row, first, count;
  int rank;
  bool exists;

  TRIFUSE_DEVICE explicit Place(const GateArgs& p) {
    const int64_t head = blockIdx.x % p.heads, tile = blockIdx.x / p.heads;
    const int thread = int(threadIdx.x);
    constexpr int kHere = kSlices<S, kWay>;
    if constexpr (kWay == kColumns) {
      const int64_t per_outer = (p.inner + kHere - 1) / kHere;
      outer = tile / per_outer;
      inner = (tile - outer * per_outer) * kHere + thread % kHere;
      rank = thread / kHere;
      exists = inner < p.inner;
    } else {
      const int64_t slice = tile * kHere + thread / kApart;
      outer = slice / p.inner;
      inner = slice - outer * p.inner;
      rank = thread % kApart;
      exists = outer < p.outer;
    }
    if (!exists) outer = inner = 0;
    slot = (head * p.outer + outer) * p.inner + inner;
    row = p.row_of(head, outer, inner);
    first = head * p.part + rank;
    const int64_t length = head == p.heads - 1 ? p.last_part : p.part;
    count = exists && length > rank ? (length - rank + kApart - 1) / kApart : 0;
  }
  TRIFUSE_DEVICE int64_t offset(const SliceView& view, int64_t entry) const {
    return outer * view.outer + (first + entry * kApart) * view.axis + inner * view.inner;
  }
  // Entries of the batch that starts at one.
  template <int kBatch>
  TRIFUSE_DEVICE int batch(int64_t begin) const {
    return count - begin < kBatch ? int(count - begin) : kBatch;
  }
};

// Which entries of a batch take part, a bit each.
template <int kBatch, typename S, int kWay>
TRIFUSE_DEVICE unsigned taking_part(const GateArgs& p, const Place<S, kWay>& at, int64_t begin) {
  const int count = at.template batch<kBatch>(begin);
  unsigned bits = (1u << count) - 1u;
  if (p.mask.ptr == nullptr) return bits;
  const unsigned char* from = static_cast<const unsigned char*>(p.mask.ptr) + at.offset(p.mask, begin);
  const int64_t step = p.mask.axis * Place<S, kWay>::kApart;
#pragma unroll
  for (int j = 0; j < kBatch; ++j, from += step) {
    if (j < count && *from == 0) bits &= ~(1u << j);
  }
  return bits;
}

// A batch of a tensor's entries; those that do not take part are 0.
template <typename S, int kWay, int kBatch>
TRIFUSE_DEVICE void read(const SliceView& view, const Place<S, kWay>& at, int64_t begin, unsigned bits,
                         float (&v)[kBatch]) {
  const S* from = static_cast<const S*>(view.ptr) + at.offset(view, begin);
  const int64_t step = view.axis * Place<S, kWay>::kApart;
#pragma unroll
  for (int j = 0; j < kBatch; ++j, from += step) v[j] = bits >> j & 1 ? to_float(*from) : 0.0f;
}

template <typename S, int kWay, int kBatch>
TRIFUSE_DEVICE void write(const SliceView& view, const Place<S, kWay>& at, int64_t begin, const float (&v)[kBatch]) {
  const int count = at.template batch<kBatch>(begin);
  S* to = static_cast<S*>(view.ptr) + at.offset(view, begin);
  const int64_t step = view.axis * Place<S, kWay>::kApart;
#pragma unroll
  for (int j = 0; j < kBatch; ++j, to += step) {
    if (j < count) *to = from_float<S>(v[j]);
  }
}

}  // namespace
}  // namespace trifuse::cuda

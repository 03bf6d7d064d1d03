// Slices as vectors meet them: a group of slices, and a block of steps of it copied to memory of its own.
// Where slices lie side by side in memory they are columns, a lane each, some vectors of them next to each other;
// otherwise a group is one slice, a row, whose neighbouring entries are the lanes.
#pragma once

#include <algorithm>

#include "trifuse/simd.h"
#include "trifuse/slices.h"

namespace trifuse::cpu {
namespace {

constexpr int64_t kBlockBytes = 1 << 18;  // of a block's copies, which stay in the second cache
constexpr int kMaxStrips = 4;             // vectors of columns that are walked together, a page's cache lines
constexpr int64_t kChunk = 32;            // steps summed in one register

template <class E, class S>
TRIFUSE_INLINE Vec<E> load_lanes(const S* p, int64_t stride, int count) {
  if (stride == 1 && count == kLanes<E>) return load_as<E>(p);
  alignas(64) E lanes[kLanes<E>] = {};
  for (int i = 0; i < count; ++i) lanes[i] = scalar_as<E>(p[i * stride]);
  return load<E>(lanes);
}
template <class E, class S>
TRIFUSE_INLINE void store_lanes(S* p, int64_t stride, int count, Vec<E> x) {
  if (stride == 1 && count == kLanes<E>) return store_as<E>(p, x);
  alignas(64) E lanes[kLanes<E>];
  store<E>(lanes, x);
  for (int i = 0; i < count; ++i) p[i * stride] = scalar_from<S>(lanes[i]);
}

// How a tensor's slices, cut along the axis into `heads` pieces, become groups and blocks.
template <class E>
struct SlicePlan {
  int64_t outer, length, inner, heads;
  bool columns;
  int64_t strips = 1, groups, steps;  // vectors side by side in a group; groups in one (outer, head); of a block

  // `copies`: how many numbers a kernel keeps of every entry of a block.
  SlicePlan(const SliceShape& p, int64_t heads_, int copies)
      : outer(p.outer), length(p.length), inner(p.inner), heads(heads_), columns(p.inner >= kLanes<E> / 2) {
    constexpr int64_t lanes = kLanes<E>;
    const int64_t most = kBlockBytes / copies / int64_t(sizeof(E)) / lanes;
    const int64_t longest = std::max<int64_t>(length - (heads - 1) * (length / heads), 1);
    if (columns) {
      strips = std::clamp<int64_t>(most / longest, 1, std::min<int64_t>(kMaxStrips, (inner + lanes - 1) / lanes));
      groups = (inner + strips * lanes - 1) / (strips * lanes);
      steps = std::min(longest, most / strips);
    } else {
      groups = inner;
      steps = std::min((longest + lanes - 1) / lanes, most);
    }
  }
  int64_t count() const { return outer * heads * groups; }
  int64_t block_size() const { return steps * strips * kLanes<E>; }
};

// The slices of one group: `width` of them from `inner` on, or one; and their piece of the axis.
template <class E>
struct SliceGroup {
  int64_t outer, head, inner, width, begin, end, per_block;
  int strips;
  bool columns;

  SliceGroup(const SlicePlan<E>& plan, int64_t index) : per_block(plan.steps), columns(plan.columns) {
    const int64_t group = index % plan.groups, piece = plan.length / plan.heads;
    head = index / plan.groups % plan.heads;
    outer = index / plan.groups / plan.heads;
    begin = head * piece;
    end = head + 1 == plan.heads ? plan.length : begin + piece;
    const int64_t most = columns ? plan.strips * kLanes<E> : 1;
    inner = group * most;
    width = std::min(most, plan.inner - inner);
    strips = int((width + kLanes<E> - 1) / kLanes<E>);
  }
  int64_t length() const { return end - begin; }
  int64_t blocks() const {
    const int64_t steps = columns ? length() : (length() + kLanes<E> - 1) / kLanes<E>;
    return (steps + per_block - 1) / per_block;
  }
  // Lanes of the last vector of a row that has fewer entries are there without being entries.
  bool ragged() const { return !columns && length() % kLanes<E> != 0; }
};

// Some steps of a group: vector (n, w) holds step n of strip w.
template <class E>
struct SliceBlock {
  const SliceGroup<E>& group;
  int64_t begin, end, steps;  // along the axis; in vectors

  SliceBlock(const SliceGroup<E>& g, int64_t index) : group(g) {
    const int64_t entries = g.per_block * (g.columns ? 1 : kLanes<E>);
    begin = g.begin + index * entries;
    end = std::min(begin + entries, g.end);
    steps = g.columns ? end - begin : (end - begin + kLanes<E> - 1) / kLanes<E>;
  }
  TRIFUSE_INLINE int64_t offset(const SliceView& view, int64_t n, int w) const {
    const int64_t at = group.outer * view.outer + group.inner * view.inner + begin * view.axis;
    return group.columns ? at + n * view.axis + w * kLanes<E> * view.inner : at + n * kLanes<E> * view.axis;
  }
  TRIFUSE_INLINE int64_t stride(const SliceView& view) const { return group.columns ? view.inner : view.axis; }
  TRIFUSE_INLINE int lanes(int64_t n, int w) const {
    const int64_t left = group.columns ? group.width - w * kLanes<E> : end - begin - n * kLanes<E>;
    return int(std::min<int64_t>(left, kLanes<E>));
  }
  // Where vector (n, w) stands in the block's own memory.
  TRIFUSE_INLINE int64_t place(int64_t n, int w) const { return (w * steps + n) * kLanes<E>; }

  // Steps of strip w, from the block's first on, whose vectors are neighbours in memory and all there.
  int64_t whole(const SliceView& view, int w) const {
    if (stride(view) != 1) return 0;
    if (group.columns) return group.width >= (w + 1) * kLanes<E> ? steps : 0;
    return (end - begin) / kLanes<E>;
  }
  // Copies what a view holds; lanes without an entry, and entries whose `keep` is 0, become 0.
  template <class S>
  void read(const SliceView& view, const E* keep, E* to) const {
    const int64_t step = group.columns ? view.axis : kLanes<E> * view.axis, across = stride(view);
    for (int64_t from = 0; from < steps; from += kChunk) {
      for (int w = 0; w < group.strips; ++w) {
        const int64_t last = std::min(from + kChunk, steps), plain = std::min(whole(view, w), last);
        const S* p = static_cast<const S*>(view.ptr) + offset(view, from, w);
        E* q = to + place(from, w);
        int64_t n = from;
        const E* k = keep ? keep + place(from, w) : nullptr;
        const auto put = [&](Vec<E> x) {
          if (keep) x = load<E>(k) != splat(E(0)) ? x : splat(E(0));
          store<E>(q, x);
          p += step, q += kLanes<E>, k += keep ? kLanes<E> : 0;
        };
        for (; n < plain; ++n) put(load_as<E>(p));
        for (; n < last; ++n) put(load_lanes<E>(p, across, lanes(n, w)));
      }
    }
  }
  // Writes f(n) for the steps n from `from` to `last` of strip w.
  template <class S, class F>
  TRIFUSE_INLINE void write(const SliceView& view, int64_t from, int64_t last, int w, F&& f) const {
    const int64_t step = group.columns ? view.axis : kLanes<E> * view.axis, plain = std::min(whole(view, w), last);
    S* p = static_cast<S*>(view.ptr) + offset(view, from, w);
    int64_t n = from;
    for (; n < plain; ++n, p += step) store_as<E>(p, f(n));
    for (; n < last; ++n, p += step) store_lanes<E>(p, stride(view), lanes(n, w), f(n));
  }
  // 1 for entries that take part and 0 for the others; every entry does without a mask.
  void read_keep(const SliceView& mask, E* to) const {
    for (int w = 0; w < group.strips; ++w) {
      for (int64_t n = 0; n < steps; ++n) {
        const int count = lanes(n, w);
        E* const q = to + place(n, w);
        const uint8_t* const p = mask.ptr ? static_cast<const uint8_t*>(mask.ptr) + offset(mask, n, w) : nullptr;
        const int64_t apart = stride(mask);
        if (p && apart == 1 && count == kLanes<E>) {
          typedef uint8_t Bytes __attribute__((vector_size(kLanes<E>)));
          Bytes bytes;
          __builtin_memcpy(&bytes, p, sizeof bytes);
          store<E>(q, __builtin_convertvector(bytes, Vec<E>));  // a bool is 0 or 1
        } else {
          for (int i = 0; i < kLanes<E>; ++i) q[i] = E(i < count && (!p || p[i * apart] != 0));
        }
      }
    }
  }
};

// Sums of a strip, a lane each, in double: errors do not grow with the length.
template <class E>
struct LaneSums {
  alignas(64) double lane[kLanes<E>] = {};

  TRIFUSE_INLINE void add(Vec<E> x) {
    alignas(64) E terms[kLanes<E>];
    store<E>(terms, x);
    for (int i = 0; i < kLanes<E>; ++i) lane[i] += double(terms[i]);
  }
  // A row's sum is that of all its lanes, and stands in the first.
  void join_row() {
    double total = 0;
    for (int i = 0; i < kLanes<E>; ++i) total += lane[i];
    lane[0] = total;
  }
};

}  // namespace
}  // namespace trifuse::cpu

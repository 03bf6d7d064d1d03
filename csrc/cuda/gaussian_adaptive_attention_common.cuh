// What the kernels of the Gaussian adaptive attention share: arguments, which threads hold which slice, and what they
// find out together. The arithmetic: gaussian_adaptive_attention_entries.cuh.
#pragma once

#include "trifuse/cuda_platform.h"
#include "trifuse/gaussian_adaptive_attention.h"

namespace trifuse::cuda::gaam {

constexpr unsigned kFullWarp = 0xffffffffu;
// Of blocks that several rows share, and of those of one; fewer of the latter where a thread also holds masks.
constexpr int kRowThreads = 128, kMaxThreads = 512, kMaxGeneralThreads = 256;
constexpr int kPieceThreads = 256;
constexpr double kLogRoot2Pi = 0.91893853320467274178;

template <typename T>
struct Numbers {
  using Acc = float;
  static constexpr int kHeld = 16;  // entries of a slice that one thread holds
};
template <>
struct Numbers<double> {
  using Acc = double;
  static constexpr int kHeld = 8;
};
template <typename T>
using Acc = typename Numbers<T>::Acc;
template <typename T>
constexpr int kHeld = Numbers<T>::kHeld;
template <typename T>
constexpr int kVector = 16 / int(sizeof(T));

template <typename T>
TRIFUSE_DEVICE Acc<T> to_acc(T x) {
  if constexpr (sizeof(T) == 8) {
    return x;
  } else {
    return to_float(x);
  }
}
template <typename T>
TRIFUSE_DEVICE T from_acc(Acc<T> x) {
  if constexpr (sizeof(T) == 8) {
    return x;
  } else {
    return from_float<T>(x);
  }
}
TRIFUSE_DEVICE float power_of_two(float x) { return exp2_fast(x); }
TRIFUSE_DEVICE double power_of_two(double x) { return exp2(x); }
TRIFUSE_DEVICE float multiply_add(float a, float b, float c) { return fma(a, b, c); }
TRIFUSE_DEVICE double multiply_add(double a, double b, double c) { return a * b + c; }

// How threads share slices.
enum class Way {
  kFour,     // four lanes hold a row
  kEight,    // eight do
  kWarp,     // a warp holds a row
  kBlock,    // a block holds a row
  kColumns,  // a block holds `columns` neighbouring columns, or one row with entries anywhere
};
TRIFUSE_HD constexpr int lanes_of(Way way) {
  return way == Way::kFour ? 4 : way == Way::kEight ? 8 : way == Way::kWarp ? 32 : 0;
}
template <Way kWay>
constexpr int kLanesOf = lanes_of(kWay);

// Without masks the forward pass of columns, and of rows of two-byte dtypes, holds twice as many: what is done once per
// slice costs as much as the entries.
template <typename T, Way kWay, bool kGeneral>
constexpr int kFwdHeld = !kGeneral && (kWay == Way::kColumns || sizeof(T) == 2) ? 32 : kHeld<T>;

struct Args {
  int64_t outer, length, inner, heads, gaussians;
  int64_t part, last_part;  // entries of a head, and of the last one
  SliceView x, mask;
  const void *mean_offset, *width;
  bool clamped, padded;
  double padding, eps, log_eps;
  void* stats;
  int64_t tiles, blocks;  // of one head: groups of slices, and blocks that share them
  int64_t column_tiles;   // tiles of one outer index
  int columns;
  // Slices cut in pieces: (.., pieces, slots) each, slots = heads * outer * inner.
  int64_t pieces, piece_length;
  double *moments, *sums;
  void* measures;
};

struct FwdArgs : Args {
  void *out, *weights;
};

struct BwdArgs : Args {
  SliceView dout, dweights;
  void* dx;
  double* partials;  // (4, heads, blocks): of the gradients of a, b, e = sum delta^2/c^2 and of the logarithms
  void *dmean_offset, *dwidth;
};

// The sums over the Gaussians of a head, and the same as the kernels' arithmetic takes them.
struct ExactProduct {
  double a, b, e, logs;
};
template <typename A>
struct Product {
  A a, b, e, centre;
  const ExactProduct* exact;  // in shared memory
};

template <typename A>
TRIFUSE_DEVICE void add_product(const Args& p, int64_t head, int lane, ExactProduct* shared) {
  const A* const delta = static_cast<const A*>(p.mean_offset) + head * p.gaussians;
  const A* const width = static_cast<const A*>(p.width) + head * p.gaussians;
  double a = 0.0, b = 0.0, e = 0.0, logs = 0.0;
#pragma unroll 1
  for (int64_t k = lane; k < p.gaussians; k += 32) {
    const double c = width[k], d = delta[k], r = 1.0 / (c * c);
    a += r;
    b += r * d;
    e += r * d * d;
    if (p.clamped) logs += log(fabs(c)) + kLogRoot2Pi;
  }
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    a += __shfl_xor_sync(kFullWarp, a, by);
    b += __shfl_xor_sync(kFullWarp, b, by);
    e += __shfl_xor_sync(kFullWarp, e, by);
    if (p.clamped) logs += __shfl_xor_sync(kFullWarp, logs, by);
  }
  if (lane == 0) *shared = {a, b, e, logs};
}

// A block's shared memory: the product, then two buffers for sums, used in turn.
constexpr int kProductBytes = 32, kValues = 2;

inline int64_t shared_bytes(Way way, int threads, int columns) {
  if (lanes_of(way) != 0) return kProductBytes;
  return kProductBytes + int64_t(2) * (threads / 32) * columns * kValues * int64_t(sizeof(double));
}

// The product of the block's head; the caller has nothing else in shared memory yet.
template <typename A>
TRIFUSE_DEVICE Product<A> product_of(const Args& p, int64_t head, unsigned char* memory) {
  ExactProduct* const shared = reinterpret_cast<ExactProduct*>(memory);
  if (threadIdx.x < 32) add_product<A>(p, head, int(threadIdx.x), shared);
  __syncthreads();
  return {A(shared->a), A(shared->b), A(shared->e), A(shared->b / shared->a), shared};
}

// Those who hold a slice, and what they find out together: every one of them gets the same bits.
template <Way kWay>
struct Team {
  int columns, position, size;  // this thread's position among them
  unsigned char* buffers;
  int turn = 0;

  TRIFUSE_DEVICE Team(const Args& p, unsigned char* memory) : buffers(memory + kProductBytes) {
    const int thread = int(threadIdx.x);
    if constexpr (kLanesOf<kWay> != 0) {
      columns = 1;
      size = kLanesOf<kWay>;
      position = thread % size;
    } else {
      columns = kWay == Way::kBlock ? 1 : p.columns;
      size = int(blockDim.x) / columns;
      position = thread / columns;
    }
  }
  // Which of the tile's slices this thread's is.
  TRIFUSE_DEVICE int slice() const {
    return kLanesOf<kWay> != 0 ? int(threadIdx.x) / size : kWay == Way::kBlock ? 0 : int(threadIdx.x) % columns;
  }

  // Calls join(value, other) until the values of all have met; join has to be commutative.
  template <typename V, int kCount, typename Join>
  TRIFUSE_DEVICE void meet(V (&v)[kCount], Join join) {
    static_assert(kCount <= kValues, "more values than a buffer has room for");
    constexpr int kLanes = kLanesOf<kWay> != 0 ? kLanesOf<kWay> : 32;
    if constexpr (kWay == Way::kColumns) {
      for (int by = columns; by < kLanes; by *= 2) swap(v, by, join);
    } else {
#pragma unroll
      for (int by = 1; by < kLanes; by *= 2) swap(v, by, join);
    }
    const int warps = int(blockDim.x) / 32;
    if (kLanesOf<kWay> != 0 || warps == 1) return;
    V* const buffer = reinterpret_cast<V*>(buffers + turn * warps * columns * kValues * int(sizeof(double)));
    const int lane = int(threadIdx.x) % 32, step = columns * kCount;
    if (lane < columns) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) buffer[int(threadIdx.x) / 32 * step + lane * kCount + i] = v[i];
    }
    __syncthreads();
    const V* from = buffer + lane % columns * kCount;
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = from[i];
#pragma unroll 1
    for (int w = 1; w < warps; ++w) {
      from += step;
      V other[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) other[i] = from[i];
      join(v, other);
    }
    turn ^= 1;
  }
  template <typename V, int kCount, typename Join>
  TRIFUSE_DEVICE static void swap(V (&v)[kCount], int by, Join join) {
    V other[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) other[i] = __shfl_xor_sync(kFullWarp, v[i], by);
    join(v, other);
  }
  template <typename V, int kCount>
  TRIFUSE_DEVICE void sum(V (&v)[kCount]) {
    meet(v, [](V(&one)[kCount], const V(&other)[kCount]) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) one[i] += other[i];
    });
  }
  template <typename V>
  TRIFUSE_DEVICE V sum(V value) {
    V v[1] = {value};
    sum(v);
    return v[0];
  }
  // The entry of the least distance; of two equally near the larger.
  template <typename V>
  TRIFUSE_DEVICE void nearest(V& distance, V& entry) {
    V v[2] = {distance, entry};
    meet(v, [](V(&one)[2], const V(&other)[2]) {
      if (other[0] < one[0] || (other[0] == one[0] && other[1] > one[1])) {
        one[0] = other[0];
        one[1] = other[1];
      }
    });
    distance = v[0];
    entry = v[1];
  }
};

// Where a thread's slice lies.
struct Place {
  int64_t outer, inner, slot;
  bool exists;
};
template <Way kWay>
TRIFUSE_DEVICE Place place_of(const Args& p, const Team<kWay>& team, int64_t tile, int64_t head) {
  Place at;
  if (kWay == Way::kColumns && p.columns > 1) {
    at.outer = tile / p.column_tiles;
    at.inner = (tile - at.outer * p.column_tiles) * p.columns + team.slice();
    at.exists = at.inner < p.inner;
  } else {
    const int64_t flat = tile * (kLanesOf<kWay> != 0 ? int(blockDim.x) / team.size : 1) + team.slice();
    at.outer = p.inner == 1 ? flat : flat / p.inner;
    at.inner = p.inner == 1 ? 0 : flat - at.outer * p.inner;
    at.exists = at.outer < p.outer;
  }
  if (!at.exists) at.outer = at.inner = 0;
  at.slot = (head * p.outer + at.outer) * p.inner + at.inner;
  return at;
}

TRIFUSE_DEVICE SliceView dense(const Args& p, void* ptr) { return {ptr, p.length * p.inner, p.inner, 1}; }

// The entry of a slice; also what the test of 64-bit offsets calls.
TRIFUSE_HD int64_t offset(const SliceView& view, int64_t outer, int64_t n, int64_t inner) {
  return outer * view.outer + n * view.axis + inner * view.inner;
}

}  // namespace trifuse::cuda::gaam

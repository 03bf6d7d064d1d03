// What a thread holds of a slice, and the arithmetic of its weights and gradients.
//
// The product of the Gaussians is one Gaussian over the deviations d = x - mu, of precision a / v and of centre b / a.
// Weights are taken relative to that of the entry nearest to the centre, which is the largest: with u the difference
// of an entry from it and r its own deviation,
//   log w - log w_nearest = u (-a u / 2 + b - a r) / v
// in which nothing large cancels, wherever the centre and the slice lie. So the three numbers that these kernels
// keep of a slice are its nearest entry, that entry's deviation from the mean, and 1 / v: negative where the clamp
// acts.
//
// An entry takes part if it has a weight; it is counted if the mean and the variance are made of it. The two differ
// for entries equal to the padding value, which the variance takes for zeros.
#pragma once

#include "gaussian_adaptive_attention_common.cuh"

namespace trifuse::cuda::gaam {

// Entries from `first` of a slice on, shared by a team: vectors in turn where kVectors, else single entries in turn.
// `count`: how many of them, vectors or entries, this thread has.
template <typename T, bool kVectors, int kHold = kHeld<T>>
TRIFUSE_DEVICE int count_of(int64_t length, int position, int size) {
  const int64_t items = kVectors ? length / kVector<T> : length, mine = (items - position + size - 1) / size;
  constexpr int most = kVectors ? kHold / kVector<T> : kHold;
  return mine < 0 ? 0 : mine > most ? most : int(mine);
}

template <typename T>
struct alignas(16) Packed {
  T v[kVector<T>];
};

template <typename T, bool kVectors, int kHold>
TRIFUSE_DEVICE void read_entries(const SliceView& view, const Place& at, int64_t first, int position, int size,
                                 int count, Acc<T> (&x)[kHold]) {
  const T* from = static_cast<const T*>(view.ptr) + offset(view, at.outer, first, at.inner);
  if constexpr (kVectors) {
    constexpr int kEach = kVector<T>;
    const Packed<T>* const vectors = reinterpret_cast<const Packed<T>*>(from) + position;
#pragma unroll
    for (int k = 0; k < kHold / kEach; ++k) {
      if (k < count) {
        const Packed<T> packed = vectors[k * size];
#pragma unroll
        for (int i = 0; i < kEach; ++i) x[k * kEach + i] = to_acc(packed.v[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kEach; ++i) x[k * kEach + i] = Acc<T>(0);
      }
    }
  } else {
    const int64_t step = size * view.axis;
    from += position * view.axis;
#pragma unroll
    for (int j = 0; j < kHold; ++j, from += step) x[j] = j < count ? to_acc(*from) : Acc<T>(0);
  }
}

template <typename T, bool kVectors, int kHold>
TRIFUSE_DEVICE void write_entries(const SliceView& view, const Place& at, int64_t first, int position, int size,
                                  int count, const Acc<T> (&x)[kHold]) {
  T* to = static_cast<T*>(view.ptr) + offset(view, at.outer, first, at.inner);
  if constexpr (kVectors) {
    constexpr int kEach = kVector<T>;
    Packed<T>* const vectors = reinterpret_cast<Packed<T>*>(to) + position;
#pragma unroll
    for (int k = 0; k < kHold / kEach; ++k) {
      if (k < count) {
        Packed<T> packed;
#pragma unroll
        for (int i = 0; i < kEach; ++i) packed.v[i] = from_acc<T>(x[k * kEach + i]);
        vectors[k * size] = packed;
      }
    }
  } else {
    const int64_t step = size * view.axis;
    to += position * view.axis;
#pragma unroll
    for (int j = 0; j < kHold; ++j, to += step) {
      if (j < count) *to = from_acc<T>(x[j]);
    }
  }
}

// What a thread holds of a slice.
template <typename T, bool kVectors, bool kGeneral, int kHold = kHeld<T>>
struct Entries {
  using A = Acc<T>;
  A x[kHold];
  int count = 0;
  unsigned part = 0, counted = 0;  // a bit each, where kGeneral

  TRIFUSE_DEVICE bool takes_part(int j) const {
    return kGeneral ? (part >> j & 1) != 0 : (kVectors ? j / kVector<T> : j) < count;
  }
  TRIFUSE_DEVICE bool is_counted(int j) const { return kGeneral ? (counted >> j & 1) != 0 : takes_part(j); }

  TRIFUSE_DEVICE void read(const Args& p, const Place& at, int64_t first, int position, int size, int count_) {
    count = at.exists ? count_ : 0;
    read_entries<T, kVectors>(p.x, at, first, position, size, count, x);
    if constexpr (kGeneral) {
      part = count >= 32 ? ~0u : (1u << count) - 1u;
      if (p.mask.ptr != nullptr) {
        const unsigned char* from =
            static_cast<const unsigned char*>(p.mask.ptr) + offset(p.mask, at.outer, first + position, at.inner);
#pragma unroll
        for (int j = 0; j < kHold; ++j, from += size * p.mask.axis) {
          if (j < count && *from == 0) part &= ~(1u << j);
        }
      }
      counted = part;
      if (p.padded) {
        const A padding = to_acc(padding_of(p));
#pragma unroll
        for (int j = 0; j < kHold; ++j) {
          if (x[j] == padding) counted &= ~(1u << j);
        }
      }
    }
  }
  // As the sequence's dtype holds it.
  TRIFUSE_DEVICE static T padding_of(const Args& p) { return from_acc<T>(A(p.padding)); }
};

// Between an entry and its weight: relative to the nearest entry's, w is 2^(u (square u + linear)).
template <typename A>
struct Weighing {
  A nearest, deviation, inverse, slope, a;  // slope: b - a r
  A square, linear;

  TRIFUSE_DEVICE Weighing(A nearest_, A deviation_, A inverse_, const Product<A>& product)
      : nearest(nearest_), deviation(deviation_), inverse(inverse_), a(product.a) {
    constexpr A kLog2E = A(1.4426950408889634074);
    slope = multiply_add(-a, deviation, product.b);
    square = A(-0.5) * kLog2E * a * inverse;
    linear = slope * inverse * kLog2E;
  }
  TRIFUSE_DEVICE A ratio(A u) const { return power_of_two(u * multiply_add(u, square, linear)); }
  // exp(l + c0) / eps of the nearest entry.
  TRIFUSE_DEVICE A clamped_scale(const Args& p, const ExactProduct& exact) const {
    const double r = deviation, squares = (exact.a * r - 2.0 * exact.b) * r + exact.e;
    return A(exp(-0.5 * squares * double(inverse) - exact.logs - p.log_eps));
  }
};

template <typename A>
TRIFUSE_DEVICE A inverse_variance(const Args& p, A count, A squares) {
  return A(1) / ((count >= A(2) ? squares / (count - A(1)) : A(0)) + A(p.eps));
}

template <typename A>
TRIFUSE_DEVICE void keep(const Args& p, const Place& at, A nearest, A deviation, A signed_inverse) {
  const int64_t slots = p.heads * p.outer * p.inner;
  A* const to = static_cast<A*>(p.stats) + at.slot;
  to[0] = nearest;
  to[slots] = deviation;
  to[2 * slots] = signed_inverse;
}

// What a slice adds to the gradients of a head's parameters. In double: where the centre is far from the mean da and
// delta db cancel.
struct Shares {
  double da = 0.0, db = 0.0, de = 0.0, dlogs = 0.0;

  // Sums over the slice of ds, ds u and ds u^2, ds being the gradient of log w.
  TRIFUSE_DEVICE void add(double total, double first, double second, double r, double inverse) {
    da -= 0.5 * inverse * (second + 2.0 * r * first + r * r * total);
    db += inverse * (first + r * total);
    de -= 0.5 * inverse * total;
    dlogs += total;
  }
};

// From the gradients of the exponents to those of the entries.
template <typename A>
struct Chain {
  A own, own_slope, mean, pull;  // t = s (own - own_slope u); dx = g w + t - mean + pull d
  A alone, alone_slope;          // the first two, for an entry that is not counted

  TRIFUSE_DEVICE Chain(const Weighing<A>& w, const Product<A>& product, A count, A total, A first, A second) {
    alone = w.slope * w.inverse;
    alone_slope = w.a * w.inverse;
    const bool several = count >= A(2);  // a single entry is its own mean, whatever it is
    own = several ? alone : A(0);
    own_slope = several ? alone_slope : A(0);
    mean = several ? (alone * total - alone_slope * first) / count : A(0);
    const A square = (w.a * w.deviation - A(2) * product.b) * w.deviation + product.e;
    const A dv = A(0.5) * w.inverse * w.inverse * (w.a * second - A(2) * w.slope * first + total * square);
    pull = several ? A(2) * dv / (count - A(1)) : A(0);
  }
};

}  // namespace trifuse::cuda::gaam

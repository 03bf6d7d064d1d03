// Real and complex numbers of the linear scan's kernels, how they lie in memory, and how steps compose.
#pragma once

#include "trifuse/cuda_platform.h"
#include "trifuse/linear_scan.h"

namespace trifuse::cuda {
namespace {

constexpr unsigned kFullWarp = 0xffffffffu;

template <bool kComplex>
struct Number {
  float re;
};
template <>
struct Number<true> {
  float re, im;
};

template <bool C>
TRIFUSE_DEVICE Number<C> number(float re) {
  Number<C> x;
  x.re = re;
  if constexpr (C) x.im = 0.0f;
  return x;
}
template <bool C>
TRIFUSE_DEVICE bool is_zero(const Number<C>& x) {
  if constexpr (C) return x.re == 0.0f && x.im == 0.0f;
  return x.re == 0.0f;
}
template <bool C>
TRIFUSE_DEVICE Number<C> conjugate(Number<C> x) {
  if constexpr (C) x.im = -x.im;
  return x;
}
template <bool A, bool B>
TRIFUSE_DEVICE Number<B> times(const Number<A>& a, const Number<B>& x) {
  Number<B> y;
  if constexpr (A) {
    y.re = a.re * x.re - a.im * x.im;
    y.im = a.re * x.im + a.im * x.re;
  } else {
    y.re = a.re * x.re;
    if constexpr (B) y.im = a.re * x.im;
  }
  return y;
}
// a x + b, and b where x is zero: a product of factors may overflow where there is no state.
template <bool A, bool B>
TRIFUSE_DEVICE Number<B> step(const Number<A>& a, const Number<B>& x, const Number<B>& b) {
  if (is_zero(x)) return b;
  Number<B> y;
  if constexpr (A) {
    y.re = fma(a.re, x.re, fma(-a.im, x.im, b.re));
    y.im = fma(a.re, x.im, fma(a.im, x.re, b.im));
  } else {
    y.re = fma(a.re, x.re, b.re);
    if constexpr (B) y.im = fma(a.re, x.im, b.im);
  }
  return y;
}
// The gradient of a: g conj(h), its real part where a is real.
template <bool A, bool B>
TRIFUSE_DEVICE Number<A> factor_gradient(const Number<B>& g, const Number<B>& h) {
  if constexpr (A == B) {
    return times(conjugate(h), g);
  } else {
    Number<A> y;
    y.re = g.re * h.re + g.im * h.im;
    return y;
  }
}

template <bool C>
TRIFUSE_DEVICE Number<C> shuffle_up(Number<C> x, unsigned by) {
  x.re = __shfl_up_sync(kFullWarp, x.re, by);
  if constexpr (C) x.im = __shfl_up_sync(kFullWarp, x.im, by);
  return x;
}
template <bool C>
TRIFUSE_DEVICE Number<C> shuffle_down(Number<C> x, unsigned by) {
  x.re = __shfl_down_sync(kFullWarp, x.re, by);
  if constexpr (C) x.im = __shfl_down_sync(kFullWarp, x.im, by);
  return x;
}
template <bool C>
TRIFUSE_DEVICE Number<C> from_lane(Number<C> x, int lane) {
  x.re = __shfl_sync(kFullWarp, x.re, lane);
  if constexpr (C) x.im = __shfl_sync(kFullWarp, x.im, lane);
  return x;
}

// Numbers in memory: S, or pairs of S; indices count numbers.
template <bool C, typename S>
TRIFUSE_DEVICE Number<C> read(const S* p, int64_t i) {
  Number<C> x;
  if constexpr (C) {
    x.re = to_float(p[2 * i]);
    x.im = to_float(p[2 * i + 1]);
  } else {
    x.re = to_float(p[i]);
  }
  return x;
}
template <bool C, typename S>
TRIFUSE_DEVICE void write(S* p, int64_t i, const Number<C>& x) {
  if constexpr (C) {
    p[2 * i] = from_float<S>(x.re);
    p[2 * i + 1] = from_float<S>(x.im);
  } else {
    p[i] = from_float<S>(x.re);
  }
}

constexpr int kRun = 4;  // consecutive steps of a lane

// As many S as one access takes, and a lane's run made of them.
template <typename S>
struct alignas(sizeof(S) * kRun) Four {
  S v[kRun];
};
template <typename S, int kSize>
union Run {
  Four<S> four[kSize];
  S flat[kSize * kRun];
  TRIFUSE_DEVICE Run() {}
};

// kRun numbers that may lie side by side: x[j] = p[first + j * stride], of which `count` exist.
template <bool C, typename S>
TRIFUSE_DEVICE void read_run(const S* p, int64_t first, int64_t stride, int count, float other, Number<C> (&x)[kRun]) {
  constexpr int size = C ? 2 : 1;
  const int64_t low = stride < 0 ? first + (kRun - 1) * stride : first;
  const S* const from = p + size * low;
  if (count == kRun && (stride == 1 || stride == -1) && reinterpret_cast<uintptr_t>(from) % sizeof(Four<S>) == 0) {
    Run<S, size> raw;
#pragma unroll
    for (int k = 0; k < size; ++k) raw.four[k] = reinterpret_cast<const Four<S>*>(from)[k];
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const Number<C> up = read<C>(raw.flat, j), down = read<C>(raw.flat, kRun - 1 - j);
      x[j] = stride < 0 ? down : up;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kRun; ++j) x[j] = j < count ? read<C>(p, first + j * stride) : number<C>(other);
  }
}
template <bool C, typename S>
TRIFUSE_DEVICE void write_run(S* p, int64_t first, int64_t stride, int count, const Number<C> (&x)[kRun]) {
  constexpr int size = C ? 2 : 1;
  const int64_t low = stride < 0 ? first + (kRun - 1) * stride : first;
  S* const to = p + size * low;
  if (count == kRun && (stride == 1 || stride == -1) && reinterpret_cast<uintptr_t>(to) % sizeof(Four<S>) == 0) {
    Run<S, size> raw;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const Number<C> value = stride < 0 ? x[kRun - 1 - j] : x[j];
      write<C>(raw.flat, j, value);
    }
#pragma unroll
    for (int k = 0; k < size; ++k) reinterpret_cast<Four<S>*>(to)[k] = raw.four[k];
  } else {
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (j < count) write<C>(p, first + j * stride, x[j]);
    }
  }
}

}  // namespace
}  // namespace trifuse::cuda

// The walk of the linear scan and of its adjoint over one group of lanes.
#pragma once

#include "linear_scan_tile.h"

namespace trifuse::cpu {
namespace {

constexpr int64_t kRowsAhead = 16;

// A number of every lane.
template <class E, bool kComplex>
struct Number {
  Wide<E> part[kComplex ? 2 : 1];
};

template <class E, bool kComplex>
TRIFUSE_INLINE Number<E, kComplex> number_at(const Tile<E, kComplex>& tile, int row) {
  Number<E, kComplex> x;
  x.part[0] = widen<E>(tile.part[0][row]);
  if constexpr (kComplex) x.part[1] = widen<E>(tile.part[1][row]);
  return x;
}
template <class E, bool kComplex>
TRIFUSE_INLINE void put(Tile<E, kComplex>& tile, int row, const Number<E, kComplex>& x) {
  narrow<E>(tile.part[0][row], x.part[0]);
  if constexpr (kComplex) narrow<E>(tile.part[1][row], x.part[1]);
}
// Numbers that are neighbours in memory, without the way through a tile.
template <class E>
TRIFUSE_INLINE Wide<E> widen_lanes(Vec<E> x) {
  alignas(64) E memory[kLanes<E>];
  store<E>(memory, x);
  return widen<E>(memory);
}
template <class E, bool kComplex, class S>
TRIFUSE_INLINE Number<E, kComplex> read(const S* p) {
  Number<E, kComplex> x;
  if constexpr (std::is_same_v<E, S> && !kComplex) {
    x.part[0] = widen<E>(p);
  } else {
    Vec<E> re, im;
    load_neighbours<E, kComplex>(p, re, im);
    x.part[0] = widen_lanes<E>(re);
    if constexpr (kComplex) x.part[1] = widen_lanes<E>(im);
  }
  return x;
}
template <class E, bool kComplex, class S>
TRIFUSE_INLINE void write(S* p, const Number<E, kComplex>& x) {
  if constexpr (std::is_same_v<E, S> && !kComplex) {
    narrow<E>(p, x.part[0]);
  } else {
    alignas(64) E memory[2][kLanes<E>];
    narrow<E>(memory[0], x.part[0]);
    if constexpr (kComplex) narrow<E>(memory[1], x.part[1]);
    store_neighbours<E, kComplex>(p, load<E>(memory[0]), load<E>(memory[kComplex]));
  }
}
template <class E, bool kComplex>
TRIFUSE_INLINE Number<E, kComplex> all_lanes(double re) {
  Number<E, kComplex> x;
  for (int k = 0; k < (kComplex ? 2 : 1); ++k) {
    for (auto& v : x.part[k].v) v = splat<double>(k ? 0 : re);
  }
  return x;
}
template <class E, bool kComplex>
TRIFUSE_INLINE double& lane_of(Number<E, kComplex>& x, int part, int lane) {
  return reinterpret_cast<double*>(x.part[part].v)[lane];
}

template <class E, bool kComplex>
TRIFUSE_INLINE Number<E, kComplex> add(const Number<E, kComplex>& x, const Number<E, kComplex>& y) {
  Number<E, kComplex> z;
  for (int k = 0; k < (kComplex ? 2 : 1); ++k) {
#pragma GCC unroll 2
    for (int i = 0; i < kParts<E>; ++i) z.part[k].v[i] = x.part[k].v[i] + y.part[k].v[i];
  }
  return z;
}

// a x, or conj(a) x; a may be real beside a complex x.
template <bool kConjugate, class E, bool kA, bool kX>
TRIFUSE_INLINE Number<E, kX> times(const Number<E, kA>& a, const Number<E, kX>& x) {
  Number<E, kX> y;
#pragma GCC unroll 2
  for (int i = 0; i < kParts<E>; ++i) {
    if constexpr (kA) {
      const Vec<double> re = a.part[0].v[i], im = kConjugate ? -a.part[1].v[i] : a.part[1].v[i];
      y.part[0].v[i] = re * x.part[0].v[i] - im * x.part[1].v[i];
      y.part[1].v[i] = re * x.part[1].v[i] + im * x.part[0].v[i];
    } else {
      for (int k = 0; k < (kX ? 2 : 1); ++k) y.part[k].v[i] = a.part[0].v[i] * x.part[k].v[i];
    }
  }
  return y;
}

// The gradient of a: g conj(h), its real part where a is real.
template <class E, bool kA, bool kB>
TRIFUSE_INLINE Number<E, kA> factor_gradient(const Number<E, kB>& g, const Number<E, kB>& h) {
  if constexpr (kA == kB) {
    return times<true, E>(h, g);
  } else {
    Number<E, kA> y;
    for (int i = 0; i < kParts<E>; ++i) {
      y.part[0].v[i] = g.part[0].v[i] * h.part[0].v[i] + g.part[1].v[i] * h.part[1].v[i];
    }
    return y;
  }
}

// Calls body(s) for the rows s of a tile in the order of the walk.
template <bool kDown, class Body>
TRIFUSE_INLINE void each_row(int n, const Body& body) {
  if constexpr (kDown) {
    for (int s = n - 1; s >= 0; --s) body(s);
  } else {
    for (int s = 0; s < n; ++s) body(s);
  }
}

// How far ahead rows of memory are fetched, where a walk through time takes long strides through it.
TRIFUSE_INLINE int64_t near(int64_t ahead) { return ahead < 0 ? -kRowsAhead : kRowsAhead; }

// What a walk computes: everything, or only how the state at its end depends on the one at its begin,
// end = product * begin + state.
enum class Pass { kAll, kCompose };

template <class E, class S, bool kA, bool kB>
struct ForwardGroup {
  using Params = LinearScanParams;
  static constexpr bool kAgainstScan = false;
  Operand<E, S, kA> a;
  Operand<E, S, kB> b, h;
  Number<E, kB> state;
  Number<E, kA> product;

  static bool outputs_side_by_side(const Params& p) { return p.h.dim == 1 && p.h.time != 1; }
  ForwardGroup(const Params& p, const Lanes<E>& lanes) : a(p.a, lanes), b(p.b, lanes), h(p.h, lanes) {}

  template <bool kDown, Pass kPass>
  TRIFUSE_INLINE void tile(int64_t t, int n, int64_t, const Number<E, kB>&, int64_t ahead) {
    if (a.neighbours() && b.neighbours() && h.neighbours()) return rows<kDown, kPass>(t, n, near(ahead));
    Tile<E, kA> factors;
    Tile<E, kB> terms;
    a.load(factors, t, n, 0, ahead);
    b.load(terms, t, n, 0, ahead);
    Number<E, kB> x = state;
    Number<E, kA> y = product;
    each_row<kDown>(n, [&](int s) {
      const Number<E, kA> factor = number_at(factors, s);
      x = add(times<false, E>(factor, x), number_at(terms, s));
      if constexpr (kPass == Pass::kAll) {
        put(terms, s, x);
      } else {
        y = times<false, E>(factor, y);
      }
    });
    state = x;
    product = y;
    if constexpr (kPass == Pass::kAll) h.store_tile(terms, t, n);
  }

  // The same where channels are neighbours in memory.
  template <bool kDown, Pass kPass>
  TRIFUSE_INLINE void rows(int64_t t, int n, int64_t ahead) {
    Number<E, kB> x = state;
    Number<E, kA> y = product;
    each_row<kDown>(n, [&](int s) {
      a.prefetch(t + s + ahead);
      b.prefetch(t + s + ahead);
      const Number<E, kA> factor = read<E, kA>(a.at(0, t + s));
      x = add(times<false, E>(factor, x), read<E, kB>(b.at(0, t + s)));
      if constexpr (kPass == Pass::kAll) {
        write<E, kB>(h.at(0, t + s), x);
      } else {
        y = times<false, E>(factor, y);
      }
    });
    state = x;
    product = y;
  }
};

// The adjoint runs against the scan: g = c + dh[t], db[t] = g, da[t] = g conj(h before t), c = conj(a[t]) g.
template <class E, class S, bool kA, bool kB>
struct AdjointGroup {
  using Params = LinearScanBwdParams;
  static constexpr bool kAgainstScan = true;
  Operand<E, S, kA> a, da;
  Operand<E, S, kB> h, dh, db;
  Number<E, kB> state;
  Number<E, kA> product;
  Lanes<E> lanes;

  static bool outputs_side_by_side(const Params& p) { return p.db.dim == 1 && p.db.time != 1; }
  AdjointGroup(const Params& p, const Lanes<E>& l)
      : a(p.a, l), da(p.da, l), h(p.h, l), dh(p.dh, l), db(p.db, l), lanes(l) {}

  // Row s holds h one step of the scan before t + s; `first` is the state before the first step.
  template <bool kDown>
  TRIFUSE_INLINE void load_before(Tile<E, kB>& before, int64_t t, int n, int64_t length, const Number<E, kB>& first,
                                  int64_t ahead) {
    const int64_t edge = kDown ? 0 : length - 1;
    const bool at_edge = kDown ? t == 0 : t + n == length;
    if (!at_edge) return h.load(before, kDown ? t - 1 : t + 1, n, 0, ahead);
    h.load(before, kDown ? t : t + 1, n - 1, kDown ? 1 : 0, 0);
    Number<E, kB> x = first;
    for (int i = 0; i < kLanes<E>; ++i) {
      if (!lanes.inner[i]) continue;
      for (int k = 0; k < (kB ? 2 : 1); ++k) {
        lane_of(x, k, i) = double(scalar_as<E>(h.at(i, kDown ? edge - 1 : edge + 1)[k]));
      }
    }
    put(before, kDown ? 0 : n - 1, x);
  }

  template <bool kDown, Pass kPass>
  TRIFUSE_INLINE void tile(int64_t t, int n, int64_t length, const Number<E, kB>& first, int64_t ahead) {
    if (a.neighbours() && h.neighbours() && dh.neighbours() && da.neighbours() && db.neighbours()) {
      return rows<kDown, kPass>(t, n, lanes.inner[0] ? -1 : kDown ? 0 : length - 1, first, near(ahead));
    }
    Tile<E, kA> factors;
    Tile<E, kB> grads, before;
    a.load(factors, t, n, 0, ahead);
    dh.load(grads, t, n, 0, ahead);
    if constexpr (kPass == Pass::kAll) load_before<kDown>(before, t, n, length, first, ahead);
    Number<E, kB> c = state;
    Number<E, kA> y = product;
    each_row<kDown>(n, [&](int s) {
      const Number<E, kA> factor = number_at(factors, s);
      const Number<E, kB> g = add(c, number_at(grads, s));
      c = times<true, E>(factor, g);
      if constexpr (kPass == Pass::kAll) {
        put(factors, s, factor_gradient<E, kA, kB>(g, number_at(before, s)));
        put(grads, s, g);
      } else {
        y = times<true, E>(factor, y);
      }
    });
    state = c;
    product = y;
    if constexpr (kPass == Pass::kAll) {
      da.store_tile(factors, t, n);
      db.store_tile(grads, t, n);
    }
  }

  // The same where channels are neighbours in memory; `edge` is the step that starts from `first`.
  template <bool kDown, Pass kPass>
  TRIFUSE_INLINE void rows(int64_t t, int n, int64_t edge, const Number<E, kB>& first, int64_t ahead) {
    Number<E, kB> c = state;
    Number<E, kA> y = product;
    each_row<kDown>(n, [&](int s) {
      a.prefetch(t + s + ahead);
      dh.prefetch(t + s + ahead);
      if constexpr (kPass == Pass::kAll) h.prefetch(t + s + ahead);
      const Number<E, kA> factor = read<E, kA>(a.at(0, t + s));
      const Number<E, kB> g = add(c, read<E, kB>(dh.at(0, t + s)));
      c = times<true, E>(factor, g);
      if constexpr (kPass == Pass::kAll) {
        const Number<E, kB> before = t + s == edge ? first : read<E, kB>(h.at(0, kDown ? t + s - 1 : t + s + 1));
        write<E, kA>(da.at(0, t + s), factor_gradient<E, kA, kB>(g, before));
        write<E, kB>(db.at(0, t + s), g);
      } else {
        y = times<true, E>(factor, y);
      }
    });
    state = c;
    product = y;
  }
};

}  // namespace
}  // namespace trifuse::cpu

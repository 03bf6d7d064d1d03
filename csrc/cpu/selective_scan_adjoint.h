// The adjoint of a tile of a selective scan on a CPU: the states are recomputed from the chunk state the
// forward pass saved, then the adjoint runs back through them.
#pragma once

#include "selective_scan_fwd.h"

namespace trifuse::cpu {
namespace {

template <class T>
constexpr int kAdjointStatesAtOnce = kVectorBytes == 64 ? 8 : 4;  // of all blocks at hand

// What a block keeps while it goes through a tile, [t][lane], at constant distances: the loops have more
// rows than there are registers for pointers. No distance is a multiple of 4096 bytes, see Scratch.
template <class T>
struct AdjointRows {
  static constexpr int64_t kGap = 320 / sizeof(T), kRows = kMaxTile * kLanes<T> + kGap;
  static constexpr int64_t kLoop = (kMaxTile + 1) * kAdjointStatesAtOnce<T> * kLanes<T> + kGap;
  T u[kRows], step[kRows], dt[kRows], dtu[kRows], y[kRows], slope[kRows], z[kRows], gate[kRows], dout[kRows];
  T gy[kRows];      // gradient of y
  T gdtu[kRows];    // accumulated: gradient of dt * u
  T gdt[kRows];     // accumulated: gradient of dt through the decay
  T decays[kLoop];  // [s][state at hand][lane]
  T states[kLoop];  // [s + 1][state at hand][lane]: the state before step s
};

// Adjoint of StateLoop. `carry` is the gradient of the state behind the step at hand.
template <class T>
struct AdjointLoop : StateLoop<T> {
  Ahead<7>* beside;  // what to ask the cache for meanwhile
  AdjointRows<T>* rows;
  T* carry;  // [n][lane], in and out
  T* gA;     // [n][lane], accumulated; for real A in units of log2(e), those of dt
  T* gB;     // [t][n][lane] or [n][lane], accumulated
  T* gC;
};

template <class T, int kBlocks, int kStates, bool kVariableB, bool kVariableC, bool kOutput>
TRIFUSE_INLINE void recompute_states(const AdjointLoop<T>* a, int64_t n0) {
  constexpr int64_t lanes = kLanes<T>;
  const Tile tile = a->tile;
  const int64_t forward = tile.reverse ? -1 : 1;
  const int64_t next_B = kVariableB ? a->dstate : 0, next_C = kVariableC ? a->dstate : 0;
  AdjointRows<T>* rows[kBlocks];
  const T* rates[kBlocks];
  const T *B = coefficients_from<T, kVariableB>(a->B, n0), *C = coefficients_from<T, kVariableC>(a->C, n0);
  Vec<T> h[kBlocks][kStates];
#pragma GCC unroll 2
  for (int k = 0; k < kBlocks; ++k) {
    rows[k] = a[k].rows;
    rates[k] = a[k].rates + n0 * lanes;
#pragma GCC unroll 16
    for (int i = 0; i < kStates; ++i) {
      h[k][i] = load<T>(a[k].h + (n0 + i) * lanes);
      store<T>(rows[k]->states + i * lanes, h[k][i]);
    }
  }
  Ahead<7> ahead = *a->beside;
  for (int64_t s = 0, t = tile.row(0); s < tile.count; ++s, t += forward) {
    ahead.step();
#pragma GCC unroll 2
    for (int k = 0; k < kBlocks; ++k) {
      AdjointRows<T>& r = *rows[k];
      const Vec<T> dt = load<T>(r.dt + t * lanes), dtu = load<T>(r.dtu + t * lanes);
      const T *b = B + t * next_B, *c = C + t * next_C;
      T *decay_row = r.decays + s * kStates * lanes, *state_row = r.states + (s + 1) * kStates * lanes;
      Vec<T> y = kOutput ? load<T>(r.y + t * lanes) : dt;
#pragma GCC unroll 16
      for (int i = 0; i < kStates; ++i) {
        const Vec<T> decay = exp2_product<T>(dt, load<T>(rates[k] + i * lanes));
        h[k][i] = decay * h[k][i] + dtu * coefficient<T, kVariableB>(b, i);
        if constexpr (kOutput) y += coefficient<T, kVariableC>(c, i) * h[k][i];
        store<T>(decay_row + i * lanes, decay);
        store<T>(state_row + i * lanes, h[k][i]);
      }
      if constexpr (kOutput) store<T>(r.y + t * lanes, y);
    }
  }
  *a->beside = ahead;
}

template <class T>
TRIFUSE_INLINE void accumulate(T* sum, Vec<T> x) {
  store<T>(sum, load<T>(sum) + x);
}

// What one step of the adjoint reads and writes besides the states, in registers.
template <class T>
struct AdjointRow {
  Vec<T> gy, dt, dtu, gdtu, gdt;
};

// States n0 .. n0 + kStates of kBlocks blocks, neighbours in `a`. Blocks share one pass over the sums of
// a variable dB and dC, which are too many for the first cache.
template <class T, int kBlocks, int kStates, bool kVariableB, bool kVariableC, bool kOutput>
void adjoint_states(const AdjointLoop<T>* a, int64_t n0) {
  static_assert(kBlocks == 1 || (kVariableB && kVariableC), "constant coefficients are a block's own");
  constexpr int64_t lanes = kLanes<T>;
  recompute_states<T, kBlocks, kStates, kVariableB, kVariableC, kOutput>(a, n0);
  const Tile tile = a->tile;
  const int64_t forward = tile.reverse ? -1 : 1;
  const int64_t next_B = kVariableB ? a->dstate : 0, next_C = kVariableC ? a->dstate : 0;
  const T *B = coefficients_from<T, kVariableB>(a->B, n0), *C = coefficients_from<T, kVariableC>(a->C, n0);
  T *gB_rows = a->gB + n0 * lanes, *gC_rows = a->gC + n0 * lanes;
  // Sums over time start at zero in every tile and are added to the total at its end: sums of sums
  // round less than one long sum.
  AdjointRows<T>* rows[kBlocks];
  const T* rates[kBlocks];
  Vec<T> carry[kBlocks][kStates], gA[kBlocks][kStates], gB[kStates], gC[kStates];
#pragma GCC unroll 2
  for (int k = 0; k < kBlocks; ++k) {
    rows[k] = a[k].rows;
    rates[k] = a[k].rates + n0 * lanes;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kStates; ++i) {
    gB[i] = gC[i] = splat(T(0));
#pragma GCC unroll 2
    for (int k = 0; k < kBlocks; ++k) {
      carry[k][i] = load<T>(a[k].carry + (n0 + i) * lanes);
      gA[k][i] = splat(T(0));
    }
  }
  for (int64_t s = tile.count - 1, t = tile.row(tile.count - 1); s >= 0; --s, t -= forward) {
    const T *b = B + t * next_B, *c = C + t * next_C;
    const int64_t at = s * kStates * lanes;
    T *gB_row = gB_rows + t * next_B * lanes, *gC_row = gC_rows + t * next_C * lanes;
    AdjointRow<T> row[kBlocks];
#pragma GCC unroll 2
    for (int k = 0; k < kBlocks; ++k) {
      const AdjointRows<T>& r = *rows[k];
      row[k] = {load<T>(r.gy + t * lanes), load<T>(r.dt + t * lanes), load<T>(r.dtu + t * lanes),
                load<T>(r.gdtu + t * lanes), load<T>(r.gdt + t * lanes)};
    }
#pragma GCC unroll 16
    for (int i = 0; i < kStates; ++i) {
      if constexpr (kVariableB) gB[i] = load<T>(gB_row + i * lanes);
      if constexpr (kVariableC) gC[i] = load<T>(gC_row + i * lanes);
#pragma GCC unroll 2
      for (int k = 0; k < kBlocks; ++k) {
        const T *before = rows[k]->states + at + i * lanes, *decay = rows[k]->decays + at + i * lanes;
        const Vec<T> g = carry[k][i] + row[k].gy * coefficient<T, kVariableC>(c, i);
        gC[i] += row[k].gy * load<T>(before + kStates * lanes);
        gB[i] += g * row[k].dtu;
        row[k].gdtu += g * coefficient<T, kVariableB>(b, i);
        carry[k][i] = load<T>(decay) * g;
        const Vec<T> q = carry[k][i] * load<T>(before);
        row[k].gdt += q * load<T>(rates[k] + i * lanes);
        gA[k][i] += q * row[k].dt;
      }
      if constexpr (kVariableB) store<T>(gB_row + i * lanes, gB[i]);
      if constexpr (kVariableC) store<T>(gC_row + i * lanes, gC[i]);
    }
#pragma GCC unroll 2
    for (int k = 0; k < kBlocks; ++k) {
      store<T>(rows[k]->gdtu + t * lanes, row[k].gdtu);
      store<T>(rows[k]->gdt + t * lanes, row[k].gdt);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kStates; ++i) {
#pragma GCC unroll 2
    for (int k = 0; k < kBlocks; ++k) {
      store<T>(a[k].carry + (n0 + i) * lanes, carry[k][i]);
      accumulate<T>(a[k].gA + (n0 + i) * lanes, gA[k][i]);
    }
    if constexpr (!kVariableB) accumulate<T>(gB_rows + i * lanes, gB[i]);
    if constexpr (!kVariableC) accumulate<T>(gC_rows + i * lanes, gC[i]);
  }
}

template <class T>
struct Complex {
  Vec<T> re, im;
};
template <class T>
TRIFUSE_INLINE Complex<T> load_complex(const T* planes) {
  return {load<T>(planes), load<T>(planes + kLanes<T>)};
}
template <class T>
TRIFUSE_INLINE void store_complex(T* planes, Complex<T> x) {
  store<T>(planes, x.re);
  store<T>(planes + kLanes<T>, x.im);
}
template <class T>
TRIFUSE_INLINE void accumulate_complex(T* planes, Complex<T> x) {
  accumulate<T>(planes, x.re);
  accumulate<T>(planes + kLanes<T>, x.im);
}
// conj(a) * b: gradients of complex numbers follow torch, d/d(re) + i d/d(im).
template <class T>
TRIFUSE_INLINE Complex<T> conj_times(Complex<T> a, Complex<T> b) {
  return {a.re * b.re + a.im * b.im, a.re * b.im - a.im * b.re};
}

template <class T, bool kVariableB, bool kVariableC, bool kOutput>
void adjoint_complex_state(const AdjointLoop<T>& a, int64_t n) {
  constexpr int64_t lanes = kLanes<T>, pair = 2 * lanes;
  Complex<T> h = load_complex<T>(a.h + n * pair);
  store_complex<T>(a.rows->states, h);
  for (int64_t s = 0; s < a.tile.count; ++s) {
    const int64_t t = a.tile.row(s);
    const Vec<T> dtu = load<T>(a.dtu + t * lanes);
    Complex<T> decay, b, c;
    complex_decay<T>(load<T>(a.dt + t * lanes), a.rates + n * pair, decay.re, decay.im);
    complex_coefficient<T, kVariableB>(a.B, t, a.dstate, n, b.re, b.im);
    h = {decay.re * h.re - decay.im * h.im + b.re * dtu, decay.re * h.im + decay.im * h.re + b.im * dtu};
    store_complex<T>(a.rows->decays + s * pair, decay);
    store_complex<T>(a.rows->states + (s + 1) * pair, h);
    if constexpr (kOutput) {
      complex_coefficient<T, kVariableC>(a.C, t, a.dstate, n, c.re, c.im);
      accumulate<T>(a.y + t * lanes, splat(T(2)) * (c.re * h.re - c.im * h.im));
    }
  }
  const Complex<T> rate = load_complex<T>(a.rates + n * pair);
  Complex<T> carry = load_complex<T>(a.carry + n * pair), gA = {splat(T(0)), splat(T(0))};
  for (int64_t s = a.tile.count; s-- > 0;) {
    const int64_t t = a.tile.row(s);
    const Vec<T> gy = splat(T(2)) * load<T>(a.rows->gy + t * lanes);
    const Vec<T> dt = load<T>(a.dt + t * lanes), dtu = load<T>(a.dtu + t * lanes);
    Complex<T> b, c;
    complex_coefficient<T, kVariableB>(a.B, t, a.dstate, n, b.re, b.im);
    complex_coefficient<T, kVariableC>(a.C, t, a.dstate, n, c.re, c.im);
    const Complex<T> g = {carry.re + gy * c.re, carry.im - gy * c.im};
    const Complex<T> after = load_complex<T>(a.rows->states + (s + 1) * pair);
    accumulate_complex<T>(a.gC + (kVariableC ? t * a.dstate + n : n) * pair, {gy * after.re, -(gy * after.im)});
    accumulate_complex<T>(a.gB + (kVariableB ? t * a.dstate + n : n) * pair, {g.re * dtu, g.im * dtu});
    accumulate<T>(a.rows->gdtu + t * lanes, conj_times<T>(b, g).re);
    carry = conj_times<T>(load_complex<T>(a.rows->decays + s * pair), g);
    const Complex<T> q = conj_times<T>(load_complex<T>(a.rows->states + s * pair), carry);
    accumulate<T>(a.rows->gdt + t * lanes, conj_times<T>(rate, q).re);
    gA = {gA.re + q.re * dt, gA.im + q.im * dt};
  }
  store_complex<T>(a.carry + n * pair, carry);
  accumulate_complex<T>(a.gA + n * pair, gA);
}

template <class T, int kBlocks, bool kVariableB, bool kVariableC, bool kOutput>
void adjoint_all_states(const AdjointLoop<T>* a, bool complex) {
  int64_t n = 0;
  if (complex) {
    for (; n < a->dstate; ++n) {
      for (int k = 0; k < kBlocks; ++k) adjoint_complex_state<T, kVariableB, kVariableC, kOutput>(a[k], n);
    }
    return;
  }
  constexpr int many = kAdjointStatesAtOnce<T> / kBlocks;
  for (; n + many <= a->dstate; n += many) {
    adjoint_states<T, kBlocks, many, kVariableB, kVariableC, kOutput>(a, n);
  }
  for (; n < a->dstate; ++n) adjoint_states<T, kBlocks, 1, kVariableB, kVariableC, kOutput>(a, n);
}

// A tile of `blocks` blocks: two only if both read the same variable B and C.
template <class T, bool kOutput>
void adjoint_tile(const AdjointLoop<T>* a, int64_t blocks, const SelectiveScanParams& p) {
  if (blocks == 2) return adjoint_all_states<T, 2, true, true, kOutput>(a, p.complex);
  if (p.B.variable && p.C.variable) return adjoint_all_states<T, 1, true, true, kOutput>(a, p.complex);
  if (p.B.variable) return adjoint_all_states<T, 1, true, false, kOutput>(a, p.complex);
  if (p.C.variable) return adjoint_all_states<T, 1, false, true, kOutput>(a, p.complex);
  return adjoint_all_states<T, 1, false, false, kOutput>(a, p.complex);
}

}  // namespace
}  // namespace trifuse::cpu

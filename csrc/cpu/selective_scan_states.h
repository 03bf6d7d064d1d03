// The loops of the forward selective scan over the states of one block of channels and one tile of time.
#pragma once

#include "selective_scan_tile.h"

namespace trifuse::cpu {
namespace {

// What a loop over the states of one block and tile reads and writes. All rows are [t][lane], except
// variable coefficients, which are [t][n] and the same for every lane.
template <class T>
struct StateLoop {
  Tile tile;
  int64_t dstate;
  const T* dt;     // decay_time(dt) if A is real, dt if it is complex
  const T* dtu;    // dt * u
  T* y;            // accumulated
  const T* rates;  // [n][lane]
  const T* B;      // [t][n], or [n][lane]
  const T* C;
  T* h;                   // [n][lane], in and out
  const Ahead<4>* ahead;  // what to ask the cache for meanwhile
};

// The i-th of the coefficients from `values` on: one number for all lanes, or one for each.
template <class T, bool kVariable>
TRIFUSE_INLINE Vec<T> coefficient(const T* values, int64_t i) {
  return kVariable ? splat(values[i]) : load<T>(values + i * kLanes<T>);
}
// Where the coefficients of states n0.. begin, and how far the next row of time is.
template <class T, bool kVariable>
TRIFUSE_INLINE const T* coefficients_from(const T* values, int64_t n0) {
  return values + n0 * (kVariable ? 1 : kLanes<T>);
}

// States n0 .. n0 + kStates in registers, through all steps of a tile.
template <class T, int kStates, bool kVariableB, bool kVariableC, bool kOutput>
void scan_states(const StateLoop<T>& a, int64_t n0) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t count = a.tile.count, forward = a.tile.reverse ? -1 : 1;
  const int64_t next_B = kVariableB ? a.dstate : 0, next_C = kVariableC ? a.dstate : 0;
  const T *rates = a.rates + n0 * lanes, *dt_rows = a.dt, *dtu_rows = a.dtu;
  const T *B = coefficients_from<T, kVariableB>(a.B, n0),
          *C = kOutput ? coefficients_from<T, kVariableC>(a.C, n0) : nullptr;
  T* y_rows = a.y;
  Vec<T> h[kStates];
#pragma GCC unroll 16
  for (int i = 0; i < kStates; ++i) h[i] = load<T>(a.h + (n0 + i) * lanes);
  Ahead<4> ahead = *a.ahead;
  for (int64_t s = 0, t = a.tile.row(0); s < count; ++s, t += forward) {
    ahead.step();
    const Vec<T> dt = load<T>(dt_rows + t * lanes), dtu = load<T>(dtu_rows + t * lanes);
    const T *b = B + t * next_B, *c = C + t * next_C;
    Vec<T> y[2] = {kOutput ? load<T>(y_rows + t * lanes) : dt, splat(T(0))};
#pragma GCC unroll 16
    for (int i = 0; i < kStates; ++i) {
      const Vec<T> decay = exp2_product<T>(dt, load<T>(rates + i * lanes));
      h[i] = decay * h[i] + dtu * coefficient<T, kVariableB>(b, i);
      if constexpr (kOutput) y[i & 1] += coefficient<T, kVariableC>(c, i) * h[i];
    }
    if constexpr (kOutput) store<T>(y_rows + t * lanes, y[0] + y[1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kStates; ++i) store<T>(a.h + (n0 + i) * lanes, h[i]);
}

// exp(dt * (re + i im)) in lanes.
template <class T>
TRIFUSE_INLINE void complex_decay(Vec<T> dt, const T* rates, Vec<T>& re, Vec<T>& im) {
  constexpr int64_t lanes = kLanes<T>;
  const Vec<T> size = exp2_product<T>(decay_time<T>(dt), load<T>(rates));
  const Vec<T> angle = dt * load<T>(rates + lanes);
  Vec<T> sine, cosine;
  sincos<T>(angle, sine, cosine);
  re = size * cosine;
  im = size * sine;
}

template <class T, bool kVariable>
TRIFUSE_INLINE void complex_coefficient(const T* values, int64_t row, int64_t dstate, int64_t n, Vec<T>& re,
                                        Vec<T>& im) {
  if constexpr (kVariable) {
    re = splat(values[2 * (row * dstate + n)]);
    im = splat(values[2 * (row * dstate + n) + 1]);
  } else {
    re = load<T>(values + 2 * n * kLanes<T>);
    im = load<T>(values + (2 * n + 1) * kLanes<T>);
  }
}

template <class T, bool kVariableB, bool kVariableC, bool kOutput>
void scan_complex_state(const StateLoop<T>& a, int64_t n) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> h_re = load<T>(a.h + 2 * n * lanes), h_im = load<T>(a.h + (2 * n + 1) * lanes);
  for (int64_t s = 0; s < a.tile.count; ++s) {
    const int64_t t = a.tile.row(s);
    const Vec<T> dt = load<T>(a.dt + t * lanes), dtu = load<T>(a.dtu + t * lanes);
    Vec<T> re, im, b_re, b_im, c_re, c_im;
    complex_decay<T>(dt, a.rates + 2 * n * lanes, re, im);
    complex_coefficient<T, kVariableB>(a.B, t, a.dstate, n, b_re, b_im);
    const Vec<T> next = re * h_re - im * h_im + b_re * dtu;
    h_im = re * h_im + im * h_re + b_im * dtu;
    h_re = next;
    if constexpr (kOutput) {
      complex_coefficient<T, kVariableC>(a.C, t, a.dstate, n, c_re, c_im);
      T* y = a.y + t * lanes;
      store<T>(y, load<T>(y) + splat(T(2)) * (c_re * h_re - c_im * h_im));
    }
  }
  store<T>(a.h + 2 * n * lanes, h_re);
  store<T>(a.h + (2 * n + 1) * lanes, h_im);
}

// As many states at a time as leave room in the registers for the exponential.
template <class T>
constexpr int kStatesAtOnce = kVectorBytes == 64 ? 16 : 8;

template <class T, bool kVariableB, bool kVariableC, bool kOutput>
void scan_all_states(const StateLoop<T>& a, bool complex) {
  int64_t n = 0;
  if (complex) {
    for (; n < a.dstate; ++n) scan_complex_state<T, kVariableB, kVariableC, kOutput>(a, n);
    return;
  }
  for (; n + kStatesAtOnce<T> <= a.dstate; n += kStatesAtOnce<T>) {
    scan_states<T, kStatesAtOnce<T>, kVariableB, kVariableC, kOutput>(a, n);
  }
  for (; n + 4 <= a.dstate; n += 4) scan_states<T, 4, kVariableB, kVariableC, kOutput>(a, n);
  for (; n < a.dstate; ++n) scan_states<T, 1, kVariableB, kVariableC, kOutput>(a, n);
}

template <class T, bool kOutput>
void scan_tile(const StateLoop<T>& a, const SelectiveScanParams& p) {
  if (p.B.variable && p.C.variable) return scan_all_states<T, true, true, kOutput>(a, p.complex);
  if (p.B.variable) return scan_all_states<T, true, false, kOutput>(a, p.complex);
  if (p.C.variable) return scan_all_states<T, false, true, kOutput>(a, p.complex);
  return scan_all_states<T, false, false, kOutput>(a, p.complex);
}

}  // namespace
}  // namespace trifuse::cpu

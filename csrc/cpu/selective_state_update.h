// One token of the selective scan on a CPU: states in vector lanes, channels one after another.
#pragma once

#include "selective_scan_tile.h"

namespace trifuse::cpu {
namespace {

template <class T, class S>
TRIFUSE_INLINE Vec<T> load_strided(const S* p, int64_t stride, int64_t count) {
  if (stride == 1 && count == kLanes<T>) return load_as<T, S>(p);
  Vec<T> v = splat(T(0));
  for (int64_t i = 0; i < count; ++i) v[i] = scalar_as<T, S>(p[i * stride]);
  return v;
}

template <class T, class S, class StateS>
void update_channels(const StateUpdateParams& p, int64_t b, int64_t h, int64_t first, int64_t count) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t row = p.state_batch_indices ? p.state_batch_indices[b] : b;
  S* out = static_cast<S*>(p.out) + (b * p.heads + h) * p.headdim + first;
  if (row < 0) {
    for (int64_t i = 0; i < count; ++i) out[i] = scalar_from<S, T>(T(0));
    return;
  }
  const Vec<T> x =
      load_strided<T>(static_cast<const S*>(p.x) + b * p.x_batch + h * p.x_head + first * p.x_dim, p.x_dim, count);
  Vec<T> dt =
      load_strided<T>(static_cast<const S*>(p.dt) + b * p.dt_batch + h * p.dt_head + first * p.dt_dim, p.dt_dim, count);
  if (p.dt_bias) {
    dt += load_strided<T>(static_cast<const T*>(p.dt_bias) + h * p.dt_bias_head + first * p.dt_bias_dim, p.dt_bias_dim,
                          count);
  }
  if (p.dt_softplus) dt = softplus<T, false>(dt).value;
  const Vec<T> dtx = dt * x;
  const Vec<T> rate_dt = decay_time<T>(dt);
  const int64_t group = h / (p.heads / p.groups);
  const S* B = static_cast<const S*>(p.B) + b * p.B_batch + group * p.B_group;
  const S* C = static_cast<const S*>(p.C) + b * p.C_batch + group * p.C_group;
  // One rate for all states of a channel, as in Mamba-2: then one decay too.
  const bool one_rate = p.A_state == 0 && !p.A_is_log;
  Vec<T> decays = splat(T(1));
  if (one_rate) {
    const T* A = static_cast<const T*>(p.A) + h * p.A_head + first * p.A_dim;
    const Vec<T> rates = load_strided<T>(A, p.A_dim, count);
    decays = exp2_product<T>(rate_dt, at_most<T>(at_least<T>(rates, -kFactorLimit<T>), kFactorLimit<T>));
  }
  Vec<T> y = splat(T(0));
  for (int64_t n = 0; n < p.dstate; n += lanes) {
    const int64_t width = least(lanes, p.dstate - n);
    const Vec<T> vB = load_strided<T>(B + n * p.B_state, p.B_state, width);
    const Vec<T> vC = load_strided<T>(C + n * p.C_state, p.C_state, width);
    for (int64_t i = 0; i < count; ++i) {
      StateS* state = static_cast<StateS*>(p.state) + row * p.state_row + h * p.state_head + (first + i) * p.state_dim +
                      n * p.state_state;
      Vec<T> decay = splat(T(decays[i]));
      if (!one_rate) {
        const T* A = static_cast<const T*>(p.A) + h * p.A_head + (first + i) * p.A_dim + n * p.A_state;
        Vec<T> rate = load_strided<T>(A, p.A_state, width);
        if (p.A_is_log) rate = -exp_bounded<T>(at_most<T>(rate, sizeof(T) == 4 ? T(85.9) : T(700)));
        rate = at_most<T>(at_least<T>(rate, -kFactorLimit<T>), kFactorLimit<T>);
        decay = exp2_product<T>(splat(T(rate_dt[i])), rate);
      }
      const Vec<T> s = decay * load_strided<T>(state, p.state_state, width) + splat(T(dtx[i])) * vB;
      if (p.state_state == 1 && width == lanes) {
        store_as<T, StateS>(state, s);
      } else {
        for (int64_t j = 0; j < width; ++j) state[j * p.state_state] = scalar_from<StateS, T>(s[j]);
      }
      y[i] += sum_lanes<T>(s * vC);
    }
  }
  if (p.D) y += x * load_strided<T>(static_cast<const T*>(p.D) + h * p.D_head + first * p.D_dim, p.D_dim, count);
  if (p.z) {
    const Vec<T> z =
        load_strided<T>(static_cast<const S*>(p.z) + b * p.z_batch + h * p.z_head + first * p.z_dim, p.z_dim, count);
    y = y * z * sigmoid<T>(z);
  }
  for (int64_t i = 0; i < count; ++i) out[i] = scalar_from<S, T>(y[i]);
}

template <class T, class S, class StateS>
void update(const StateUpdateParams& p, const Threads& threads) {
  constexpr int64_t lanes = kLanes<T>;
  constexpr int64_t worth_a_thread = 1 << 16;  // state numbers: below, waking threads costs more than it saves
  const int64_t blocks = divide_up(p.headdim, lanes), tasks = p.batch * p.heads * blocks;
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * lanes, h = i / blocks % p.heads, b = i / blocks / p.heads;
      update_channels<T, S, StateS>(p, b, h, first, least(lanes, p.headdim - first));
    }
  };
  if (p.batch * p.heads * p.headdim * p.dstate < worth_a_thread) {
    run(0, tasks);
  } else {
    parallel(threads, tasks, run);
  }
}

}  // namespace
}  // namespace trifuse::cpu

// The arithmetic of the backward kernel: sweeps over the groups of a tile that lies in shared memory.
#pragma once

#include "selective_scan_tiles.cuh"

namespace trifuse::cuda {

struct BwdArgs : ScanArgs {
  Sequence dout, du, ddelta, dz;
  const float* dlast_state;
  const float* chunk_states;  // one per tile
  int64_t n_chunks;
  Coefficient dB, dC;  // float32, `group` per channel block; ptr null when constant
  // Rows of partial sums, one per batch item and split.
  float *dA, *dB_constant, *dC_constant;  // (rows, dim, dstate); the last two may be null
  float *dD, *ddelta_bias;                // (rows, dim) or null
  float* dinitial_state;                  // may be null
};

// The forward sweep's states and, in the same place once read, the groups' sums over channels.
template <int kStates>
struct GroupStates {
  static constexpr int kWarpFloats = 32 * 2 * kStates;
  static constexpr int kRow = 2 * kStates * kSlices;  // dB and dC of one step
  static_assert(kGroup * kRow <= kWarpFloats, "the sums of a group fit where its states were");
  alignas(16) float x[kGroups][kWarps][kWarpFloats];
};

template <typename T, int kStates>
struct BwdShared {
  // Narrow types stage one tile ahead; float32 would leave room for one block only.
  static constexpr int kBuffers = sizeof(T) == 2 ? 2 : 1;
  static constexpr int kTensors = 4, kSlots = kSteps * kChannels;
  T raw[kBuffers][kTensors][kSlots];
  alignas(16) float tile[kSteps * kPairs * 4];
  alignas(16) float dy[kSteps * kChannels];
  alignas(16) float coefficients[CoefficientTile<kStates, kStates>::kFloats];
  GroupStates<kStates> groups;
  float sums[2][kMaxOwnChannels][kThreads];  // dD and ddelta_bias, of each thread's own channels
  Boundaries boundaries;
};

TRIFUSE_DEVICE int dy_slot(int step, int channel) {
  return step * kChannels + (channel ^ int(unsigned(step) / kGroup % 8 * 4));
}

template <typename T, int kStates, bool kConstant, bool kLocal>
struct BackwardSweeps {
  using Shared = BwdShared<T, kStates>;
  using Registers = float[2][kStates];
  static constexpr int kTileStates = kStates * kSlices;
  static constexpr int kCopies = kStates;
  static constexpr int kRow = CoefficientTile<kStates, kCopies>::kRow;
  static constexpr int kC = kCopies * kTileStates;  // from B to C in a row
  static constexpr int kSumRow = GroupStates<kStates>::kRow;

  const BwdArgs& p;
  Shared& shared;
  const Block block;
  const Lane<kStates, true> lane;
  int64_t state0 = 0;
  Registers A2, h, g, dA;  // g: what the later step passes to the state before it
  float B[kConstant ? 2 : 1][kStates], C[kConstant ? 2 : 1][kStates];
  float dB[kConstant ? 2 : 1][kStates], dC[kConstant ? 2 : 1][kStates];

  TRIFUSE_DEVICE BackwardSweeps(const BwdArgs& args, Shared& s) : p(args), shared(s), block(args), lane(block) {}

  TRIFUSE_DEVICE float b_of(const float (&b)[kStates], int k, int i) const {
    return kConstant ? b[i] * B[kConstant ? k : 0][i] : b[i];
  }
  TRIFUSE_DEVICE float c_of(const float (&c)[kStates], int k, int i) const {
    return kConstant ? c[i] * C[kConstant ? k : 0][i] : c[i];
  }
  TRIFUSE_DEVICE void load_row(const float* base, int64_t row, Registers& x) {
    lane.load(base == nullptr ? nullptr : base + row * p.dim * p.dstate, p.dstate, state0, x);
  }
  TRIFUSE_DEVICE void store_row(float* base, int64_t row, const Registers& x) {
    lane.store(base == nullptr ? nullptr : base + row * p.dim * p.dstate, p.dstate, state0, x);
  }
  TRIFUSE_DEVICE bool begins(int step) const { return p.cu_seqlens != nullptr && shared.boundaries.begins[step] >= 0; }
  TRIFUSE_DEVICE bool ends(int step) const { return p.cu_seqlens != nullptr && shared.boundaries.ends[step] >= 0; }

  // Where this lane finds and leaves things of a group's first step; further steps lie rows behind.
  struct Place {
    float *pairs[2], *dy[2];    // per register k
    const float* coefficients;  // this lane's copy of B; C is kC behind
    float* states;              // of the warp

    TRIFUSE_DEVICE float2 x(int s, int k) const { return *reinterpret_cast<const float2*>(pairs[k] + s * kPairs * 4); }
  };
  TRIFUSE_DEVICE Place place(int group) {
    Place at;
    const int step = group * kGroup;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      at.pairs[k] = shared.tile + pair_slot(step, lane.pair) + (k ^ lane.low) * 2;
      at.dy[k] = shared.dy + dy_slot(step, lane.pair * 2 + (k ^ lane.low));
    }
    at.coefficients = shared.coefficients + step * kRow + lane.permuted * kTileStates + lane.slice * kStates;
    at.states = shared.groups.x[group][threadIdx.x / 32];
    return at;
  }

  // What one step is made of: dt and dt * u, the states' decay and B.
  struct Step {
    float2 x[2];
    Registers a;
    float b[kStates];
  };

  // From the state before a step to that after it, which may be the same registers.
  TRIFUSE_DEVICE void step_forward(const Place& at, int s, Step& now, const Registers& before, Registers& next) const {
    read_states(at.coefficients + s * kRow, now.b);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      now.x[k] = at.x(s, k);
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        now.a[k][i] = exp2_fast(now.x[k].x * A2[k][i]);
        next[k][i] = fma(now.a[k][i], before[k][i], now.x[k].y * b_of(now.b, k, i));
      }
    }
  }

  // The first sweep: h from before the group to after it.
  TRIFUSE_DEVICE void advance(int group) {
    const Place at = place(group);
#pragma unroll
    for (int s = 0; s < kGroup; ++s) {
      Step now;
      step_forward(at, s, now, h, h);
    }
  }
  // The same up to step `end` of the group, minding boundaries.
  TRIFUSE_DEVICE void advance_carefully(int group, int end, Registers& state) {
    const Place at = place(group);
#pragma unroll 1
    for (int s = 0; s < end; ++s) {
      const int step = group * kGroup + s;
      if (begins(step)) load_row(p.initial_state, shared.boundaries.begins[step], state);
      Step now;
      step_forward(at, s, now, state, state);
    }
  }

  TRIFUSE_DEVICE void keep_states(int group) {
    float* to = place(group).states;
    const int at = int(threadIdx.x) % 32;
    if constexpr (kStates == 4) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        reinterpret_cast<float4*>(to)[k * 32 + at] = make_float4(h[k][0], h[k][1], h[k][2], h[k][3]);
      }
    } else {
      reinterpret_cast<float2*>(to)[at] = make_float2(h[0][0], h[1][0]);
    }
  }
  TRIFUSE_DEVICE void recall_states(const float* from, Registers& x) {
    const int at = int(threadIdx.x) % 32;
    if constexpr (kStates == 4) {
#pragma unroll
      for (int k = 0; k < 2; ++k) read_states(from + (k * 32 + at) * 4, x[k]);
    } else {
      const float2 v = reinterpret_cast<const float2*>(from)[at];
      x[0][0] = v.x, x[1][0] = v.y;
    }
  }

  // The reverse sweep of a group: g from after it to before it.
  TRIFUSE_DEVICE void group_backward(int group) {
    const Place at = place(group);
    Step now[kGroup];
    Registers state[kGroup + 1];
    float dy[kGroup][2];
    recall_states(at.states, state[0]);
#pragma unroll
    for (int s = 0; s < kGroup; ++s) {
      step_forward(at, s, now[s], state[s], state[s + 1]);
#pragma unroll
      for (int k = 0; k < 2; ++k) dy[s][k] = at.dy[k][s * kChannels];
    }
    __syncwarp();  // from here on the lanes overwrite what they have just read
#pragma unroll
    for (int s = kGroup - 1; s >= 0; --s) step_backward(at, s, now[s], dy[s], state[s], state[s + 1]);
  }
  // The same with boundaries or less than a group of steps, which is rare: step by step, each from the
  // group's first state again.
  TRIFUSE_DEVICE void group_backward_carefully(int group, int steps) {
    const Place at = place(group);
    Registers first;
    recall_states(at.states, first);
#pragma unroll 1
    for (int s = (steps < kGroup ? steps : kGroup) - 1; s >= 0; --s) {
      const int step = group * kGroup + s;
      Registers before, after;
      lane.copy(first, before);
      advance_carefully(group, s, before);
      if (begins(step)) load_row(p.initial_state, shared.boundaries.begins[step], before);
      if (ends(step)) load_row(p.dlast_state, shared.boundaries.ends[step], g);
      Step now;
      step_forward(at, s, now, before, after);
      const float dy[2] = {at.dy[0][s * kChannels], at.dy[1][s * kChannels]};
      __syncwarp();
      step_backward(at, s, now, dy, before, after);
      if (begins(step)) {
        store_row(p.dinitial_state, shared.boundaries.begins[step], g);
        lane.clear(g);
      }
    }
  }

  TRIFUSE_DEVICE void step_backward(const Place& at, int s, const Step& now, const float (&dy)[2],
                                    const Registers& before, const Registers& after) {
    float c[kStates], sum_b[kStates] = {}, sum_c[kStates] = {}, P[2], Q[2], y[2];
    read_states(at.coefficients + s * kRow + kC, c);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      P[k] = Q[k] = y[k] = 0.0f;
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const float here = fma(c_of(c, k, i), dy[k], g[k][i]);
        const float from_b = here * now.x[k].y, from_c = dy[k] * after[k][i];
        sum_b[i] = k == 0 ? from_b : fma(here, now.x[k].y, sum_b[i]);
        sum_c[i] = k == 0 ? from_c : fma(dy[k], after[k][i], sum_c[i]);
        P[k] = fma(here, b_of(now.b, k, i), P[k]);
        y[k] = fma(c_of(c, k, i), after[k][i], y[k]);
        g[k][i] = now.a[k][i] * here;
        const float decayed = g[k][i] * before[k][i];
        Q[k] = fma(A2[k][i], decayed, Q[k]);
        dA[k][i] = fma(now.x[k].x, decayed, dA[k][i]);
        if constexpr (kConstant) {
          dB[k][i] += from_b;
          dC[k][i] += from_c;
        }
      }
    }
    write_state_sums(at, s, P, Q, y);
    write_channel_sums(at, s, sum_b, sum_c);
  }

  // P and Q end in two of a channel's four lanes each, y in all; y and P go where dt and dt * u were,
  // Q where dy was.
  TRIFUSE_DEVICE void write_state_sums(const Place& at, int s, float (&P)[2], float (&Q)[2], float (&y)[2]) {
    P[0] += __shfl_xor_sync(kFullWarp, P[1], 1);
    Q[0] += __shfl_xor_sync(kFullWarp, Q[1], 1);
    y[0] += __shfl_xor_sync(kFullWarp, y[1], 1);
    const float give = lane.high ? P[0] : Q[0];
    const float sum = (lane.high ? Q[0] : P[0]) + __shfl_xor_sync(kFullWarp, give, 2);
    y[0] += __shfl_xor_sync(kFullWarp, y[0], 2);
    if (lane.high) {
      at.dy[0][s * kChannels] = sum;
    } else {
      *reinterpret_cast<float2*>(at.pairs[0] + s * kPairs * 4) = make_float2(y[0], sum);
    }
  }

  // dB or dC, of one state, summed over the warp's channels, in each lane.
  TRIFUSE_DEVICE void write_channel_sums(const Place& at, int s, float (&b)[kStates], float (&c)[kStates]) {
    if constexpr (kStates == 4) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        b[i] += __shfl_xor_sync(kFullWarp, b[i + 1], 4);
        c[i] += __shfl_xor_sync(kFullWarp, c[i + 1], 4);
      }
      b[0] += __shfl_xor_sync(kFullWarp, b[2], 8);
      c[0] += __shfl_xor_sync(kFullWarp, c[2], 8);
    } else {
#pragma unroll
      for (int by = 4; by <= 8; by *= 2) {
        b[0] += __shfl_xor_sync(kFullWarp, b[0], by);
        c[0] += __shfl_xor_sync(kFullWarp, c[0], by);
      }
    }
    const bool is_c = lane.place >= 4;
    const float give = is_c ? b[0] : c[0];
    const float sum = (is_c ? c[0] : b[0]) + __shfl_xor_sync(kFullWarp, give, 16);
    if (lane.place % 4 < kStates) {
      at.states[s * kSumRow + is_c * kTileStates + lane.slice * kStates + lane.place % 4] = sum;
    }
  }

  // The local pass: g alone.
  TRIFUSE_DEVICE void step_carry(const Place& at, int s) {
    float c[kStates];
    read_states(at.coefficients + s * kRow + kC, c);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float dt = at.x(s, k).x, dy = at.dy[k][s * kChannels];
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        g[k][i] = exp2_fast(dt * A2[k][i]) * fma(c_of(c, k, i), dy, g[k][i]);
      }
    }
  }
  TRIFUSE_DEVICE void group_carry(int group) {
    const Place at = place(group);
#pragma unroll
    for (int s = kGroup - 1; s >= 0; --s) step_carry(at, s);
  }
  TRIFUSE_DEVICE void group_carry_carefully(int group, int steps) {
    const Place at = place(group);
#pragma unroll 1
    for (int s = (steps < kGroup ? steps : kGroup) - 1; s >= 0; --s) {
      const int step = group * kGroup + s;
      if (ends(step)) load_row(p.dlast_state, shared.boundaries.ends[step], g);
      step_carry(at, s);
      if (begins(step)) lane.clear(g);
    }
  }

  TRIFUSE_DEVICE void carry_tile(int groups, int steps, unsigned special) {
#pragma unroll 1
    for (int group = groups - 1; group >= 0; --group) {
      if ((special >> group * kGroup & 15) != 0) {
        group_carry_carefully(group, steps - group * kGroup);
      } else {
        group_carry(group);
      }
    }
  }
  TRIFUSE_DEVICE void sweep_tile(int groups, int steps, unsigned special) {
#pragma unroll 1
    for (int group = 0; group < groups - 1; ++group) {
      keep_states(group);
      if ((special >> group * kGroup & 15) != 0) {
        advance_carefully(group, kGroup, h);
      } else {
        advance(group);
      }
    }
    keep_states(groups - 1);
#pragma unroll 1
    for (int group = groups - 1; group >= 0; --group) {
      if ((special >> group * kGroup & 15) != 0) {
        group_backward_carefully(group, steps - group * kGroup);
      } else {
        group_backward(group);
      }
    }
  }
};

}  // namespace trifuse::cuda

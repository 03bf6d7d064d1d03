// The backward kernel of the selective scan. See selective_scan_common.cuh for who does what.
//
// Tiles go backwards. Within one, a forward sweep from the saved state keeps the state before every
// fourth step in shared memory; then each group of four steps is recomputed into registers and swept
// in reverse. With g the gradient of the state after a step, a = exp(dt A) and h' the state before it:
//   dC += dy h    dB += g dt u    P = sum_n g B    Q = sum_n A g a h'    dA += dt g a h'    g' = a g
//   du = D dy + dt P    ddt = u P + Q
// Sums over states and over channels are exchanged between lanes; what a block sums over its channels
// for dB and dC, and over time for dA, dD and ddelta_bias, goes to rows of its own that a last kernel
// adds in a fixed order, so that no atomics are needed and results repeat bit for bit.
//
// Per state and step 2 exponentials and 17 multiply-adds, and per step and thread (8 states) about 26
// instructions of exchange: at B 8, D 2048, L 2048, N 16 on 132 multiprocessors 450 us of issue slots,
// 400 us of shared memory, 280 us of special functions and 190 us of device memory.
#pragma once

#include "selective_scan_common.cuh"

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

TRIFUSE_DEVICE int dy_slot(int step, int channel) { return step * kChannels + (channel ^ (step / kGroup % 8 * 4)); }

template <typename T, int kStates, bool kConstant, bool kLocal>
struct Backward {
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

  TRIFUSE_DEVICE Backward(const BwdArgs& args, Shared& s) : p(args), shared(s), block(args), lane(block) {}

  TRIFUSE_DEVICE float b_of(const float (&b)[kStates], int k, int i) const {
    return kConstant ? b[i] * B[kConstant ? k : 0][i] : b[i];
  }
  TRIFUSE_DEVICE float c_of(const float (&c)[kStates], int k, int i) const {
    return kConstant ? c[i] * C[kConstant ? k : 0][i] : c[i];
  }

  template <class Map>
  TRIFUSE_DEVICE void stage_tile(int64_t step0, int buffer) {
    const Map map;
    const int steps = int(block.end - step0 < kSteps ? block.end - step0 : kSteps);
    if (!kLocal) stage(map, p.u, block, step0, steps, shared.raw[buffer][0]);
    stage(map, p.delta, block, step0, steps, shared.raw[buffer][1]);
    if (p.z.ptr != nullptr) stage(map, p.z, block, step0, steps, shared.raw[buffer][2]);
    stage(map, p.dout, block, step0, steps, shared.raw[buffer][3]);
  }

  template <class Map>
  TRIFUSE_DEVICE void read_delta(const Map& map, int buffer, int j, float (&x)[Map::kLength]) {
    read_staged(map, shared.raw[buffer][1], j, x);
#pragma unroll
    for (int i = 0; i < Map::kLength; ++i) x[i] += weight(map, p.delta_bias, block, j, i);
  }

  // Staged tensors to the tiles of dt, dt * u and dy.
  template <class Map>
  TRIFUSE_DEVICE void convert(int buffer) {
    const Map map;
#pragma unroll Map::kUnroll
    for (int j = 0; j < Map::kVectors; ++j) {
      float u[Map::kLength], dt[Map::kLength], dy[Map::kLength], z[Map::kLength];
      if (!kLocal) read_staged(map, shared.raw[buffer][0], j, u);
      read_delta(map, buffer, j, dt);
      if (p.z.ptr != nullptr) read_staged(map, shared.raw[buffer][2], j, z);
      read_staged(map, shared.raw[buffer][3], j, dy);
#pragma unroll
      for (int i = 0; i < Map::kLength; ++i) {
        if (p.softplus) dt[i] = softplus(dt[i]);
        if (p.z.ptr != nullptr) dy[i] *= z[i] * sigmoid(z[i]);
        if (kLocal) u[i] = 0.0f;
      }
      const int step = map.step(j), channel = map.channel(j);
      if constexpr (Map::kAlongTime) {
#pragma unroll
        for (int i = 0; i < Map::kLength; ++i) {
          float* slot = shared.tile + pair_slot(step + i, channel / 2) + channel % 2 * 2;
          *reinterpret_cast<float2*>(slot) = make_float2(dt[i], dt[i] * u[i]);
          shared.dy[dy_slot(step + i, channel)] = dy[i];
        }
      } else {
        *reinterpret_cast<float4*>(shared.tile + pair_slot(step, channel / 2)) =
            make_float4(dt[0], dt[0] * u[0], dt[1], dt[1] * u[1]);
        *reinterpret_cast<float2*>(shared.dy + dy_slot(step, channel)) = make_float2(dy[0], dy[1]);
      }
    }
  }

  TRIFUSE_DEVICE const float* coefficients(int step) const {
    return shared.coefficients + step * kRow + lane.permuted * kTileStates + lane.slice * kStates;
  }
  TRIFUSE_DEVICE float2 dt_and_drive(int slot, int s, int k) const {
    return *reinterpret_cast<const float2*>(shared.tile + slot + s * kPairs * 4 + (k ^ lane.low) * 2);
  }
  TRIFUSE_DEVICE float* states_of(int group) { return shared.groups.x[group][threadIdx.x / 32]; }

  TRIFUSE_DEVICE void load_row(const float* base, int64_t row, Registers& x) {
    lane.load(base == nullptr ? nullptr : base + row * p.dim * p.dstate, p.dstate, state0, x);
  }
  TRIFUSE_DEVICE void store_row(float* base, int64_t row, const Registers& x) {
    lane.store(base == nullptr ? nullptr : base + row * p.dim * p.dstate, p.dstate, state0, x);
  }
  TRIFUSE_DEVICE bool begins(int step) const {
    return p.cu_seqlens != nullptr && shared.boundaries.begins[step] >= 0;
  }
  TRIFUSE_DEVICE bool ends(int step) const { return p.cu_seqlens != nullptr && shared.boundaries.ends[step] >= 0; }

  // What one step is made of: dt and dt * u, the states' decay and B.
  struct Step {
    float2 x[2];
    Registers a;
    float b[kStates];
  };

  // From the state before a step to that after it, which may be the same registers.
  TRIFUSE_DEVICE void step_forward(int slot, int step, Step& now, const Registers& before, Registers& next) const {
    read_states(coefficients(step), now.b);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      now.x[k] = dt_and_drive(slot, step % kGroup, k);
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        now.a[k][i] = exp2_fast(now.x[k].x * A2[k][i]);
        next[k][i] = fma(now.a[k][i], before[k][i], now.x[k].y * b_of(now.b, k, i));
      }
    }
  }

  // The first sweep: h from before the group to after it.
  TRIFUSE_DEVICE void advance(int group) {
    const int slot = pair_slot(group * kGroup, lane.pair);
#pragma unroll
    for (int s = 0; s < kGroup; ++s) {
      Step now;
      step_forward(slot, group * kGroup + s, now, h, h);
    }
  }
  // The same up to `end`, minding boundaries.
  TRIFUSE_DEVICE void advance_carefully(int group, int end, Registers& state) {
    const int slot = pair_slot(group * kGroup, lane.pair);
#pragma unroll 1
    for (int step = group * kGroup; step < end; ++step) {
      if (begins(step)) load_row(p.initial_state, shared.boundaries.begins[step], state);
      Step now;
      step_forward(slot, step, now, state, state);
    }
  }

  TRIFUSE_DEVICE void keep_states(int group) {
    float* to = states_of(group);
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
  TRIFUSE_DEVICE void recall_states(int group, Registers& x) {
    const float* from = states_of(group);
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
    const int slot = pair_slot(group * kGroup, lane.pair);
    Step now[kGroup];
    Registers state[kGroup + 1];
    float dy[kGroup][2];
    recall_states(group, state[0]);
#pragma unroll
    for (int s = 0; s < kGroup; ++s) {
      step_forward(slot, group * kGroup + s, now[s], state[s], state[s + 1]);
      read_dy(group * kGroup + s, dy[s]);
    }
    __syncwarp();  // from here on the lanes overwrite what they have just read
#pragma unroll
    for (int s = kGroup - 1; s >= 0; --s) {
      step_backward(slot, group * kGroup + s, now[s], dy[s], state[s], state[s + 1]);
    }
  }
  // The same with boundaries or less than a group of steps, which is rare: step by step, each from the
  // group's first state again.
  TRIFUSE_DEVICE void group_backward_carefully(int group, int steps) {
    const int slot = pair_slot(group * kGroup, lane.pair);
    Registers first;
    recall_states(group, first);
    const int end = steps < (group + 1) * kGroup ? steps : (group + 1) * kGroup;
#pragma unroll 1
    for (int step = end - 1; step >= group * kGroup; --step) {
      Registers before, after;
      lane.copy(first, before);
      advance_carefully(group, step, before);
      if (begins(step)) load_row(p.initial_state, shared.boundaries.begins[step], before);
      if (ends(step)) load_row(p.dlast_state, shared.boundaries.ends[step], g);
      Step now;
      float dy[2];
      step_forward(slot, step, now, before, after);
      read_dy(step, dy);
      __syncwarp();
      step_backward(slot, step, now, dy, before, after);
      if (begins(step)) {
        store_row(p.dinitial_state, shared.boundaries.begins[step], g);
        lane.clear(g);
      }
    }
  }
  TRIFUSE_DEVICE void read_dy(int step, float (&dy)[2]) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) dy[k] = shared.dy[dy_slot(step, lane.pair * 2 + (k ^ lane.low))];
  }

  TRIFUSE_DEVICE void step_backward(int slot, int step, const Step& now, const float (&dy)[2],
                                    const Registers& before, const Registers& after) {
    float c[kStates], sum_b[kStates] = {}, sum_c[kStates] = {}, P[2], Q[2], y[2];
    read_states(coefficients(step) + kC, c);
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
    write_state_sums(slot, step, P, Q, y);
    write_channel_sums(step, sum_b, sum_c);
  }

  // P and Q end in two of a channel's four lanes each, y in all.
  TRIFUSE_DEVICE void write_state_sums(int slot, int step, float (&P)[2], float (&Q)[2], float (&y)[2]) {
    P[0] += __shfl_xor_sync(kFullWarp, P[1], 1);
    Q[0] += __shfl_xor_sync(kFullWarp, Q[1], 1);
    y[0] += __shfl_xor_sync(kFullWarp, y[1], 1);
    const float give = lane.high ? P[0] : Q[0];
    const float sum = (lane.high ? Q[0] : P[0]) + __shfl_xor_sync(kFullWarp, give, 2);
    y[0] += __shfl_xor_sync(kFullWarp, y[0], 2);
    if (lane.high) {
      shared.dy[dy_slot(step, lane.pair * 2 + lane.low)] = sum;
    } else {
      float* to = shared.tile + slot + step % kGroup * kPairs * 4 + lane.low * 2;
      *reinterpret_cast<float2*>(to) = make_float2(y[0], sum);
    }
  }

  // dB or dC, of one state, summed over the warp's channels, in each lane.
  TRIFUSE_DEVICE void write_channel_sums(int step, float (&b)[kStates], float (&c)[kStates]) {
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
      states_of(step / kGroup)[step % kGroup * kSumRow + is_c * kTileStates + lane.slice * kStates + lane.place % 4] = sum;
    }
  }

  // The local pass: g alone.
  TRIFUSE_DEVICE void step_carry(int slot, int step) {
    float c[kStates], dy[2];
    read_states(coefficients(step) + kC, c);
    read_dy(step, dy);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float dt = dt_and_drive(slot, step % kGroup, k).x;
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        g[k][i] = exp2_fast(dt * A2[k][i]) * fma(c_of(c, k, i), dy[k], g[k][i]);
      }
    }
  }
  TRIFUSE_DEVICE void group_carry(int group) {
#pragma unroll
    for (int s = kGroup - 1; s >= 0; --s) step_carry(pair_slot(group * kGroup, lane.pair), group * kGroup + s);
  }
  TRIFUSE_DEVICE void group_carry_carefully(int group, int steps) {
    const int end = steps < (group + 1) * kGroup ? steps : (group + 1) * kGroup;
#pragma unroll 1
    for (int step = end - 1; step >= group * kGroup; --step) {
      if (ends(step)) load_row(p.dlast_state, shared.boundaries.ends[step], g);
      step_carry(pair_slot(group * kGroup, lane.pair), step);
      if (begins(step)) lane.clear(g);
    }
  }

  TRIFUSE_DEVICE void carry_tile(int groups, int steps, unsigned special) {
#pragma unroll 1
    for (int group = groups - 1; group >= 0; --group) {
      if ((special >> group * kGroup & 15) != 0) {
        group_carry_carefully(group, steps);
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
        advance_carefully(group, (group + 1) * kGroup, h);
      } else {
        advance(group);
      }
    }
    keep_states(groups - 1);
#pragma unroll 1
    for (int group = groups - 1; group >= 0; --group) {
      if ((special >> group * kGroup & 15) != 0) {
        group_backward_carefully(group, steps);
      } else {
        group_backward(group);
      }
    }
  }

  // The warps' sums over channels, added, to the block's row of dB and dC.
  TRIFUSE_DEVICE void write_coefficient_gradients(int64_t step0, int steps) {
    for (int e = int(threadIdx.x); e < steps * kSumRow; e += kThreads) {
      const int step = e / kSumRow, at = e % kSumRow;
      const Coefficient& to = at < kTileStates ? p.dB : p.dC;
      const int64_t state = state0 + at % kTileStates;
      if (to.ptr == nullptr || state >= p.dstate) continue;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += shared.groups.x[step / kGroup][w][step % kGroup * kSumRow + at];
      static_cast<float*>(to.ptr)[coefficient_offset(to, block.batch, block.index, state, step0 + step)] = sum;
    }
  }

  // P, Q and y of an element with those of the states before this go, or false if more states follow.
  TRIFUSE_DEVICE bool complete(float& P, float& Q, float& y, int64_t step, int64_t channel) {
    const bool first = state0 == 0, last = state0 + kTileStates >= p.dstate;
    if (first && last) return true;
    const int64_t part = p.batch * p.seqlen * p.dim;
    float* sum = p.partial_sums + (block.batch * p.seqlen + step) * p.dim + channel;
    if (!first) P += sum[0], Q += sum[part], y += sum[2 * part];
    if (!last) sum[0] = P, sum[part] = Q, sum[2 * part] = y;
    return last;
  }

  template <class Map>
  TRIFUSE_DEVICE void finish(int64_t step0, int steps, int buffer) {
    const Map map;
#pragma unroll Map::kUnroll
    for (int j = 0; j < Map::kVectors; ++j) {
      float u[Map::kLength], x[Map::kLength], z[Map::kLength], dy[Map::kLength];
      read_staged(map, shared.raw[buffer][0], j, u);
      read_delta(map, buffer, j, x);
      if (p.z.ptr != nullptr) read_staged(map, shared.raw[buffer][2], j, z);
      read_staged(map, shared.raw[buffer][3], j, dy);
      bool last = true;
#pragma unroll
      for (int i = 0; i < Map::kLength; ++i) {
        const int step = map.step(j) + (Map::kAlongTime ? i : 0);
        const int channel = map.channel(j) + (Map::kAlongTime ? 0 : i);
        const float2 sums =
            *reinterpret_cast<const float2*>(shared.tile + pair_slot(step, channel / 2) + channel % 2 * 2);
        float y = sums.x, P = sums.y, Q = shared.dy[dy_slot(step, channel)];
        const bool here = inside(map, block, steps, j, i);
        if (here) last = complete(P, Q, y, step0 + step, block.channel0 + channel);
        const float skip = weight(map, p.D, block, j, i);
        float dt = x[i], slope = 1.0f;
        if (p.softplus) dt = softplus_and_slope(x[i], slope);
        if (p.z.ptr != nullptr) {
          const float gate = sigmoid(z[i]), dout = dy[i];
          dy[i] *= z[i] * gate;
          z[i] = dout * fma(skip, u[i], y) * gate * (1.0f + z[i] * (1.0f - gate));
        }
        x[i] = (u[i] * P + kLn2 * Q) * slope;
        if (here && last) {
          shared.sums[0][Map::own(j, i)][threadIdx.x] += dy[i] * u[i];
          shared.sums[1][Map::own(j, i)][threadIdx.x] += x[i];
        }
        u[i] = fma(skip, dy[i], dt * P);
      }
      if (!last) continue;
      write_sequence<T>(map, p.du, block, step0, steps, j, u);
      write_sequence<T>(map, p.ddelta, block, step0, steps, j, x);
      if (p.z.ptr != nullptr) write_sequence<T>(map, p.dz, block, step0, steps, j, z);
    }
  }

  // dD and ddelta_bias of the block's split: the threads that share a channel, in order.
  template <class Map>
  TRIFUSE_DEVICE void write_weight_gradients() {
    const int channel = int(threadIdx.x) % kChannels, which = int(threadIdx.x) / kChannels;
    float* to = which == 0 ? p.dD : p.ddelta_bias;
    if (to == nullptr || channel >= block.channels) return;
    float sum = 0.0f;
    if constexpr (Map::kAlongTime) {
      for (int i = 0; i < Map::kPerRow; ++i) {
        const int at = channel * Map::kPerRow + i;
        sum += shared.sums[which][at / kThreads][at % kThreads];
      }
    } else {
      for (int w = 0; w < kThreads / kPairs; ++w) sum += shared.sums[which][channel % 2][w * kPairs + channel / 2];
    }
    to[(block.batch * p.splits + block.split) * p.dim + block.channel0 + channel] = sum;
  }

  TRIFUSE_DEVICE void stage_tile(int64_t step0, int buffer) {
    p.channel_fast ? stage_tile<ChannelFast<T>>(step0, buffer) : stage_tile<TimeFast<T>>(step0, buffer);
  }
  TRIFUSE_DEVICE void convert(int buffer) {
    p.channel_fast ? convert<ChannelFast<T>>(buffer) : convert<TimeFast<T>>(buffer);
  }
  TRIFUSE_DEVICE void finish(int64_t step0, int steps, int buffer) {
    p.channel_fast ? finish<ChannelFast<T>>(step0, steps, buffer) : finish<TimeFast<T>>(step0, steps, buffer);
  }

  // All steps of the block's split, last to first, for the states from state0 on.
  TRIFUSE_DEVICE void run() {
    constexpr int kOther = Shared::kBuffers - 1;
    enter();
    StagedCoefficients<T, kStates> staged;
    SplitDecay decay;
    int64_t step0 = block.begin + (block.end - 1 - block.begin) / kSteps * kSteps;
    stage_tile(step0, 0);
    staged.load(p, block, state0, step0);
    for (int buffer = 0; step0 >= block.begin; step0 -= kSteps, buffer ^= kOther) {
      const int steps = int(block.end - step0 < kSteps ? block.end - step0 : kSteps);
      const bool more = step0 > block.begin;
      if (!kLocal) {
        lane.load_plane(p.chunk_states + (block.batch * p.n_chunks + step0 / kSteps) * p.dstate * p.dim, p.dim,
                        p.dstate, state0, h);
      }
      async_copy_wait();
      if (p.cu_seqlens != nullptr) find_boundaries(p, step0, shared.boundaries);
      convert(buffer);
      staged.template store<kCopies>(p, shared.coefficients);
      __syncthreads();
      if (more && kOther) stage_tile(step0 - kSteps, buffer ^ kOther);
      if (kLocal) decay.add(p, shared.tile, shared.boundaries, steps);
      const unsigned special = special_steps(p, shared.boundaries, steps);
      const int groups = (steps + kGroup - 1) / kGroup;
      if constexpr (kLocal) {
        carry_tile(groups, steps, special);
      } else {
        sweep_tile(groups, steps, special);
      }
      __syncthreads();
      if (more) staged.load(p, block, state0, step0 - kSteps);  // here, not earlier: eight registers
      if (!kLocal) {
        write_coefficient_gradients(step0, steps);
        finish(step0, steps, buffer);
      }
      if (more && !kOther) stage_tile(step0 - kSteps, buffer);
    }
    leave(decay);
  }

  // The gradient that reaches the split's last step from behind it.
  TRIFUSE_DEVICE void enter() {
    lane.load(p.A, p.dstate, state0, A2);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < kStates; ++i) A2[k][i] *= kLog2e;
    }
    lane.clear(g);
    lane.clear(dA);
    if constexpr (kConstant) {
      load_constant(p.B, B);
      load_constant(p.C, C);
      lane.clear(dB);
      lane.clear(dC);
    }
    if (!kLocal && state0 == 0) {
#pragma unroll
      for (int i = 0; i < 2 * kMaxOwnChannels; ++i) {
        shared.sums[i / kMaxOwnChannels][i % kMaxOwnChannels][threadIdx.x] = 0.0f;
      }
    }
    if (block.end == p.seqlen) {
      if (p.cu_seqlens == nullptr) load_row(p.dlast_state, block.batch, g);
    } else if (!kLocal) {
      for (unsigned split = p.splits - 1; split > block.split; --split) {
        through_split(p, block, lane, split, state0, A2, g);
      }
    }
  }
  TRIFUSE_DEVICE void load_constant(const Coefficient& from, Registers& x) {
    if (!from.variable) lane.load(static_cast<const float*>(from.ptr), p.dstate, state0, x);
#pragma unroll
    for (int i = 0; from.variable && i < kStates; ++i) x[0][i] = x[1][i] = 1.0f;
  }

  TRIFUSE_DEVICE void leave(const SplitDecay& decay) {
    const int64_t row = block.batch * p.splits + block.split;
    if constexpr (kLocal) {
      decay.store(p, block);
      lane.store_plane(p.split_state + row * p.dstate * p.dim, p.dim, p.dstate, state0, g);
    } else {
      store_row(p.dA, row, dA);
      if constexpr (kConstant) {
        store_row(p.dB_constant, row, dB);
        store_row(p.dC_constant, row, dC);
      }
      if (p.cu_seqlens == nullptr && block.begin == 0) store_row(p.dinitial_state, block.batch, g);
      if (state0 + kTileStates < p.dstate) return;
      __syncthreads();
      p.channel_fast ? write_weight_gradients<ChannelFast<T>>() : write_weight_gradients<TimeFast<T>>();
    }
  }
};

template <typename T, int kStates, bool kConstant, bool kLocal>
__global__ void __launch_bounds__(kThreads, kLocal ? 3 : 2) scan_bwd_kernel(const __grid_constant__ BwdArgs p) {
  TRIFUSE_SHARED_MEMORY(memory);
  using Kernel = Backward<T, kStates, kConstant, kLocal>;
  Kernel kernel(p, *reinterpret_cast<typename Kernel::Shared*>(memory));
  if (kLocal && kernel.block.split == 0) return;  // nothing comes before the first split
  do {
    kernel.run();
    kernel.state0 += Kernel::kTileStates;
  } while (kernel.state0 < p.dstate);
}

}  // namespace trifuse::cuda

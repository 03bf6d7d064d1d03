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
// Per step and thread (8 states) 38 instructions in the first sweep, 157 in the others, and about 75 to
// stage, convert and finish its half element. Counted in sm_90 machine code, at B 8, D 2048, L 2048,
// N 16, bfloat16, on 132 multiprocessors at 1.98 GHz: 540 us of issue slots, 400 us of shared memory,
// 280 us of special functions, 190 us of device memory. Not yet timed on a GPU.
#pragma once

#include "selective_scan_bwd_sweeps.cuh"

namespace trifuse::cuda {

template <typename T, int kStates, bool kConstant, bool kLocal>
struct Backward : BackwardSweeps<T, kStates, kConstant, kLocal> {
  using Base = BackwardSweeps<T, kStates, kConstant, kLocal>;
  using Base::A2, Base::dA, Base::g, Base::h;
  using Base::Base, Base::block, Base::lane, Base::p, Base::shared, Base::state0;
  using Base::kCopies, Base::kSumRow, Base::kTileStates;
  using Shared = typename Base::Shared;
  using Registers = typename Base::Registers;

  template <class Map>
  TRIFUSE_DEVICE void stage_tile(int64_t step0, int buffer) {
    const Map map(p);
    const int steps = int(block.end - step0 < kSteps ? block.end - step0 : kSteps);
    if (!kLocal) stage(map, p.u, block, step0, steps, shared.raw[buffer][0]);
    stage(map, p.delta, block, step0, steps, shared.raw[buffer][1]);
    if (p.z.ptr != nullptr) stage(map, p.z, block, step0, steps, shared.raw[buffer][2]);
    stage(map, p.dout, block, step0, steps, shared.raw[buffer][3]);
  }

  // Staged tensors to the tiles of dt, dt * u and dy.
  template <class Map>
  TRIFUSE_DEVICE void convert(int buffer) {
    const Map map(p);
    Weight<Map> bias(map, p.delta_bias, block);
#pragma unroll Map::kUnroll
    for (int j = 0; j < Map::kVectors; ++j) {
      float u[Map::kLength], dt[Map::kLength], dy[Map::kLength], z[Map::kLength];
      bias.load(map, p.delta_bias, block, j);
      if (!kLocal) read_staged(map, shared.raw[buffer][0], j, u);
      read_staged(map, shared.raw[buffer][1], j, dt);
      if (p.z.ptr != nullptr) read_staged(map, shared.raw[buffer][2], j, z);
      read_staged(map, shared.raw[buffer][3], j, dy);
#pragma unroll
      for (int i = 0; i < Map::kLength; ++i) {
        dt[i] += bias.of(i);
        if (p.softplus) dt[i] = softplus(dt[i]);
        if (p.z.ptr != nullptr) dy[i] *= z[i] * sigmoid(z[i]);
        u[i] = kLocal ? 0.0f : dt[i] * u[i];
      }
      write_pairs(map, j, dt, u, shared.tile);
      const int step = map.step(j), channel = map.channel(j);
      if constexpr (Map::kAlongTime) {
#pragma unroll
        for (int i = 0; i < Map::kLength; ++i) shared.dy[dy_slot(step + i, channel)] = dy[i];
      } else {
        *reinterpret_cast<float2*>(shared.dy + dy_slot(step, channel)) = make_float2(dy[0], dy[1]);
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

  // Adds P, Q and y of the states of earlier goes, and keeps them if more follow.
  TRIFUSE_DEVICE void complete(float& P, float& Q, float& y, int64_t step, int64_t channel) {
    const bool first = state0 == 0, last = state0 + kTileStates >= p.dstate;
    const int64_t part = p.batch * p.seqlen * p.dim;
    float* sum = p.partial_sums + (block.batch * p.seqlen + step) * p.dim + channel;
    if (!first) P += sum[0], Q += sum[part], y += sum[2 * part];
    if (!last) sum[0] = P, sum[part] = Q, sum[2 * part] = y;
  }

  template <class Map>
  TRIFUSE_DEVICE void finish(int64_t step0, int steps, int buffer) {
    const Map map(p);
    const bool last = state0 + kTileStates >= p.dstate;
    Weight<Map> bias(map, p.delta_bias, block), skip(map, p.D, block);
    T* du = first_element<T>(map, p.du, block, step0);
    T* ddelta = first_element<T>(map, p.ddelta, block, step0);
    T* dz = first_element<T>(map, p.dz, block, step0);
    float sums[2][Map::kAlongTime ? 1 : 2] = {};
#pragma unroll Map::kUnroll
    for (int j = 0; j < Map::kVectors; ++j) {
      float u[Map::kLength], x[Map::kLength], z[Map::kLength], dy[Map::kLength];
      bias.load(map, p.delta_bias, block, j);
      skip.load(map, p.D, block, j);
      read_staged(map, shared.raw[buffer][0], j, u);
      read_staged(map, shared.raw[buffer][1], j, x);
      if (p.z.ptr != nullptr) read_staged(map, shared.raw[buffer][2], j, z);
      read_staged(map, shared.raw[buffer][3], j, dy);
#pragma unroll
      for (int i = 0; i < Map::kLength; ++i) {
        element_gradients<Map>(map, j, i, step0, bias.of(i), skip.of(i), steps, u[i], x[i], z[i], dy[i]);
        sums[0][Map::own(0, i)] += dy[i];  // zero past the end, where everything staged is zero
        sums[1][Map::own(0, i)] += x[i];
      }
      if (!last) continue;
      write_vector(map, p.du, block, steps, j, du, u);
      write_vector(map, p.ddelta, block, steps, j, ddelta, x);
      if (p.z.ptr != nullptr) write_vector(map, p.dz, block, steps, j, dz, z);
      du += Map::to_next(p.du);
      ddelta += Map::to_next(p.ddelta);
      dz += Map::to_next(p.dz);
      if (Map::kAlongTime) add_sums(j, sums);
    }
    if (!Map::kAlongTime && last) add_sums(0, sums);
  }

  // Of one element: u, delta, z and dout become du, ddelta, dz and what dD sums.
  template <class Map>
  TRIFUSE_DEVICE void element_gradients(const Map& map, int j, int i, int64_t step0, float bias, float skip, int steps,
                                        float& u, float& x, float& z, float& dy) {
    const int step = map.step(j) + (Map::kAlongTime ? i : 0);
    const int channel = map.channel(j) + (Map::kAlongTime ? 0 : i);
    const float* pair = shared.tile + pair_slot(step, channel / 2) + channel % 2 * 2;
    const float2 sums = *reinterpret_cast<const float2*>(pair);
    float y = sums.x, P = sums.y, Q = shared.dy[dy_slot(step, channel)];
    if (p.partial_sums != nullptr && inside(map, block, steps, j, i)) {
      complete(P, Q, y, step0 + step, block.channel0 + channel);
    }
    float dt = x + bias, slope = 1.0f;
    if (p.softplus) dt = softplus_and_slope(dt, slope);
    if (p.z.ptr != nullptr) {
      const float gate = sigmoid(z), dout = dy;
      dy *= z * gate;
      z = dout * fma(skip, u, y) * gate * (1.0f + z * (1.0f - gate));
    }
    x = (u * P + kLn2 * Q) * slope;
    const float du = fma(skip, dy, dt * P);
    dy *= u;
    u = du;
  }

  template <int kOwn>
  TRIFUSE_DEVICE void add_sums(int first, float (&sums)[2][kOwn]) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        shared.sums[which][first + i][threadIdx.x] += sums[which][i];
        sums[which][i] = 0.0f;
      }
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
      for (unsigned i = 0; i < Map::kPerRow; ++i) {
        const unsigned at = unsigned(channel) * Map::kPerRow + i;
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
        this->carry_tile(groups, steps, special);
      } else {
        this->sweep_tile(groups, steps, special);
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
      load_constant(p.B, this->B);
      load_constant(p.C, this->C);
      lane.clear(this->dB);
      lane.clear(this->dC);
    }
    if (!kLocal && state0 == 0) {
#pragma unroll
      for (int i = 0; i < 2 * kMaxOwnChannels; ++i) {
        shared.sums[i / kMaxOwnChannels][i % kMaxOwnChannels][threadIdx.x] = 0.0f;
      }
    }
    if (block.end == p.seqlen) {
      if (p.cu_seqlens == nullptr) this->load_row(p.dlast_state, block.batch, g);
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
      this->store_row(p.dA, row, dA);
      if constexpr (kConstant) {
        this->store_row(p.dB_constant, row, this->dB);
        this->store_row(p.dC_constant, row, this->dC);
      }
      if (p.cu_seqlens == nullptr && block.begin == 0) this->store_row(p.dinitial_state, block.batch, g);
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

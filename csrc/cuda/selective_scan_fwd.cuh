// The forward kernel of the selective scan. See selective_scan_common.cuh for who does what.
//
// Per state and step: one exponential, two products, two multiply-adds; per step and thread (8 states)
// 54 instructions, of which 4 shared-memory loads and 3.5 to sum over states, and about 40 more to
// stage, convert and finish its half element. Counted in sm_90 machine code, at B 8, D 2048, L 2048,
// N 16, bfloat16, on 132 multiprocessors at 1.98 GHz: 200 us of issue slots, 150 us of special
// functions, 120 us of shared memory, 62 us of device memory. Not yet timed on a GPU.
#pragma once

#include "selective_scan_tiles.cuh"

namespace trifuse::cuda {

struct FwdArgs : ScanArgs {
  Sequence out;  // ptr may be null
  float* last_state;
  float* chunk_states;  // may be null
  int64_t chunk_size, n_chunks;
};

template <typename T, int kStates>
struct FwdShared {
  static constexpr int kTensors = 3, kSlots = kSteps * kChannels;
  T raw[2][kTensors][kSlots];
  alignas(16) float tile[kSteps * kPairs * 4];
  alignas(16) float coefficients[CoefficientTile<kStates, 1>::kFloats];
  Boundaries boundaries;
};

template <typename T, int kStates, bool kConstant>
struct Forward {
  using Shared = FwdShared<T, kStates>;
  static constexpr int kTileStates = kStates * kSlices;
  static constexpr int kRow = CoefficientTile<kStates, 1>::kRow;

  const FwdArgs& p;
  Shared& shared;
  const Block block;
  const Lane<kStates, false> lane;
  int64_t state0 = 0;
  float A2[2][kStates], h[2][kStates];
  float B[kConstant ? 2 : 1][kStates], C[kConstant ? 2 : 1][kStates];

  TRIFUSE_DEVICE Forward(const FwdArgs& args, Shared& s) : p(args), shared(s), block(args), lane(block) {}

  template <class Map>
  TRIFUSE_DEVICE void stage_tile(int64_t step0, int buffer) {
    const Map map(p);
    const int steps = int(block.end - step0 < kSteps ? block.end - step0 : kSteps);
    stage(map, p.u, block, step0, steps, shared.raw[buffer][0]);
    stage(map, p.delta, block, step0, steps, shared.raw[buffer][1]);
    if (p.z.ptr != nullptr) stage(map, p.z, block, step0, steps, shared.raw[buffer][2]);
  }

  // Staged u and delta to the tile of dt and dt * u.
  template <class Map>
  TRIFUSE_DEVICE void convert(int buffer) {
    const Map map(p);
    Weight<Map> bias(map, p.delta_bias, block);
#pragma unroll Map::kUnroll
    for (int j = 0; j < Map::kVectors; ++j) {
      float u[Map::kLength], dt[Map::kLength];
      bias.load(map, p.delta_bias, block, j);
      read_staged(map, shared.raw[buffer][0], j, u);
      read_staged(map, shared.raw[buffer][1], j, dt);
#pragma unroll
      for (int i = 0; i < Map::kLength; ++i) {
        dt[i] += bias.of(i);
        if (p.softplus) dt[i] = softplus(dt[i]);
        u[i] *= dt[i];
      }
      write_pairs(map, j, dt, u, shared.tile);
    }
  }

  TRIFUSE_DEVICE void one_step(int slot, int step, float& y0, float& y1) {
    const float* coefficients = shared.coefficients + step * kRow + lane.slice * kStates;
    float b[kStates], c[kStates], y[2] = {0.0f, 0.0f};
    read_states(coefficients, b);
    read_states(coefficients + kTileStates, c);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float* from = shared.tile + slot + step % kGroup * kPairs * 4 + (k ^ lane.low) * 2;
      const float2 x = *reinterpret_cast<const float2*>(from);
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const float drive = x.y * (kConstant ? b[i] * B[kConstant ? k : 0][i] : b[i]);
        h[k][i] = fma(exp2_fast(x.x * A2[k][i]), h[k][i], drive);
        y[k] = fma(kConstant ? c[i] * C[kConstant ? k : 0][i] : c[i], h[k][i], y[k]);
      }
    }
    y0 = y[0], y1 = y[1];
  }

  // Four steps; their y go where dt and dt * u were. Summed over the four lanes of a pair, which end
  // with two steps of one channel each.
  TRIFUSE_DEVICE void group_of_steps(int group) {
    const int slot = pair_slot(group * kGroup, lane.pair);
    float y[2][kGroup];
#pragma unroll
    for (int s = 0; s < kGroup; ++s) one_step(slot, group * kGroup + s, y[0][s], y[1][s]);
#pragma unroll
    for (int s = 0; s < kGroup; ++s) y[0][s] += __shfl_xor_sync(kFullWarp, y[1][s], 1);
    float sum[2];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const float give = lane.high ? y[0][s] : y[0][s + 2];
      sum[s] = (lane.high ? y[0][s + 2] : y[0][s]) + __shfl_xor_sync(kFullWarp, give, 2);
    }
    __syncwarp();  // the lanes overwrite what they have just read
    float* to = shared.tile + slot + lane.high * 2 * kPairs * 4 + lane.low * 2 + lane.high;
    to[0] = sum[0];
    to[kPairs * 4] = sum[1];
  }
  // The same with boundaries or less than four steps, which is rare: one step at a time.
  TRIFUSE_DEVICE void group_of_steps_carefully(int group, int steps) {
    const int slot = pair_slot(group * kGroup, lane.pair);
    const int end = steps < (group + 1) * kGroup ? steps : (group + 1) * kGroup;
#pragma unroll 1
    for (int step = group * kGroup; step < end; ++step) {
      const bool packed = p.cu_seqlens != nullptr;
      if (packed && shared.boundaries.begins[step] >= 0) load_row(shared.boundaries.begins[step]);
      float y0, y1;
      one_step(slot, step, y0, y1);
      if (packed && shared.boundaries.ends[step] >= 0 && !p.local) store_row(shared.boundaries.ends[step]);
      y0 += __shfl_xor_sync(kFullWarp, y1, 1);
      y0 += __shfl_xor_sync(kFullWarp, y0, 2);
      __syncwarp();
      if (lane.high == 0) shared.tile[sum_slot(step, lane.pair * 2 + lane.low)] = y0;
    }
  }
  TRIFUSE_DEVICE static int sum_slot(int step, int channel) {
    return pair_slot(step, channel / 2) + channel % 2 * 2 + int(unsigned(step) / 2 % 2);
  }

  template <class Map>
  TRIFUSE_DEVICE void finish(int64_t step0, int steps, int buffer) {
    const Map map(p);
    const bool first = state0 == 0, last = state0 + kTileStates >= p.dstate;
    Weight<Map> skip(map, p.D, block);
    T* to = first_element<T>(map, p.out, block, step0);
#pragma unroll Map::kUnroll
    for (int j = 0; j < Map::kVectors; ++j, to += Map::to_next(p.out)) {
      float u[Map::kLength], z[Map::kLength], y[Map::kLength];
      skip.load(map, p.D, block, j);
      read_staged(map, shared.raw[buffer][0], j, u);
      if (p.z.ptr != nullptr) read_staged(map, shared.raw[buffer][2], j, z);
#pragma unroll
      for (int i = 0; i < Map::kLength; ++i) {
        const int step = map.step(j) + (Map::kAlongTime ? i : 0);
        const int channel = map.channel(j) + (Map::kAlongTime ? 0 : i);
        y[i] = shared.tile[sum_slot(step, channel)];
        if (p.partial_sums != nullptr && inside(map, block, steps, j, i)) {
          float* sum = p.partial_sums + (block.batch * p.seqlen + step0 + step) * p.dim + block.channel0 + channel;
          if (!first) y[i] += *sum;
          if (!last) *sum = y[i];
        }
        y[i] = fma(skip.of(i), u[i], y[i]);
        if (p.z.ptr != nullptr) y[i] *= z[i] * sigmoid(z[i]);
      }
      if (last) write_vector(map, p.out, block, steps, j, to, y);
    }
  }

  TRIFUSE_DEVICE void load_row(int64_t row) {
    const float* from = p.initial_state;
    if (from != nullptr) from += row * p.dim * p.dstate;
    lane.load(from, p.dstate, state0, h);
  }
  TRIFUSE_DEVICE void store_row(int64_t row) {
    float* to = p.last_state;
    if (to != nullptr) to += row * p.dim * p.dstate;
    lane.store(to, p.dstate, state0, h);
  }
  TRIFUSE_DEVICE void save_chunk(int64_t chunk) {
    lane.store_plane(p.chunk_states + (block.batch * p.n_chunks + chunk) * p.dstate * p.dim, p.dim, p.dstate, state0,
                     h);
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

  // All steps of the block's split, for the states from state0 on.
  TRIFUSE_DEVICE void run() {
    enter();
    StagedCoefficients<T, kStates> staged;
    SplitDecay decay;
    int64_t chunk = p.chunk_states != nullptr && !p.local ? (block.begin + p.chunk_size - 1) / p.chunk_size : -1;
    int64_t save_at = chunk >= 0 ? chunk * p.chunk_size : -1;
    stage_tile(block.begin, 0);
    staged.load(p, block, state0, block.begin);
    int buffer = 0;
    for (int64_t step0 = block.begin; step0 < block.end; step0 += kSteps, buffer ^= 1) {
      const int steps = int(block.end - step0 < kSteps ? block.end - step0 : kSteps);
      async_copy_wait();
      if (p.cu_seqlens != nullptr) find_boundaries(p, step0, shared.boundaries);
      convert(buffer);
      staged.template store<1>(p, shared.coefficients);
      __syncthreads();
      if (step0 + kSteps < block.end) stage_tile(step0 + kSteps, buffer ^ 1);
      if (p.local) decay.add(p, shared.tile, shared.boundaries, steps);
      const unsigned special = special_steps(p, shared.boundaries, steps);
#pragma unroll 1
      for (int group = 0; group * kGroup < steps; ++group) {
        if (step0 + group * kGroup == save_at) {
          save_chunk(chunk++);
          save_at += p.chunk_size;
        }
        if ((special >> group * kGroup & 15) != 0) {
          group_of_steps_carefully(group, steps);
        } else {
          group_of_steps(group);
        }
      }
      __syncthreads();
      // Here, not earlier: kept through the steps, they would hold eight registers.
      if (step0 + kSteps < block.end) staged.load(p, block, state0, step0 + kSteps);
      if (!p.local && p.out.ptr != nullptr) finish(step0, steps, buffer);
    }
    leave(decay);
  }

  // The state before the split's first step.
  TRIFUSE_DEVICE void enter() {
    lane.load(p.A, p.dstate, state0, A2);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        A2[k][i] *= kLog2e;
        h[k][i] = 0.0f;
      }
    }
    if constexpr (kConstant) {
      load_constant(p.B, B);
      load_constant(p.C, C);
    }
    if (block.split == 0) {
      if (p.cu_seqlens == nullptr) load_row(block.batch);
    } else if (!p.local) {
      for (unsigned split = 0; split < block.split; ++split) {
        through_split(p, block, lane, split, state0, A2, h);
      }
    }
  }
  TRIFUSE_DEVICE void load_constant(const Coefficient& from, float (&x)[2][kStates]) {
    if (!from.variable) lane.load(static_cast<const float*>(from.ptr), p.dstate, state0, x);
#pragma unroll
    for (int i = 0; from.variable && i < kStates; ++i) x[0][i] = x[1][i] = 1.0f;
  }
  TRIFUSE_DEVICE void leave(const SplitDecay& decay) {
    if (p.local) {
      decay.store(p, block);
      lane.store_plane(p.split_state + (block.batch * p.splits + block.split) * p.dstate * p.dim, p.dim, p.dstate,
                       state0, h);
    } else if (p.cu_seqlens == nullptr && block.end == p.seqlen) {
      store_row(block.batch);
    }
  }
};

template <typename T, int kStates, bool kConstant>
__global__ void __launch_bounds__(kThreads, 3) scan_fwd_kernel(const __grid_constant__ FwdArgs p) {
  TRIFUSE_SHARED_MEMORY(memory);
  using Kernel = Forward<T, kStates, kConstant>;
  Kernel kernel(p, *reinterpret_cast<typename Kernel::Shared*>(memory));
  if (p.local && kernel.block.split == p.splits - 1) return;  // nothing comes after the last split
  do {
    kernel.run();
    kernel.state0 += Kernel::kTileStates;
  } while (kernel.state0 < p.dstate);
}

}  // namespace trifuse::cuda

// Slices that threads hold in registers: everything is read once and written once. A block takes every p.blocks-th
// tile of one head.
#pragma once

#include "gaussian_adaptive_attention_entries.cuh"

namespace trifuse::cuda::gaam {

// Of a slice: how many entries the variance is made of, their mean in two parts, the sum of their squared deviations.
template <typename A>
struct Moments {
  A count, mean, rest, squares;
};

template <typename T, Way kWay, bool kVectors, bool kGeneral, int kHold>
TRIFUSE_DEVICE Moments<Acc<T>> moments_of(const Args& p, Team<kWay>& team,
                                          const Entries<T, kVectors, kGeneral, kHold>& held, int64_t length) {
  using A = Acc<T>;
  A sums[2] = {A(0), A(0)};
#pragma unroll
  for (int j = 0; j < kHold; ++j) {
    if (held.is_counted(j)) sums[0] += held.x[j];
    if (kGeneral && held.takes_part(j)) sums[1] += A(1);
  }
  A count = A(length);
  if constexpr (kGeneral) {
    team.sum(sums);
    count = sums[1];
  } else {
    sums[0] = team.sum(sums[0]);
  }
  const A some = count > A(1) ? count : A(1), mean = sums[0] / some;
  A second[2] = {A(0), A(0)};
#pragma unroll
  for (int j = 0; j < kHold; ++j) {
    if (held.takes_part(j)) {
      const A d = (!kGeneral || held.is_counted(j) ? held.x[j] : A(0)) - mean;
      second[0] += d;
      second[1] = multiply_add(d, d, second[1]);
    }
  }
  team.sum(second);
  const A rest = second[0] / some, squares = second[1] - count * rest * rest;
  return {count, mean, rest, squares > A(0) ? squares : squares < A(0) ? A(0) : squares};  // a NaN stays one
}

// What the compiler is given its registers by: threads of a block, and blocks that a multiprocessor has room for.
template <Way kWay, bool kGeneral, bool kForward>
constexpr int kThreadsOf = kLanesOf<kWay> != 0                               ? kRowThreads
                           : kGeneral || (kForward && kWay == Way::kColumns) ? kMaxGeneralThreads
                                                                             : kMaxThreads;
template <Way kWay, int kHold>
constexpr int kFwdBlocks = kLanesOf<kWay> == 0 ? 1
                           : kHold > 16        ? 3
                                               : 4;
template <Way kWay, bool kGeneral>
constexpr int kBwdBlocks = kLanesOf<kWay> == 0 ? 1
                           : kGeneral          ? 3
                                               : 4;

template <typename T, Way kWay, bool kGeneral>
__global__ void __launch_bounds__(kThreadsOf<kWay, kGeneral, true>, kFwdBlocks<kWay, kFwdHeld<T, kWay, kGeneral>>)
    gaam_fwd_kernel(const __grid_constant__ FwdArgs p) {
  using A = Acc<T>;
  constexpr bool kVectors = !kGeneral && kWay != Way::kColumns;
  constexpr int kHold = kFwdHeld<T, kWay, kGeneral>;
  TRIFUSE_SHARED_MEMORY(memory);
  const int64_t head = blockIdx.x % p.heads, first = head * p.part;
  const int64_t length = head == p.heads - 1 ? p.last_part : p.part;
  Team<kWay> team(p, memory);
  const int count = count_of<T, kVectors, kHold>(length, team.position, team.size);
  int64_t tile = blockIdx.x / p.heads;
  Place at = place_of(p, team, tile, head);
  Entries<T, kVectors, kGeneral, kHold> held;
  held.read(p, at, first, team.position, team.size, count);  // on their way while the product is found
  const Product<A> product = product_of<A>(p, head, memory);
  const A centre = product.centre;
  while (true) {
    const Moments<A> m = moments_of(p, team, held, length);
    const A inverse = inverse_variance(p, m.count, m.squares);
    A distance = A(INFINITY), nearest = A(0);
    const A middle = m.rest + centre;
#pragma unroll
    for (int j = 0; j < kHold; ++j) {
      const A far = fabs(held.x[j] - m.mean - middle);
      if (held.takes_part(j) && far < distance) {
        distance = far;
        nearest = held.x[j];
      }
    }
    team.nearest(distance, nearest);
    const bool nothing = kGeneral && m.count == A(0);
    const Weighing<A> weighing(nearest, nothing ? A(0) : nearest - m.mean - m.rest, inverse, product);
    A ratios[kHold], total = A(0);
#pragma unroll
    for (int j = 0; j < kHold; ++j) {
      ratios[j] = held.takes_part(j) ? weighing.ratio(held.x[j] - nearest) : A(0);
      total += ratios[j];
    }
    total = team.sum(total);
    A scale = total == A(0) ? A(1) : A(1) / total, signed_inverse = inverse;
    if (p.clamped && !nothing) {
      const A clamped = weighing.clamped_scale(p, *product.exact);
      if (total * clamped < A(1)) {
        scale = clamped;
        signed_inverse = -inverse;
      }
    }
    if (at.exists && team.position == 0) keep(p, at, nearest, weighing.deviation, signed_inverse);
#pragma unroll
    for (int j = 0; j < kHold; ++j) ratios[j] *= scale;
    if (p.weights != nullptr) {
      write_entries<T, kVectors>(dense(p, p.weights), at, first, team.position, team.size, held.count, ratios);
    }
#pragma unroll
    for (int j = 0; j < kHold; ++j) {
      const bool replaced = kGeneral && !held.is_counted(j);
      ratios[j] = !replaced ? held.x[j] * ratios[j] : held.takes_part(j) ? held.x[j] : A(0);
    }
    write_entries<T, kVectors>(dense(p, p.out), at, first, team.position, team.size, held.count, ratios);
    tile += p.blocks;
    if (tile >= p.tiles) break;
    at = place_of(p, team, tile, head);
    held.read(p, at, first, team.position, team.size, count);
  }
}

// dL/dw of the entries a thread holds: x dout where that is counted, and dweights.
template <typename T, bool kVectors, bool kGeneral>
struct Gradients {
  using A = Acc<T>;
  A g[kHeld<T>];                    // dout
  A more[kGeneral ? kHeld<T> : 1];  // dweights

  TRIFUSE_DEVICE void read(const BwdArgs& p, const Place& at, int64_t first, int position, int size, int count) {
    if constexpr (kGeneral) {
#pragma unroll
      for (int j = 0; j < kHeld<T>; ++j) g[j] = more[j] = A(0);
      if (p.dout.ptr != nullptr) read_entries<T, kVectors>(p.dout, at, first, position, size, count, g);
      if (p.dweights.ptr != nullptr) read_entries<T, kVectors>(p.dweights, at, first, position, size, count, more);
    } else {
      read_entries<T, kVectors>(p.dout, at, first, position, size, count, g);
    }
  }
  TRIFUSE_DEVICE A of_weight(const Entries<T, kVectors, kGeneral>& held, int j) const {
    if constexpr (kGeneral) {
      return held.is_counted(j) ? multiply_add(g[j], held.x[j], more[j]) : held.takes_part(j) ? more[j] : A(0);
    } else {
      return g[j] * held.x[j];
    }
  }
};

// dx of one entry, s being the gradient of the logarithm of its weight.
template <typename T, bool kVectors, bool kGeneral>
TRIFUSE_DEVICE Acc<T> gradient_of(const Entries<T, kVectors, kGeneral>& held, int j, const Chain<Acc<T>>& chain,
                                  Acc<T> g, Acc<T> weight, Acc<T> s, Acc<T> u, Acc<T> deviation) {
  using A = Acc<T>;
  if constexpr (kGeneral) {
    if (!held.takes_part(j)) return A(0);
    if (!held.is_counted(j)) return g + s * (chain.alone - chain.alone_slope * u);
  }
  const A t = multiply_add(g, weight, s * multiply_add(-chain.own_slope, u, chain.own));
  return t - chain.mean + chain.pull * (u + deviation);
}

// Adds up what the threads of a block found, by position of the threads, and leaves it for the last kernel.
TRIFUSE_DEVICE void leave_shares(const BwdArgs& p, int64_t head, int64_t block, const Shares& mine, double* memory) {
  double all[4] = {mine.da, mine.db, mine.de, mine.dlogs};
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) all[i] += __shfl_xor_sync(kFullWarp, all[i], by);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) memory[threadIdx.x / 32 * 4 + i] = all[i];
  }
  __syncthreads();
  if (threadIdx.x >= 4) return;
  double sum = 0.0;
  for (int w = 0; w < int(blockDim.x) / 32; ++w) sum += memory[w * 4 + int(threadIdx.x)];
  p.partials[(int(threadIdx.x) * p.heads + head) * p.blocks + block] = sum;
}

inline int64_t bytes_of_shares(int threads) { return threads / 32 * 4 * int64_t(sizeof(double)); }

template <typename T, Way kWay, bool kGeneral>
__global__ void __launch_bounds__(kThreadsOf<kWay, kGeneral, false>, kBwdBlocks<kWay, kGeneral>)
    gaam_bwd_kernel(const __grid_constant__ BwdArgs p) {
  using A = Acc<T>;
  constexpr bool kVectors = !kGeneral && kWay != Way::kColumns;
  TRIFUSE_SHARED_MEMORY(memory);
  const int64_t head = blockIdx.x % p.heads, first = head * p.part, slots = p.heads * p.outer * p.inner;
  const int64_t length = head == p.heads - 1 ? p.last_part : p.part;
  Team<kWay> team(p, memory);
  const int count = count_of<T, kVectors>(length, team.position, team.size);
  int64_t tile = blockIdx.x / p.heads;
  Place at = place_of(p, team, tile, head);
  Entries<T, kVectors, kGeneral> held;
  Gradients<T, kVectors, kGeneral> gradients;
  held.read(p, at, first, team.position, team.size, count);
  gradients.read(p, at, first, team.position, team.size, held.count);
  const Product<A> product = product_of<A>(p, head, memory);
  Shares shares;
  while (true) {
    const A* const stats = static_cast<const A*>(p.stats) + at.slot;
    const A signed_inverse = stats[2 * slots];
    const Weighing<A> weighing(stats[0], stats[slots], fabs(signed_inverse), product);
    A ratios[kHeld<T>], sums[2] = {A(0), A(0)};
#pragma unroll
    for (int j = 0; j < kHeld<T>; ++j) {
      ratios[j] = held.takes_part(j) ? weighing.ratio(held.x[j] - weighing.nearest) : A(0);
      sums[0] += ratios[j];
      sums[1] = multiply_add(ratios[j], gradients.of_weight(held, j), sums[1]);
    }
    team.sum(sums);
    A scale = sums[0] == A(0) ? A(1) : A(1) / sums[0], taken = sums[1] * scale, total = A(0);
    if (p.clamped && signed_inverse < A(0)) {
      scale = weighing.clamped_scale(p, *product.exact);
      total = sums[1] * scale;
      taken = A(0);
    }
    A moments[2] = {A(0), A(0)};
#pragma unroll
    for (int j = 0; j < kHeld<T>; ++j) {
      if (held.takes_part(j)) {
        const A u = held.x[j] - weighing.nearest;
        const A su = ratios[j] * scale * (gradients.of_weight(held, j) - taken) * u;
        moments[0] += su;
        moments[1] = multiply_add(su, u, moments[1]);
      }
    }
    team.sum(moments);
    A entries = A(length);
    if constexpr (kGeneral) {
      entries = A(0);
#pragma unroll
      for (int j = 0; j < kHeld<T>; ++j) entries += held.takes_part(j) ? A(1) : A(0);
      entries = team.sum(entries);
    }
    if (at.exists && team.position == 0) {
      shares.add(total, moments[0], moments[1], weighing.deviation, weighing.inverse);
    }
    const Chain<A> chain(weighing, product, entries, total, moments[0], moments[1]);
#pragma unroll
    for (int j = 0; j < kHeld<T>; ++j) {
      const A weight = ratios[j] * scale, s = weight * (gradients.of_weight(held, j) - taken);
      ratios[j] =
          gradient_of(held, j, chain, gradients.g[j], weight, s, held.x[j] - weighing.nearest, weighing.deviation);
    }
    write_entries<T, kVectors>(dense(p, p.dx), at, first, team.position, team.size, held.count, ratios);
    tile += p.blocks;
    if (tile >= p.tiles) break;
    at = place_of(p, team, tile, head);
    held.read(p, at, first, team.position, team.size, count);
    gradients.read(p, at, first, team.position, team.size, held.count);
  }
  leave_shares(p, head, blockIdx.x / p.heads, shares, reinterpret_cast<double*>(memory));
}

}  // namespace trifuse::cuda::gaam

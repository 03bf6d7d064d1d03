// The small kernels around the causal convolution: edges of sequences, initial and final states, and
// the sums of the weights' gradients.
#pragma once

#include "causal_conv1d_common.cuh"

namespace trifuse::cuda::conv {

constexpr int kStateThreads = 128, kStateEntries = 8, kStateChannels = kStateThreads / kStateEntries;
constexpr int kSumColumns = 32, kSumSlices = 8;

inline __global__ void __launch_bounds__(kStateThreads) conv_edges_kernel(const __grid_constant__ ConvArgs p) {
  const unsigned blocks = unsigned((p.seqlen + kStateThreads - 1) / kStateThreads);
  const int64_t batch = blockIdx.x / blocks, position = int64_t(blockIdx.x % blocks) * kStateThreads + threadIdx.x;
  if (position < p.seqlen) p.edges[batch * p.seqlen + position] = edges_of(p, batch, position);
}

// One entry of the states of one row and channel to a thread; a block stays within a row.
struct StateEntry {
  int64_t row, channel, entry, batch;
  Span span;
  int64_t end;  // of the row's last run of one id
  bool any;

  TRIFUSE_DEVICE explicit StateEntry(const ConvArgs& p) {
    const unsigned blocks = unsigned((p.dim + kStateChannels - 1) / kStateChannels);
    row = blockIdx.x / blocks;
    channel = int64_t(blockIdx.x % blocks) * kStateChannels + threadIdx.x / kStateEntries;
    entry = threadIdx.x % kStateEntries;
    any = channel < p.dim && entry < p.width - 1;
    batch = p.cu_seqlens == nullptr ? row : 0;
    span = {row, 0, p.seqlen};
    if (p.cu_seqlens != nullptr) span = {row, p.cu_seqlens[row], p.cu_seqlens[row + 1]};
    end = span.end;
    if (p.seq_idx == nullptr) return;
    // A warp at a time over the padding at the end.
    for (unsigned live = 0; live == 0 && end > span.begin;) {
      const int64_t position = end - 1 - int(threadIdx.x) % 32;
      live = __ballot_sync(kFullWarp, position >= span.begin && id_at(p, batch, position) >= 0);
      int padding = 0;
      while (padding < 32 && (live >> padding & 1) == 0) ++padding;
      end = end - padding > span.begin ? end - padding : span.begin;
    }
  }
  TRIFUSE_DEVICE int64_t at(const ConvArgs& p) const { return state_offset(p, row, channel, entry); }
};

inline int64_t state_blocks(const ConvArgs& p, int64_t rows) {
  return rows * ((p.dim + kStateChannels - 1) / kStateChannels);
}

template <typename T>
__global__ void __launch_bounds__(kStateThreads) conv_final_kernel(const __grid_constant__ FwdArgs p) {
  const StateEntry at(p);
  if (!at.any) return;
  const int64_t position = at.end - (p.width - 1) + at.entry, begin = at.span.begin;
  T value = from_float<T>(0.0f);
  if (one_run(p, at.batch, position > begin ? position : begin, at.end)) {
    if (position >= begin) {
      value = static_cast<const T*>(p.x.ptr)[offset(p.x, at.batch, at.channel, position)];
    } else if (p.initial_states != nullptr) {
      const int64_t entry = p.width - 1 + position - begin;
      value = static_cast<const T*>(p.initial_states)[state_offset(p, at.row, at.channel, entry)];
    }
  }
  static_cast<T*>(p.final_states)[at.at(p)] = value;
}

// What an entry of the initial states receives: from the first positions, whose taps read it, and from
// the final states where the row is too short to have filled them.
template <typename T>
__global__ void __launch_bounds__(kStateThreads) conv_dinitial_kernel(const __grid_constant__ BwdArgs p) {
  const StateEntry at(p);
  if (!at.any) return;
  const int width = int(p.width);
  const int64_t begin = at.span.begin;
  const float* const weight = p.weight + at.channel * width;
  float total = 0.0f;
#pragma unroll 1
  for (int into = 0; into <= int(at.entry) && begin + into < at.span.end; ++into) {
    const int64_t position = begin + into;
    if (id_at(p, at.batch, position) < 0 || !one_run(p, at.batch, begin, position + 1)) break;
    float sum = p.bias != nullptr ? p.bias[at.channel] : 0.0f;
#pragma unroll 1
    for (int w = 0; w < width; ++w) {
      const int entry = into + w;  // of the initial states followed by the sequence
      const int64_t initial = state_offset(p, at.row, at.channel, entry);
      sum = fma(weight[w],
                entry < width - 1 ? to_float(static_cast<const T*>(p.initial_states)[initial])
                                  : element<T>(p.x, at.batch, at.channel, begin + entry - (width - 1)),
                sum);
    }
    float g = element<T>(p.dy, at.batch, at.channel, position);
    if (p.silu) g *= silu_slope(sum);
    total = fma(weight[int(at.entry) - into], g, total);
  }
  const int64_t final_entry = at.entry - (at.end - begin);
  if (p.dfinal_states != nullptr && final_entry >= 0 && one_run(p, at.batch, begin, at.end)) {
    total += to_float(static_cast<const T*>(p.dfinal_states)[state_offset(p, at.row, at.channel, final_entry)]);
  }
  static_cast<T*>(p.dinitial_states)[at.at(p)] = from_float<T>(total);
}

// dweight and dbias: the partial sums of all batch items and segments, added in a fixed order.
inline __global__ void __launch_bounds__(kSumColumns* kSumSlices) conv_sum_kernel(const __grid_constant__ BwdArgs p) {
  TRIFUSE_SHARED_MEMORY(memory);
  float* const sums = reinterpret_cast<float*>(memory);
  const int64_t rows = p.batch * p.segments, each = (p.width + 1) * p.dim, w = blockIdx.y;
  const int place = int(threadIdx.x) % kSumColumns, slice = int(threadIdx.x) / kSumColumns;
  const int64_t channel = int64_t(blockIdx.x) * kSumColumns + place;
  float sum = 0.0f;
  if (channel < p.dim) {
#pragma unroll 4
    for (int64_t row = slice; row < rows; row += kSumSlices) sum += p.partials[row * each + w * p.dim + channel];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (slice != 0 || channel >= p.dim) return;
#pragma unroll
  for (int i = 1; i < kSumSlices; ++i) sum += sums[i * kSumColumns + place];
  if (w < p.width) {
    p.dweight[channel * p.width + w] = sum;
  } else if (p.dbias != nullptr) {
    p.dbias[channel] = sum;
  }
}

}  // namespace trifuse::cuda::conv

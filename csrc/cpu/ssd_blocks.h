// Where sequences begin and end: chunks cut into blocks that each lie in one sequence.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "trifuse/ssd.h"

namespace trifuse::cpu {
namespace {
namespace ssd {

constexpr int64_t kContinues = -1;  // the state comes from the chunk before, or goes on to the next one
constexpr int64_t kNothing = -2;    // it starts from zero, or is dropped

// Positions [begin, end) of one sequence inside one chunk.
struct Block {
  int64_t begin = 0, end = 0;
  int64_t source = kNothing;  // kContinues, kNothing, or the row of initial_states
  int64_t target = kNothing;  // kContinues, kNothing, or the row of final_states
};

// All blocks in order of batch and time; those of chunk c of batch item b are
// [first[b * n_chunks + c], first[b * n_chunks + c + 1]).
struct Blocks {
  std::vector<Block> list;
  std::vector<int64_t> first;

  explicit Blocks(const SsdParams& p) {
    first.reserve(p.batch * p.n_chunks + 1);
    for (int64_t b = 0; b < p.batch; ++b) {
      int64_t sequence = 0;  // of cu_seqlens, that position t lies in
      for (int64_t c = 0; c < p.n_chunks; ++c) {
        first.push_back(int64_t(list.size()));
        const int64_t chunk_end = std::min(p.seqlen, (c + 1) * p.chunk_size);
        for (int64_t t = c * p.chunk_size; t < chunk_end;) {
          Block block;
          block.begin = t;
          int64_t sequence_begin = 0, sequence_end = p.seqlen, row = b;
          if (p.cu_seqlens) {
            while (p.cu_seqlens[sequence + 1] <= t) ++sequence;
            sequence_begin = p.cu_seqlens[sequence];
            sequence_end = p.cu_seqlens[sequence + 1];
            row = sequence;
          }
          block.source = t == sequence_begin ? row : changes(p, b, t) ? kNothing : kContinues;
          const int64_t limit = std::min(chunk_end, sequence_end);
          for (++t; t < limit && !changes(p, b, t);) ++t;
          block.end = t;
          block.target = t == sequence_end ? row : changes(p, b, t) ? kNothing : kContinues;
          list.push_back(block);
        }
      }
    }
    first.push_back(int64_t(list.size()));
  }

  // Whether seq_idx changes from position t - 1 to t.
  static bool changes(const SsdParams& p, int64_t b, int64_t t) {
    return p.seq_idx && p.seq_idx[b * p.seqlen + t] != p.seq_idx[b * p.seqlen + t - 1];
  }
};

// Calls f(row) for every sequence of no positions: its final state is its initial state.
template <class F>
void for_empty_sequences(const SsdParams& p, F&& f) {
  const int64_t rows = p.cu_seqlens ? p.num_seqs : p.batch;
  for (int64_t row = 0; row < rows; ++row) {
    if (p.cu_seqlens ? p.cu_seqlens[row] == p.cu_seqlens[row + 1] : p.seqlen == 0) f(row);
  }
}

}  // namespace ssd
}  // namespace
}  // namespace trifuse::cpu

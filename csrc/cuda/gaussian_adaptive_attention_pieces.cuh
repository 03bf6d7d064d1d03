// Slices too long for the registers of a block, cut in pieces of the axis, a block each (and p.columns neighbouring
// columns). Going forward one launch finds the moments of every piece, one the nearest entry and the sum of the weights
// relative to it, and one writes; going backward one launch finds seven sums of every piece, and one writes. Every
// block joins what the pieces left for itself, in a fixed order.
#pragma once

#include "gaussian_adaptive_attention_held.cuh"

namespace trifuse::cuda::gaam {

// A block's piece: its columns, and from where to where it walks, counted within the head.
template <typename T>
struct Piece {
  static constexpr Way kWay = Way::kColumns;
  int64_t head, first, begin, end, slots;
  Team<kWay> team;
  Place at;

  TRIFUSE_DEVICE Piece(const Args& p, unsigned char* memory) : team(p, memory) {
    head = blockIdx.x % p.heads;
    first = head * p.part;
    slots = p.heads * p.outer * p.inner;
    at = place_of(p, team, blockIdx.x / p.heads, head);
    const int64_t length = head == p.heads - 1 ? p.last_part : p.part;
    begin = blockIdx.y * p.piece_length;
    end = begin + p.piece_length < length ? begin + p.piece_length : length;
  }
  TRIFUSE_DEVICE int64_t step() const { return int64_t(team.size) * kHeld<T>; }
  TRIFUSE_DEVICE int count(int64_t n) const { return count_of<T, false>(end - n, team.position, team.size); }

  // Where this piece, or another, leaves its i-th number of this thread's slice.
  TRIFUSE_DEVICE int64_t slot(const Args& p, int i, int64_t piece) const {
    return (i * p.pieces + piece) * slots + at.slot;
  }
  TRIFUSE_DEVICE bool writes() const { return at.exists && team.position == 0; }
  TRIFUSE_DEVICE double sum_of_pieces(const Args& p, const double* numbers, int i) {
    double sum = 0.0;
    for (int64_t k = team.position; k < p.pieces; k += team.size) sum += numbers[slot(p, i, k)];
    return team.sum(sum);
  }
};

// Of whole slices.
template <typename T>
TRIFUSE_DEVICE Moments<Acc<T>> join_moments(const Args& p, Piece<T>& piece) {
  using A = Acc<T>;
  const double count = piece.sum_of_pieces(p, p.moments, 0);
  double weighted = 0.0;
  for (int64_t k = piece.team.position; k < p.pieces; k += piece.team.size) {
    weighted += p.moments[piece.slot(p, 0, k)] * p.moments[piece.slot(p, 1, k)];
  }
  const double mean = piece.team.sum(weighted) / (count > 1.0 ? count : 1.0);
  double squares = 0.0;
  for (int64_t k = piece.team.position; k < p.pieces; k += piece.team.size) {
    const double apart = p.moments[piece.slot(p, 1, k)] - mean;
    squares += p.moments[piece.slot(p, 2, k)] + p.moments[piece.slot(p, 0, k)] * apart * apart;
  }
  return {A(count), A(mean), A(mean - double(A(mean))), A(piece.team.sum(squares))};
}

template <typename T>
__global__ void __launch_bounds__(kPieceThreads, 1) gaam_moments_kernel(const __grid_constant__ FwdArgs p) {
  using A = Acc<T>;
  TRIFUSE_SHARED_MEMORY(memory);
  Piece<T> piece(p, memory);
  double count = 0.0, mean = 0.0, squares = 0.0;
  for (int64_t n = piece.begin; n < piece.end; n += piece.step()) {
    Entries<T, false, true> held;
    held.read(p, piece.at, piece.first + n, piece.team.position, piece.team.size, piece.count(n));
    A sum = A(0), more = A(0), rest = A(0), more_squares = A(0);
#pragma unroll
    for (int j = 0; j < kHeld<T>; ++j) {
      if (held.is_counted(j)) sum += held.x[j];
      if (held.takes_part(j)) more += A(1);
    }
    if (more == A(0)) continue;
    const A middle = sum / more;
#pragma unroll
    for (int j = 0; j < kHeld<T>; ++j) {
      if (held.takes_part(j)) {
        const A d = (held.is_counted(j) ? held.x[j] : A(0)) - middle;
        rest += d;
        more_squares = multiply_add(d, d, more_squares);
      }
    }
    rest /= more;
    const double apart = double(middle) + double(rest) - mean, both = count + double(more);
    mean += apart * double(more) / both;
    squares += double(more_squares - more * rest * rest) + apart * apart * count * double(more) / both;
    count = both;
  }
  const double all = piece.team.sum(count), middle = piece.team.sum(count * mean) / (all > 1.0 ? all : 1.0);
  const double apart = mean - middle;
  squares = piece.team.sum(squares + count * apart * apart);
  if (!piece.writes()) return;
  p.moments[piece.slot(p, 0, blockIdx.y)] = all;
  p.moments[piece.slot(p, 1, blockIdx.y)] = middle;
  p.moments[piece.slot(p, 2, blockIdx.y)] = squares;
}

// Each piece's nearest entry, and the sum of its weights relative to that one's: zero where nothing takes part.
template <typename T>
__global__ void __launch_bounds__(kPieceThreads, 1) gaam_measure_kernel(const __grid_constant__ FwdArgs p) {
  using A = Acc<T>;
  TRIFUSE_SHARED_MEMORY(memory);
  Piece<T> piece(p, memory);
  const Product<A> product = product_of<A>(p, piece.head, memory);
  const Moments<A> m = join_moments<T>(p, piece);
  const A inverse = inverse_variance(p, m.count, m.squares), centre = product.centre;
  A nearest = A(0), distance = A(INFINITY), total = A(0);
  for (int64_t n = piece.begin; n < piece.end; n += piece.step()) {
    Entries<T, false, true> held;
    held.read(p, piece.at, piece.first + n, piece.team.position, piece.team.size, piece.count(n));
    const A before = nearest;
#pragma unroll
    for (int j = 0; j < kHeld<T>; ++j) {
      const A far = fabs(held.x[j] - m.mean - m.rest - centre);
      if (held.takes_part(j) && far < distance) {
        distance = far;
        nearest = held.x[j];
      }
    }
    const Weighing<A> weighing(nearest, nearest - m.mean - m.rest, inverse, product);
    // What was nearest so far is one entry more, of the weight of all that it stands for.
    if (total > A(0)) total *= weighing.ratio(before - nearest);
#pragma unroll
    for (int j = 0; j < kHeld<T>; ++j) {
      if (held.takes_part(j)) total += weighing.ratio(held.x[j] - nearest);
    }
  }
  const A mine = nearest;
  piece.team.nearest(distance, nearest);
  const Weighing<A> weighing(nearest, nearest - m.mean - m.rest, inverse, product);
  if (total > A(0)) total *= weighing.ratio(mine - nearest);
  total = piece.team.sum(total);
  if (!piece.writes()) return;
  static_cast<A*>(p.measures)[piece.slot(p, 0, blockIdx.y)] = nearest;
  static_cast<A*>(p.measures)[piece.slot(p, 1, blockIdx.y)] = total;
}

template <typename T>
__global__ void __launch_bounds__(kPieceThreads, 1) gaam_write_kernel(const __grid_constant__ FwdArgs p) {
  using A = Acc<T>;
  TRIFUSE_SHARED_MEMORY(memory);
  Piece<T> piece(p, memory);
  const Product<A> product = product_of<A>(p, piece.head, memory);
  const Moments<A> m = join_moments<T>(p, piece);
  const A inverse = inverse_variance(p, m.count, m.squares);
  const A* const measures = static_cast<const A*>(p.measures);
  A nearest = A(0), distance = A(INFINITY);
  for (int64_t k = piece.team.position; k < p.pieces; k += piece.team.size) {
    const A entry = measures[piece.slot(p, 0, k)], far = fabs(entry - m.mean - m.rest - product.centre);
    if (measures[piece.slot(p, 1, k)] != A(0) && far < distance) {
      distance = far;
      nearest = entry;
    }
  }
  piece.team.nearest(distance, nearest);
  const bool nothing = m.count == A(0);
  const Weighing<A> weighing(nearest, nothing ? A(0) : nearest - m.mean - m.rest, inverse, product);
  A total = A(0);
  for (int64_t k = piece.team.position; k < p.pieces; k += piece.team.size) {
    const A part = measures[piece.slot(p, 1, k)];
    if (part != A(0)) total = multiply_add(part, weighing.ratio(measures[piece.slot(p, 0, k)] - nearest), total);
  }
  total = piece.team.sum(total);
  A scale = total == A(0) ? A(1) : A(1) / total, signed_inverse = inverse;
  if (p.clamped && !nothing) {
    const A clamped = weighing.clamped_scale(p, *product.exact);
    if (total * clamped < A(1)) {
      scale = clamped;
      signed_inverse = -inverse;
    }
  }
  if (piece.writes() && blockIdx.y == 0) keep(p, piece.at, nearest, weighing.deviation, signed_inverse);
  for (int64_t n = piece.begin; n < piece.end; n += piece.step()) {
    Entries<T, false, true> held;
    held.read(p, piece.at, piece.first + n, piece.team.position, piece.team.size, piece.count(n));
    A values[kHeld<T>];
#pragma unroll
    for (int j = 0; j < kHeld<T>; ++j) {
      values[j] = held.takes_part(j) ? weighing.ratio(held.x[j] - nearest) * scale : A(0);
    }
    const int64_t at = piece.first + n;
    if (p.weights != nullptr) {
      write_entries<T, false>(dense(p, p.weights), piece.at, at, piece.team.position, piece.team.size, held.count,
                              values);
    }
#pragma unroll
    for (int j = 0; j < kHeld<T>; ++j) {
      values[j] = held.is_counted(j) ? held.x[j] * values[j] : held.takes_part(j) ? held.x[j] : A(0);
    }
    write_entries<T, false>(dense(p, p.out), piece.at, at, piece.team.position, piece.team.size, held.count, values);
  }
}

constexpr int kSums = 7;  // over the entries, e being weights relative to the nearest entry's and G the weights'
                          // gradients: of 1, e, e G, e u, e u^2, e G u, e G u^2

template <typename T>
__global__ void __launch_bounds__(kPieceThreads, 1) gaam_sums_kernel(const __grid_constant__ BwdArgs p) {
  using A = Acc<T>;
  TRIFUSE_SHARED_MEMORY(memory);
  Piece<T> piece(p, memory);
  const Product<A> product = product_of<A>(p, piece.head, memory);
  const A* const stats = static_cast<const A*>(p.stats) + piece.at.slot;
  const Weighing<A> weighing(stats[0], stats[piece.slots], fabs(stats[2 * piece.slots]), product);
  double sums[kSums] = {};
  for (int64_t n = piece.begin; n < piece.end; n += piece.step()) {
    const int64_t first = piece.first + n;
    Entries<T, false, true> held;
    Gradients<T, false, true> gradients;
    held.read(p, piece.at, first, piece.team.position, piece.team.size, piece.count(n));
    gradients.read(p, piece.at, first, piece.team.position, piece.team.size, held.count);
    A ratios[kHeld<T>], count = A(0), total = A(0), with_gradient = A(0);
#pragma unroll
    for (int j = 0; j < kHeld<T>; ++j) {
      gradients.g[j] = gradients.of_weight(held, j);
      ratios[j] = held.takes_part(j) ? weighing.ratio(held.x[j] - weighing.nearest) : A(0);
      count += held.takes_part(j) ? A(1) : A(0);
      total += ratios[j];
      with_gradient = multiply_add(ratios[j], gradients.g[j], with_gradient);
    }
    // Of the gradients what they differ by from the mean of these few: the sums lose nothing where all are alike.
    const A middle = total == A(0) ? A(0) : with_gradient / total;
    A e1 = A(0), e2 = A(0), g1 = A(0), g2 = A(0);
#pragma unroll
    for (int j = 0; j < kHeld<T>; ++j) {
      if (held.takes_part(j)) {
        const A u = held.x[j] - weighing.nearest, eu = ratios[j] * u, apart = gradients.g[j] - middle;
        e1 += eu;
        e2 = multiply_add(eu, u, e2);
        g1 = multiply_add(eu, apart, g1);
        g2 = multiply_add(eu * u, apart, g2);
      }
    }
    const double few[kSums] = {count,
                               total,
                               with_gradient,
                               e1,
                               e2,
                               double(g1) + double(middle) * double(e1),
                               double(g2) + double(middle) * double(e2)};
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += few[i];
  }
  for (int i = 0; i < kSums; ++i) {
    const double sum = piece.team.sum(sums[i]);
    if (piece.writes()) p.sums[piece.slot(p, i, blockIdx.y)] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kPieceThreads, 1) gaam_gradients_kernel(const __grid_constant__ BwdArgs p) {
  using A = Acc<T>;
  TRIFUSE_SHARED_MEMORY(memory);
  Piece<T> piece(p, memory);
  const Product<A> product = product_of<A>(p, piece.head, memory);
  const A* const stats = static_cast<const A*>(p.stats) + piece.at.slot;
  const A signed_inverse = stats[2 * piece.slots];
  const Weighing<A> weighing(stats[0], stats[piece.slots], fabs(signed_inverse), product);
  const double entries = piece.sum_of_pieces(p, p.sums, 0), sum = piece.sum_of_pieces(p, p.sums, 1);
  const double with_gradient = piece.sum_of_pieces(p, p.sums, 2);
  double scale = sum == 0.0 ? 1.0 : 1.0 / sum, taken = with_gradient * scale, total = 0.0;
  if (p.clamped && signed_inverse < A(0)) {
    scale = double(weighing.clamped_scale(p, *product.exact));
    total = with_gradient * scale;
    taken = 0.0;
  }
  const double e1 = piece.sum_of_pieces(p, p.sums, 3), e2 = piece.sum_of_pieces(p, p.sums, 4);
  const double first = (piece.sum_of_pieces(p, p.sums, 5) - taken * e1) * scale;
  const double second = (piece.sum_of_pieces(p, p.sums, 6) - taken * e2) * scale;
  const Chain<A> chain(weighing, product, A(entries), A(total), A(first), A(second));
  for (int64_t n = piece.begin; n < piece.end; n += piece.step()) {
    const int64_t at = piece.first + n;
    Entries<T, false, true> held;
    Gradients<T, false, true> gradients;
    held.read(p, piece.at, at, piece.team.position, piece.team.size, piece.count(n));
    gradients.read(p, piece.at, at, piece.team.position, piece.team.size, held.count);
    A dx[kHeld<T>];
#pragma unroll
    for (int j = 0; j < kHeld<T>; ++j) {
      const A u = held.x[j] - weighing.nearest, weight = weighing.ratio(u) * A(scale);
      const A s = weight * (gradients.of_weight(held, j) - A(taken));
      dx[j] = gradient_of(held, j, chain, gradients.g[j], weight, s, u, weighing.deviation);
    }
    write_entries<T, false>(dense(p, p.dx), piece.at, at, piece.team.position, piece.team.size, held.count, dx);
  }
  if (blockIdx.y != 0) return;
  Shares shares;
  if (piece.writes()) shares.add(total, first, second, weighing.deviation, weighing.inverse);
  leave_shares(p, piece.head, blockIdx.x / p.heads, shares, reinterpret_cast<double*>(memory));
}

}  // namespace trifuse::cuda::gaam

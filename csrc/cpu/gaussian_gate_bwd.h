// The backward pass of gaussian_gate. With d = x - mean, u_k = d - offset_k, z_k = u_k q_k, q_k = 1 / (width_k
// sqrt(v)), the gate base + amplitude sum_k exp(-z_k^2 / 2) and its gradient G (x dout, or dout), that of z_k is w_k =
// -G amplitude exp(-z_k^2 / 2) z_k, and with M the count (less one where the variance is unbiased)
//   dx = dout gate + s - mean(s) - d Q / (v M),   s = sum_k w_k q_k,   Q = sum_k q_k sum w_k u_k,
//   doffset_k = -q_k sum w_k,   dwidth_k = -q_k / width_k sum w_k u_k (half of it where the width is squared).
// A first pass over a group finds the sums and leaves dout gate and s in its block; the second completes dx.
#pragma once

#include "gaussian_gate_strip.h"

namespace trifuse::cpu {
namespace {

template <class E, class S>
class GateBackward {
 public:
  // `sums` receives the parameters' gradients: (rows, gaussians) of offset and of width, (rows,) of alpha.
  GateBackward(const GaussianGateBwdParams& p, const SlicePlan<E>& plan, double* sums)
      : p_(p),
        plan_(plan),
        doffset_(sums),
        dwidth_(sums + p.rows * p.gaussians),
        dalpha_(sums + 2 * p.rows * p.gaussians),
        x_(plan.block_size()),
        g_(plan.block_size()),
        direct_(p.multiply ? plan.block_size() : 0),
        keep_(plan.block_size()),
        sums_(kMaxStrips * stride()) {}

  void run(int64_t index) {
    const SliceGroup<E> group(plan_, index);
    if (p_.mask.ptr || group.ragged()) {
      run<true>(group);
    } else {
      run<false>(group);
    }
  }

 private:
  // LaneSums of a strip: of w_k and of w_k u_k for every k, of G times the bells, and the count.
  int64_t stride() const { return 2 * p_.gaussians + 2; }

  template <bool kMasked>
  void run(const SliceGroup<E>& group) {
    const int64_t blocks = group.blocks();
    std::fill(sums_.begin(), sums_.end(), LaneSums<E>());
    for (int w = 0; w < group.strips; ++w) start(group, w);
    for (int64_t b = 0; b < blocks; ++b) first_pass<kMasked, true>(SliceBlock<E>(group, b));
    for (int w = 0; w < group.strips; ++w) finish(group, w, !kMasked);
    for (int64_t b = 0; b < blocks; ++b) {
      const SliceBlock<E> block(group, b);
      if (blocks > 1) first_pass<kMasked, false>(block);
      second_pass<kMasked>(block);
    }
  }

  void start(const SliceGroup<E>& group, int w) {
    GateStrip<E>& strip = strips_[w];
    const E* stats = static_cast<const E*>(p_.stats);
    strip.slices(group, w);
    for (int i = 0; i < strip.lanes; ++i) {
      const int64_t at = strip.place(p_, group, w, i), part = p_.heads * p_.outer * p_.inner;
      strip.mean[i] = stats[at];
      strip.rest[i] = stats[part + at];
      strip.inverse[i] = stats[2 * part + at];
    }
    strip.take_parameters(p_, group, w);
  }

  template <bool kMasked, bool kSums>
  void first_pass(const SliceBlock<E>& block) {
    if (kMasked) block.read_keep(p_.mask, keep_.data());
    block.template read<S>(p_.x, kMasked ? keep_.data() : nullptr, x_.data());
    block.template read<S>(p_.dout, kMasked ? keep_.data() : nullptr, g_.data());
    for (int64_t from = 0; from < block.steps; from += kChunk) {
      const int64_t to = std::min(from + kChunk, block.steps);
      for (int w = 0; w < block.group.strips; ++w) {
        if (p_.gaussians == 1) {
          chunk_of_one<kMasked, kSums>(block, from, to, w);
        } else {
          chunk<kMasked, kSums>(block, from, to, w);
        }
      }
    }
  }

  template <bool kMasked, bool kSums>
  void chunk_of_one(const SliceBlock<E>& block, int64_t from, int64_t to, int w) {
    const GateStrip<E>& strip = strips_[w];
    LaneSums<E>* sums = &sums_[w * stride()];
    const Vec<E> mean = load<E>(strip.mean), rest = load<E>(strip.rest), base = load<E>(strip.base),
                 amplitude = load<E>(strip.amplitude);
    const Vec<E> offset = load<E>(strip.offset.data()), scale = load<E>(strip.scale.data());
    Vec<E> sum_w = splat(E(0)), sum_wu = sum_w, sum_bell = sum_w, count = sum_w;
    for (int64_t n = from; n < to; ++n) {
      const int64_t at = block.place(n, w);
      const Vec<E> x = load<E>(&x_[at]), g = load<E>(&g_[at]);
      const Vec<E> gate_gradient = p_.multiply ? g * x : g, u = ((x - mean) - rest) - offset, z = u * scale;
      const Vec<E> part = bell<E>(z), ours = gate_gradient * part, ws = -(ours * amplitude) * z;
      sum_w += ws;
      sum_wu += ws * u;
      sum_bell += ours;
      if (kMasked) count += load<E>(&keep_[at]);
      if (p_.multiply) store<E>(&direct_[at], g * (base + amplitude * part));
      store<E>(&g_[at], ws * scale);
    }
    if (!kSums) return;
    sums[0].add(sum_w);
    sums[1].add(sum_wu);
    sums[2].add(sum_bell);
    if (kMasked) sums[3].add(count);
  }

  template <bool kMasked, bool kSums>
  void chunk(const SliceBlock<E>& block, int64_t from, int64_t to, int w) {
    const GateStrip<E>& strip = strips_[w];
    LaneSums<E>* sums = &sums_[w * stride()];
    const Vec<E> mean = load<E>(strip.mean), rest = load<E>(strip.rest), base = load<E>(strip.base),
                 amplitude = load<E>(strip.amplitude);
    alignas(64) E s[kChunk * kLanes<E>];
    alignas(64) E gate[kChunk * kLanes<E>];
    std::fill(s, s + kChunk * kLanes<E>, E(0));
    std::fill(gate, gate + kChunk * kLanes<E>, E(0));
    Vec<E> sum_bell = splat(E(0)), count = sum_bell;
    for (int64_t k = 0; k < p_.gaussians; ++k) {
      const Vec<E> offset = load<E>(&strip.offset[k * kLanes<E>]), scale = load<E>(&strip.scale[k * kLanes<E>]);
      Vec<E> sum_w = splat(E(0)), sum_wu = sum_w;
      for (int64_t n = from; n < to; ++n) {
        const int64_t at = block.place(n, w), here = (n - from) * kLanes<E>;
        const Vec<E> x = load<E>(&x_[at]), g = load<E>(&g_[at]);
        const Vec<E> gate_gradient = p_.multiply ? g * x : g, u = ((x - mean) - rest) - offset, z = u * scale;
        const Vec<E> part = bell<E>(z), ours = gate_gradient * part, ws = -(ours * amplitude) * z;
        sum_w += ws;
        sum_wu += ws * u;
        sum_bell += ours;
        store<E>(s + here, load<E>(s + here) + ws * scale);
        store<E>(gate + here, load<E>(gate + here) + part);
      }
      if (!kSums) continue;
      sums[2 * k].add(sum_w);
      sums[2 * k + 1].add(sum_wu);
    }
    for (int64_t n = from; n < to; ++n) {
      const int64_t at = block.place(n, w), here = (n - from) * kLanes<E>;
      const Vec<E> g = load<E>(&g_[at]), own = base + amplitude * load<E>(gate + here);
      if (kMasked) count += load<E>(&keep_[at]);
      if (p_.multiply) store<E>(&direct_[at], g * own);
      store<E>(&g_[at], load<E>(s + here));
    }
    if (!kSums) return;
    sums[2 * p_.gaussians].add(sum_bell);
    if (kMasked) sums[2 * p_.gaussians + 1].add(count);
  }

  // From the sums of a strip the gradients of its rows' parameters, and what every entry's dx still lacks.
  void finish(const SliceGroup<E>& group, int w, bool whole) {
    const GateStrip<E>& strip = strips_[w];
    LaneSums<E>* sums = &sums_[w * stride()];
    const int64_t count = 2 * p_.gaussians + 1;
    if (!group.columns) {
      for (int64_t j = 0; j <= count; ++j) sums[j].join_row();
    }
    for (int i = 0; i < strip.lanes; ++i) {
      const double r = strip.inverse[i], entries = whole ? double(group.length()) : sums[count].lane[i];
      double s = 0, q = 0;
      for (int64_t k = 0; k < p_.gaussians; ++k) {
        const double scale = strip.scale[k * kLanes<E> + i], ws = sums[2 * k].lane[i], wu = sums[2 * k + 1].lane[i];
        s += scale * ws;
        q += scale * wu;
        doffset_[strip.row[i] * p_.gaussians + k] -= scale * ws;
        dwidth_[strip.row[i] * p_.gaussians + k] -= wu * scale * strip.width_slope(p_, i, k);
      }
      dalpha_[strip.row[i]] += sums[2 * p_.gaussians].lane[i] * p_.alpha_scale();
      shift_[w][i] = E(-s / std::max(entries, 1.0));
      slope_[w][i] = E(-q * r * r / std::max(entries - (p_.alpha ? 1 : 0), 1.0));
    }
    strip.fill(shift_[w]);
    strip.fill(slope_[w]);
  }

  template <bool kMasked>
  void second_pass(const SliceBlock<E>& block) {
    for (int64_t from = 0; from < block.steps; from += kChunk) {
      for (int w = 0; w < block.group.strips; ++w) {
        const Vec<E> mean = load<E>(strips_[w].mean), rest = load<E>(strips_[w].rest), shift = load<E>(shift_[w]),
                     slope = load<E>(slope_[w]);
        block.template write<S>(p_.dx, from, std::min(from + kChunk, block.steps), w, [&](int64_t n) {
          const int64_t at = block.place(n, w);
          Vec<E> dx = (load<E>(&g_[at]) + shift) + slope * ((load<E>(&x_[at]) - mean) - rest);
          if (p_.multiply) dx += load<E>(&direct_[at]);
          if (kMasked) dx *= load<E>(&keep_[at]);
          return dx;
        });
      }
    }
  }

  const GaussianGateBwdParams& p_;
  const SlicePlan<E>& plan_;
  double *doffset_, *dwidth_, *dalpha_;
  std::vector<E> x_, g_, direct_, keep_;  // g becomes s, once it has been used
  std::vector<LaneSums<E>> sums_;
  GateStrip<E> strips_[kMaxStrips];
  alignas(64) E shift_[kMaxStrips][kLanes<E>], slope_[kMaxStrips][kLanes<E>];
};

}  // namespace
}  // namespace trifuse::cpu

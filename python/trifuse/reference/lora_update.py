"""A low-rank update of a weight with one rounding, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from trifuse.reference.philox import philox_words

__all__ = ["lora_update", "round_stochastically"]


def round_stochastically(value: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """Round to one of the two neighbours in `dtype`, up in size with the probability of what is cut off.

    The low bits of a random word are added to those bits of a float32 number that `dtype` has not, and what is then
    below its last place is cut off. Below 2**-14 float16 counts in steps of 2**-24; there the word is added in 8192nds
    of a step, and the bias is at most that.

    Args:
        value: float32, or float64 for float64.
        dtype: bfloat16 or float16; float32 and float64, in which the value is already, leave nothing to round.
        words: int64 in [0, 2**32), one for each element.

    Returns:
        The shape of value, in `dtype`. Infinities and NaN stay what they are.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return value.to(dtype)
    bits = value.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    sign, size = bits >> 31, bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = (size + (words & 0xFFFF)) >> 16
        nearest = value.to(dtype)
    else:
        small = size < 0x38800000
        steps = (torch.where(small, value.abs(), 0) * 2.0**37).to(torch.int64)
        rounded = (torch.where(small, steps, size - 0x38000000) + (words & 0x1FFF)) >> 13
        rounded = rounded.clamp(max=0x7C00)
        nearest = value.to(dtype)
    rounded = (rounded | sign << 15).to(torch.int32).to(torch.int16).view(dtype)
    return torch.where(value.isfinite(), rounded, nearest)


def lora_update(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float | Tensor = 1.0,
    *,
    active_rank: int | None = None,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``weight + lora_B diag(scale) lora_A``, rounded once.

    Args:
        weight: ``(N, K)``.
        lora_A: ``(r, K)``; lora_B: ``(N, r)``.
        scale: a number, or ``(r,)``: one per rank.
        active_rank: only the first so many ranks take part.
        seed: of stochastic rounding; without one the result is rounded to nearest even.

    Returns:
        ``(N, K)`` in the dtype of weight, and ``(2,)`` float64: the sum of squares of the update, and of what rounding
        lost of it. Computed in float32 (float64 for float64).
    """
    acc = torch.promote_types(weight.dtype, torch.float32)
    rank = lora_A.shape[0] if active_rank is None else active_rank
    A, B = lora_A[:rank].to(acc), lora_B[:, :rank].to(acc)
    factor = scale[:rank].to(acc) if isinstance(scale, Tensor) and scale.dim() else scale
    with torch.autocast(weight.device.type, enabled=False):
        update = (B * factor) @ A
    wide = weight.to(acc)
    value = wide + update
    if seed is None:
        out = value.to(weight.dtype)
    else:
        out = round_stochastically(value, weight.dtype, philox_words(seed, *weight.shape, weight.device))
    lost = (out.to(acc) - wide) - update
    return out, torch.stack((update.double().square().sum(), lost.double().square().sum()))

"""The causal convolution of a block: fused where its module is plain, called where something wraps it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifuse.nn.block import is_plain
from trifuse.nn.dylora import DyLoRAConv1d
from trifuse.nn.lora_conv1d import LoRAConv1d
from trifuse.ops import causal_conv1d, causal_conv1d_update

__all__ = ["convolve", "convolve_token", "has_taps", "is_fused", "taps"]

_FUSED_WIDTHS = range(2, 9)


def convolve(
    module: nn.Module,
    width: int,
    x: Tensor,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """``silu`` of a depthwise convolution of x, with `state` to its left; moves `state` on.

    Args:
        module: an ``nn.Conv1d`` that pads by ``width - 1``, or whatever wraps one. A plain one is not called: the
            fused kernel does the same with its weight and bias; nor is one whose adapter changes the weight only.
        x: ``(B, L, D)``.
        state: ``(B, D, W)``, or ``(S, D, W)`` with `cu_seqlens`: the last inputs before x.
        seq_idx: ``(B, L)``, `cu_seqlens` ``(S + 1,)``: where the window stops, as in ``trifuse.causal_conv1d``.
        reverse: the window reaches forwards in time. Neither `state` nor `seq_idx` goes with it.
    """
    left = None if state is None else state[..., 1:].to(x.dtype)
    if not is_fused(module, width):
        y = _called(module, width, x, left, seq_idx, cu_seqlens, reverse)
    elif reverse:
        y = _fused_reverse(x, taps(module), module.bias, cu_seqlens)
    else:
        y = causal_conv1d(
            x, taps(module), module.bias, seq_idx, left, activation="silu", cu_seqlens=cu_seqlens,
            layout="bld",
        )  # fmt: skip
    if state is not None:
        _advance(state, x.detach(), seq_idx, cu_seqlens)
    return y


def convolve_token(module: nn.Module, width: int, x: Tensor, state: Tensor) -> Tensor:
    """``convolve`` of one token x ``(B, D)`` of each text, where no gradient is asked for."""
    if is_fused(module, width):
        return causal_conv1d_update(x, state, taps(module), module.bias, "silu")
    return convolve(module, width, x.unsqueeze(1), state).squeeze(1)


def has_taps(module: nn.Module) -> bool:
    """Whether calling a module does no more than a convolution with ``taps(module)`` and its bias."""
    kind = type(module) if type(module) in (LoRAConv1d, DyLoRAConv1d) else nn.Conv1d
    return is_plain(module, kind)


def taps(module: nn.Module) -> Tensor:
    """``(D, W)``: the weight of a depthwise convolution, with the update of its adapter."""
    return module.taps() if isinstance(module, LoRAConv1d) else module.weight.squeeze(1)


def is_fused(module: nn.Module, width: int) -> bool:
    """Whether the fused kernel computes what the module does: some other convolution may have taken its place."""
    return (
        has_taps(module)
        and width in _FUSED_WIDTHS
        and module.weight.shape[1:] == (1, width)
        and (module.stride, module.dilation, module.padding, module.padding_mode) == ((1,), (1,), (width - 1,), "zeros")
    )


def _fused_reverse(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """``y[t] = silu(bias + sum_w weight[w] x[t + W - 1 - w])``: the causal convolution with its taps reversed, read
    W - 1 steps later, where its window begins at t. Past the end of a sequence the window sees zeros."""
    taps, gap = weight.flip(1), weight.shape[1] - 1
    options = {"activation": "silu", "layout": "bld"}
    if cu_seqlens is not None:
        spread, places, _ = _spread(x, gap, 0, None, cu_seqlens)
        return causal_conv1d(spread, taps, bias, **options).gather(1, _rows(places + gap, x))
    body, last = causal_conv1d(x, taps, bias, return_final_states=True, **options)
    tail = causal_conv1d(x.new_zeros(x.shape[0], gap, x.shape[2]), taps, bias, None, last, **options)
    return torch.cat((body[:, gap:], tail[:, max(gap - x.shape[1], 0) :]), dim=1)


def _called(
    module: nn.Module,
    width: int,
    x: Tensor,
    left: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> Tensor:
    """What ``convolve`` computes, by calling the module; `left` is ``(B or S, D, W - 1)``."""
    length, gap = x.shape[1], width - 1
    if x.numel() == 0:
        return F.silu(x)
    left = None if left is None else left.transpose(1, 2)
    if reverse:  # from outside, the taps of a wrapper cannot be reversed: its input is
        x = x.flip(1)
        cu_seqlens = None if cu_seqlens is None else length - cu_seqlens.flip(0)
    if seq_idx is None and cu_seqlens is None:
        padded = x if left is None else torch.cat((left, x), dim=1)
        start = padded.shape[1] - length
        y = module(padded.transpose(1, 2)).transpose(1, 2)[:, start : start + length]
    else:
        spread, places, starts = _spread(x, gap, 1, seq_idx, cu_seqlens)
        if left is not None and cu_seqlens is None:
            spread = torch.cat((left, spread[:, gap:]), dim=1)
        elif left is not None:
            before = starts[:, None] + torch.arange(gap, device=x.device)
            spread = spread.index_copy(1, before.flatten(), left.reshape(1, -1, x.shape[2]))
        y = module(spread.transpose(1, 2)).transpose(1, 2).gather(1, _rows(places, x))
    y = F.silu(y).to(x.dtype)
    if seq_idx is not None:
        y = y.masked_fill((seq_idx < 0).unsqueeze(2), 0)
    return y.flip(1) if reverse else y


def _rows(places: Tensor, x: Tensor) -> Tensor:
    return places.unsqueeze(2).expand(x.shape)


def _spread(
    x: Tensor, gap: int, lead: int, seq_idx: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x with `gap` zeros before (`lead` 1) or after (`lead` 0) every run of one sequence, so that no window of
    ``gap + 1`` sees two; where each position went ``(B, L)``; where the gap of each packed sequence begins ``(S,)``.
    """
    batch, length, dim = x.shape
    time = torch.arange(length, device=x.device)
    bounds = torch.tensor([0, length], device=x.device) if cu_seqlens is None else cu_seqlens.long()
    sequence = torch.searchsorted(bounds[1:], time, right=True)
    changes = torch.zeros(batch, length + 1, dtype=torch.long, device=x.device)
    if seq_idx is not None and length > 1:
        inside = sequence[1:] == sequence[:-1]
        changes[:, 1:length] = ((seq_idx[:, 1:] != seq_idx[:, :-1]) & inside).cumsum(1)
        changes[:, length] = changes[:, length - 1]
    count = bounds.shape[0] - 1
    places = time + gap * (sequence + changes[:, :length] + lead)
    spread = x.new_zeros(batch, length + gap * (count + int(changes.max())), dim)
    starts = bounds[:-1] + gap * (torch.arange(count, device=x.device) + changes[0, bounds[:-1]])
    return spread.scatter(1, _rows(places, x), x), places, starts


def _advance(state: Tensor, x: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Move `state` ``(B or S, D, W)`` on to the last W inputs."""
    length, width = x.shape[1], state.shape[2]
    if seq_idx is not None:  # which inputs are the last run's is known to the op, for the W - 1 that are ever read
        taps = x.new_zeros(x.shape[2], width)
        _, last = causal_conv1d(
            x, taps, None, seq_idx, state[..., 1:].to(x.dtype), True, cu_seqlens=cu_seqlens, layout="bld"
        )
        state.copy_(F.pad(last, (1, 0)))
    elif cu_seqlens is None:
        last = x[:, -width:].transpose(1, 2)
        state.copy_(last if length >= width else torch.cat((state[..., length:].to(x.dtype), last), dim=2))
    elif length > 0:
        ends = cu_seqlens.long()
        place = ends.diff()[:, None] - width + torch.arange(width, device=x.device)  # before the sequence if negative
        new = x[0][(ends[:-1, None] + place).clamp(0, length - 1)].transpose(1, 2)
        old = state.gather(2, (place + width).clamp(max=width - 1).unsqueeze(1).expand(state.shape))
        state.copy_(torch.where((place >= 0).unsqueeze(1), new, old.to(x.dtype)))

"""The forward of transformers' Mamba mixers, on trifuse.

Each function takes the place of a mixer's ``forward(hidden_states, cache_params, attention_mask, **kwargs)``. They
compute what the mixers' own torch code computes, in training and in decoding, and differ in one thing: every
submodule is called (or, where it is a plain one, its weights are taken), so that adapters, quantization and hooks on
in_proj, conv1d, x_proj, dt_proj and out_proj count.

All tensors here are (B, L, D); transformers' caches are (B, D, W).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifuse.nn.block import needs_grad, product_and_bias
from trifuse.nn.convolution import convolve, has_taps, taps
from trifuse.ops import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update, ssd

__all__ = ["mamba", "mamba2", "zamba"]


def mamba(
    self: nn.Module,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The mixer of mamba, falcon_mamba and jamba; the latter two normalize dt, B and C."""
    dtype = hidden_states.dtype
    state = _recurrent_state(self, cache_params)
    x, z = self.in_proj(_masked(hidden_states, attention_mask)).chunk(2, dim=-1)
    x = _masked(_convolve(self, x, cache_params, kwargs.get("seq_idx")), attention_mask)

    sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
    dt, B, C = self.x_proj(x).to(x.dtype).split(sizes, dim=-1)
    if hasattr(self, "dt_layernorm"):
        dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
    dt, dt_bias = product_and_bias(self.dt_proj, dt)
    A = -torch.exp(self.A_log.float())
    z, dt, B, C = (sequence.to(x.dtype) for sequence in (z, dt, B, C))

    tensors = (x, dt, A, B, C, self.D, z, dt_bias)
    if state is not None and x.shape[1] == 1 and not needs_grad(*tensors):
        x, dt, B, C, z = (sequence.squeeze(1) for sequence in (x, dt, B, C, z))
        out = selective_state_update(state, x, dt, A, B, C, self.D, z, dt_bias, dt_softplus=True).unsqueeze(1)
    else:
        out = _scan(self, tensors, cache_params, state, kwargs.get("seq_idx"))
    return self.out_proj(out.to(dtype))


def zamba(
    self: nn.Module,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The mixer of zamba: x_proj and dt_proj are parameters, one per head; a head is a group of the scan."""
    dtype, (batch, length, _) = hidden_states.dtype, hidden_states.shape
    heads, size = self.n_mamba_heads, self.mamba_head_dim
    state = _recurrent_state(self, cache_params)  # (B, H, P, N)
    # The projection holds, channel by channel, an input and a gate.
    projected = self.in_proj(_masked(hidden_states, attention_mask)).unflatten(-1, (-1, 2))
    x, z = (sequence.contiguous() for sequence in projected.unbind(-1))
    x = _masked(_convolve(self, x, cache_params, kwargs.get("seq_idx")), attention_mask)

    per_head = x.reshape(batch, length, heads, size)
    projected = torch.einsum("blhp,hrp->blhr", per_head, self.x_proj_weight)
    dt, B, C = projected.split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
    dt = torch.einsum("blhr,hpr->blhp", dt, self.dt_proj_weight)
    A = -torch.exp(self.A_log.float())  # (H, P, N)
    z, dt, B, C = (sequence.to(x.dtype) for sequence in (z, dt, B, C))

    if state is not None and length == 1 and not needs_grad(x, dt, A, B, C, self.D, z, self.dt_proj_bias):
        token = (per_head[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D, z.reshape(batch, heads, size))
        out = selective_state_update(state, *token, self.dt_proj_bias, dt_softplus=True).reshape(batch, 1, -1)
    else:
        bias = None if self.dt_proj_bias is None else self.dt_proj_bias.flatten()
        tensors = (x, dt.flatten(2), A.flatten(0, 1), B, C, self.D.flatten(), z, bias)
        state = None if state is None else state.flatten(1, 2)
        out = _scan(self, tensors, cache_params, state, kwargs.get("seq_idx"), (heads, size))
    return self.out_proj(out.to(dtype))


def mamba2(
    self: nn.Module,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The mixer of mamba2, bamba, zamba2, nemotron_h, granitemoehybrid and falcon_h1 (multipliers, optional norm)."""
    dtype, (batch, length, _) = hidden_states.dtype, hidden_states.shape
    inner, heads, groups = self.intermediate_size, self.num_heads, self.n_groups
    normed = getattr(self, "mamba_rms_norm", True)
    state = _recurrent_state(self, cache_params)  # (B, H, P, N)

    hidden_states = _masked(hidden_states, attention_mask)
    if hasattr(self, "ssm_in_multiplier"):
        hidden_states = hidden_states * self.ssm_in_multiplier
    projected = self.in_proj(hidden_states)
    if hasattr(self, "mup_vector"):
        projected = projected * self.mup_vector
    gate, xBC, dt = projected.split([inner, self.conv_dim, heads], dim=-1)

    seq_idx = kwargs.get("seq_idx")
    xBC = _masked(_convolve(self, xBC, cache_params, seq_idx), attention_mask)
    x, B, C = xBC.split([inner, groups * self.ssm_state_size, groups * self.ssm_state_size], dim=-1)
    x, B, C = x.unflatten(-1, (heads, -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
    z = None if normed else gate.unflatten(-1, (heads, -1)).to(x.dtype)
    A = -torch.exp(self.A_log.float())

    if state is not None and length == 1 and not needs_grad(x, dt, A, B, C, self.D, z, self.dt_bias):
        size = self.head_dim  # the state's rate, step and skip weight are the head's for each of its channels
        out = selective_state_update(
            state, x[:, 0], dt[:, 0, :, None].to(x.dtype).expand(-1, -1, size),
            A[:, None, None].expand(-1, size, self.ssm_state_size), B[:, 0], C[:, 0], self.D[:, None].expand(-1, size),
            None if z is None else z[:, 0], self.dt_bias[:, None].expand(-1, size), dt_softplus=True,
        )  # fmt: skip
    else:
        out = ssd(
            x, dt, A, B, C, D=self.D, z=z, dt_bias=self.dt_bias, dt_softplus=True,
            dt_limit=tuple(self.time_step_limit), initial_states=state, seq_idx=seq_idx,
            return_final_states=cache_params is not None,
        )  # fmt: skip
        if cache_params is not None:
            out, last_state = out
            cache_params.update_recurrent_state(last_state, self.layer_idx)
    out = out.reshape(batch, length, inner)
    if normed:
        out = self.norm(out, gate)
    return self.out_proj(out.to(dtype))


def _masked(sequence: Tensor, mask: Tensor | None) -> Tensor:
    """A padded position holds zero, and leaves zero in the state."""
    return sequence if mask is None else (sequence * mask[:, :, None]).to(sequence.dtype)


def _recurrent_state(mixer: nn.Module, cache: Any) -> Tensor | None:
    return None if cache is None else cache.get_recurrent_state(mixer.layer_idx, state_idx=0)


def _scan(
    mixer: nn.Module,
    tensors: tuple,
    cache: Any,
    state: Tensor | None,
    seq_idx: Tensor | None = None,
    heads: tuple[int, int] | None = None,
) -> Tensor:
    """The selective scan of a piece of text; its last state goes into the cache.

    As in transformers, several tokens at once start from a state of zero whatever the cache holds (there the fused
    kernel takes no initial state); one token, which comes here only if gradients are wanted, goes on from `state`.
    Where `seq_idx` (B, L) changes, the state starts anew, as the convolution does.
    """
    x, dt, A, B, C, D, z, dt_bias = tensors
    rows, length = x.shape[:2]
    options: dict[str, Any] = {"initial_state": state if length == 1 else None}
    packed = seq_idx is not None and rows > 0 and length > 1
    if packed:
        # All rows become one, with a boundary before each and wherever the text changes.
        changes = torch.ones(rows, length, dtype=torch.bool, device=x.device)
        changes[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        options["cu_seqlens"] = F.pad(changes.flatten().nonzero().flatten(), (0, 1), value=rows * length)
        x, dt, B, C, z = (sequence.flatten(0, 1).unsqueeze(0) for sequence in (x, dt, B, C, z))
    out = selective_scan(
        x, dt, A, B, C, D, z, dt_bias, delta_softplus=True, return_last_state=cache is not None, layout="bld", **options
    )
    if cache is not None:
        out, last_state = out
        if packed:
            last_state = last_state[changes.sum(1).cumsum(0) - 1]  # of the last text of each row
        cache.update_recurrent_state(last_state if heads is None else last_state.unflatten(1, heads), mixer.layer_idx)
    return out.view(rows, length, -1) if packed else out


def _convolve(mixer: nn.Module, x: Tensor, cache: Any, seq_idx: Tensor | None) -> Tensor:
    """``act(conv1d(x))`` of x (B, L, D), with the cached inputs to its left; moves the cache on."""
    length, width, conv = x.shape[1], mixer.conv_kernel_size, mixer.conv1d
    silu = mixer.activation in ("silu", "swish")
    if cache is not None:
        state = cache.get_conv_state(mixer.layer_idx, state_idx=0)
        one_token = state is not None and length == 1 and not cache.is_recording_past(mixer.layer_idx)
        if one_token and has_taps(conv) and not needs_grad(x, *conv.parameters()):
            activation = "silu" if silu else None
            y = causal_conv1d_update(x[:, 0], state, taps(conv), conv.bias, activation).unsqueeze(1)
            return y if silu else mixer.act(y)
        x = cache.update_conv_state(x.transpose(1, 2), mixer.layer_idx, conv_kernel_size=width).transpose(1, 2)
    if silu:
        y = convolve(conv, width, x, seq_idx=seq_idx)
    elif has_taps(conv):
        y = mixer.act(causal_conv1d(x, taps(conv), conv.bias, seq_idx, layout="bld"))
    elif seq_idx is None:
        y = mixer.act(conv(x.transpose(1, 2)).transpose(1, 2)[:, : x.shape[1]]).to(x.dtype)
    else:
        raise ValueError(
            f"trifuse: seq_idx came to a {type(mixer).__name__} whose conv1d is a {type(conv).__name__} and whose "
            f"activation is {mixer.activation!r}; packed sequences need a plain nn.Conv1d there, or silu"
        )
    return y[:, -length:]

"""The Mamba block, with the constructor, parameters and state_dict of the well-known one."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifuse.ops import _checks as check
from trifuse.ops import selective_scan, selective_state_update

__all__ = ["InferenceParams", "Mamba"]


@dataclass
class InferenceParams:
    """What a model's layers remember while a text is read or written piece by piece.

    ``Mamba.forward`` takes this or any other object with these attributes.

    Args:
        max_seqlen, max_batch_size: the limits of the cache; Mamba's does not grow and ignores them.
        seqlen_offset: how many tokens were processed before this piece. The caller moves it on.
        key_value_memory_dict: each layer's states, by ``layer_idx``.
    """

    max_seqlen: int = 0
    max_batch_size: int = 0
    seqlen_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)


class Mamba(nn.Module):
    """The Mamba block: projection, causal convolution, selective scan, gate, projection.

    Args:
        d_model: size of the tokens that go in and come out.
        d_state: N, states per channel.
        d_conv: width of the causal convolution.
        expand: the block works on ``expand * d_model`` channels.
        dt_rank: size of the bottleneck that ``dt`` is projected from; ``"auto"`` is ``ceil(d_model / 16)``.
        dt_min, dt_max, dt_init_floor: range of the step sizes at the start, drawn log-uniformly.
        dt_init, dt_scale: how ``dt_proj.weight`` starts: ``"random"`` or ``"constant"``, of size
            ``dt_scale * dt_rank ** -0.5``.
        conv_bias, bias: whether the convolution, and the input and output projections, have a bias.
        use_fast_path: accepted for compatibility; there is one path.
        layer_idx: the layer's key in ``inference_params.key_value_memory_dict``.
        device, dtype: of the parameters. ``A_log`` and ``D`` are float32 whatever ``dtype`` is.

    Parameters, their initial values (the same draws from the same seed) and ``state_dict`` keys are
    those of the reference implementation, so checkpoints load either way. The submodules are called,
    never read around, so a wrapped ``in_proj``, ``conv1d``, ``x_proj``, ``dt_proj`` or ``out_proj``
    (LoRA, quantization, hooks) is honoured, in ``step`` too.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.4.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ValueError(f'Mamba: dt_init is {dt_init!r}; it must be "random" or "constant"')
        factory = {"device": device, "dtype": dtype}
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        for name in ("d_model", "d_state", "d_conv", "d_inner", "dt_rank"):
            size = getattr(self, name)
            if not isinstance(size, numbers.Integral) or size < 1:
                also = ' or "auto"' if name == "dt_rank" else ""
                raise ValueError(f"Mamba: {name} is {size!r}; it must be a positive int{also}")
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx

        # The order of the submodules, and of the draws in _init_dt_proj, fixes what a seed gives.
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **factory
        )
        self.activation = "silu"
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **factory)
        self._init_dt_proj(dt_init, dt_scale, dt_min, dt_max, dt_init_floor)

        rates = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = nn.Parameter(rates.log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner, dtype=torch.float32, device=device))
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    @torch.no_grad()
    def _init_dt_proj(self, init: str, scale: float, dt_min: float, dt_max: float, floor: float) -> None:
        """Start with step sizes ``softplus(bias)`` between dt_min and dt_max, log-uniformly."""
        weight, bias = self.dt_proj.weight, self.dt_proj.bias
        size = scale * self.dt_rank**-0.5
        if init == "constant":
            weight.fill_(size)
        else:
            weight.uniform_(-size, size)
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.exp(torch.rand(self.d_inner, device=bias.device, dtype=bias.dtype) * (high - low) + low)
        dt = dt.clamp(min=floor)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt
        bias._no_reinit = True

    def forward(
        self, hidden_states: Tensor, inference_params: Any = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Mix tokens along time.

        Args:
            hidden_states: ``(B, L, d_model)``.
            inference_params: reads a text in pieces of any size, see ``InferenceParams``. With
                ``seqlen_offset`` 0 a text starts; above 0 it goes on from the states this layer left
                there. The states hold values only: no gradient flows from one piece into another.
            cu_seqlens: ``(S + 1,)`` offsets of S texts packed in a batch of one; convolution and scan
                stop at every boundary.

        Returns:
            ``(B, L, d_model)``.

        Raises:
            TypeError, ValueError: naming the argument, what it was and what it must be.
        """
        self._check_input(hidden_states)
        conv_state = ssm_state = None
        if cu_seqlens is not None:
            check.tensors("Mamba", cu_seqlens=cu_seqlens)
            check.same_device("Mamba", hidden_states, cu_seqlens=cu_seqlens)
            check.cu_seqlens("Mamba", cu_seqlens, *hidden_states.shape[:2])
        if inference_params is not None:
            if cu_seqlens is not None:
                raise ValueError("Mamba: cu_seqlens came with inference_params; a packed batch has no cached states")
            start = inference_params.seqlen_offset == 0
            conv_state, ssm_state = self._get_states_from_cache(inference_params, hidden_states.shape[0], start)
            check.same_device("Mamba", hidden_states, conv_state=conv_state, ssm_state=ssm_state)
        return self._mix(hidden_states, conv_state, ssm_state, cu_seqlens)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Process one token of each text and move the states on, in place.

        Args:
            hidden_states: ``(B, 1, d_model)``.
            conv_state: ``(B, d_inner, d_conv)``, the last inputs of the convolution.
            ssm_state: ``(B, d_inner, d_state)``.

        Returns:
            ``(B, 1, d_model)``, and the two states that were passed in.

        Raises:
            TypeError, ValueError: naming the argument, what it was and what it must be.
        """
        self._check_input(hidden_states)
        if hidden_states.shape[1] != 1:
            raise ValueError(
                f"Mamba: hidden_states has {hidden_states.shape[1]} tokens; step takes 1 (forward takes more)"
            )
        self._check_states(hidden_states.shape[0], conv_state, ssm_state)
        check.same_device("Mamba", hidden_states, conv_state=conv_state, ssm_state=ssm_state)
        return self._mix(hidden_states, conv_state, ssm_state), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """States for the start of ``batch_size`` texts: ``(conv_state, ssm_state)``, both zero.

        Args:
            batch_size: B.
            max_seqlen: not used; the states do not grow.
            dtype: of both states. By default the convolution's is that of its weight and the scan's
                float32 (float64 in a float64 module): a half-precision state forgets as it is carried.
        """
        weight = next(self.conv1d.parameters())
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (
            weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype or weight.dtype),
            weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype or wide),
        )

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ValueError("Mamba: layer_idx is None; a layer needs one to find its states in inference_params")
        cache = inference_params.key_value_memory_dict
        states = cache.get(self.layer_idx)
        if states is None or (initialize_states and states[0].shape[0] != batch_size):
            states = cache[self.layer_idx] = self.allocate_inference_cache(batch_size)
        self._check_states(batch_size, *states)
        if initialize_states:
            for state in states:
                state.zero_()
        return states

    def _check_input(self, hidden_states: Tensor) -> None:
        check.tensors("Mamba", hidden_states=hidden_states)
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.d_model:
            raise ValueError(
                f"Mamba: hidden_states has shape {tuple(hidden_states.shape)}; "
                f"it must be (B, L, d_model) with d_model = {self.d_model}"
            )
        if not hidden_states.is_floating_point():
            was = check.dtype_name(hidden_states.dtype)
            raise TypeError(f"Mamba: hidden_states is {was}; it must be floating point like the parameters")
        if hidden_states.device != self.A_log.device:
            was, own = hidden_states.device, self.A_log.device
            raise ValueError(f"Mamba: hidden_states is on {was}; it must be on {own} like the parameters")

    def _check_states(self, batch_size: int, conv_state: Tensor, ssm_state: Tensor) -> None:
        check.tensors("Mamba", conv_state=conv_state, ssm_state=ssm_state)
        check.shape("Mamba", "conv_state", conv_state, (batch_size, self.d_inner, self.d_conv), "(B, d_inner, d_conv)")
        check.shape("Mamba", "ssm_state", ssm_state, (batch_size, self.d_inner, self.d_state), "(B, d_inner, d_state)")

    def _mix(
        self,
        hidden_states: Tensor,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        x = self._convolve(x, conv_state) if cu_seqlens is None else self._convolve_packed(x, cu_seqlens)
        return self.out_proj(self._scan(x, z, ssm_state, cu_seqlens))

    def _convolve(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """``silu(conv1d(x))`` of x (B, L, d_inner), with `state` to its left; moves `state` on."""
        length, width = x.shape[1], self.d_conv
        left = None if state is None else state.transpose(1, 2).to(x.dtype)
        if _is_plain(self.conv1d, nn.Conv1d):
            padded = F.pad(x, (0, 0, width - 1, 0)) if left is None else torch.cat((left[:, 1:], x), dim=1)
            y = _depthwise(padded, self.conv1d.weight, self.conv1d.bias, length)
        else:
            padded = x if left is None else torch.cat((left[:, 1:], x), dim=1)
            y = self.conv1d(padded.transpose(1, 2)).transpose(1, 2)  # the module pads by itself
            start = padded.shape[1] - length
            y = F.silu(y[:, start : start + length])
        if state is not None:
            window = torch.cat((left[:, length:], x[:, -width:]), dim=1)
            state.copy_(window.detach().transpose(1, 2))
        return y.to(x.dtype)

    def _convolve_packed(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The convolution of sequences packed in a batch of one: a gap of zeros goes before each."""
        gap, count, length = self.d_conv - 1, cu_seqlens.shape[0] - 1, x.shape[1]
        places = torch.arange(length, device=x.device)
        places = places + gap * torch.searchsorted(cu_seqlens.to(torch.int64)[1:], places, right=True)
        spread = x.new_zeros(1, length + gap * count, self.d_inner).index_copy(1, places, x)
        return self._convolve(spread).index_select(1, places)

    def _scan(self, x: Tensor, z: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """The gated selective scan of x (B, L, d_inner), starting from `state`; moves `state` on."""
        dt, B, C = self.x_proj(x).to(x.dtype).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        wide = torch.promote_types(x.dtype, torch.float32)
        if _is_plain(self.dt_proj, nn.Linear):
            dt, dt_bias = F.linear(dt, self.dt_proj.weight), self.dt_proj.bias.to(wide)
        else:
            dt, dt_bias = self.dt_proj(dt).to(x.dtype), None
        A, D = -torch.exp(self.A_log.to(wide)), self.D.to(wide)

        tensors = (x, dt, A, B, C, D, z, dt_bias)
        if state is not None and x.shape[1] == 1 and not _needs_grad(*tensors):
            x, dt, B, C, z = (sequence.squeeze(1) for sequence in (x, dt, B, C, z))
            return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=True).unsqueeze(1)
        out, last_state = selective_scan(
            *tensors, delta_softplus=True, return_last_state=True,
            initial_state=None if state is None else state.to(wide, copy=True), cu_seqlens=cu_seqlens, layout="bld",
        )  # fmt: skip
        if state is not None:
            state.copy_(last_state.detach())
        return out


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module does no more than its class does with its weight and bias."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and "forward" not in module.__dict__ and not any(hooks)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _depthwise(padded: Tensor, weight: Tensor, bias: Tensor | None, length: int) -> Tensor:
    """silu of the causal depthwise convolution of (B, W - 1 + L, D), summed in float32 over W shifts.

    On a CPU, forward and backward together, torch's own convolutions of these layouts take longer.
    """
    padded = padded.to(torch.promote_types(padded.dtype, torch.float32))
    taps = weight.to(padded.dtype).squeeze(1).unbind(1)
    y = padded[:, :length] * taps[0]
    if bias is not None:
        y = y + bias.to(padded.dtype)
    for shift, tap in enumerate(taps[1:], start=1):
        y = torch.addcmul(y, padded[:, shift : shift + length], tap)
    return F.silu(y)

"""The Mamba block, with the constructor, parameters and state_dict of the well-known one."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trifuse.nn import block
from trifuse.nn.convolution import convolve, convolve_token, is_fused, taps
from trifuse.ops import _checks as check
from trifuse.ops import selective_scan, selective_state_update
from trifuse.ops.mamba_token import mamba_token

__all__ = ["Mamba", "StepSizes", "add_direction", "scan", "set_sizes"]


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
        factory = {"device": device, "dtype": dtype}
        set_sizes(self, d_model, d_state, d_conv, expand, dt_rank)
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        # The order of the submodules and of the draws fixes what a seed gives.
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.activation = "silu"
        self.act = nn.SiLU()
        steps = StepSizes(dt_init, dt_scale, dt_min, dt_max, dt_init_floor)
        add_direction(self, "", conv_bias, steps, **factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def forward(
        self,
        hidden_states: Tensor,
        inference_params: Any = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens along time.

        Args:
            hidden_states: ``(B, L, d_model)``.
            inference_params: reads a text in pieces of any size, see ``InferenceParams``. With
                ``seqlen_offset`` 0 a text starts; above 0 it goes on from the states this layer left
                there. The states hold values only: no gradient flows from one piece into another.
            attention_mask: ``(B, L)`` bool or numbers; where it is 0 stands padding, on the left, on the right or in
                between. Outputs, gradients and states are those of the texts without it; at padding the output is 0.
            cu_seqlens: ``(S + 1,)`` offsets of S texts packed in a batch of one; convolution and scan
                stop at every boundary. With inference_params every text has its own row of states.

        Returns:
            ``(B, L, d_model)``.

        Raises:
            TypeError, ValueError: naming the argument, what it was and what it must be.
        """
        block.check_input("Mamba", hidden_states, self.d_model, self.A_log.device)
        block.check_packing("Mamba", hidden_states, attention_mask, cu_seqlens)
        states = (None, None)
        if inference_params is not None:
            rows = hidden_states.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            start = inference_params.seqlen_offset == 0
            states = self._get_states_from_cache(inference_params, rows, start)
            check.same_device("Mamba", hidden_states, conv_state=states[0], ssm_state=states[1])
        if attention_mask is not None:
            return block.without_padding(
                hidden_states, attention_mask, lambda texts, bounds: self._mix(texts, *states, bounds)
            )
        return self._mix(hidden_states, *states, cu_seqlens)

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
        out = self._plain_token(hidden_states, conv_state, ssm_state)
        if out is not None:
            return out, conv_state, ssm_state
        block.check_input("Mamba", hidden_states, self.d_model, self.A_log.device)
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
        return block.cached_states(self, inference_params, batch_size, initialize_states)

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
        one = hidden_states.shape[1] == 1 and conv_state is not None and cu_seqlens is None
        if one and not torch.is_grad_enabled():
            out = self._plain_token(hidden_states, conv_state, ssm_state)
            return self._token(hidden_states.squeeze(1), conv_state, ssm_state).unsqueeze(1) if out is None else out
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        x = convolve(self.conv1d, self.d_conv, x, conv_state, cu_seqlens=cu_seqlens)
        return self.out_proj(
            scan(x, z, self.x_proj, self.dt_proj, self.A_log, self.D, state=ssm_state, cu_seqlens=cu_seqlens)
        )

    def _token(self, token: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """One token ``(B, d_model)`` of each text, where no gradient is asked for."""
        x, z = self.in_proj(token).chunk(2, dim=-1)
        x = convolve_token(self.conv1d, self.d_conv, x, conv_state)
        dt, B, C, dt_bias = _coefficients(x, self.x_proj, self.dt_proj, self.d_state)
        A, D = _weights(x, self.A_log, self.D)
        return self.out_proj(selective_state_update(ssm_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=True))

    def _plain_token(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor | None:
        """One token ``(B, 1, d_model)`` of each text in one call, or None where it takes the long way."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        weights = self._plain_weights()
        return None if weights is None else mamba_token(hidden_states, conv_state, ssm_state, *weights)

    def _plain_weights(self) -> tuple[Tensor | None, ...] | None:
        """What ``ops.mamba_token`` takes, if no submodule is more than its weight and bias; else None."""
        modules, linear, is_plain = self._modules, nn.Linear, block.is_plain
        in_proj, x_proj, dt_proj, out_proj = (
            modules["in_proj"], modules["x_proj"], modules["dt_proj"], modules["out_proj"],
        )  # fmt: skip
        conv1d = modules["conv1d"]
        if not (
            is_plain(in_proj, linear) and is_plain(x_proj, linear) and is_plain(dt_proj, linear)
            and is_plain(out_proj, linear) and is_fused(conv1d, self.d_conv)
        ):  # fmt: skip
            return None
        first, conv, second = in_proj._parameters, conv1d._parameters, x_proj._parameters
        kernel = conv["weight"] if type(conv1d) is nn.Conv1d else taps(conv1d).unsqueeze(1)
        step, last, own = dt_proj._parameters, out_proj._parameters, self._parameters
        if second["bias"] is not None or own.get("A_log") is None or own.get("D") is None:
            return None
        return (
            first["weight"], first["bias"], kernel, conv["bias"], second["weight"], step["weight"],
            step["bias"], own["A_log"], own["D"], last["weight"], last["bias"],
        )  # fmt: skip


def scan(
    x: Tensor,
    z: Tensor,
    x_proj: nn.Module,
    dt_proj: nn.Module,
    A_log: Tensor,
    D: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """The gated selective scan of x ``(B, L, d_inner)`` with what a block projects from x; moves `state` on.

    Args:
        x: what the convolution gave, z: the gate, both ``(B, L, d_inner)``.
        x_proj, dt_proj: the projections of x to (dt, B, C) and of dt to the channels, or whatever wraps them.
        A_log, D: ``(d_inner, d_state)`` and ``(d_inner,)``.
        state: ``(B, d_inner, d_state)``, or ``(S, d_inner, d_state)`` with `cu_seqlens`; no gradient flows into it.
        cu_seqlens, reverse: as in ``trifuse.selective_scan``.
    """
    dt, B, C, dt_bias = _coefficients(x, x_proj, dt_proj, A_log.shape[1])
    A, D = _weights(x, A_log, D)
    out, last_state = selective_scan(
        x, dt, A, B, C, D, z, dt_bias, delta_softplus=True, return_last_state=True,
        initial_state=None if state is None else state.to(A.dtype, copy=True), cu_seqlens=cu_seqlens, reverse=reverse,
        layout="bld",
    )  # fmt: skip
    if state is not None:
        state.copy_(last_state.detach())
    return out


def _coefficients(
    x: Tensor, x_proj: nn.Module, dt_proj: nn.Module, d_state: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dt, B, C and the bias that is still to be added to dt."""
    projected = x_proj(x).to(x.dtype)
    dt, B, C = projected.split([projected.shape[-1] - 2 * d_state, d_state, d_state], dim=-1)
    dt, bias = block.product_and_bias(dt_proj, dt)
    return dt, B, C, bias if bias is None else bias.to(_wide(x))


def _weights(x: Tensor, A_log: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    rates = torch.exp(A_log.to(wide))
    return -rates if rates.requires_grad else rates.neg_(), D.to(wide)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class StepSizes(NamedTuple):
    """How ``dt_proj`` starts: its weight's kind and size, and the range of ``softplus(bias)``."""

    init: str
    scale: float
    low: float
    high: float
    floor: float

    @torch.no_grad()
    def start(self, dt_proj: nn.Linear, name: str) -> None:
        weight, bias = dt_proj.weight, dt_proj.bias
        size = self.scale * dt_proj.in_features**-0.5
        if self.init == "constant":
            weight.fill_(size)
        elif self.init == "random":
            weight.uniform_(-size, size)
        else:
            raise ValueError(f'{name}: dt_init is {self.init!r}; it must be "random" or "constant"')
        low, high = math.log(self.low), math.log(self.high)
        dt = torch.exp(torch.rand(bias.shape, device=bias.device, dtype=bias.dtype) * (high - low) + low)
        dt = dt.clamp(min=self.floor)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt
        bias._no_reinit = True


def set_sizes(block: Any, d_model: int, d_state: int, d_conv: int, expand: float, dt_rank: int | str) -> None:
    """Check and keep the sizes of a block."""
    block.d_model = d_model
    block.d_state = d_state
    block.d_conv = d_conv
    block.expand = expand
    block.d_inner = int(expand * d_model)
    block.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
    for name in ("d_model", "d_state", "d_conv", "d_inner", "dt_rank"):
        size = getattr(block, name)
        if not isinstance(size, numbers.Integral) or size < 1:
            also = ' or "auto"' if name == "dt_rank" else ""
            raise ValueError(f"{type(block).__name__}: {name} is {size!r}; it must be a positive int{also}")


def add_direction(block: Any, suffix: str, conv_bias: bool, steps: StepSizes, **factory: Any) -> None:
    """What one direction of time needs in a block: ``conv1d``, ``x_proj``, ``dt_proj``, ``A_log`` and ``D``."""
    inner, width = block.d_inner, block.d_conv
    conv1d = nn.Conv1d(inner, inner, width, groups=inner, padding=width - 1, bias=conv_bias, **factory)
    setattr(block, f"conv1d{suffix}", conv1d)
    setattr(block, f"x_proj{suffix}", nn.Linear(inner, block.dt_rank + 2 * block.d_state, bias=False, **factory))
    dt_proj = nn.Linear(block.dt_rank, inner, bias=True, **factory)
    setattr(block, f"dt_proj{suffix}", dt_proj)
    steps.start(dt_proj, type(block).__name__)
    device = factory.get("device")
    rates = torch.arange(1, block.d_state + 1, dtype=torch.float32, device=device)
    A_log = nn.Parameter(rates.log().repeat(inner, 1))
    D = nn.Parameter(torch.ones(inner, dtype=torch.float32, device=device))
    A_log._no_weight_decay = D._no_weight_decay = True
    setattr(block, f"A{suffix}_log", A_log)
    setattr(block, f"D{suffix}", D)

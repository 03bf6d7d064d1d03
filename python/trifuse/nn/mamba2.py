"""The Mamba-2 block, with the constructor, parameters and state_dict of the well-known one."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifuse.nn import block
from trifuse.nn.convolution import convolve, convolve_token
from trifuse.nn.norm import RMSNormGated
from trifuse.ops import _checks as check
from trifuse.ops import selective_state_update, ssd

__all__ = ["Mamba2"]


class Mamba2(nn.Module):
    """The Mamba-2 block: one projection, causal convolution, SSD, gated normalization, projection.

    Args:
        d_model: size of the tokens that go in and come out.
        d_state: N, states per channel.
        d_conv: width of the causal convolution.
        conv_init: the convolution's weights start uniformly within ``+-conv_init``; None leaves torch's start.
        expand: the block works on ``expand * d_model`` channels.
        headdim: P, channels per head.
        d_ssm: channels that pass through convolution and SSD; the others are a gated MLP. None is all of them.
        ngroups: G, groups of heads that share B and C; also the groups of the normalization.
        A_init_range: the decay rates start uniformly between these.
        D_has_hdim: a skip weight per channel, not per head.
        rmsnorm: normalize in front of the output projection, with the gate; else the gate alone.
        norm_before_gate: gate after the normalization, not before it.
        dt_min, dt_max, dt_init_floor: range of the step sizes at the start, drawn log-uniformly.
        dt_limit: the smallest and the largest step size.
        bias, conv_bias: whether the input and output projections, and the convolution, have a bias.
        chunk_size: positions per matrix product of the SSD; it changes rounding and speed only.
        use_mem_eff_path: accepted for compatibility; there is one path.
        layer_idx: the layer's key in ``inference_params.key_value_memory_dict``.
        process_group: None; layers split over processes are not served.
        sequence_parallel: accepted for compatibility; it belongs to ``process_group``.
        device, dtype: of the parameters. ``D`` is of torch's default dtype whatever ``dtype`` is.
        learnable_init_states: a text starts from a trained state ``init_states``, not from zero (of texts that
            ``seq_idx`` parts, the first of each row; of those of ``cu_seqlens``, every one).

    Parameters, their initial values (the same draws from the same seed) and ``state_dict`` keys are
    those of the reference implementation, so checkpoints load either way. The submodules are called,
    never read around, so a wrapped ``in_proj``, ``conv1d``, ``norm`` or ``out_proj`` (LoRA, quantization,
    hooks) is honoured, in ``step`` too.

    Source: Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
    State Space Duality", 2024, section 7.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        learnable_init_states: bool = False,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.conv_init = conv_init
        self.expand = expand
        self.d_inner = int(expand * d_model)
        self.headdim = headdim
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.ngroups = ngroups
        self.D_has_hdim = D_has_hdim
        self.rmsnorm = rmsnorm
        self.norm_before_gate = norm_before_gate
        self.dt_limit = dt_limit
        self.activation = "silu"
        self.chunk_size = chunk_size
        self.use_mem_eff_path = use_mem_eff_path
        self.layer_idx = layer_idx
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.learnable_init_states = learnable_init_states
        self._check_sizes(A_init_range)
        self.nheads = self.d_ssm // headdim

        # The order of the submodules and of the draws fixes what a seed gives.
        self.in_proj = nn.Linear(d_model, sum(self._pieces()), bias=bias, **factory)
        channels = self.d_ssm + 2 * ngroups * d_state
        self.conv1d = nn.Conv1d(
            channels, channels, d_conv, groups=channels, padding=d_conv - 1, bias=conv_bias, **factory
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        if learnable_init_states:
            self.init_states = nn.Parameter(torch.zeros(self.nheads, headdim, d_state, **factory))
        self.act = nn.SiLU()
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.exp(torch.rand(self.nheads, **factory) * (high - low) + low).clamp(min=dt_init_floor)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt
        rates = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = nn.Parameter(rates.log().to(dtype=dtype))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        for name in ("init_states", "dt_bias", "A_log", "D"):
            if hasattr(self, name):
                getattr(self, name)._no_weight_decay = True
        if rmsnorm:
            self.norm = RMSNormGated(
                self.d_ssm, eps=1e-5, group_size=self.d_ssm // ngroups, norm_before_gate=norm_before_gate, **factory
            )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def _check_sizes(self, A_init_range: Sequence[float]) -> None:
        name = type(self).__name__
        for attribute in ("d_model", "d_state", "d_conv", "d_inner", "headdim", "d_ssm", "ngroups", "chunk_size"):
            size = getattr(self, attribute)
            if not isinstance(size, numbers.Integral) or size < 1:
                raise ValueError(f"{name}: {attribute} is {size!r}; it must be a positive int")
        if self.d_ssm > self.d_inner:
            raise ValueError(f"{name}: d_ssm is {self.d_ssm}; it must be at most d_inner = {self.d_inner}")
        if self.d_ssm % self.headdim:
            raise ValueError(f"{name}: headdim is {self.headdim}, which does not divide d_ssm = {self.d_ssm}")
        if self.d_ssm // self.headdim % self.ngroups:
            heads = self.d_ssm // self.headdim
            raise ValueError(f"{name}: ngroups is {self.ngroups}, which does not divide the {heads} heads")
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(f"{name}: A_init_range is {A_init_range}; it must be two positive numbers in order")
        if self.process_group is not None:
            raise ValueError(
                f"{name}: process_group is {self.process_group!r}; it must be None: layers split over processes are "
                "not served"
            )

    def _pieces(self) -> list[int]:
        """What ``in_proj`` gives: MLP gate, MLP, gate, inputs of the convolution, step sizes."""
        mlp = self.d_inner - self.d_ssm
        return [mlp, mlp, self.d_ssm, self.d_ssm + 2 * self.ngroups * self.d_state, self.nheads]

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
        *,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens along time.

        Args:
            u: ``(B, L, d_model)``; with ``seqlen`` ``(B * seqlen, d_model)``.
            seqlen: L, where u comes flat.
            seq_idx: ``(B, L)`` int32 or int64; convolution and state restart where it changes.
            cu_seqlens: ``(S + 1,)`` offsets of S texts packed in a batch of one; convolution and state
                restart at every boundary. With ``inference_params`` each text has its own states. Where they end
                before L, ``seq_idx`` must change there: the rest is padding, and its output is 0.
            inference_params: reads a text in pieces of any size, see ``InferenceParams``. With
                ``seqlen_offset`` 0 a text starts; above 0 it goes on from the states this layer left
                there. The states hold values only: no gradient flows from one piece into another.
            attention_mask: ``(B, L)`` bool or numbers; where it is 0 stands padding, on the left, on the right or in
                between. Outputs, gradients and states are those of the texts without it; at padding the output is 0.

        Returns:
            The shape of u.

        Raises:
            TypeError, ValueError: naming the argument, what it was and what it must be.
        """
        name = type(self).__name__
        if seqlen is not None:
            check.tensors(name, u=u)
            if u.dim() != 2 or seqlen < 1 or u.shape[0] % seqlen:
                raise ValueError(
                    f"{name}: u has shape {tuple(u.shape)}; with seqlen it must be (B * seqlen, d_model), "
                    f"seqlen = {seqlen}"
                )
            flat, u = u, u.unflatten(0, (-1, seqlen))
        block.check_input(name, u, self.d_model, self.A_log.device)
        end = _end_of_texts(u, seq_idx, cu_seqlens)
        if end < u.shape[1]:
            out = self.forward(u[:, :end], None, seq_idx[:, :end], cu_seqlens, inference_params)
            out = F.pad(out, (0, 0, 0, u.shape[1] - end))
            return out if seqlen is None else out.view(flat.shape)
        block.check_packing(name, u, attention_mask, cu_seqlens)
        if seq_idx is not None:
            check.tensors(name, seq_idx=seq_idx)
            check.dtype(name, "seq_idx", seq_idx, (torch.int32, torch.int64))
            check.shape(name, "seq_idx", seq_idx, tuple(u.shape[:2]), "(B, L)")
            check.same_device(name, u, seq_idx=seq_idx)
            if attention_mask is not None:
                raise ValueError(f"{name}: attention_mask came with seq_idx; name the padding by one of them")
        states, start = (None, None), True
        if inference_params is not None:
            rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            start = inference_params.seqlen_offset == 0
            states = self._get_states_from_cache(inference_params, rows, start)
            check.same_device(name, u, conv_state=states[0], ssm_state=states[1])
        if attention_mask is None:
            out = self._mix(u, *states, start, seq_idx, cu_seqlens)
        else:
            out = block.without_padding(
                u, attention_mask, lambda texts, bounds: self._mix(texts, *states, start, None, bounds)
            )
        return out if seqlen is None else out.view(flat.shape)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Process one token of each text and move the states on, in place.

        Args:
            hidden_states: ``(B, 1, d_model)``.
            conv_state: ``(B, d_ssm + 2 * G * N, d_conv)``, the last inputs of the convolution.
            ssm_state: ``(B, H, P, N)``.

        Returns:
            ``(B, 1, d_model)``, and the two states that were passed in.

        Raises:
            TypeError, ValueError: naming the argument, what it was and what it must be.
        """
        name = type(self).__name__
        block.check_input(name, hidden_states, self.d_model, self.A_log.device)
        if hidden_states.shape[1] != 1:
            raise ValueError(
                f"{name}: hidden_states has {hidden_states.shape[1]} tokens; step takes 1 (forward takes more)"
            )
        self._check_states(hidden_states.shape[0], conv_state, ssm_state)
        check.same_device(name, hidden_states, conv_state=conv_state, ssm_state=ssm_state)
        return self._mix(hidden_states, conv_state, ssm_state, False), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """States for the start of ``batch_size`` texts: ``(conv_state, ssm_state)``.

        Args:
            batch_size: B.
            max_seqlen: not used; the states do not grow.
            dtype: of both states. By default the convolution's is that of its weight and the SSD's
                float32 (float64 in a float64 module): a half-precision state forgets as it is carried.
        """
        weight = next(self.conv1d.parameters())
        wide = torch.promote_types(weight.dtype, torch.float32)
        conv_state = weight.new_zeros(batch_size, self._pieces()[3], self.d_conv, dtype=dtype or weight.dtype)
        shape = (batch_size, self.nheads, self.headdim, self.d_state)
        ssm_state = weight.new_zeros(shape, dtype=dtype or wide)
        if self.learnable_init_states:
            ssm_state.copy_(self.init_states.detach())
        return conv_state, ssm_state

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        return block.cached_states(self, inference_params, batch_size, initialize_states)

    def _check_states(self, batch_size: int, conv_state: Tensor, ssm_state: Tensor) -> None:
        name = type(self).__name__
        check.tensors(name, conv_state=conv_state, ssm_state=ssm_state)
        conv_shape = (batch_size, self._pieces()[3], self.d_conv)
        check.shape(name, "conv_state", conv_state, conv_shape, "(B, d_ssm + 2 G N, d_conv)")
        ssm_shape = (batch_size, self.nheads, self.headdim, self.d_state)
        check.shape(name, "ssm_state", ssm_state, ssm_shape, "(B, H, P, N)")

    def _mix(
        self,
        u: Tensor,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        start: bool,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        one = u.shape[1] == 1 and conv_state is not None and cu_seqlens is None and seq_idx is None
        if one and not torch.is_grad_enabled():
            return self._token(u.squeeze(1), conv_state, ssm_state).unsqueeze(1)
        z0, x0, z, xBC, dt = self.in_proj(u).split(self._pieces(), dim=-1)
        xBC = convolve(self.conv1d, self.d_conv, xBC, conv_state, seq_idx, cu_seqlens)
        x, B, C = self._heads(xBC)
        wide = torch.promote_types(x.dtype, torch.float32)
        initial = None if ssm_state is None else ssm_state.to(wide, copy=True)
        if start and self.learnable_init_states:
            rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            initial = self.init_states.to(wide).expand(rows, -1, -1, -1)
        y, last_state = ssd(
            x, dt, -torch.exp(self.A_log.to(wide)), B, C, self.chunk_size, D=self._skip(wide),
            z=None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim)), dt_bias=self.dt_bias.to(wide),
            dt_softplus=True, dt_limit=self.dt_limit, initial_states=initial, seq_idx=seq_idx, cu_seqlens=cu_seqlens,
            return_final_states=True,
        )  # fmt: skip
        if ssm_state is not None:
            ssm_state.copy_(last_state.detach())
        return self._project(y.flatten(-2), z, z0, x0)

    def _token(self, token: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """One token ``(B, d_model)`` of each text, where no gradient is asked for."""
        z0, x0, z, xBC, dt = self.in_proj(token).split(self._pieces(), dim=-1)
        x, B, C = self._heads(convolve_token(self.conv1d, self.d_conv, xBC, conv_state))
        wide = torch.promote_types(x.dtype, torch.float32)
        heads = (self.nheads, self.headdim)
        A, D, dt_bias = -torch.exp(self.A_log.to(wide)), self._skip(wide), self.dt_bias.to(wide)
        limited = tuple(self.dt_limit) != (0.0, math.inf)
        if limited:
            dt = F.softplus(dt.to(wide) + dt_bias).clamp(*self.dt_limit).to(x.dtype)
        y = selective_state_update(
            ssm_state, x, dt.unsqueeze(2).expand_as(x), A[:, None, None].expand(*heads, self.d_state), B, C,
            D if self.D_has_hdim else D.unsqueeze(1).expand(heads), None if self.rmsnorm else z.unflatten(-1, heads),
            None if limited else dt_bias.unsqueeze(1).expand(heads), dt_softplus=not limited,
        )  # fmt: skip
        return self._project(y.flatten(-2), z, z0, x0)

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x as ``(..., H, P)``, B and C as ``(..., G, N)``, from what the convolution gave."""
        size = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_ssm, size, size], dim=-1)
        groups = (self.ngroups, self.d_state)
        return x.unflatten(-1, (self.nheads, self.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _skip(self, wide: torch.dtype) -> Tensor:
        D = self.D.to(wide)
        return D.view(self.nheads, self.headdim) if self.D_has_hdim else D

    def _project(self, y: Tensor, z: Tensor, z0: Tensor, x0: Tensor) -> Tensor:
        if self.rmsnorm:
            y = self.norm(y, z)
        if z0.shape[-1] > 0:
            y = torch.cat((F.silu(z0) * x0, y), dim=-1)
        return self.out_proj(y)


def _end_of_texts(u: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """Where the padding begins that seq_idx tells from the last packed text; L where there is none."""
    length = u.shape[1]
    if not (isinstance(seq_idx, Tensor) and isinstance(cu_seqlens, Tensor)) or torch.compiler.is_compiling():
        return length
    if seq_idx.shape != u.shape[:2] or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        return length  # the checks will say so
    end = int(cu_seqlens[-1])
    inside = 0 < end < length and bool((seq_idx[:, end] != seq_idx[:, end - 1]).all())
    return end if inside else length

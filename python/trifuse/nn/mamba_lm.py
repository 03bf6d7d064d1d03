"""A language model of Mamba or Mamba-2 blocks, with the keys and the config of the published checkpoints."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trifuse.nn import checkpoints, generation
from trifuse.nn.mamba import Mamba
from trifuse.nn.mamba2 import Mamba2
from trifuse.nn.multi_lora import packed_from
from trifuse.ops import _checks as check

__all__ = ["MambaLM", "MambaLMConfig"]

_MIXERS = {"Mamba1": Mamba, "Mamba2": Mamba2}


@dataclass
class MambaLMConfig:
    """The shape of a ``MambaLM``, in the words of the published ``config.json``.

    Args:
        d_model: size of a token's vector.
        d_intermediate: width of a gated MLP after every mixer; 0 for none.
        n_layer: number of blocks.
        vocab_size: number of tokens; the embedding has ``pad_vocab_size_multiple`` times as many rows as it needs.
        ssm_cfg: arguments of the mixer, and under ``"layer"`` which: ``"Mamba1"`` (the default) or ``"Mamba2"``.
        attn_layer_idx, attn_cfg: of attention blocks, which are not built here; they must be empty.
        rms_norm: RMSNorm, or else LayerNorm.
        residual_in_fp32: keep the sum of the blocks' outputs in float32 whatever the weights are.
        fused_add_norm: accepted; there is one path.
        pad_vocab_size_multiple: see vocab_size.
        tie_embeddings: the head is the embedding, transposed.
        norm_epsilon: of the norms.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
    norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"MambaLM: {name} is {value!r}; it must be a positive int")
        if self.attn_layer_idx:
            raise ValueError(
                f"MambaLM: attn_layer_idx is {self.attn_layer_idx}; attention blocks are not built here, it must be "
                "empty (for hybrid models: transformers with trifuse.integrations.install())"
            )
        layer = self.ssm_cfg.get("layer", "Mamba1")
        if layer not in _MIXERS:
            raise ValueError(f'MambaLM: ssm_cfg["layer"] is {layer!r}; it must be one of {", ".join(_MIXERS)}')

    @property
    def rows(self) -> int:
        """Rows of the embedding."""
        return math.ceil(self.vocab_size / self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple


class GatedMLP(nn.Module):
    """``fc2(y * silu(gate))`` with ``y, gate = fc1(x)``; the hidden size is rounded up to a multiple of 128."""

    def __init__(self, d_model: int, d_hidden: int, **factory: Any):
        super().__init__()
        d_hidden = math.ceil(d_hidden / 128) * 128
        self.fc1 = nn.Linear(d_model, 2 * d_hidden, bias=False, **factory)
        self.fc2 = nn.Linear(d_hidden, d_model, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * F.silu(gate))


class Block(nn.Module):
    """``residual + mixer(norm(residual))``, and the same with an MLP where there is one."""

    def __init__(self, config: MambaLMConfig, layer_idx: int, **factory: Any):
        super().__init__()
        arguments = dict(config.ssm_cfg)
        mixer = _MIXERS[arguments.pop("layer", "Mamba1")]
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = _norm(config, **factory)
        self.mixer = mixer(config.d_model, layer_idx=layer_idx, **arguments, **factory)
        self.mlp = None
        if config.d_intermediate:
            self.norm2 = _norm(config, **factory)
            self.mlp = GatedMLP(config.d_model, config.d_intermediate, **factory)

    def forward(self, residual: Tensor, **mixer_arguments: Any) -> Tensor:
        residual = residual + self.mixer(self._normed(self.norm, residual), **mixer_arguments)
        if self.mlp is not None:
            residual = residual + self.mlp(self._normed(self.norm2, residual))
        return residual

    @staticmethod
    def _normed(norm: nn.Module, residual: Tensor) -> Tensor:
        return norm(residual.to(norm.weight.dtype))


def _norm(config: MambaLMConfig, **factory: Any) -> nn.Module:
    return (nn.RMSNorm if config.rms_norm else nn.LayerNorm)(config.d_model, eps=config.norm_epsilon, **factory)


class Backbone(nn.Module):
    """Embedding, blocks and the last norm: tokens in, vectors out."""

    def __init__(self, config: MambaLMConfig, **factory: Any):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.embedding = nn.Embedding(config.rows, config.d_model, **factory)
        self.layers = nn.ModuleList(Block(config, i, **factory) for i in range(config.n_layer))
        self.norm_f = _norm(config, **factory)

    def forward(self, input_ids: Tensor, **mixer_arguments: Any) -> Tensor:
        residual = self.embedding(input_ids)
        if self.residual_in_fp32:
            residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        for layer in self.layers:
            residual = layer(residual, **mixer_arguments)
        return self.norm_f(residual.to(self.norm_f.weight.dtype))


class MambaLM(nn.Module):
    """A causal language model: embedding, residual blocks of Mamba or Mamba-2, norm, (tied) head.

    Args:
        config: a ``MambaLMConfig``.
        initializer_range: standard deviation of the embedding at the start.
        device, dtype: of the parameters (``A_log``, ``D`` and ``dt_bias`` stay float32 where their blocks say so).

    ``state_dict`` keys are those of the published Mamba and Mamba-2 language models
    (``backbone.embedding.weight``, ``backbone.layers.0.mixer.…``, ``backbone.layers.0.norm.weight``,
    ``backbone.norm_f.weight``, ``lm_head.weight``), and the draws at the start theirs in kind.

    Source: Gu and Dao, "Mamba", 2023, section 3.4 and appendix E.2; Dao and Gu, "Transformers are SSMs", 2024.
    """

    def __init__(
        self,
        config: MambaLMConfig,
        *,
        initializer_range: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not isinstance(config, MambaLMConfig):
            raise TypeError(f"MambaLM: config is {type(config).__name__}; it must be a MambaLMConfig")
        self.config = config
        factory = {"device": device, "dtype": dtype}
        self.backbone = Backbone(config, **factory)
        self.lm_head = nn.Linear(config.d_model, config.rows, bias=False, **factory)
        self._initialize(initializer_range)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    @torch.no_grad()
    def _initialize(self, embedding_std: float) -> None:
        """Biases zero, the embedding normal, what enters the residual smaller by the root of its number of terms."""
        terms = self.config.n_layer * (2 if self.config.d_intermediate else 1)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                if not getattr(module.bias, "_no_reinit", False):
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(std=embedding_std)
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                parameter /= math.sqrt(terms)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token after every token.

        Args:
            input_ids: ``(B, L)`` integers.
            attention_mask: ``(B, L)``, nonzero where a token is; padding on either side, or anywhere, is left
                out of the computation: the rest gets what it would get without it. Logits of padding are zero.
            inference_params: see ``InferenceParams``; with a mask, every row goes on from its own states.
            num_last_tokens: if positive, the logits of only so many last tokens of each row (last real ones,
                where there is a mask).
            cu_seqlens: ``(S + 1,)`` offsets of S texts packed in a batch of one; not together with a mask.

        Returns:
            ``(B, L, rows)``, or ``(B, num_last_tokens, rows)``.

        Raises:
            TypeError, ValueError: naming the argument, what it was and what it must be.
        """
        self._check(input_ids, attention_mask, num_last_tokens, cu_seqlens)
        if attention_mask is None or bool((attention_mask != 0).all()):
            hidden = self.backbone(input_ids, inference_params=inference_params, cu_seqlens=cu_seqlens)
            return self.lm_head(hidden[:, -num_last_tokens:] if num_last_tokens else hidden)

        keep = attention_mask != 0
        lengths = keep.sum(1)
        packed = F.pad(lengths.cumsum(0), (1, 0))
        origin = keep.nonzero(as_tuple=True)
        with packed_from(*origin):
            hidden = self.backbone(input_ids[keep].unsqueeze(0), inference_params=inference_params, cu_seqlens=packed)
        if num_last_tokens:
            # The j-th from the end of each row, where the row has so many.
            back = torch.arange(num_last_tokens, 0, -1, device=lengths.device)
            places, here = packed[1:, None] - back, back <= lengths[:, None]
            last = hidden[0, places.clamp(min=0)] if hidden.shape[1] else hidden.new_zeros(*here.shape, hidden.shape[2])
            logits = self.lm_head(last)
            return logits.masked_fill(~here.unsqueeze(-1), 0.0)
        with packed_from(*origin):
            logits = self.lm_head(hidden[0])
        return logits.new_zeros(*keep.shape, logits.shape[-1]).masked_scatter(keep.unsqueeze(-1), logits)

    def _check(self, input_ids: Tensor, mask: Tensor | None, num_last_tokens: int, cu_seqlens: Tensor | None) -> None:
        op = "MambaLM"
        check.tensors(op, input_ids=input_ids)
        check.tensors(op, optional=True, attention_mask=mask, cu_seqlens=cu_seqlens)
        check.rank(op, "input_ids", input_ids, 2, "(B, L)")
        check.dtype(op, "input_ids", input_ids, (torch.int64, torch.int32))
        if mask is not None:
            if cu_seqlens is not None:
                raise ValueError("MambaLM: attention_mask came with cu_seqlens; a packed batch has no padding")
            check.same_shape(op, "attention_mask", mask, "input_ids", input_ids)
        if num_last_tokens < 0:
            raise ValueError(f"MambaLM: num_last_tokens is {num_last_tokens}; it must be 0 (all) or more")

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """The states of every layer at the start of ``batch_size`` texts, by layer index."""
        return {
            i: layer.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype)
            for i, layer in enumerate(self.backbone.layers)
        }

    def generate(self, input_ids: Tensor | Sequence[Any], max_new_tokens: int, **options: Any) -> Tensor | list[Tensor]:
        """Write on from prompts.

        Args:
            input_ids: ``(B, L)`` tokens, or a sequence of B prompts (lists or 1-D tensors) of any lengths.
            max_new_tokens: how many tokens to add at most.
            attention_mask: ``(B, L)`` beside a tensor: nonzero where a token is.
            do_sample: draw tokens; False takes the likeliest.
            temperature: logits are divided by it before drawing; positive.
            top_k: draw among so many likeliest tokens.
            top_p: draw among the likeliest tokens that together have this probability, in (0, 1].
            eos_token_id: one token or several that end a text.
            pad_token_id: what follows the end of a text that ended before others; the first end token by default.
            generator: ``torch.Generator`` of the draws.
            streamer: has ``put(tokens)``, called with the prompts (where they form a tensor) and with the ``(B,)``
                tokens of every step on the CPU, and ``end()``; transformers' ``TextStreamer`` is one.

        Returns:
            ``(B, L + new)`` tokens, prompts included, or, for a sequence of prompts, a list of B 1-D tensors
            without padding.

        Raises:
            TypeError, ValueError: naming the argument, what it was and what it must be.
        """
        return generation.generate(self, input_ids, max_new_tokens, **options)

    def stream(self, input_ids: Tensor | Sequence[Any], max_new_tokens: int, **options: Any) -> Iterator[Tensor]:
        """Like ``generate``, one step at a time: yields the ``(B,)`` new tokens of each."""
        return generation.stream(self, input_ids, max_new_tokens, **options)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MambaLM:
        """Load a checkpoint in the layout of the published models, or of transformers' Mamba and Mamba-2.

        Args:
            path: a folder with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin`` (or their
                ``.index.json``), or such a weight file beside its ``config.json``.
            device, dtype: of the parameters; by default the CPU, and the dtype of the checkpoint's embedding.

        Raises:
            FileNotFoundError: saying what was looked for.
            ValueError: naming what the config or the weights have, lack, or have in another shape.
        """
        config, weights = checkpoints.read(path)
        embedding = weights.get("backbone.embedding.weight")
        if dtype is None and embedding is not None:  # without one, load_into says what is missing
            dtype = embedding.dtype
        with torch.device("meta"):
            model = cls(MambaLMConfig(**config), dtype=dtype)
        model = model.to_empty(device=device or "cpu")
        if model.config.tie_embeddings:
            model.lm_head.weight = model.backbone.embedding.weight
            if embedding is not None:
                weights.setdefault("lm_head.weight", embedding)
        checkpoints.load_into(model, weights, str(path))
        return model

    def save_pretrained(self, path: str | os.PathLike, *, safe_serialization: bool = True) -> None:
        """Write ``config.json`` and the weights into a folder, in the layout of the published models.

        Args:
            path: the folder; made if it is not there.
            safe_serialization: ``model.safetensors`` (a tied head is left out, as that format has it), or else
                ``pytorch_model.bin``.
        """
        checkpoints.write(path, asdict(self.config), self.state_dict(), self.config.tie_embeddings, safe_serialization)

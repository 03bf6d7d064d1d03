"""What the Mamba blocks share: cached states, texts with padding, the checks of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from trifuse.nn.dora import DoRALinear
from trifuse.nn.dylora import DyLoRAConv1d, DyLoRALinear
from trifuse.nn.lora import LoRALinear
from trifuse.nn.lora_conv1d import LoRAConv1d
from trifuse.nn.multi_lora import MultiLoRALinear, packed_from
from trifuse.ops import _checks as check

__all__ = ["InferenceParams", "cached_states", "check_input", "check_packing", "is_plain", "needs_grad",
           "product_and_bias", "without_padding"]  # fmt: skip

# Layers with an adapter of which it is known what calling them does; a class derived from one may do more.
_MERGEABLE = (LoRALinear, DyLoRALinear, DoRALinear, LoRAConv1d, DyLoRAConv1d)
_LINEAR = (LoRALinear, DyLoRALinear, DoRALinear, MultiLoRALinear)


@dataclass
class InferenceParams:
    """What a model's layers remember while a text is read or written piece by piece.

    A block's ``forward`` takes this or any other object with these attributes.

    Args:
        max_seqlen, max_batch_size: the limits of the cache; Mamba's does not grow and ignores them.
        seqlen_offset: how many tokens were processed before this piece. The caller moves it on.
        key_value_memory_dict: each layer's states, by ``layer_idx``.
    """

    max_seqlen: int = 0
    max_batch_size: int = 0
    seqlen_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module does no more than its class does with its weight and bias; a low-rank update may be
    merged into the weight."""
    if type(module) is not kind and not (type(module) in _MERGEABLE and module.acts_as(kind)):
        return False
    if "forward" in module.__dict__ or _has_any_global_hook():
        return False
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def product_and_bias(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """``module(x)`` of a linear layer, and the bias that is still to be added: a kernel adds it in float32. What wraps
    such a layer is called, and leaves none."""
    if is_plain(module, nn.Linear):
        return F.linear(x, module.weight), module.bias
    if type(module) in _LINEAR and is_plain(module, type(module)):
        return module.product(x), module.bias
    return module(x).to(x.dtype), None


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def cached_states(block: Any, inference_params: Any, batch_size: int, start: bool) -> tuple[Tensor, Tensor]:
    """A block's (conv_state, ssm_state) in the cache, made anew where there are none, or another number of rows."""
    name = type(block).__name__
    if block.layer_idx is None:
        raise ValueError(f"{name}: layer_idx is None; a layer needs one to find its states in inference_params")
    cache = inference_params.key_value_memory_dict
    states = cache.get(block.layer_idx)
    if states is None or (start and states[0].shape[0] != batch_size):
        states = cache[block.layer_idx] = block.allocate_inference_cache(batch_size)
        return states
    block._check_states(batch_size, *states)
    if start:
        for state, first in zip(states, block.allocate_inference_cache(batch_size), strict=True):
            state.copy_(first)
    return states


def check_input(name: str, hidden_states: Tensor, d_model: int, device: torch.device) -> None:
    check.tensors(name, hidden_states=hidden_states)
    if hidden_states.dim() != 3 or hidden_states.shape[2] != d_model:
        raise ValueError(
            f"{name}: hidden_states has shape {tuple(hidden_states.shape)}; "
            f"it must be (B, L, d_model) with d_model = {d_model}"
        )
    if not hidden_states.is_floating_point():
        was = check.dtype_name(hidden_states.dtype)
        raise TypeError(f"{name}: hidden_states is {was}; it must be floating point like the parameters")
    if hidden_states.device != device:
        was = hidden_states.device
        raise ValueError(f"{name}: hidden_states is on {was}; it must be on {device} like the parameters")


def check_packing(name: str, hidden_states: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    check.tensors(name, optional=True, attention_mask=attention_mask, cu_seqlens=cu_seqlens)
    check.same_device(name, hidden_states, attention_mask=attention_mask, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError(f"{name}: attention_mask came with cu_seqlens; a packed batch has no padding")
        check.cu_seqlens(name, cu_seqlens, *hidden_states.shape[:2])
    if attention_mask is not None:
        check.shape(name, "attention_mask", attention_mask, tuple(hidden_states.shape[:2]), "(B, L)")


def without_padding(hidden_states: Tensor, mask: Tensor, mix: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
    """``mix(texts, cu_seqlens)`` of the positions where `mask` is true, packed in a batch of one; 0 elsewhere.

    Padding thus reaches neither a convolution nor a state, wherever it stands and whatever it holds.
    """
    mask = mask != 0
    if bool(mask.all()):
        return mix(hidden_states, None)
    rows, places = mask.nonzero(as_tuple=True)
    offsets = F.pad(mask.sum(1).cumsum(0), (1, 0))
    with packed_from(rows, places):
        packed = mix(hidden_states[rows, places].unsqueeze(0), offsets).squeeze(0)
    return packed.new_zeros(*mask.shape, packed.shape[1]).index_put((rows, places), packed)

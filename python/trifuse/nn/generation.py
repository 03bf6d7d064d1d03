"""Writing texts with a language model that keeps states: greedy, temperature, top-k, top-p."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trifuse.nn.block import InferenceParams
from trifuse.ops import _checks as check

__all__ = ["generate", "sample", "stream"]

_OP = "generate"


def sample(
    logits: Tensor,
    *,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The next tokens: ``(B,)`` of logits ``(B, V)``. Top-k is applied before top-p.

    Source of top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020, section 3.1.
    """
    if not do_sample:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    order = None
    if top_k is not None or top_p is not None:
        logits, order = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), dim=-1)
    probabilities = logits.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities  # of the likelier ones: the likeliest always stays
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return (drawn if order is None else order.gather(-1, drawn)).squeeze(-1)


def stream(
    model: Any,
    input_ids: Tensor | Sequence[Any],
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yields the ``(B,)`` new tokens of every step; see ``MambaLM.generate``."""
    _check_sampling(temperature, top_k, top_p)
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"{_OP}: max_new_tokens is {max_new_tokens!r}; it must be an int, 0 or more")
    ids, mask = _prompts(model, input_ids, attention_mask)
    ends = _ends(eos_token_id)
    pad = pad_token_id if pad_token_id is not None else ends[0] if ends else 0
    how = {"do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    return _steps(model, ids, mask, max_new_tokens, ends, pad, how)


def _steps(
    model: Any, ids: Tensor, mask: Tensor | None, steps: int, ends: list[int], pad: int, how: dict[str, Any]
) -> Iterator[Tensor]:
    cache = InferenceParams(max_seqlen=ids.shape[1] + steps, max_batch_size=ids.shape[0])
    vocabulary = model.config.vocab_size  # rows beyond it only round the embedding's size up
    alive = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
    stops = torch.tensor(ends, device=ids.device)
    for _ in range(steps):
        # Entered anew at every step: a caller that stops in the middle must not be left without gradients.
        with torch.inference_mode():
            logits = model(ids, mask, inference_params=cache, num_last_tokens=1)[:, -1, :vocabulary]
            cache.seqlen_offset += ids.shape[1]
            tokens = sample(logits, **how)
            tokens = torch.where(alive, tokens, torch.full_like(tokens, pad))
            if ends:
                alive = alive & ~torch.isin(tokens, stops)
            ids, mask = tokens.unsqueeze(1), None
        yield tokens.clone()
        if ends and not bool(alive.any()):
            return


def generate(
    model: Any, input_ids: Tensor | Sequence[Any], max_new_tokens: int, *, streamer: Any = None, **options: Any
) -> Tensor | list[Tensor]:
    """All of ``stream`` at once, behind the prompts; see ``MambaLM.generate``."""
    listed = not isinstance(input_ids, Tensor)
    if streamer is not None and not listed:
        streamer.put(input_ids.cpu())
    new = []
    for tokens in stream(model, input_ids, max_new_tokens, **options):
        new.append(tokens)
        if streamer is not None:
            streamer.put(tokens.cpu())
    if streamer is not None:
        streamer.end()
    if not listed:
        return torch.cat([input_ids, *(one.unsqueeze(1).to(input_ids) for one in new)], dim=1)
    ends = _ends(options.get("eos_token_id"))
    return [
        torch.cat([torch.as_tensor(prompt, device=_device(model)), _until_end([one[i] for one in new], ends, model)])
        for i, prompt in enumerate(input_ids)
    ]


def _ends(eos_token_id: Any) -> list[int]:
    """The end tokens: of an int, Python's, numpy's or a tensor's, or of several."""
    if eos_token_id is None:
        return []
    several = isinstance(eos_token_id, Sequence)
    return [int(one) for one in eos_token_id] if several else torch.as_tensor(eos_token_id).long().flatten().tolist()


def _until_end(tokens: list[Tensor], ends: list[int], model: Any) -> Tensor:
    """A text's own new tokens: what follows its end token is padding."""
    if not tokens:
        return torch.zeros(0, dtype=torch.int64, device=_device(model))
    text = torch.stack(tokens)
    last = torch.isin(text, torch.tensor(ends, device=text.device)).nonzero() if ends else text[:0]
    return text[: int(last[0]) + 1] if len(last) else text


def _device(model: Any) -> torch.device:
    return model.backbone.embedding.weight.device


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not temperature > 0:
        raise ValueError(f"{_OP}: temperature is {temperature}; it must be positive (do_sample=False is greedy)")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"{_OP}: top_k is {top_k!r}; it must be a positive int or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{_OP}: top_p is {top_p}; it must be in (0, 1] or None")


def _prompts(model: Any, input_ids: Tensor | Sequence[Any], mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Prompts as (B, L) with a mask where their lengths differ."""
    if not isinstance(input_ids, Tensor):
        if mask is not None:
            raise ValueError(f"{_OP}: attention_mask came with a list of prompts; it belongs to a tensor of them")
        texts = [torch.as_tensor(one, dtype=torch.int64, device=_device(model)) for one in input_ids]
        if any(one.dim() != 1 for one in texts):
            raise ValueError(f"{_OP}: input_ids is a list and must hold one-dimensional prompts")
        if not texts:
            raise ValueError(f"{_OP}: input_ids is empty; it must hold at least one prompt")
        input_ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        lengths = torch.tensor([len(one) for one in texts], device=input_ids.device)
        mask = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
    check.rank(_OP, "input_ids", input_ids, 2, "(B, L)")
    if mask is not None:
        check.same_shape(_OP, "attention_mask", mask, "input_ids", input_ids)
    shortest = input_ids.shape[1] if mask is None else int((mask != 0).sum(1).min()) if mask.numel() else 0
    if shortest < 1 and input_ids.shape[0]:
        raise ValueError(f"{_OP}: a prompt is empty; every one must hold at least one token")
    return input_ids, mask

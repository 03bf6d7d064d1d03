"""Writing texts token by token."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trifuse.nn import generation

__all__ = ["GenerationMixin", "GenerationOutput", "InferenceParams", "decode", "sample"]


@dataclass
class InferenceParams:
    """What a model's layers remember while a text is read or written; ``trifuse.nn.InferenceParams`` with lengths."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@dataclass
class GenerationOutput:
    """``sequences`` ``(B, L)``, and the logits ``(B, V)`` of each new token, or None."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Draw a token from each row of ``(B, V)``.

    Args:
        top_k: from so many of the likeliest; 1 is the likeliest, 0 sets no limit.
        top_p: from the likeliest that together have this probability; 0 sets no limit.
        min_p: from those at least so probable as this part of the likeliest; 0 sets no limit.
        temperature: the logits are divided by it.
    """
    if top_k == 1:
        return logits.argmax(dim=-1)
    if not 0.0 <= top_p <= 1.0:
        raise ValueError(f"sample: top_p is {top_p}; it must be in [0, 1]")
    logits = logits.float() / temperature
    if 0.0 < min_p < 1.0:
        probability = logits.softmax(dim=-1)
        logits = logits.masked_fill(probability < min_p * probability.amax(dim=-1, keepdim=True), -torch.inf)
    return generation.sample(logits, top_k=top_k or None, top_p=top_p if 0.0 < top_p < 1.0 else None)


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Any = None,
) -> GenerationOutput:
    """Continue prompts of equal length up to ``max_length`` tokens.

    Args:
        input_ids: ``(B, L)``.
        model: called as ``MambaLMHeadModel`` is.
        top_k, top_p, min_p, temperature: see ``sample``.
        repetition_penalty: logits of tokens that occurred are divided by it (multiplied, if negative).
        eos_token_id: stop when every text has just got it.
        teacher_outputs: ``(B, L')``: take the tokens from here, as far as it goes.
        vocab_size: ignore logits beyond it.
        cg: accepted; there is no graph to capture on a CPU, and none is captured.
        enable_timing: print the time it took.
        output_scores: keep the logits.
        streamer: gets tokens by ``put``, then ``end``.
    """
    start = time.perf_counter()
    params = InferenceParams(max_seqlen=max_length, max_batch_size=input_ids.shape[0])
    texts, tokens, scores = input_ids, input_ids, []
    if streamer is not None:
        streamer.put(input_ids.cpu())
    while True:
        logits = model(tokens, position_ids=None, inference_params=params, num_last_tokens=1).logits[:, -1]
        logits = logits[:, :vocab_size]
        if output_scores:
            scores.append(logits.clone())
        params.seqlen_offset += tokens.shape[1]
        if repetition_penalty != 1.0:
            seen = logits.gather(1, texts)
            seen = torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty)
            logits = logits.scatter(1, texts, seen)
        if teacher_outputs is not None and params.seqlen_offset < teacher_outputs.shape[1]:
            tokens = teacher_outputs[:, params.seqlen_offset, None]
        else:
            tokens = sample(logits, top_k, top_p, min_p, temperature)[:, None]
        texts = torch.cat((texts, tokens), dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        if texts.shape[1] >= max_length or (eos_token_id is not None and bool((tokens == eos_token_id).all())):
            break
    if streamer is not None:
        streamer.end()
    if enable_timing:
        print(f"Prompt processing + decoding time: {1000 * (time.perf_counter() - start):.0f}ms")
    return GenerationOutput(texts, tuple(scores) if output_scores else None)


class GenerationMixin:
    """Gives a model ``generate``."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        raise NotImplementedError

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Tensor | GenerationOutput:
        """``decode``: the sequences ``(B, max_length)``, or all of its output."""
        output = decode(
            input_ids, self, max_length, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature,
            output_scores=output_scores, **kwargs,
        )  # fmt: skip
        return output if return_dict_in_generate else output.sequences

"""One of transformers' models in a process of its own, with or without trifuse: told what to do line by line.

``python -m trifuse.report.model_worker`` reads one JSON object a line and answers each with one. Whether trifuse
stands in is decided before transformers is imported, and cannot be undone by the other side: hence the process.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path

import torch

from trifuse.report import memory

__all__ = ["SHAPES", "VOCABULARY"]

VOCABULARY = 1024  # small, so that the blocks are what is measured and not the head
# The 130M models; how many layers is told. Initialized as published, with 0.02, where transformers' default is 0.1.
SHAPES = {
    "mamba": {"hidden_size": 768, "state_size": 16, "expand": 2, "conv_kernel": 4, "time_step_rank": 48},
    "mamba2": {"hidden_size": 768, "state_size": 128, "expand": 2, "conv_kernel": 4, "num_heads": 24, "head_dim": 64,
               "n_groups": 1, "chunk_size": 256},
}  # fmt: skip
_FALLBACK = ("fast path", "falling back", "fallback", "falls back", "slow implementation", "sequential implementation")


class Said(logging.Handler):
    """Keeps what libraries say about not using fast kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.take(record.getMessage())

    def take(self, text: str) -> None:
        if any(words in text.lower() for words in _FALLBACK):
            self.lines.append(text.splitlines()[0])


class Worker:
    def __init__(self) -> None:
        self.said = Said()
        self.models: dict[tuple, torch.nn.Module] = {}
        self.device = "cpu"

    def start(self, trifuse: bool, device: str) -> dict:
        os.environ["HF_HUB_OFFLINE"] = "1"
        self.device = device
        warnings.showwarning = lambda message, *rest, **named: self.said.take(str(message))
        for name in ("transformers", "trifuse"):
            logging.getLogger(name).addHandler(self.said)
        if trifuse:
            from trifuse import integrations

            integrations.install()
        import transformers

        return {"version": transformers.__version__}

    def load(self, model: str, layers: int) -> dict:
        import transformers

        name = {"mamba": "Mamba", "mamba2": "Mamba2"}[model]
        config = getattr(transformers, name + "Config")(
            **SHAPES[model], num_hidden_layers=layers, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=0,
            eos_token_id=None, initializer_range=0.02,
        )  # fmt: skip
        torch.manual_seed(0)
        built = getattr(transformers, name + "ForCausalLM")(config).to(self.device).eval()
        self.models = {(model, layers): built}
        return {"parameters": sum(one.numel() for one in built.parameters())}

    def run(self, do: str, model: str, layers: int, batch: int, length: int, tokens: int) -> dict:
        self.compute(do, model, layers, batch, length, tokens)
        return {}

    def peak(self, **what) -> dict:
        found, how = memory.peak_extra(lambda: self.compute(**what), self.device)
        return {"bytes": found, "method": how}

    def answer(self, path: str, **what) -> dict:
        """Save what the call computes, for the comparison of the two sides."""
        torch.save(self.compute(**what), path)
        return {"said": self.said.lines}

    def compute(self, do: str, model: str, layers: int, batch: int, length: int, tokens: int) -> dict:
        if (model, layers) not in self.models:
            self.load(model, layers)
        one = self.models[model, layers]
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1, VOCABULARY, (batch, length), generator=generator).to(self.device)
        out = getattr(self, f"_{do}")(one, ids, tokens)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return out

    def _forward(self, model, ids, tokens) -> dict:
        with torch.no_grad():
            return {"logits": model(ids, use_cache=False).logits}

    def _train(self, model, ids, tokens) -> dict:
        model.train()
        model.zero_grad(set_to_none=True)
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
        model.eval()
        gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        return {"logits": out.logits.detach(), "loss": out.loss.detach()} | gradients

    def _generate(self, model, ids, tokens) -> dict:
        settings = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "use_cache": True}
        with torch.no_grad():
            return {"tokens": model.generate(ids, attention_mask=torch.ones_like(ids), **settings)}


def main() -> None:
    # Whatever a library prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            found = getattr(worker, request.pop("ask"))(**request)
        except Exception as error:  # the other side decides what to do about it
            found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    # Run by path or module, `trifuse` is the installation's, never this folder.
    sys.path[:] = [one for one in sys.path if Path(one or ".").resolve() != Path(__file__).parent]
    main()

"""Arguments for lora_linear_multi, and the comparison every kernel has to pass (tests/tolerance.py)."""

from __future__ import annotations

import torch
from lora_linear_cases import eager_errors as errors_of
from tolerance import compare, incoming

import trifuse

FLOATS = ("x", "weight", "bias", "A", "B", "scales")
LISTS = ("A", "B")


def make(rows=24, columns=40, out=24, ranks=(3, 1, 17), dtype=torch.float32, adapter_dtype=None, bias=True, seed=0,
         lead=()):  # fmt: skip
    """Arguments of one call, in their dtypes, with rows of every adapter and of none. Lists are numbered names."""
    g = torch.Generator().manual_seed(seed)
    acc = torch.promote_types(dtype, torch.float32)
    adapter = adapter_dtype or acc

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tensors = {"x": randn(*lead, rows, columns).to(dtype), "weight": (randn(out, columns) / columns**0.5).to(dtype)}
    if bias:
        tensors["bias"] = randn(out).to(dtype)
    for i, rank in enumerate(ranks):
        tensors[f"A{i}"] = (randn(rank, columns) / columns**0.5).to(adapter)
        tensors[f"B{i}"] = randn(out, rank).to(adapter)
    tensors["scales"] = (0.5 + torch.rand(len(ranks), max(ranks), generator=g, dtype=torch.float64)).to(acc)
    tensors["index"] = torch.randint(-1, len(ranks), (*lead, rows), generator=g)
    return tensors


def run(backend, tensors, exact=False, device="cpu", needs=FLOATS):
    """y and the gradients of `needs`, as named results; in double precision if `exact`."""

    def ready(name, value):
        if name == "index":
            return value.to(device)
        value = (value.double() if exact else value).to(device).detach()
        return value.requires_grad_(name.rstrip("0123456789") in needs)

    args = {name: ready(name, value) for name, value in tensors.items()}
    n = tensors["scales"].shape[0]
    lists = [[args[f"{name}{i}"] for i in range(n)] for name in LISTS]
    with trifuse.backend(backend):
        y = trifuse.lora_linear_multi(
            args["x"], args["weight"], args.get("bias"), *lists, args["scales"], args["index"]
        )
        results = {"y": y}
        wanted = {name: x for name, x in args.items() if x.requires_grad}
        if wanted:
            g = torch.Generator().manual_seed(99)
            gradient = incoming(y.shape, g).to(y.dtype).to(device)
            found = torch.autograd.grad(y, list(wanted.values()), gradient, allow_unused=True, materialize_grads=True)
            results |= {f"d{name}": grad for name, grad in zip(wanted, found, strict=True)}
    return {name: result.detach().cpu() for name, result in results.items()}


def check(backend, tensors, device="cpu", **options):
    """Assert the rule for everything that `backend` returns."""
    exact = run("reference", tensors, exact=True, **options)
    kernel = run(backend, tensors, device=device, **options)
    assert kernel["y"].dtype == tensors["x"].dtype
    for name, value in kernel.items():
        if name != "y":
            assert value.dtype == tensors[name[1:]].dtype, name
    compare(kernel, exact, errors_of(tensors, run=run, **options))

"""Arguments for lora_linear, and the comparison every kernel has to pass (tests/tolerance.py)."""

from __future__ import annotations

import torch
from tolerance import compare, error, incoming

import trifuse

FLOATS = ("x", "weight", "bias", "lora_A", "lora_B", "scale")


def make(rows=37, columns=40, out=24, rank=4, dtype=torch.float32, adapter_dtype=None, bias=True, vector=False, seed=0,
         lead=()):  # fmt: skip
    """Arguments of one call, in their dtypes. vector: a scale for each rank; lead: more axes before the rows."""
    g = torch.Generator().manual_seed(seed)
    acc = torch.promote_types(dtype, torch.float32)
    adapter = adapter_dtype or acc

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tensors = {
        "x": randn(*lead, rows, columns).to(dtype),
        "weight": (randn(out, columns) / max(columns, 1) ** 0.5).to(dtype),
        "lora_A": (randn(rank, columns) / max(columns, 1) ** 0.5).to(adapter),
        "lora_B": randn(out, rank).to(adapter),
        "scale": (0.5 + torch.rand(rank, generator=g, dtype=torch.float64)).to(acc) if vector else 0.75,
    }
    if bias:
        tensors["bias"] = randn(out).to(dtype)
    return tensors


def run(backend, tensors, exact=False, device="cpu", needs=FLOATS, **options):
    """y and the gradients of `needs`, as named results; in double precision if `exact`."""

    def ready(name, value):
        if not isinstance(value, torch.Tensor):
            return value
        value = (value.double() if exact else value).to(device).detach()
        return value.requires_grad_(name in needs)

    args = {"bias": None} | {name: ready(name, value) for name, value in tensors.items()}
    with trifuse.backend(backend):
        y = trifuse.lora_linear(**args, **options)
        results = {"y": y}
        wanted = {name: x for name, x in args.items() if isinstance(x, torch.Tensor) and x.requires_grad}
        if wanted:
            g = torch.Generator().manual_seed(99)
            found = torch.autograd.grad(y, list(wanted.values()), incoming(y.shape, g).to(y.dtype).to(device))
            results |= {f"d{name}": grad for name, grad in zip(wanted, found, strict=True)}
    return {name: result.detach().cpu() for name, result in results.items()}


def eager_errors(tensors, run=run, **options):
    """The error of eager PyTorch: the largest of a few draws of nearby inputs, since the error of one draw of a
    few numbers is a lottery."""
    g = torch.Generator().manual_seed(7)
    worst: dict[str, float] = {}
    for spread in (0.0, *[0.02] * 7):
        near = dict(tensors)
        for name, x in tensors.items():
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                near[name] = (x.double() * (1 + spread * torch.randn(x.shape, generator=g))).to(x.dtype)
        exact, eager = run("reference", near, exact=True, **options), run("reference", near, **options)
        worst = {name: max(error(eager[name], exact[name]), worst.get(name, 0.0)) for name in eager}
    return worst


def check(backend, tensors, device="cpu", **options):
    """Assert the rule for everything that `backend` returns."""
    exact = run("reference", tensors, exact=True, **options)
    kernel = run(backend, tensors, device=device, **options)
    assert kernel["y"].dtype == tensors["x"].dtype
    for name, value in kernel.items():
        if name != "y":
            assert value.dtype == tensors[name[1:]].dtype, name
    compare(kernel, exact, eager_errors(tensors, **options))

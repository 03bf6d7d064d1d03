"""Arguments for dora_linear, and the comparison every kernel has to pass (tests/tolerance.py)."""

from __future__ import annotations

import lora_linear_cases as lora
import torch
import torch.nn.functional as F
from tolerance import compare, in_double, incoming

import trifuse

FLOATS = (*lora.FLOATS, "magnitude")


def make(rows=37, out=24, dtype=torch.float32, seed=0, magnitude_dtype=None, **options):
    """Arguments of one call, in their dtypes; the magnitude is not the norm of the start, but near it."""
    tensors = lora.make(rows, out=out, dtype=dtype, seed=seed, **options)
    g = torch.Generator().manual_seed(seed + 1)
    magnitude = 1 + torch.rand(out, generator=g, dtype=torch.float64)
    return tensors | {"magnitude": magnitude.to(magnitude_dtype or torch.promote_types(dtype, torch.float32))}


def run(backend, tensors, exact=False, device="cpu", needs=FLOATS, function=trifuse.dora_linear, **options):
    """The result of `function` as y and the gradients of `needs`, by name; in double precision if `exact`."""

    def ready(name, value):
        if not isinstance(value, torch.Tensor):
            return value
        return (value.double() if exact else value).to(device).detach().requires_grad_(name in needs)

    args = {name: ready(name, value) for name, value in tensors.items()}
    if function is trifuse.dora_linear:
        args = {"bias": None} | args
    with trifuse.backend(backend):
        y = function(**args, **options)
        results = {"y": y}
        wanted = {name: x for name, x in args.items() if isinstance(x, torch.Tensor) and x.requires_grad}
        if wanted:
            gradient = incoming(y.shape, torch.Generator().manual_seed(99)).to(y.dtype).to(device)
            found = torch.autograd.grad(y, list(wanted.values()), gradient)
            results |= {f"d{name}": grad for name, grad in zip(wanted, found, strict=True)}
    return {name: result.detach().cpu() for name, result in results.items()}


def layer_by_layer(x, weight, lora_A, lora_B, magnitude, scale, bias=None, dropout=0.0, seed=None, detach_norm=True):
    """dora_linear as it is written without a kernel: the products in the dtype of x, where the adapter is added too."""
    acc = lora_A.dtype
    norm = (weight.to(acc) + (lora_B * scale).to(acc) @ lora_A).norm(dim=1)
    factors = magnitude / (norm.detach() if detach_norm else norm)
    seen = x.to(acc)
    if dropout:
        kept = trifuse.reference.lora_dropout_mask(seed, x.numel() // max(x.shape[-1], 1), x.shape[-1], dropout)
        seen = seen * kept.view(x.shape) / (1 - dropout)
    update = F.linear((F.linear(seen, lora_A) * scale).to(acc), lora_B)
    y = (F.linear(x, weight) + update.to(x.dtype)) * factors
    return (y if bias is None else y + bias).to(x.dtype)


def eager_errors(tensors, **options):
    """The errors of the reference, which computes in float32. Those of PyTorch's own layers in half precision where a
    gradient comes through the magnitudes: what they scale is a layer's output, rounded."""
    worst = lora.eager_errors(tensors, run=run, **options)
    if tensors["weight"].dtype == torch.float32 or "magnitude" not in tensors:
        return worst
    through = ["dmagnitude"] if options.get("detach_norm", True) else ["dmagnitude", "dlora_A", "dlora_B", "dscale"]

    def rounded(backend, tensors, exact=False, **options):
        return run(backend, tensors, exact, function=trifuse.dora_linear if exact else layer_by_layer, **options)

    layers = lora.eager_errors(tensors, run=rounded, **options)
    return worst | {name: layers[name] for name in through if name in layers}


def check(backend, tensors, device="cpu", **options):
    """Assert the rule for everything that `backend` returns."""
    exact = run("reference", tensors, exact=True, **options)
    kernel = run(backend, tensors, device=device, **options)
    for name, value in kernel.items():
        if name != "y":
            assert value.dtype == tensors[name[1:]].dtype, name
    if tensors["weight"].dtype == torch.float64:
        single = {name: x.float() if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}
        return compare(kernel, exact, in_double(lora.eager_errors(single, run=run, **options)))
    compare(kernel, exact, eager_errors(tensors, **options))

"""Arguments for nested_linear, and the comparison that its products have to pass (tests/tolerance.py)."""

from __future__ import annotations

import torch
from tolerance import compare, error, incoming

import trifuse

FLOATS = ("x", "weight", "bias")


def make(rows=(5, 7), inner=40, outer=11, widths=(1, 2, 8, 17, 40), dtype=torch.float32, bias=True, seed=0):
    """Arguments of one call, in their dtypes."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tensors = {"x": normal(*rows, inner).to(dtype), "weight": (normal(outer, inner) * max(inner, 1) ** -0.5).to(dtype)}
    if bias:
        tensors["bias"] = normal(outer).to(dtype)
    return tensors | {"widths": list(widths)}


def run(backend, arguments, exact=False, needs=FLOATS, device="cpu"):
    """The logits and the gradients asked for, as named results; in double precision if `exact`."""
    args = {"bias": None, "widths": arguments["widths"]}
    for name in FLOATS:
        if name in arguments:
            tensor = arguments[name].double() if exact else arguments[name]
            args[name] = tensor.to(device).detach().requires_grad_(name in needs)
    with trifuse.backend(backend):
        logits = trifuse.nested_linear(**args)
    results = {"logits": logits}
    wanted = {name: args[name] for name in needs if name in arguments}
    if wanted:
        gradient = incoming(logits.shape, torch.Generator().manual_seed(99)).to(logits.dtype).to(logits.device)
        found = torch.autograd.grad(logits, list(wanted.values()), gradient)
        results |= {f"d{name}": grad for name, grad in zip(wanted, found, strict=True)}
    return {name: result.detach().cpu() for name, result in results.items()}


def eager_errors(arguments, **options):
    """The error of eager PyTorch: the largest of a few draws of nearby inputs."""
    g = torch.Generator().manual_seed(7)
    worst: dict[str, float] = {}
    for scale in (0.0, 0.02, 0.02):
        near = dict(arguments)
        for name in FLOATS:
            if name in near:
                x = near[name]
                near[name] = (x.double() * (1 + scale * torch.randn(x.shape, generator=g))).to(x.dtype)
        exact, eager = run("reference", near, exact=True, **options), run("reference", near, **options)
        worst = {name: max(error(eager[name], exact[name]), worst.get(name, 0.0)) for name in eager}
    return worst


def check(arguments, device="cpu", **options):
    """Assert the rule for the logits and all gradients."""
    exact = run("reference", arguments, exact=True, **options)
    found = run("torch", arguments, device=device, **options)
    assert all(value.dtype == arguments["x"].dtype for value in found.values())
    if arguments["x"].dtype == torch.float64:  # the reference is its equal, not its judge
        for name, value in found.items():
            largest = exact[name].abs().max().item() if value.numel() else 0.0
            assert value.shape == exact[name].shape and error(value, exact[name]) <= 1e-13 * largest, name
        return
    compare(found, exact, eager_errors(arguments, **options))

"""Arguments for gaussian_gate, and the comparison every kernel has to pass (tests/tolerance.py)."""

from __future__ import annotations

import torch
from tolerance import compare, error, incoming

import trifuse

KINDS = ("feature", "context", "density")
TENSORS = ("x", "mean_offset", "width", "alpha")


def make(kind, shape=(3, 20, 37), dim=1, feature_dim=None, heads=1, gaussians=3, dtype=torch.float32, seed=0, mask=None,
         away=0.0, parameters=torch.float32, **options):  # fmt: skip
    """Arguments of one call in their dtypes. `mask`: the share of entries that take part."""
    g = torch.Generator().manual_seed(seed)
    parameters = torch.promote_types(dtype, torch.float32) if parameters is None else parameters

    def rand(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def widths(*shape):
        return (0.5 + 2 * torch.rand(shape, generator=g, dtype=torch.float64)).to(parameters)

    x = rand(*shape) * (0.5 + 2 * torch.rand(shape[:1] + (1,) * (len(shape) - 1), generator=g, dtype=torch.float64))
    made = {"x": (x + away).to(dtype), "kind": kind, "dim": dim} | options
    if kind == "feature":
        feature_dim = -1 if feature_dim is None else feature_dim
        features = shape[feature_dim]
        made |= {"mean_offset": (0.3 * rand(features)).to(parameters), "width": widths(features)}
        made["feature_dim"] = feature_dim
    elif kind == "context":
        made["width"] = widths()
    else:
        made |= {"mean_offset": (0.3 * rand(heads, gaussians)).to(parameters), "width": widths(heads, gaussians)}
        made |= {"alpha": widths(heads), "num_heads": heads}
    if mask is not None:
        made["mask"] = torch.rand(shape, generator=g) < mask
    return made


def run(backend, call, exact=False, grads=True, device="cpu", function=None):
    """The output and all gradients, as named results; in double precision if `exact`."""
    call = {name: value.to(device) if torch.is_tensor(value) else value for name, value in call.items()}
    args = {
        name: (call[name].double() if exact else call[name]).detach().requires_grad_(grads)
        for name in TENSORS
        if torch.is_tensor(call.get(name))
    }
    with trifuse.backend(backend):
        out = (function or trifuse.gaussian_gate)(**(call | args))
    results = {"out": out}
    if grads:
        dout = incoming(out.shape, torch.Generator().manual_seed(99)).to(out.dtype).to(device)
        found = torch.autograd.grad(out, list(args.values()), dout, allow_unused=True, materialize_grads=True)
        results |= {f"d{name}": grad for name, grad in zip(args, found, strict=True)}
    return {name: result.detach().cpu() for name, result in results.items()}


def eager_errors(call):
    """The error of eager PyTorch: the largest of a few draws of nearby inputs, since the error of one draw of a
    few numbers is a lottery."""
    g = torch.Generator().manual_seed(7)
    worst: dict[str, float] = {}
    for scale in (0.0, 0.02, 0.02, 0.02, 0.02):
        near = dict(call)
        for name in TENSORS:
            if torch.is_tensor(call.get(name)):
                noise = 1 + scale * torch.randn(call[name].shape, generator=g, dtype=torch.float64)
                near[name] = (call[name].double() * noise).to(call[name].dtype)
        exact, eager = run("reference", near, exact=True), run("reference", near)
        worst = {name: max(error(eager[name], exact[name]), worst.get(name, 0.0)) for name in eager}
    return worst


def check(backend, call, device="cpu", function=None):
    """Assert the rule for everything that `backend` returns."""
    exact = run("reference", call, exact=True)
    kernel = run(backend, call, device=device, function=function)
    assert kernel["out"].dtype == call["x"].dtype
    if call["x"].dtype == torch.float64:  # the reference is the kernel's equal, not its judge
        for name, value in kernel.items():
            largest = exact[name].abs().max().item() if value.numel() else 0.0
            assert value.shape == exact[name].shape and error(value, exact[name]) <= 1e-12 * max(largest, 1e-3), name
        return
    compare(kernel, exact, eager_errors(call))

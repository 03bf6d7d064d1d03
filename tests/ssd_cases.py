"""Arguments for ssd, and the comparison every kernel of it has to pass (the rule is in tolerance.py)."""

from __future__ import annotations

import torch
from tolerance import compare, error, incoming

import trifuse

SEQUENCES = ("x", "B", "C", "z")


def make(
    batch=2, seqlen=37, heads=4, headdim=8, groups=1, dstate=16, dtype=torch.float32, seed=0, skip="H", gate=False,
    bias=True, initial=True, rows=None, wide_dt=False,
):  # fmt: skip
    """Arguments of one call in float64, holding values that `dtype` (or float32, for weights) can hold."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape, weight=False):
        values = torch.randn(shape, generator=g, dtype=torch.float64)
        narrow = torch.promote_types(dtype, torch.float32) if weight else dtype
        return values.to(narrow).double()

    return {
        "x": rand(batch, seqlen, heads, headdim),
        "dt": rand(batch, seqlen, heads, weight=wide_dt),
        "A": -(0.2 + rand(heads, weight=True).abs()),
        "B": rand(batch, seqlen, groups, dstate),
        "C": rand(batch, seqlen, groups, dstate),
        "D": {"": None, "H": rand(heads, weight=True), "HP": rand(heads, headdim, weight=True)}[skip],
        "z": rand(batch, seqlen, heads, headdim) if gate else None,
        "dt_bias": rand(heads, weight=True) if bias else None,
        "initial_states": rand(rows or batch, heads, headdim, dstate, weight=True) if initial else None,
    }


def cast(name, tensor, dtype, wide_dt=False):
    """Sequences in `dtype`, weights and states in at least float32. Strides survive."""
    narrow = name in SEQUENCES or (name == "dt" and not wide_dt)
    return tensor.to(dtype if narrow else torch.promote_types(dtype, torch.float32))


def run(backend, tensors, dtype, grads=True, final_grad=True, device="cpu", wide_dt=False, **options):
    """out, final_states and all gradients, as named results."""
    args = {
        name: cast(name, value, dtype, wide_dt).to(device).detach().requires_grad_(grads)
        for name, value in tensors.items() if value is not None
    }  # fmt: skip
    options = {name: one.to(device) if torch.is_tensor(one) else one for name, one in options.items()}
    with trifuse.backend(backend):
        out, final = trifuse.ssd(**args, return_final_states=True, **options)
    results = {"out": out, "final_states": final}
    if grads:
        g = torch.Generator().manual_seed(99)
        outs = [one for one in (out, final)[: 1 + final_grad] if one.requires_grad]  # zeros after no steps do not
        douts = [incoming(one.shape, g).to(one.dtype).to(device) for one in outs]
        found = torch.autograd.grad(outs, list(args.values()), douts, allow_unused=True, materialize_grads=True)
        results |= {f"d{name}": grad for name, grad in zip(args, found, strict=True)}
    return {name: result.detach().cpu() for name, result in results.items()}


def eager_errors(tensors, dtype, wide_dt=False, **options):
    """The error of eager PyTorch in `dtype`: the largest of a few draws of nearby inputs."""
    g = torch.Generator().manual_seed(7)
    worst: dict[str, float] = {}
    for scale in (0.0, 0.02, 0.02):
        near = {}
        for name, tensor in tensors.items():
            if tensor is not None:
                tensor = tensor * (1 + scale * torch.randn(tensor.shape, generator=g, dtype=torch.float64))
                tensor = cast(name, tensor, dtype, wide_dt).double()
            near[name] = tensor
        exact = run("reference", near, torch.float64, **options)
        eager = run("reference", near, dtype, wide_dt=wide_dt, **options)
        worst = {name: max(error(eager[name], exact[name]), worst.get(name, 0.0)) for name in eager}
    return worst


def check(backend, tensors, dtype=torch.float32, device="cpu", wide_dt=False, chunk_size=None, **options):
    """Assert the rule for everything that `backend` returns."""
    exact = run("reference", tensors, torch.float64, **options)
    eager = eager_errors(tensors, dtype, wide_dt, **options)
    kernel = run(backend, tensors, dtype, device=device, wide_dt=wide_dt, chunk_size=chunk_size, **options)
    assert kernel["out"].dtype == dtype
    compare(kernel, exact, eager)

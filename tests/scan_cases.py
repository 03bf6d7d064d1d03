"""Arguments for selective_scan, and the comparison every kernel has to pass.

With the float64 reference as the truth: error(kernel) <= 2 error(eager PyTorch in the same dtype) + a few
ulp, for the output, the last state and the gradient of every argument.
"""

from __future__ import annotations

import torch
from tolerance import compare, error, incoming

import trifuse

SEQUENCES = ("u", "delta", "B", "C", "z")


def make(
    batch=2, dim=20, seqlen=37, dstate=16, groups=(1, 1), constant="", layout="bdl", dtype=torch.float32, seed=0,
    skip=True, gate=True, bias=True, initial=True, cu_seqlens=None, complex_A=False,
):  # fmt: skip
    """Arguments of one call in float64, holding values that `dtype` (or float32, for weights) can hold."""
    g = torch.Generator().manual_seed(seed)
    batch = 1 if cu_seqlens is not None else batch

    def rand(*shape, weight=False, complex=False):
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        if weight or complex:
            x = x if dtype == torch.float64 else x.to(torch.float32).double()
        else:
            x = x.to(dtype).double()
        return torch.complex(x, rand(*shape, weight=True)) if complex else x

    def sequence(*channels, complex=False):
        shape = (batch, seqlen, *channels) if layout == "bld" else (batch, *channels, seqlen)
        return rand(*shape, complex=complex)

    def coef(name, count):
        if name in constant:
            return rand(dim, dstate, weight=True, complex=complex_A)
        return sequence(count, dstate, complex=complex_A)

    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    A = -(0.2 + rand(dim, dstate, weight=True).abs())
    return {
        "u": sequence(dim),
        "delta": sequence(dim),
        "A": torch.complex(A, rand(dim, dstate, weight=True)) if complex_A else A,
        "B": coef("B", groups[0]),
        "C": coef("C", groups[1]),
        "D": rand(dim, weight=True) if skip else None,
        "z": sequence(dim) if gate else None,
        "delta_bias": rand(dim, weight=True) if bias else None,
        "initial_state": rand(rows, dim, dstate, weight=True, complex=complex_A) if initial else None,
    }


def cast(name, tensor, dtype):
    """Sequences in `dtype`, weights and states in at least float32. Strides survive."""
    weights = torch.promote_types(dtype, torch.float32)
    if tensor.is_complex():
        return tensor.to(torch.complex128 if weights == torch.float64 else torch.complex64)
    return tensor.to(dtype if name in SEQUENCES and tensor.dim() > 2 else weights)


def output_gradients(out, last):
    g = torch.Generator().manual_seed(99)
    return [incoming(x.shape, g).to(x.dtype).to(x.device) for x in (out, last)]


def run(backend, tensors, dtype, grads=True, last_grad=True, device="cpu", **options):
    """out, last_state and all gradients, as named results."""
    args = {k: cast(k, v, dtype).to(device).detach().requires_grad_(grads) for k, v in tensors.items() if v is not None}
    if torch.is_tensor(options.get("cu_seqlens")):
        options["cu_seqlens"] = options["cu_seqlens"].to(device)
    with trifuse.backend(backend):
        out, last = trifuse.selective_scan(**args, return_last_state=True, **options)
    results = {"out": out, "last_state": last}
    if grads:
        g = torch.Generator().manual_seed(99)
        outs = [x for x in (out, last)[: 1 + last_grad] if x.requires_grad]  # zeros after no steps do not
        douts = [incoming(x.shape, g).to(x.dtype).to(device) for x in outs]
        found = torch.autograd.grad(outs, list(args.values()), douts, allow_unused=True, materialize_grads=True)
        results |= {f"d{name}": grad for name, grad in zip(args, found, strict=True)}
    return {name: result.detach().cpu() for name, result in results.items()}


def eager_errors(tensors, dtype, **options):
    """The error of eager PyTorch in `dtype`: the largest of a few draws of nearby inputs, since the error of
    one draw of a few numbers is a lottery."""
    g = torch.Generator().manual_seed(7)
    worst: dict[str, float] = {}
    for scale in (0.0, 0.02, 0.02):
        near = {}
        for name, tensor in tensors.items():
            if tensor is not None:
                tensor = tensor * (1 + scale * torch.randn(tensor.shape, generator=g, dtype=torch.float64))
                tensor = cast(name, tensor, dtype).to(tensor.dtype)
            near[name] = tensor
        exact = run("reference", near, torch.float64, **options)
        eager = run("reference", near, dtype, **options)
        worst = {name: max(error(eager[name], exact[name]), worst.get(name, 0.0)) for name in eager}
    return worst


def check(backend, tensors, dtype=torch.float32, device="cpu", **options):
    """Assert the rule for everything that `backend` returns."""
    exact = run("reference", tensors, torch.float64, **options)
    eager = eager_errors(tensors, dtype, **options)
    kernel = run(backend, tensors, dtype, device=device, **options)
    assert kernel["out"].dtype == dtype
    compare(kernel, exact, eager)

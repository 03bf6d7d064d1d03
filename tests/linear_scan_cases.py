"""Arguments for linear_scan, and the comparison every kernel has to pass (tests/tolerance.py)."""

from __future__ import annotations

import torch
from tolerance import compare, error, incoming

import trifuse

WIDE = {True: torch.complex128, False: torch.float64}
COMPLEX = (torch.complex64, torch.complex128)


def wide(x):
    return x.to(WIDE[x.is_complex()])


def make(batch=2, dim=20, seqlen=37, layout="bdl", dtype=torch.float32, real_a=False, seed=0, initial=True,
         cu_seqlens=None, size=1.0):  # fmt: skip
    """Arguments of one call, in their dtypes. Factors of about `size`, so that states neither vanish nor explode."""
    g = torch.Generator().manual_seed(seed)
    batch = 1 if cu_seqlens is not None else batch
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    shape = (batch, seqlen, dim) if layout == "bld" else (batch, dim, seqlen)
    acc = torch.promote_types(dtype, torch.float32)

    def rand(shape, dtype):
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        return (torch.complex(x, torch.randn(shape, generator=g, dtype=torch.float64)) if dtype in COMPLEX else x).to(
            dtype
        )

    a_dtype = {torch.complex64: torch.float32, torch.complex128: torch.float64}[dtype] if real_a else dtype
    a = rand(shape, torch.complex128 if a_dtype in COMPLEX else torch.float64)
    a = a / a.abs().clamp(min=1e-3) * (size * (0.9 + 0.2 * torch.rand(shape, generator=g, dtype=torch.float64)))
    return {
        "a": a.to(a_dtype),
        "b": rand(shape, dtype),
        "initial_state": rand((rows, dim), acc) if initial else None,
    }


def output_gradients(outs):
    g = torch.Generator().manual_seed(99)

    def rand(x):
        real, imaginary = (incoming(x.shape, g).double() for _ in range(2))
        return (torch.complex(real, imaginary) if x.is_complex() else real).to(x.dtype).to(x.device)

    return [rand(x) for x in outs]


def run(backend, tensors, exact=False, grads=True, last_grad=True, device="cpu", function=None, **options):
    """h, last_state and all gradients, as named results; in double precision if `exact`."""
    args = {
        name: (wide(tensor) if exact else tensor).to(device).detach().requires_grad_(grads)
        for name, tensor in tensors.items()
        if tensor is not None
    }
    if torch.is_tensor(options.get("cu_seqlens")):
        options["cu_seqlens"] = options["cu_seqlens"].to(device)
    with trifuse.backend(backend):
        h, last = (function or trifuse.linear_scan)(**args, return_last_state=True, **options)
    results = {"h": h, "last_state": last}
    if grads:
        outs = [x for x in (h, last)[: 1 + last_grad] if x.requires_grad]  # zeros after no steps do not
        found = torch.autograd.grad(
            outs, list(args.values()), output_gradients(outs), allow_unused=True, materialize_grads=True
        )
        results |= {f"d{name}": grad for name, grad in zip(args, found, strict=True)}
    return {name: result.detach().cpu() for name, result in results.items()}


def eager_errors(tensors, **options):
    """The error of eager PyTorch: the largest of a few draws of nearby inputs, since the error of one draw of a
    few numbers is a lottery."""
    g = torch.Generator().manual_seed(7)
    worst: dict[str, float] = {}
    for scale in (0.0, 0.02, 0.02):
        near = {
            name: None if x is None else (wide(x) * (1 + scale * torch.randn(x.shape, generator=g))).to(x.dtype)
            for name, x in tensors.items()
        }
        exact, eager = run("reference", near, exact=True, **options), run("reference", near, **options)
        worst = {name: max(error(eager[name], exact[name]), worst.get(name, 0.0)) for name in eager}
    return worst


def check(backend, tensors, device="cpu", function=None, **options):
    """Assert the rule for everything that `backend` returns."""
    exact = run("reference", tensors, exact=True, **options)
    kernel = run(backend, tensors, device=device, function=function, **options)
    assert kernel["h"].dtype == tensors["b"].dtype
    if tensors["b"].dtype in (torch.float64, torch.complex128):  # the reference is the kernel's equal, not its judge
        for name, value in kernel.items():
            largest = exact[name].abs().max().item() if value.numel() else 0.0
            assert value.shape == exact[name].shape and error(value, exact[name]) <= 1e-13 * largest, name
        return
    compare(kernel, exact, eager_errors(tensors, **options))

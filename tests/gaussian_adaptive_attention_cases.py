"""Arguments for gaussian_adaptive_attention, and the comparison every kernel has to pass (tests/tolerance.py)."""

from __future__ import annotations

import torch
from tolerance import compare, error, incoming

import trifuse

PARAMETERS = ("mean_offset", "width")


def make(shape=(3, 37), dtype=torch.float32, heads=1, gaussians=3, seed=0, offset=0.0, spread=1.0, least=0.6,
         keep=None, padding=None):  # fmt: skip
    """Tensors of one call. `keep`: the share of entries that a mask lets take part; `padding`: a value that every
    fourth entry has."""
    g = torch.Generator().manual_seed(seed)

    def rand(*size):
        return torch.randn(size, generator=g, dtype=torch.float64)

    acc = torch.promote_types(dtype, torch.float32)
    x = (offset + spread * rand(*shape)).to(dtype)
    if padding is not None:
        x[torch.rand(shape, generator=g) < 0.25] = padding
    signs = 1 - 2 * (torch.rand((heads, gaussians), generator=g) < 0.3).double()
    return {
        "x": x,
        "mean_offset": (0.5 * spread * rand(heads, gaussians)).to(acc),
        "width": (signs * (least + torch.rand((heads, gaussians), generator=g).double())).to(acc),
        "mask": None if keep is None else torch.rand(shape, generator=g) < keep,
    }


def run(backend, tensors, exact=False, grads=True, device="cpu", function=None, dout=True, **options):
    """Outputs and gradients by name; in float64 if `exact`. dout=False: only the weights have a gradient."""
    args = {
        name: value if name == "mask" or value is None else value.double() if exact else value
        for name, value in tensors.items()
    }
    args = {name: None if value is None else value.to(device) for name, value in args.items()}
    args |= {name: args[name].detach().requires_grad_(grads) for name in ("x", *PARAMETERS)}
    with trifuse.backend(backend):
        found = (function or trifuse.gaussian_adaptive_attention)(**args, **options)
    outs = found if isinstance(found, tuple) else (found,)
    results = dict(zip(("out", "weights"), outs, strict=False))
    if grads:
        g = torch.Generator().manual_seed(99)
        incomings = [incoming(out.shape, g).to(out.dtype).to(device) for out in outs]
        first = 0 if dout else 1
        wanted = [args[name] for name in ("x", *PARAMETERS)]
        gradients = torch.autograd.grad(outs[first:], wanted, incomings[first:])
        results |= dict(zip(("dx", "dmean_offset", "dwidth"), gradients, strict=True))
    return {name: result.detach().cpu() for name, result in results.items()}


def near(tensors, scale, g):
    """Nearby tensors; what is padding stays it."""
    x = tensors["x"]
    moved = (x.double() * (1 + scale * torch.randn(x.shape, generator=g))).to(x.dtype)
    rest = {
        name: (tensors[name].double() * (1 + scale * torch.randn(tensors[name].shape, generator=g))).to(
            tensors[name].dtype
        )
        for name in PARAMETERS
    }
    return {**tensors, **rest, "x": moved}


def eager_errors(tensors, **options):
    """The error of eager PyTorch: the largest of a few draws of nearby inputs, since the error of one draw of a few
    numbers is a lottery; of more draws where the gradients of parameters are sums over few slices, and so the more
    of a lottery."""
    g = torch.Generator().manual_seed(7)
    worst: dict[str, float] = {}
    padding = options.get("padding_value")
    draws = 3 if tensors["x"].numel() > 4096 else 8
    for scale in (0.0, *[0.01] * (draws - 1)):
        moved = near(tensors, scale, g)
        if padding is not None:
            moved["x"] = torch.where(tensors["x"] == padding, tensors["x"], moved["x"])
        exact, eager = run("reference", moved, exact=True, **options), run("reference", moved, **options)
        worst = {name: max(error(eager[name], exact[name]), worst.get(name, 0.0)) for name in eager}
    return worst


def check(backend, tensors, device="cpu", function=None, **options):
    """Assert the rule for everything that `backend` returns."""
    kernel = run(backend, tensors, device=device, function=function, **options)
    against_the_reference(kernel, tensors, **options)
    return kernel


def against_the_reference(kernel, tensors, **options):
    exact = run("reference", tensors, exact=True, **options)
    for name, value in kernel.items():
        assert value.dtype == tensors[name.removeprefix("d") if name[1:] in PARAMETERS else "x"].dtype, name
    if tensors["x"].dtype == torch.float64:  # the reference is the kernel's equal, not its judge
        for name, value in kernel.items():
            largest = exact[name].abs().max().item() if value.numel() else 0.0
            assert value.shape == exact[name].shape and error(value, exact[name]) <= 1e-12 * largest, name
        return
    compare(kernel, exact, eager_errors(tensors, **options))

"""Arguments for gmm_attention_step, and the comparison every kernel has to pass (tests/tolerance.py)."""

from __future__ import annotations

import torch
from tolerance import compare, error, incoming

import trifuse

OUTPUTS = ("context", "mean_new", "alignment")
FLOATS = ("values", "weight", "delta", "sigma", "mean")


def make(batch=2, length=37, width=20, components=3, dtype=torch.float32, mixture_dtype=None, seed=0, masked=False,
         spread=4.0, reach=0.7):  # fmt: skip
    """Arguments of one call, in their dtypes: means over `reach` of the sequence, widths of about `spread`."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(shape, generator=g, dtype=torch.float64)

    mixture = mixture_dtype or torch.promote_types(dtype, torch.float32)
    shape = (batch, components)
    tensors = {
        "values": torch.randn(batch, length, width, generator=g, dtype=torch.float64).to(dtype),
        "weight": (rand(*shape) + 0.1).to(mixture),
        "delta": (4 * rand(*shape) - 2).to(mixture),
        "sigma": (spread * (0.25 + 1.5 * rand(*shape))).to(mixture),
        "mean": (reach * length * rand(*shape)).to(mixture),
    }
    if masked:
        tensors["key_padding_mask"] = rand(batch, length) < 0.3
    return tensors


def output_gradients(outs):
    g = torch.Generator().manual_seed(99)
    return [incoming(x.shape, g).to(x.dtype).to(x.device) for x in outs]


def run(backend, tensors, exact=False, grads=OUTPUTS, device="cpu", function=None):
    """The outputs and all gradients, as named results; in double precision if `exact`. `grads`: the outputs that a
    gradient comes in for."""

    def ready(tensor):
        if tensor.dtype == torch.bool:
            return tensor.to(device)
        return (tensor.double() if exact else tensor).to(device).detach().requires_grad_(bool(grads))

    args = {name: ready(tensor) for name, tensor in tensors.items()}
    with trifuse.backend(backend):
        outs = (function or trifuse.gmm_attention_step)(**args, return_alignment=True)
    results = dict(zip(OUTPUTS, outs, strict=True))
    if grads:
        wanted = {name: tensor for name, tensor in args.items() if tensor.requires_grad}
        gradients = dict(zip(OUTPUTS, output_gradients(outs), strict=True))
        found = torch.autograd.grad(
            [results[name] for name in grads], list(wanted.values()), [gradients[name] for name in grads],
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        results |= {f"d{name}": grad for name, grad in zip(wanted, found, strict=True)}
    return {name: result.detach().cpu() for name, result in results.items()}


def eager_errors(tensors, moved=FLOATS, **options):
    """The error of eager PyTorch: the largest of a few draws of nearby inputs, since the error of one draw of a
    few numbers is a lottery. `moved`: what of them differs; far from a Gaussian a near mean is another world."""
    g = torch.Generator().manual_seed(7)
    worst: dict[str, float] = {}
    for scale in (0.0, 0.02, 0.02):
        near = dict(tensors)
        for name, x in tensors.items():
            if name in moved:
                near[name] = (x.double() * (1 + scale * torch.randn(x.shape, generator=g))).to(x.dtype)
        exact, eager = run("reference", near, exact=True, **options), run("reference", near, **options)
        worst = {name: max(error(eager[name], exact[name]), worst.get(name, 0.0)) for name in eager}
    return worst


def check(backend, tensors, device="cpu", function=None, moved=FLOATS, **options):
    """Assert the rule for everything that `backend` returns."""
    exact = run("reference", tensors, exact=True, **options)
    kernel = run(backend, tensors, device=device, function=function, **options)
    assert kernel["context"].dtype == tensors["values"].dtype
    if tensors["values"].dtype == torch.float64:  # the reference is the kernel's equal, not its judge
        for name, value in kernel.items():
            largest = exact[name].abs().max().item() if value.numel() else 0.0
            assert value.shape == exact[name].shape and error(value, exact[name]) <= 1e-13 * largest, name
        return
    compare(kernel, exact, eager_errors(tensors, moved, **options))

"""Arguments for causal_conv1d, and the comparison every kernel has to pass (the rule of tolerance.py)."""

from __future__ import annotations

import torch
from tolerance import compare, error

import trifuse

IN_SEQUENCE_DTYPE = ("x", "initial_states")


def make(
    batch=2, dim=10, seqlen=37, width=4, layout="bdl", dtype=torch.float32, bias=True, initial=True, cu_seqlens=None,
    seed=0,
):  # fmt: skip
    """Arguments of one call in float64, holding values that `dtype` (or float32, for weights) can hold."""
    g = torch.Generator().manual_seed(seed)
    batch = 1 if cu_seqlens is not None else batch
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1

    def rand(*shape, of=torch.float32):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(of).double()

    return {
        "x": rand(*((batch, seqlen, dim) if layout == "bld" else (batch, dim, seqlen)), of=dtype),
        "weight": rand(dim, width),
        "bias": rand(dim) if bias else None,
        "initial_states": rand(rows, dim, width - 1, of=dtype) if initial else None,
    }


def make_ids(batch, seqlen, seed=0, padding=True, run=7):
    """Ids of sequences that follow one another, some of them padding, some coming back later."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.empty(batch, seqlen, dtype=torch.int32)
    for b in range(batch):
        at = 0
        while at < seqlen:
            length = int(torch.randint(1, run + 1, (), generator=g))
            low = -1 if padding else 0
            ids[b, at : at + length] = int(torch.randint(low, 4, (), generator=g))
            at += length
    return ids


def cast(name, tensor, dtype):
    """x and its states in `dtype`, weights in at least float32. Strides survive."""
    return tensor.to(dtype if name in IN_SEQUENCE_DTYPE else torch.promote_types(dtype, torch.float32))


def output_gradients(*outputs):
    """Gradients of these outputs (None for None), the same for every kernel."""
    g = torch.Generator().manual_seed(99)
    grads = [None if x is None else torch.randn(x.shape, generator=g, dtype=torch.float64) for x in outputs]
    return [None if x is None else grad.to(x) for x, grad in zip(outputs, grads, strict=True)]


def to_device(options, device):
    return {name: x.to(device) if torch.is_tensor(x) else x for name, x in options.items()}


def run(backend, tensors, dtype, grads=True, final=True, device="cpu", **options):
    """y, final_states and all gradients, as named results."""
    args = {k: cast(k, v, dtype).to(device).detach().requires_grad_(grads) for k, v in tensors.items() if v is not None}
    with trifuse.backend(backend):
        found = trifuse.causal_conv1d(**args, return_final_states=final, **to_device(options, device))
    y, states = found if final else (found, None)
    results = {"y": y} | ({"final_states": states} if final else {})
    if grads:
        outs = [x for x in (y, states) if x is not None and x.requires_grad]
        douts = output_gradients(*outs)
        found = torch.autograd.grad(outs, list(args.values()), douts, allow_unused=True, materialize_grads=True)
        results |= {f"d{name}": grad for name, grad in zip(args, found, strict=True)}
    return {name: result.detach().cpu() for name, result in results.items()}


def eager_errors(tensors, dtype, **options):
    """The error of eager PyTorch in `dtype`: the largest of a few draws of nearby inputs, since the error of one
    draw of a few numbers is a lottery."""
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
    assert kernel["y"].dtype == dtype
    compare(kernel, exact, eager)


def make_update(
    batch=3, dim=10, seqlen=1, width=4, size=None, rows=None, dtype=torch.float32, state_dtype=None, seed=0
):  # fmt: skip
    """Arguments of causal_conv1d_update in their dtypes; seqlen 0: one token without an axis for it."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape, of=dtype):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(of)

    return {
        "x": rand(batch, dim, seqlen) if seqlen else rand(batch, dim),
        "conv_state": rand(rows or batch, dim, size or width - 1, of=state_dtype or dtype),
        "weight": rand(dim, width, of=torch.float32),
        "bias": rand(dim, of=torch.float32),
    }


def run_update(backend, tensors, device="cpu", **options):
    """The output and the state in place. Strides of conv_state survive."""
    args = {name: x.to(device) for name, x in tensors.items() if x is not None}
    args["conv_state"] = args["conv_state"].clone(memory_format=torch.preserve_format)
    with trifuse.backend(backend):
        y = trifuse.causal_conv1d_update(**args, **to_device(options, device))
    return {"y": y.cpu(), "conv_state": args["conv_state"].cpu()}


def check_update(update, tensors, **options):
    """Assert the rule for `update(tensors, **options)`, which returns what run_update does."""
    wide = {name: None if x is None else x.double() for name, x in tensors.items()}
    exact = run_update("reference", wide, **options)
    eager = run_update("reference", tensors, **options)
    found = update(tensors, **options)
    for name, value in found.items():
        assert value.dtype == eager[name].dtype, name
    compare(found, exact, {name: error(eager[name], exact[name]) for name in exact})

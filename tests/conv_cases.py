"""Arguments for causal_conv1d, and the comparison every kernel has to pass.

With the float64 reference as the truth: error(kernel) <= 2 error(eager PyTorch in the same dtype) + a few ulp, for
the output, the final states and the gradient of every argument.
"""

from __future__ import annotations

import torch
from tolerance import compare, error, incoming

import trifuse

SEQUENCES = ("x", "initial_states")  # the arguments in the sequence dtype; the weights are at least float32


def make(
    batch=2, dim=20, seqlen=37, width=4, layout="bdl", dtype=torch.float32, seed=0, bias=True, initial=True,
    cu_seqlens=None,
):  # fmt: skip
    """Arguments of one call in float64, holding values that `dtype` (or float32, for weights) can hold."""
    g = torch.Generator().manual_seed(seed)
    batch = 1 if cu_seqlens is not None else batch
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1

    def rand(*shape, weight=False):
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        held = torch.promote_types(dtype, torch.float32) if weight else dtype
        return x.to(held).double()

    return {
        "x": rand(batch, *((seqlen, dim) if layout == "bld" else (dim, seqlen))),
        "weight": rand(dim, width, weight=True),
        "bias": rand(dim, weight=True) if bias else None,
        "initial_states": rand(rows, dim, width - 1) if initial else None,
    }


def ids(batch, seqlen, seed=0, mean=9, padding=0.1):
    """(B, L) ids in runs of about `mean` positions, some of them padding."""
    g = torch.Generator().manual_seed(seed)
    starts = torch.rand(batch, seqlen, generator=g) < 1 / mean
    numbers = torch.cumsum(starts, dim=1).to(torch.int32)
    kept = torch.rand(batch, seqlen + 1, generator=g) >= padding
    return torch.where(torch.gather(kept, 1, numbers.long()), numbers, -1)


def recurring_ids(batch, seqlen, seed=0, padding=True, run=7):
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
    return tensor.to(dtype if name in SEQUENCES else torch.promote_types(dtype, torch.float32))


def output_gradients(y, final_states):
    g = torch.Generator().manual_seed(99)
    return [incoming(x.shape, g).to(x.dtype) for x in (y, final_states)]


def run(backend, tensors, dtype, grads=True, final_grad=True, device="cpu", **options):
    """y, final_states and all gradients, as named results."""
    args = {k: cast(k, v, dtype).to(device).detach().requires_grad_(grads) for k, v in tensors.items() if v is not None}
    for name in ("cu_seqlens", "seq_idx"):
        if torch.is_tensor(options.get(name)):
            options[name] = options[name].to(device)
    with trifuse.backend(backend):
        y, final = trifuse.causal_conv1d(**args, return_final_states=True, **options)
    results = {"y": y, "final_states": final}
    if grads:
        gradients = [one.to(device) for one in output_gradients(y, final)]
        pairs = [(y, gradients[0]), *([(final, gradients[1])] if final_grad and final.requires_grad else [])]
        outs, douts = zip(*pairs, strict=True)
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
                tensor = cast(name, tensor, dtype).double()
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
    assert kernel["y"].dtype == kernel["final_states"].dtype == dtype
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
        y = trifuse.causal_conv1d_update(
            **args, **{k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
        )
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

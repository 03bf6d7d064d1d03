"""Parameters of adapters, steps of AdamW over them by any kernel, and the rule that a kernel has to keep."""

import torch
from tolerance import compare, error

from trifuse import reference
from trifuse.ops.lora_adamw import ADAMW, prepare
from trifuse.registration import lora_adamw as kernels

OPTIONS = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
SHAPES = [((5, 70), 0), ((33, 5), 1), ((1, 17), 1), ((8, 1), 0), ((3, 4, 6), 1), ((2000, 6), 1), ((2, 9000), 0)]


def make(dtype, shapes=SHAPES, seed=0):
    """(parameter, axis of its ranks) pairs."""
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype), dim) for shape, dim in shapes]


def gradients(made, seed):
    """Of very different sizes, also along the ranks."""
    g = torch.Generator().manual_seed(1000 + seed)
    return [
        (torch.randn(one.shape, generator=g, dtype=torch.float64) * 10 ** (2 - seed % 5)).bfloat16().to(one.dtype)
        for one, _ in made
    ]


def run(step, made, active, steps=5, device="cpu", dtype=None, state_dtype=None, **options):
    """Parameters and moments after some steps; ``active(step, ranks)`` are the ranks of each."""
    params = [one.to(device=device, dtype=dtype or one.dtype, copy=True) for one, _ in made]
    dims = [dim for _, dim in made]
    acc = [state_dtype or torch.promote_types(one.dtype, torch.float32) for one in params]
    moments = [[torch.zeros_like(one, dtype=kind) for one, kind in zip(params, acc, strict=True)] for _ in range(2)]
    counts = [torch.zeros(one.shape[dim], device=device) for one, dim in zip(params, dims, strict=True)]
    lrs = [1e-2 * (1 + at) for at in range(len(params))]
    for at in range(steps):
        grads = [one.to(device=device, dtype=dtype or one.dtype) for one in gradients(made, at)]
        ranks = [active(at, one.shape[dim]) for one, dim in zip(params, dims, strict=True)]
        step(params, grads, *moments, counts, dims, ranks, lrs, **OPTIONS | options)
    found = {}
    for at, one in enumerate(params):
        found |= {f"param {at}": one, f"exp_avg {at}": moments[0][at], f"exp_avg_sq {at}": moments[1][at]}
        found[f"steps {at}"] = counts[at]
    return {name: value.cpu() for name, value in found.items()}


def by_reference(params, grads, exp_avgs, exp_avg_sqs, steps, rank_dims, active, lrs, **options):
    for *tensors, rank_dim, ranks, lr in zip(
        params, grads, exp_avgs, exp_avg_sqs, steps, rank_dims, active, lrs, strict=True
    ):
        reference.lora_adamw(*tensors, rank_dim=rank_dim, active=ranks, lr=lr, **options)


def by(backend):
    def step(*args, **options):
        call = prepare(*args, **options)
        assert not ADAMW.refusals[backend](call), ADAMW.refusals[backend](call)
        kernels.step(backend, call)

    return step


def check(step, made, active, device="cpu", **options):
    """Compare with the reference in float64; the counts of steps are equal."""
    found = run(step, made, active, device=device, **options)
    exact = run(by_reference, made, active, dtype=torch.float64, **options)
    eager = run(by_reference, made, active, **options)
    for name in [name for name in found if name.startswith("steps")]:
        assert torch.equal(found.pop(name), eager[name])
    compare(found, exact, {name: error(eager[name], exact[name]) for name in found})
    return found

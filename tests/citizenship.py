"""What the tests share that ask whether an op is a good citizen of torch. `made` are the keyword arguments of a call,
`call(made)` is its result, and `loss(*results)` a scalar."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import trifuse


def served(entry, arguments, device, backend, **options):
    """The arguments of a call; skips, with the reasons, where the backend cannot serve it on this machine."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{backend} on cuda: torch sees no CUDA device here")
    made = arguments(device, **options)
    reasons = entry.refusals[backend](entry.prepare(**made))
    if reasons:
        pytest.skip(f"{backend} on {device}: " + "; ".join(reasons))
    return made


def op(name, part, backend):
    """The forward ("fwd") or backward ("bwd") op of a backend."""
    return getattr(torch.ops.trifuse, f"{name}_{part}" + ("_triton" if backend == "triton" else "")).default


def gradients_of(made):
    return [value for value in made.values() if isinstance(value, torch.Tensor) and value.requires_grad]


def results(found):
    return found if isinstance(found, tuple) else (found,)


def autocast_changes_nothing(call, made, device, backend):
    with trifuse.backend(backend):
        expected = results(call(made))
        with torch.autocast(device, dtype=torch.bfloat16):
            found = results(call(made))
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype == torch.float32 and torch.equal(got, wanted)


def checkpointing_gives_the_same_gradients(call, loss, made, backend):
    with trifuse.backend(backend):
        again = results(checkpoint(call, made, use_reentrant=False))
        found = torch.autograd.grad(loss(*again), gradients_of(made))
        expected = torch.autograd.grad(loss(*results(call(made))), gradients_of(made))
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)


def a_second_derivative_is_refused(name, call, loss, made, backend):
    """And the reference has it."""

    def second():
        grads = torch.autograd.grad(loss(*results(call(made))), gradients_of(made), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), gradients_of(made))

    with trifuse.backend(backend), pytest.raises(RuntimeError, match=f"{name}: a native kernel has no second"):
        second()
    with trifuse.backend("reference"):
        assert all(grad.isfinite().all() for grad in second())


def forward_mode_is_refused(name, call, made, argument, backend):
    with torch.autograd.forward_ad.dual_level():
        plain = made[argument].detach()
        dual = made | {argument: torch.autograd.forward_ad.make_dual(plain, torch.ones_like(plain))}
        with trifuse.backend(backend), pytest.raises(RuntimeError, match=rf"{name}: .* no forward-mode derivative"):
            call(dual)

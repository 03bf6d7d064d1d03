"""The rule that every kernel of every op has to keep.

With the float64 reference as the truth: error(kernel) <= 2 error(eager PyTorch in the same dtype) + a few
ulp, for every output and every gradient.
"""

import torch

FEW_ULP = 4


def incoming(shape, g):
    """A gradient that comes in, drawn of values that every dtype holds: were it rounded for each dtype by itself, that
    rounding would count as the error of eager PyTorch, and hide any of a kernel."""
    return torch.randn(shape, generator=g, dtype=torch.float64).to(torch.bfloat16).to(torch.float16)


def error(result, exact):
    """The largest difference, 0 for empty tensors."""
    wide = torch.complex128 if exact.is_complex() else torch.float64
    return (result.to(wide) - exact).abs().max().item() if result.numel() else 0.0


def in_double(single):
    """The errors of eager PyTorch in float64, from those in float32. Nothing finer judges float64: the reference errs
    as a kernel does, so both are allowed for."""
    finer = 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return {name: finer * value for name, value in single.items()}


def compare(kernel, exact, eager):
    """Assert the rule; `eager` holds the errors of eager PyTorch."""
    for name, value in kernel.items():
        assert value.shape == exact[name].shape, name
        largest = exact[name].abs().max().item() if value.numel() else 0.0
        allowed = 2 * eager[name] + FEW_ULP * torch.finfo(value.dtype).eps * largest
        found = error(value, exact[name])
        assert found <= allowed, f"{name}: error {found:.2e}, allowed {allowed:.2e}"

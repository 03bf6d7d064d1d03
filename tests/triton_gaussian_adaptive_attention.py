"""What is compiled of gaussian_adaptive_attention's Triton kernels, see triton_configurations.py."""

from functools import partial

import torch

SHAPES = {
    "rows": ((4096, 1024, 1), 8),
    "columns": ((8, 512, 1024), 8),
    "long rows": ((64, 16384, 1), 1),
    "columns in pieces": ((2, 8192, 512), 1),
    "rows in pieces": ((4, 10**6, 1), 1),
}


def tensors(dtype, shape, heads, mask=False, gaussians=5):
    def empty(*size, dtype=dtype):
        return torch.empty(size, dtype=dtype, device="meta")

    acc = torch.promote_types(dtype, torch.float32)
    parameters = empty(heads, gaussians, dtype=acc), empty(heads, gaussians, dtype=acc)
    return empty(*shape), *parameters, empty(*shape, dtype=torch.bool) if mask else None


def forward(dtype, shape, heads, mask=False, padding=None, clamped=False, weights=False):
    from trifuse.triton_kernels.gaussian_adaptive_attention import gaussian_adaptive_attention_fwd

    gaussian_adaptive_attention_fwd(*tensors(dtype, shape, heads, mask), padding, 1e-8, clamped, weights)


def backward(dtype, shape, heads, mask=False, padding=None, clamped=False, weights=False):
    from trifuse.triton_kernels.gaussian_adaptive_attention import gaussian_adaptive_attention_bwd

    x, *parameters, mask = tensors(dtype, shape, heads, mask)
    stats = torch.empty((3, heads, shape[0], shape[2]), dtype=parameters[0].dtype, device="meta")
    dweights = torch.empty_like(x) if weights else None
    gaussian_adaptive_attention_bwd(torch.empty_like(x), dweights, x, *parameters, mask, stats, padding, 1e-8, clamped)


def configurations(target):
    """(name, call) of everything compiled for a target: all of it for sm_90, the main ones elsewhere."""
    dtypes = {"float32": torch.float32}
    everything = target == "sm_90"
    if everything:
        dtypes |= {"bfloat16": torch.bfloat16, "float16": torch.float16}
    for name, dtype in dtypes.items():
        for shape, (size, heads) in SHAPES.items():
            yield f"fwd {name} {shape}", partial(forward, dtype, size, heads)
            yield f"bwd {name} {shape}", partial(backward, dtype, size, heads)
    if everything:
        variants = {
            "mask, clamped, weights": {"mask": True, "clamped": True, "weights": True},
            "padding": {"padding": 0.0, "weights": True},
        }
        for shape in ("rows", "columns", "rows in pieces"):
            size, heads = SHAPES[shape]
            for variant, options in variants.items():
                yield f"fwd {shape}, {variant}", partial(forward, torch.float32, size, heads, **options)
                yield f"bwd {shape}, {variant}", partial(backward, torch.float32, size, heads, **options)
            yield f"fwd float64 {shape}", partial(forward, torch.float64, size, heads)
            yield f"bwd float64 {shape}", partial(backward, torch.float64, size, heads)

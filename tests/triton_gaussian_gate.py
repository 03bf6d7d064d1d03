"""What is compiled of the Gaussian gates' Triton kernels, see triton_configurations.py."""

from functools import partial

import torch

# (outer, axis, inner); the features, which are outer or inner; heads and Gaussians
SHAPES = {
    "rows": {"shape": (4096, 512, 1)},
    "columns": {"shape": (8, 512, 1024)},
    "long rows": {"shape": (16, 200_000, 1)},
    "long columns": {"shape": (4, 100_000, 64)},
}


def arguments(dtype, kind, shape, masked=False, multiply=True):
    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, mask = meta(*shape, dtype=dtype), meta(*shape, dtype=torch.bool) if masked else None
    heads, rows, gaussians, outer = 1, 1, 1, False
    if kind == "density":
        heads, rows, gaussians = 8, 8, 5
    if kind == "feature":
        outer = shape[2] == 1
        rows = shape[0] if outer else shape[2]
    alpha = meta(rows) if kind == "density" else None
    parameters = (meta(rows, gaussians), meta(rows, gaussians), alpha, mask)
    return x, parameters, (heads, 1, outer, 1e-5, kind == "feature", multiply)


def forward(*args, **options):
    from trifuse.triton_kernels.gaussian_gate import gaussian_gate_fwd

    x, parameters, flags = arguments(*args, **options)
    gaussian_gate_fwd(x, *parameters, *flags)


def backward(*args, **options):
    from trifuse.triton_kernels.gaussian_gate import gaussian_gate_bwd

    x, parameters, flags = arguments(*args, **options)
    stats = torch.empty((3, flags[0], x.shape[0], x.shape[2]), device="meta")
    gaussian_gate_bwd(torch.empty_like(x), x, *parameters, stats, *flags)


def configurations(target):
    """(name, call) of everything compiled for a target: all of it for sm_90, the main ones elsewhere."""
    everything = target == "sm_90"
    for kind in ("feature", "context", "density"):
        for name, options in SHAPES.items():
            if not everything and (kind == "context" or name.startswith("long")):
                continue
            for way in (forward, backward):
                yield f"{way.__name__} {kind} {name}", partial(way, torch.float32, kind, **options)
    if everything:
        for dtype in (torch.float16, torch.bfloat16):
            for way in (forward, backward):
                name = f"{way.__name__} {str(dtype).removeprefix('torch.')} masked gate"
                yield name, partial(way, dtype, "density", **SHAPES["rows"], masked=True, multiply=False)
                yield name + " of columns", partial(way, dtype, "feature", **SHAPES["columns"], masked=True)

"""What is compiled of the linear scan's Triton kernels, see triton_configurations.py."""

from functools import partial

import torch


def tensors(dtype, batch=8, dim=2048, seqlen=2048, bld=False, real_a=False, once=False):
    def sequence(dtype):
        shape = (batch, seqlen, dim) if bld else (batch, dim, seqlen)
        x = torch.empty(shape, dtype=dtype, device="meta")
        return x.transpose(1, 2) if bld else x

    a = sequence(torch.float32 if real_a else dtype)
    return (a[:1, :, :1].expand(a.shape) if once else a), sequence(dtype)


def forward(dtype, packed=False, state=False, reverse=False, bld=False, **options):
    from trifuse.triton_kernels.linear_scan import linear_scan_fwd

    a, b = tensors(dtype, bld=bld, **options)
    linear_scan_fwd(a, b, *states(b, packed, state), reverse, bld)


def backward(dtype, packed=False, state=False, reverse=False, bld=False, **options):
    from trifuse.triton_kernels.linear_scan import linear_scan_bwd

    a, h = tensors(dtype, bld=bld, **options)
    first, cu_seqlens = states(h, packed, state)
    linear_scan_bwd(torch.empty_like(h), first, a, h, first, cu_seqlens, reverse, bld)


def states(b, packed, state):
    rows = 5 if packed else b.shape[0]
    acc = torch.promote_types(b.dtype, torch.float32)
    first = torch.empty((rows, b.shape[1]), dtype=acc, device="meta") if state else None
    return first, torch.empty(rows + 1, dtype=torch.int64, device="meta") if packed else None


def configurations(target):
    """(name, call) of everything compiled for a target: all of it for sm_90, the main ones elsewhere."""
    dtypes = {"float32": torch.float32, "complex64": torch.complex64}
    everything = target == "sm_90"
    if everything:
        dtypes |= {"bfloat16": torch.bfloat16, "float16": torch.float16}
    variants = {"": {}, " bld": {"bld": True, "state": True}}
    if everything:
        variants |= {
            " packed reverse": {"batch": 1, "packed": True, "reverse": True, "state": True},
            " few rows, odd length": {"batch": 1, "dim": 96, "seqlen": 30001, "state": True},
        }
    for name, dtype in dtypes.items():
        for variant, options in variants.items():
            yield f"fwd {name}{variant}", partial(forward, dtype, **options)
            yield f"bwd {name}{variant}", partial(backward, dtype, **options)
    for variant, options in variants.items():
        yield f"fwd real a{variant}", partial(forward, torch.complex64, real_a=True, **options)
        yield f"bwd real a{variant}", partial(backward, torch.complex64, real_a=True, **options)
    if everything:
        yield "fwd complex64 a given once", partial(forward, torch.complex64, bld=True, once=True)

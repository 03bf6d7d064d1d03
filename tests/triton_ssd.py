"""What is compiled of the SSD's Triton kernels, see triton_configurations.py."""

from functools import partial

import torch


def arguments(
    dtype, batch=8, seqlen=2048, heads=24, headdim=64, groups=1, dstate=128, bare=False, runs=False, packed=False,
    initial=False, dt_dtype=None,
):  # fmt: skip
    """The tensors of the registered forward op."""
    empty = partial(torch.empty, device="meta")
    batch = 1 if packed else batch
    x, dt = empty((batch, seqlen, heads, headdim), dtype=dtype), empty((batch, seqlen, heads), dtype=dt_dtype or dtype)
    coef, weight = empty((batch, seqlen, groups, dstate), dtype=dtype), empty(heads)
    return (
        x, dt, weight, coef, coef, None if bare else weight, None if bare else x, None if bare else weight,
        empty((5 if packed else batch, heads, headdim, dstate)) if initial else None,
        empty((batch, seqlen), dtype=torch.int32) if runs else None,
        empty(6, dtype=torch.int64) if packed else None,
    )  # fmt: skip


STEPS = (True, 0.0, float("inf"), True)


def forward(dtype, return_final=False, **options):
    from trifuse.registration.ssd import CHUNK_SIZE
    from trifuse.triton_kernels.ssd import ssd_fwd

    ssd_fwd(*arguments(dtype, **options), *STEPS, return_final, CHUNK_SIZE["triton"], False)


def backward(dtype, return_final=False, **options):
    from trifuse.registration.ssd import CHUNK_SIZE
    from trifuse.triton_kernels.ssd import ssd_bwd

    tensors = arguments(dtype, **options)
    x, coef, initial = tensors[0], tensors[3], tensors[8]
    batch, seqlen, *sizes = x.shape
    chunk = CHUNK_SIZE["triton"]
    windows = -(-seqlen // chunk) if seqlen > chunk else 0
    states = torch.empty((batch, windows, *sizes, coef.shape[3]), device="meta")
    dfinal = torch.empty_like(initial) if return_final and initial is not None else None
    ssd_bwd(torch.empty_like(x), dfinal, *tensors, states, *STEPS, chunk)


def configurations(target):
    """(name, call) of everything compiled for a target: all of it for sm_90, the main ones elsewhere."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    packed = {"packed": True, "initial": True, "return_final": True, "heads": 64, "groups": 8}
    variants = [(name, "", {}) for name in ("float32", "bfloat16")]
    variants += [(name, "packed", packed) for name in ("float32", "bfloat16")]
    if target == "sm_90":
        odd = {"headdim": 50, "dstate": 17, "seqlen": 1001, "heads": 3, "initial": True, "return_final": True}
        variants += [
            ("float16", "", {}),
            ("bfloat16", "short", {"seqlen": 3, "dstate": 1024, "bare": True}),
            ("bfloat16", "wide", {"headdim": 128, "dstate": 256, "runs": True, "initial": True}),
            ("float32", "odd", odd),
        ]
    for name, variant, options in variants:
        yield f"fwd {name} {variant}".strip(), partial(forward, dtypes[name], **options)
        yield f"bwd {name} {variant}".strip(), partial(backward, dtypes[name], **options)

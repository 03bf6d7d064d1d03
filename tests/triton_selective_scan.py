"""What is compiled of the selective scan's Triton kernels, see triton_configurations.py."""

from functools import partial

import torch


def scan_arguments(
    dtype, batch=8, dim=2048, seqlen=2048, dstate=16, groups=1, bld=False, bare=False, constant=False, packed=False,
    softplus=True, reverse=False, deterministic=False,
):  # fmt: skip
    """The arguments of the registered forward op, less chunk_size."""
    empty = partial(torch.empty, device="meta")

    def sequence(*channels):
        if bld:
            return empty((batch, seqlen, *channels), dtype=dtype).movedim(1, -1)
        return empty((batch, *channels, seqlen), dtype=dtype)

    def coef():
        return empty((dim, dstate)) if constant else sequence(groups, dstate)

    rows = 5 if packed else batch
    return (
        sequence(dim), sequence(dim), empty((dim, dstate)), coef(), coef(), None if bare else empty(dim),
        None if bare else sequence(dim), None if bare else empty(dim), empty((rows, dim, dstate)) if packed else None,
        empty(6, dtype=torch.int64) if packed else None, softplus, reverse, bld, deterministic,
    )  # fmt: skip


def forward(dtype, save=False, **options):
    from trifuse.registration.selective_scan import CHUNK_SIZE
    from trifuse.triton_kernels.selective_scan import selective_scan_fwd

    selective_scan_fwd(*scan_arguments(dtype, **options), CHUNK_SIZE["triton"] if save else 0)


def backward(dtype, packed=False, **options):
    from trifuse.registration.selective_scan import CHUNK_SIZE
    from trifuse.triton_kernels.selective_scan import selective_scan_bwd

    *tensors, softplus, reverse, bld, deterministic = scan_arguments(dtype, packed=packed, **options)
    u, A, initial_state = tensors[0], tensors[2], tensors[8]
    batch, dim, seqlen = u.shape
    states = A.new_empty((batch, -(-seqlen // CHUNK_SIZE["triton"]), A.shape[1], dim))
    dlast = torch.empty_like(initial_state) if packed else None
    flags = (softplus, reverse, bld, deterministic, CHUNK_SIZE["triton"])
    selective_scan_bwd(torch.empty_like(u), dlast, *tensors, states, *flags)


def update(dtype, heads=1, dstate=16, indices=False):
    from trifuse.triton_kernels.selective_state_update import selective_state_update

    empty = partial(torch.empty, device="meta")
    channels = (heads, 2048 // heads)
    x, weight = empty((8, *channels), dtype=dtype), empty(channels)
    coef = empty((8, 1, dstate), dtype=dtype)
    state, A = empty((8, *channels, dstate)), empty((*channels, dstate))
    rows = empty(8, dtype=torch.int64) if indices else None
    selective_state_update(state, x, x, A, coef, coef, weight, x, weight, True, rows)


def configurations(target):
    """(name, call) of everything compiled for a target: all of it for sm_90, the main ones elsewhere."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    everything = target == "sm_90"
    for name, dtype in dtypes.items():
        if name == "float16" and not everything:
            continue
        yield f"fwd {name}", partial(forward, dtype)
        yield f"bwd {name}", partial(backward, dtype)
        yield f"fwd {name} bld", partial(forward, dtype, bld=True)
        yield f"bwd {name} bld", partial(backward, dtype, bld=True)
        yield f"update {name}", partial(update, dtype)
    variants = {
        "packed reverse": {"batch": 1, "packed": True, "reverse": True},
        "few rows, odd length": {"batch": 1, "dim": 1536, "seqlen": 1000},
    }
    if everything:
        variants |= {
            "packed bld": {"batch": 1, "packed": True, "bld": True},
            "reverse": {"reverse": True},
            "bare": {"bare": True, "softplus": False},
            "constant": {"constant": True},
            "groups, short": {"groups": 8, "seqlen": 64, "dstate": 5},
            "one channel a group": {"groups": 64, "dim": 64, "dstate": 4},
        }
    for name, options in variants.items():
        for dtype in ("float32", "bfloat16"):
            yield f"fwd {dtype} {name}", partial(forward, dtypes[dtype], save=True, **options)
            yield f"bwd {dtype} {name}", partial(backward, dtypes[dtype], **options)
    if everything:
        yield "bwd float32 deterministic", partial(backward, torch.float32, deterministic=True)
        yield "bwd bfloat16 deterministic groups", partial(backward, torch.bfloat16, deterministic=True, groups=8)
        yield "update float32 heads", partial(update, torch.float32, heads=32, dstate=128, indices=True)

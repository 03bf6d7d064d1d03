"""What is compiled of lora_linear's Triton kernels, see triton_configurations.py."""

from functools import partial

import torch

ALL = (True,) * 6


def tensors(dtype, rows=512, columns=1024, out=1024, rank=16, adapter=torch.float32, bias=True, vector=False):
    empty = partial(torch.empty, device="meta")
    weights = (
        empty((rows, columns), dtype=dtype), empty((out, columns), dtype=dtype),
        empty(out, dtype=dtype) if bias else None, empty((rank, columns), dtype=adapter),
        empty((out, rank), dtype=adapter),
    )  # fmt: skip
    return weights, 0.5, empty(rank) if vector else None


def forward(dtype, active=None, seed=False, save=True, **options):
    from trifuse.triton_kernels.lora_linear import lora_linear_fwd

    weights, scale, p = tensors(dtype, **options)
    seed = torch.empty(1, dtype=torch.int64, device="meta") if seed else None
    lora_linear_fwd(*weights, scale, p, active or weights[3].shape[0], False, 0.1, seed, False, save)


def backward(dtype, active=None, seed=False, needs=(True, False, False, True, True, False), **options):
    from trifuse.triton_kernels.lora_linear import lora_linear_bwd

    (x, weight, _, A, B), scale, p = tensors(dtype, **options)
    active = active or A.shape[0]
    seed = torch.empty(1, dtype=torch.int64, device="meta") if seed else None
    dy, S = x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], active), dtype=torch.float32)
    lora_linear_bwd(dy, x, weight, A, B, S, scale, p, active, False, 0.1, seed, False, list(needs))


def down(dtype, **options):
    """What dora_linear's norms take of it: the weight times A, and the gradients of both."""
    from trifuse.triton_kernels.lora_linear import lora_down, lora_down_bwd

    (_, weight, _, A, _), _, _ = tensors(dtype, **options)
    lora_down_bwd(lora_down(weight, A), weight, A, True, True)


def configurations(target):
    """(name, call) of everything compiled for a target: all of it for sm_90, the main ones elsewhere. float16 takes
    the same ways as bfloat16, so of it there is one of each."""
    everything = target == "sm_90"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if everything:
        dtypes["float16"] = torch.float16
    for name, dtype in dtypes.items():
        variants = {"": {}, " dropout": {"seed": True}}
        if dtype == torch.bfloat16:
            variants[" half adapter"] = {"adapter": dtype}
        if dtype == torch.float32:
            variants[" rank 64"] = {"rank": 64}
        if everything and dtype != torch.float16:
            variants |= {
                " one row": {"rows": 1, "seed": True},
                " rank 64": {"rank": 64},
                " rank 24": {"rank": 24, "seed": True, "vector": True},
                " rank 130 of 200": {"rank": 200, "active": 130, "seed": True},
                " odd": {"rows": 37, "columns": 50, "out": 23, "rank": 5, "seed": True},
                " wide": {"rows": 4096, "columns": 4096, "out": 4096, "rank": 8, "bias": False},
            }
        for variant, options in variants.items():
            yield f"fwd {name}{variant}", partial(forward, dtype, **options)
            backwards = {key: value for key, value in options.items() if key != "bias"}
            yield f"bwd {name}{variant}", partial(backward, dtype, **backwards)
        if everything:
            yield f"down {name}", partial(down, dtype)
        if everything and dtype != torch.float16:
            yield f"fwd {name} not saved", partial(forward, dtype, save=False)
            yield f"bwd {name} everything", partial(backward, dtype, seed=True, vector=True, needs=ALL)
            frozen_adapter = (True, False, False, False, False, False)
            yield f"bwd {name} of x alone", partial(backward, dtype, needs=frozen_adapter)

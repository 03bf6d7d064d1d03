"""What is compiled of lora_update's Triton kernel, see triton_configurations.py."""

from functools import partial

import torch


def update(dtype, adapter=None, rank=16, random=False, transposed=False, vector=False, measure=True):
    from trifuse.triton_kernels.lora_update import lora_update

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, columns = 4096, 4096
    out = meta(columns, rows, dtype=dtype).t() if transposed else meta(rows, columns, dtype=dtype)
    factors = meta(rank, columns, dtype=adapter or torch.float32), meta(rows, rank, dtype=adapter or torch.float32)
    p, seed = meta(rank) if vector else None, meta(1, dtype=torch.int64) if random else None
    lora_update(out, None, *factors, 2.0, p, rank, seed, measure)


def configurations(target):
    """(name, call) of everything compiled for a target: all of it for sm_90, the main ones elsewhere."""
    everything = target == "sm_90"
    yield "float32", partial(update, torch.float32)
    yield "bfloat16", partial(update, torch.bfloat16)
    yield "bfloat16 stochastic", partial(update, torch.bfloat16, random=True)
    if everything:
        yield "bfloat16 factors", partial(update, torch.bfloat16, torch.bfloat16, vector=True, measure=False)
        yield "bfloat16 stochastic transposed", partial(update, torch.bfloat16, random=True, transposed=True)
        yield "float16 stochastic", partial(update, torch.float16, random=True)
        yield "float32 transposed", partial(update, torch.float32, transposed=True)

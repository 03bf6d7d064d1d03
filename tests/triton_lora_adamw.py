"""What is compiled of lora_adamw's Triton kernels, see triton_configurations.py."""

from functools import partial

import torch


def step(dtype, shape, rank_dim, first, last):
    from trifuse.triton_kernels.lora_adamw import lora_adamw

    def meta(dtype, *shape):
        return [torch.empty(shape, dtype=dtype, device="meta")]

    state = meta(torch.float32, *shape), meta(torch.float32, *shape), meta(torch.float32, shape[rank_dim])
    options = (0.9, 0.999, 1e-8, 0.01, False)
    lora_adamw(meta(dtype, *shape), meta(dtype, *shape), *state, [rank_dim], [first], [last], [1e-3], *options)


def configurations(target):
    """(name, call) of everything compiled for a target: all of it for sm_90, the main ones elsewhere."""
    yield "A float32", partial(step, torch.float32, (16, 4096), 0, 0, 16)
    yield "B float32", partial(step, torch.float32, (4096, 16), 1, 0, 16)
    if target == "sm_90":
        yield "A bfloat16 one rank", partial(step, torch.bfloat16, (16, 4096), 0, 3, 4)
        yield "B float16 one rank", partial(step, torch.float16, (4096, 16), 1, 3, 4)

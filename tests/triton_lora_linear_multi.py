"""What is compiled of lora_linear_multi's Triton kernels, see triton_configurations.py."""

from functools import partial

import torch


def tensors(dtype, rows=512, columns=1024, out=1024, ranks=(8, 16, 16, 4), adapter=torch.float32):
    empty = partial(torch.empty, device="meta")
    A, B = ([empty(shape, dtype=adapter) for shape in shapes] for shapes in zip(
        *(((rank, columns), (out, rank)) for rank in ranks), strict=True
    ))  # fmt: skip
    return (
        empty((rows, columns), dtype=dtype), empty((out, columns), dtype=dtype), empty(out, dtype=dtype), A, B,
        empty((len(ranks), max(ranks))), empty(rows, dtype=torch.int64),
    )  # fmt: skip


def forward(dtype, save=True, **options):
    from trifuse.triton_kernels.lora_linear_multi import lora_linear_multi_fwd

    lora_linear_multi_fwd(*tensors(dtype, **options), save)


def backward(dtype, **options):
    from trifuse.triton_kernels.lora_linear_multi import lora_linear_multi_bwd

    x, weight, _, A, B, scales, index = tensors(dtype, **options)
    dy, S = x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], scales.shape[1]), dtype=torch.float32)
    lora_linear_multi_bwd(dy, x, weight, A, B, S, scales, index, [True] * 6)


def configurations(target):
    """(name, call) of everything compiled for a target: all of it for sm_90, the main ones elsewhere."""
    everything = target == "sm_90"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if everything:
        dtypes["float16"] = torch.float16
    for name, dtype in dtypes.items():
        variants = {"": {}, " few rows": {"rows": 32}}
        if everything and dtype != torch.float16:
            variants |= {
                " rank 64": {"ranks": (64, 8)},
                " odd": {"rows": 130, "columns": 50, "out": 23, "ranks": (5, 3)},
            }
        for variant, options in variants.items():
            yield f"fwd {name}{variant}", partial(forward, dtype, **options)
            if variant != " few rows":
                yield f"bwd {name}{variant}", partial(backward, dtype, **options)
    if everything:
        yield "bwd bfloat16 half adapter", partial(backward, torch.bfloat16, adapter=torch.bfloat16)
        yield "fwd bfloat16 not saved", partial(forward, torch.bfloat16, save=False)

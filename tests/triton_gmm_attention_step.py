"""What is compiled of gmm_attention_step's Triton kernels, see triton_configurations.py."""

from functools import partial

import torch


def tensors(dtype, batch=16, length=1000, width=512, components=10, masked=False, time_inside=False):
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    values = empty(batch, width, length, dtype=dtype).transpose(1, 2) if time_inside else None
    values = empty(batch, length, width, dtype=dtype) if values is None else values
    mixture = [empty(batch, components) for _ in range(4)]
    return values, *mixture, empty(batch, length, dtype=torch.bool) if masked else None


def forward(dtype, **options):
    from trifuse.triton_kernels.gmm_attention_step import gmm_attention_step_fwd

    gmm_attention_step_fwd(*tensors(dtype, **options))


def backward(dtype, values_grad=True, outputs=(True, False, False), **options):
    from trifuse.triton_kernels.gmm_attention_step import gmm_attention_step_bwd

    values, weight, delta, sigma, mean, padding = tensors(dtype, **options)
    alignment = weight.new_empty(values.shape[:2])
    wanted = (values.new_empty((values.shape[0], values.shape[2])), torch.empty_like(mean), alignment)
    grads = [grad if there else None for grad, there in zip(wanted, outputs, strict=True)]
    gmm_attention_step_bwd(*grads, values, weight, delta, sigma, mean, alignment, padding, values_grad)


def configurations(target):
    """(name, call) of everything compiled for a target: all of it for sm_90, the main ones elsewhere."""
    everything = target == "sm_90"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    variants = {"": {}}
    if everything:
        dtypes["float16"] = torch.float16
        variants |= {
            " masked": {"masked": True, "outputs": (True, True, True)},
            " time inside": {"time_inside": True, "length": 1024},
            " one long sequence": {"batch": 1, "length": 4096, "components": 20, "width": 1024},
            " small": {"batch": 2, "length": 50, "width": 40, "components": 5},
        }
    for name, dtype in dtypes.items():
        for variant, options in variants.items():
            outputs = options.get("outputs", (True, False, False))
            shape = {key: value for key, value in options.items() if key != "outputs"}
            yield f"fwd {name}{variant}", partial(forward, dtype, **shape)
            yield f"bwd {name}{variant}", partial(backward, dtype, outputs=outputs, **shape)
    if everything:
        alignment_only = (False, False, True)
        yield "bwd float32 alignment", partial(backward, torch.float32, values_grad=False, outputs=alignment_only)
        yield "bwd float32 no dvalues", partial(backward, torch.float32, values_grad=False)

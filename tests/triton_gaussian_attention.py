"""What is compiled of Gaussian attention's Triton kernels, see triton_configurations.py."""

from functools import partial

import torch


def arguments(
    dtype, batch=4, heads=16, kv_heads=16, queries=2048, keys=2048, head_dim=64, value_dim=None, gamma=True,
    sigma=False, center=False, mask=None, padding=False, packed=False, causal=False, normalized=True,
):  # fmt: skip
    """The arguments of the registered forward op."""
    empty = partial(torch.empty, device="meta")
    batch = 1 if packed else batch
    rows = (batch, heads, queries)
    offsets = empty(6, dtype=torch.int64) if packed else None
    return (
        empty((*rows, head_dim), dtype=dtype), empty((batch, kv_heads, keys, head_dim), dtype=dtype),
        empty((batch, kv_heads, keys, value_dim or head_dim), dtype=dtype), empty(heads) if gamma else None,
        empty(rows) if center else None, empty((heads, 1)).expand(rows) if sigma else None,
        None if mask is None else empty((queries, keys), dtype=mask).expand(*rows, keys),
        empty((batch, keys), dtype=torch.bool) if padding else None, offsets, offsets, 0.125, causal, normalized,
    )  # fmt: skip


def forward(dtype, **options):
    from trifuse.triton_kernels.gaussian_attention import gaussian_attention_fwd

    gaussian_attention_fwd(*arguments(dtype, **options))


def backward(dtype, dlse=False, **options):
    from trifuse.triton_kernels.gaussian_attention import gaussian_attention_bwd

    *tensors, scale, causal, normalized = arguments(dtype, **options)
    q, v = tensors[0], tensors[2]
    out, lse = q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)
    gradients = torch.empty_like(out), lse if dlse else None
    gaussian_attention_bwd(*gradients, *tensors, out, lse, lse, scale, causal, normalized)


def configurations(target):
    """(name, call) of everything compiled for a target: all of it for sm_90, the main ones elsewhere."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    window = {"gamma": False, "sigma": True}
    everything = {
        "sigma": True, "center": True, "padding": True, "packed": True, "causal": True, "dlse": True, "kv_heads": 4,
    }  # fmt: skip
    variants = [(name, "distance", {}) for name in ("float32", "bfloat16")]
    variants += [(name, "everything", everything) for name in ("float32", "bfloat16")]
    variants += [("bfloat16", "window", window), ("bfloat16", "wide", {"head_dim": 128, "causal": True})]
    if target == "sm_90":
        odd = {"head_dim": 50, "value_dim": 70, "queries": 1001, "keys": 999, "mask": torch.float32, "dlse": True}
        variants += [
            ("float16", "distance", {}),
            ("float32", "window", window),
            ("bfloat16", "masked", {"mask": torch.bool, "padding": True}),
            ("float16", "unnormalized", {"normalized": False, "dlse": True, "sigma": True}),
            ("float32", "odd", odd),
            ("bfloat16", "odd", odd),
            *((name, "wide everything", everything | {"head_dim": 128}) for name in ("float32", "bfloat16")),
        ]
    for name, variant, options in variants:
        forward_options = {key: value for key, value in options.items() if key != "dlse"}
        yield f"fwd {name} {variant}", partial(forward, dtypes[name], **forward_options)
        yield f"bwd {name} {variant}", partial(backward, dtypes[name], **options)

"""Argument checks shared by the ops. Every message names the argument, what it was and what it must be."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from trifuse._library import values_are_known

SEQUENCE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensors(op: str, *, optional: bool = False, **arguments: object) -> None:
    for name, value in arguments.items():
        if isinstance(value, Tensor) or (optional and value is None):
            continue
        also = " or None" if optional else ""
        raise TypeError(f"{op}: {name} is {type(value).__name__}; it must be a torch.Tensor{also}")


def rank(op: str, name: str, tensor: Tensor, dims: int, form: str) -> None:
    if tensor.dim() != dims:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must be {form}")


def shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], form: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must be {form} = {tuple(expected)}")


def same_shape(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        was, expected = tuple(tensor.shape), tuple(other.shape)
        raise ValueError(f"{op}: {name} has shape {was}; it must have the shape of {other_name}, {expected}")


def dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(dtype_name(one) for one in allowed)
        raise TypeError(f"{op}: {name} is {dtype_name(tensor.dtype)}; it must be one of {names}")


def same_dtype(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{op}: {name} is {dtype_name(tensor.dtype)}; it must be {dtype_name(other.dtype)} like {other_name}"
        )


def weight_dtype(op: str, name: str, tensor: Tensor, sequence: Tensor, complex_too: bool = False) -> None:
    """Weights and states: float32, float64 beside float64 sequences, or the sequence dtype."""
    allowed = [torch.float32]
    if sequence.dtype != torch.float32:
        allowed.append(sequence.dtype)
    if complex_too:
        allowed.append(torch.complex64)
        if sequence.dtype == torch.float64:
            allowed.append(torch.complex128)
    if tensor.dtype not in allowed:
        names = " or ".join(dtype_name(one) for one in allowed)
        was, beside = dtype_name(tensor.dtype), dtype_name(sequence.dtype)
        raise TypeError(f"{op}: {name} is {was}; beside {beside} sequences it must be {names}")


def same_device(op: str, sequence: Tensor, **arguments: Tensor | None) -> None:
    for name, tensor in arguments.items():
        if tensor is not None and tensor.device != sequence.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}; it must be on {sequence.device} like the sequences")


def written(op: str, name: str, tensor: Tensor) -> None:
    """A tensor that is changed in place must not be expanded: two elements would share one number."""
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(
            f"{op}: {name} has strides {tuple(tensor.stride())}, so elements share memory; "
            "it is changed in place and each must have its own"
        )


def cu_seqlens(op: str, offsets: Tensor, batch: int, seqlen: int, name: str = "cu_seqlens", length: str = "L") -> None:
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} is {dtype_name(offsets.dtype)}; it must be int32 or int64")
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{op}: {name} has shape {tuple(offsets.shape)}; it must be (S + 1,)")
    if batch != 1:
        raise ValueError(f"{op}: {name} packs sequences in a batch of one, and the batch is {batch}")
    if not values_are_known(offsets):
        return
    values = offsets.tolist()
    if values[0] != 0:
        raise ValueError(f"{op}: {name} starts at {values[0]}; it must start at 0")
    for i in range(1, len(values)):
        if values[i] < values[i - 1]:
            raise ValueError(f"{op}: {name} decreases from {values[i - 1]} to {values[i]} at index {i}")
    if values[-1] != seqlen:
        raise ValueError(f"{op}: {name} ends at {values[-1]}; it must end at {length} = {seqlen}")


def sequence_ids(op: str, ids: Tensor, batch: int, seqlen: int) -> Tensor:
    """seq_idx as the kernels read it: contiguous int32."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: seq_idx is {dtype_name(ids.dtype)}; it must be int32 or int64")
    shape(op, "seq_idx", ids, (batch, seqlen), "(B, L)")
    # Only the host's copy is free to look at. Cut to 32 bits, two ids could become one, and a large one padding.
    if ids.dtype == torch.int64 and ids.device.type == "cpu" and values_are_known(ids) and ids.numel():
        held = torch.iinfo(torch.int32)
        for value in (int(ids.min()), int(ids.max())):
            if not held.min <= value <= held.max:
                raise ValueError(f"{op}: seq_idx holds {value}; its values must fit into int32")
    return ids.to(torch.int32).contiguous()


def state_rows(
    op: str, rows: Tensor, batch: int, available: int, name: str = "state_batch_indices", state: str = "state"
) -> None:
    if rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} is {dtype_name(rows.dtype)}; it must be int32 or int64")
    shape(op, name, rows, (batch,), "(B,)")
    # Only the host's copy is free to look at: on a device the look would stall every token.
    if rows.device.type == "cpu" and values_are_known(rows) and batch and int(rows.max()) >= available:
        raise ValueError(f"{op}: {name} holds {int(rows.max())}; {state} has only {available} rows")


def axis(op: str, name: str, value: object, tensor: Tensor) -> int:
    """An axis of `tensor`, counted from the front."""
    dims = tensor.dim()
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} is {type(value).__name__}; it must be an int")
    if dims == 0:
        raise ValueError(f"{op}: x has shape (); it must have at least one axis")
    if not -dims <= value < dims:
        raise ValueError(
            f"{op}: {name} is {value}; for x of shape {tuple(tensor.shape)} it must be {-dims} to {dims - 1}"
        )
    return value % dims


def mask(op: str, mask: Tensor, tensor: Tensor, name: str = "mask") -> None:
    """A bool mask whose shape broadcasts to that of `tensor`."""
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: {name} is {dtype_name(mask.dtype)}; it must be bool, True where an entry takes part")
    missing = tensor.dim() - mask.dim()
    if missing < 0 or any(size not in (1, full) for size, full in zip(mask.shape, tensor.shape[missing:], strict=True)):
        was, full = tuple(mask.shape), tuple(tensor.shape)
        raise ValueError(f"{op}: {name} has shape {was}; it must broadcast to the shape of x, {full}")


def widths(op: str, name: str, width: Tensor, *, positive: bool = False) -> None:
    """Widths of Gaussians are finite and not 0. Only the host's copy is free to look at: a device's would be waited
    for."""
    if width.device.type != "cpu" or not values_are_known(width) or width.numel() == 0:
        return
    value = width.detach()
    bad = ~(value.isfinite() & (value > 0 if positive else value != 0))
    if not bad.any():
        return
    index = tuple(bad.nonzero()[0].tolist())
    where = f" at index {index[0] if len(index) == 1 else index}" if index else ""
    wanted = "above 0 and finite" if positive else "finite and not 0"
    raise ValueError(f"{op}: {name} is {value[index].item()}{where}; it must be {wanted}")


def number(op: str, name: str, value: object, *, least: float = 0.0) -> float:
    """A finite number above `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} is {type(value).__name__}; it must be a number")
    if not least < value < float("inf"):
        raise ValueError(f"{op}: {name} is {value}; it must be above {least:g} and finite")
    return float(value)


def linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments of a linear layer, cast as ``torch.nn.functional.linear`` casts them under autocast; the bias is
    contiguous afterwards."""
    tensors(op, x=x, weight=weight)
    tensors(op, optional=True, bias=bias)
    if x.dim() < 1:
        raise ValueError(f"{op}: x has shape (); it must be (..., K)")
    rank(op, "weight", weight, 2, "(N, K)")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}; its last size must be the weight's, K = {weight.shape[1]}"
        )
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        to = torch.get_autocast_dtype(device)
        x, weight, bias = (
            one.to(to) if one is not None and one.is_floating_point() and one.dtype != torch.float64 else one
            for one in (x, weight, bias)
        )
    dtype(op, "x", x, SEQUENCE_DTYPES)
    same_dtype(op, "weight", weight, "x", x)
    same_device(op, x, weight=weight, bias=bias)
    if bias is not None:
        shape(op, "bias", bias, (weight.shape[0],), "(N,)")
        same_dtype(op, "bias", bias, "x", x)
        bias = bias.contiguous()
    return x, weight, bias


def active_rank(op: str, active: object, rank: int) -> int:
    """How many ranks of an adapter are in use: by default all."""
    if active is None:
        return rank
    if isinstance(active, bool) or not isinstance(active, numbers.Integral):
        raise TypeError(f"{op}: active_rank is {type(active).__name__}; it must be an int")
    if not 1 <= active <= rank:
        raise ValueError(f"{op}: active_rank is {active}; it must be 1 to the rank of lora_A, {rank}")
    return int(active)


def seed(op: str, value: object, like: Tensor) -> Tensor:
    """A seed as an int64 tensor of one element on the device of `like`; None is drawn from torch's generator."""
    if value is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=like.device)
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1:
            was = f"{dtype_name(value.dtype)} of shape {tuple(value.shape)}"
            raise TypeError(f"{op}: seed is {was}; it must be a number or an int64 tensor of one element")
        if value.device != like.device:
            raise ValueError(f"{op}: seed is on {value.device}; it must be on {like.device}")
        return value.reshape(1)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: seed is {type(value).__name__}; it must be a number or an int64 tensor of one element")
    return torch.tensor([(int(value) + 2**63) % 2**64 - 2**63], dtype=torch.int64, device=like.device)

"""Where a Mamba block's adapters go: its buffers, and the rows of each that one of its quantities comes from."""

from __future__ import annotations

from itertools import accumulate

from torch import nn

from trifuse.nn.bidirectional_mamba import BidirectionalMamba
from trifuse.nn.mamba import Mamba
from trifuse.nn.mamba2 import Mamba2

__all__ = ["bypasses", "mamba_buffers"]

Buffers = dict[str, range | None]

_BUFFERS = ("in_proj", "x_proj", "dt_proj", "conv1d", "out_proj")


def mamba_buffers(block: nn.Module) -> Buffers:
    """The buffers of a block of this package or a mixer of transformers; of another module none.

    Returns:
        ``{"in_proj": None, "in_proj.x": rows, ...}``: the names of submodules, and names of parts of them with the rows
        of their weights.
    """
    pieces = _pieces(block)
    if pieces is None:
        return {}
    suffixes = ("", "_b") if isinstance(block, BidirectionalMamba) else ("",)
    names = [name + suffix for name in _BUFFERS for suffix in suffixes]
    buffers: Buffers = {name: None for name in names if isinstance(block._modules.get(name), nn.Module)}
    for name, parts in pieces.items():
        buffers.update({f"{name}.{part}": rows for part, rows in parts.items() if len(rows)})
    return buffers


def _pieces(block: nn.Module) -> dict[str, dict[str, range]] | None:
    """The parts of those buffers that have several."""
    if isinstance(block, Mamba | BidirectionalMamba):
        halves = _rows(x=block.d_inner, z=block.d_inner)
        coefficients = _rows(dt=block.dt_rank, B=block.d_state, C=block.d_state)
        both = {"x_proj_b": coefficients} if isinstance(block, BidirectionalMamba) else {}
        return {"in_proj": halves, "x_proj": coefficients, **both}
    if isinstance(block, Mamba2):
        mlp, states = block.d_inner - block.d_ssm, block.ngroups * block.d_state
        return {"in_proj": _rows(z0=mlp, x0=mlp, z=block.d_ssm, x=block.d_ssm, B=states, C=states, dt=block.nheads)}
    if not is_mixer_of_transformers(block):
        return None
    inner, state = block.intermediate_size, block.ssm_state_size
    if hasattr(block, "x_proj_weight"):  # zamba: an input and a gate, channel by channel; the others are no modules
        return {"in_proj": {"x": range(0, 2 * inner, 2), "z": range(1, 2 * inner, 2)}}
    if hasattr(block, "x_proj"):
        coefficients = _rows(dt=block.time_step_rank, B=state, C=state)
        return {"in_proj": _rows(x=inner, z=inner), "x_proj": coefficients}
    states = block.n_groups * state
    return {"in_proj": _rows(z=inner, x=inner, B=states, C=states, dt=block.num_heads)}


def _rows(**sizes: int) -> dict[str, range]:
    ends = accumulate(sizes.values())
    return {name: range(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


def is_mixer_of_transformers(block: nn.Module) -> bool:
    known = ("A_log", "conv1d", "in_proj", "intermediate_size", "ssm_state_size")
    return type(block).__module__.startswith("transformers.models.") and all(hasattr(block, name) for name in known)


def bypasses(parent: nn.Module) -> str | None:
    """Why a module reads the weights of its submodules, so that their adapters would not count; None if it calls
    them."""
    kind, package = type(parent).__name__, type(parent).__module__.partition(".")[0]
    if isinstance(parent, nn.MultiheadAttention):
        return f"a torch.nn.{kind} reads its weights and calls no submodule"
    if is_mixer_of_transformers(parent) and not getattr(type(parent).forward, "calls_submodules", False):
        return (
            f"transformers' {kind} reads the weights of its submodules in places; call trifuse.integrations.install() "
            "first"
        )
    if package == "mamba_ssm" and hasattr(parent, "A_log") and not isinstance(parent, Mamba | Mamba2):
        return f"mamba_ssm's {kind} reads the weights of its submodules; trifuse.nn.{kind} calls them"
    return None

"""Adapters on the layers of a model, by name; which parameters are trained; checkpoints of adapters alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trifuse.nn.dora import DoRALinear
from trifuse.nn.dylora import DyLoRAConv1d, DyLoRALinear
from trifuse.nn.lora import LoRALinear
from trifuse.nn.lora_conv1d import LoRAConv1d
from trifuse.nn.lora_embedding import LoRAEmbedding
from trifuse.nn.low_rank import adapted_by, check_options, scale_of
from trifuse.nn.mamba_buffers import bypasses, mamba_buffers
from trifuse.nn.multi_lora import MultiLoRALinear

__all__ = ["apply_lora", "lora_state_dict", "mark_only_lora_as_trainable"]

_NAME = "apply_lora"
# What takes the place of a linear layer, a depthwise convolution, an embedding.
_KINDS: dict[str, tuple[type | None, type | None, type | None]] = {
    "lora": (LoRALinear, LoRAConv1d, LoRAEmbedding),
    "dylora": (DyLoRALinear, DyLoRAConv1d, None),
    "dora": (DoRALinear, LoRAConv1d, LoRAEmbedding),
    "multi": (MultiLoRALinear, None, None),
}
_ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Embedding)
_BIASES = ("none", "all", "lora_only")


@dataclass
class _Target:
    """A module that gets an adapter: under which names, and on which rows (all of them if `whole`)."""

    module: nn.Module
    names: list[str]
    whole: bool = False
    rows: set[int] = field(default_factory=set)


def apply_lora(
    model: nn.Module,
    target_modules: str | Iterable[str] = "all-linear",
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    kind: str = "lora",
    *,
    scaling: str = "lora",
    adapter_dtype: torch.dtype | None = None,
    bias: str = "none",
    exclude_modules: str | Iterable[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    nested_ranks: Sequence[int] | None = None,
    frozen: bool = False,
    adapters: Sequence[str] = ("default",),
) -> nn.Module:
    """Put adapters on the layers of a model, in place, and freeze the rest of it.

    Args:
        model: whatever holds the layers. Linear layers, depthwise ``torch.nn.Conv1d`` and embeddings can be adapted.
        target_modules: one or several of

            - the name of a module, or the end of it from a dot on (``"q_proj"``, ``"layers.0.mixer.in_proj"``);
            - a part of a Mamba block's buffer: ``"in_proj.x"``, ``"in_proj.z"``, ``"x_proj.dt"``, ``"x_proj.B"``,
              ``"x_proj.C"``; for Mamba-2 ``"in_proj.z"``, ``.x``, ``.B``, ``.C``, ``.dt``. Parts of one buffer share
              one ``lora_A``;
            - a regular expression for whole names (asked if no name is or ends so);
            - ``"all-linear"``: every linear layer but the output head;
            - ``"mamba-buffers"``: of every Mamba block in_proj, x_proj, dt_proj, out_proj and conv1d, as far as it has
              them (for "multi" without conv1d).

        rank, alpha, dropout, scaling, adapter_dtype: as in ``nn.LoRALinear``. A convolution of W taps has no more than
            W ranks, with the same scale. Dropout is of linear layers.
        kind: ``"lora"``, ``"dylora"``, ``"dora"`` (of linear layers; the others get "lora") or ``"multi"``.
        bias: which biases are trained too: ``"none"``, ``"all"``, or ``"lora_only"`` those of adapted layers.
        exclude_modules: names or expressions, as above, of layers that are left as they are.
        rank_pattern, alpha_pattern: other ranks and alphas of layers whose name is, or ends with, a given expression.
        nested_ranks: of kind "lora", frozen: of kind "dylora", see there.
        adapters: of kind "multi": the names of the adapters that each layer gets.

    Returns:
        the model.

    Raises:
        ValueError: a target matches nothing, is not one that can be adapted, has an adapter already or is in a module
            that reads weights instead of calling layers; or an option is wrong. The model is then as it was.
    """
    _check(kind, rank, alpha, dropout, scaling, bias, nested_ranks, frozen)
    targets = _targets(model, target_modules, exclude_modules, kind)
    options = {
        "scaling": scaling, "adapter_dtype": adapter_dtype, "dropout": dropout, "nested_ranks": nested_ranks,
        "frozen": frozen, "adapters": adapters,
    }  # fmt: skip
    were = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        layers = []
        for target in targets:
            ranks = _pattern(target.names[0], rank_pattern, rank)
            alphas = _pattern(target.names[0], alpha_pattern, alpha)
            layers.append(_adapted(target, kind, ranks, alphas, options))
    except Exception:
        for parameter, required in were:
            parameter.requires_grad_(required)
        raise
    owners = _owners(model)
    for target, layer in zip(targets, layers, strict=True):
        tied = [name for name, owner in owners.get(id(layer.weight), ()) if owner is not target.module]
        layer.tied_to = tied[0] if tied else None
        for name in target.names:
            parent_name, _, attribute = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            setattr(parent, attribute, layer)
            if isinstance(parent, nn.TransformerEncoderLayer):  # it calls a layer with a hook, and reads others
                layer.register_forward_pre_hook(_do_nothing)
    mark_only_lora_as_trainable(model, bias)
    return model


def _check(
    kind: str, rank: int, alpha: float | None, dropout: float, scaling: str, bias: str,
    nested_ranks: Sequence[int] | None, frozen: bool,
) -> None:  # fmt: skip
    if kind not in _KINDS:
        raise ValueError(f"{_NAME}: kind is {kind!r}; it must be one of {', '.join(map(repr, _KINDS))}")
    check_options(_NAME, rank, alpha, dropout, scaling)
    _check_bias(_NAME, bias)
    if nested_ranks is not None and kind != "lora":
        raise ValueError(f'{_NAME}: nested_ranks came with kind {kind!r}; they are an option of "lora"')
    if frozen and kind != "dylora":
        raise ValueError(f'{_NAME}: frozen came with kind {kind!r}; it is an option of "dylora"')
    if dropout and kind == "multi":
        raise ValueError(f'{_NAME}: dropout is {dropout}; for kind "multi" it must be 0')


def _targets(model: nn.Module, wanted: Any, excluded: Any, kind: str) -> list[_Target]:
    """The modules to adapt, every name resolved and everything checked that can be."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if any(hasattr(module, "base_layer") and hasattr(module, "lora_A") for module in modules.values()):
        raise ValueError(f"{_NAME}: the model has adapters of PEFT; trifuse.accelerate_peft(model) makes those fused")
    parts: dict[str, tuple[str, range]] = {}
    presets: dict[str, list[str]] = {"all-linear": _all_linear(model, modules), "mamba-buffers": []}
    for name, module in modules.items():
        prefix = f"{name}." if name else ""
        for buffer, rows in mamba_buffers(module).items():
            if rows is not None:
                parts[prefix + buffer] = (prefix + buffer.rpartition(".")[0], rows)
            elif not (kind == "multi" and buffer.startswith("conv1d")):
                presets["mamba-buffers"].append(prefix + buffer)
    names = [name for name in (*modules, *parts) if name]
    skipped = {name for one in _listed(excluded) for name in _matching(one, names, modules)}
    found: dict[int, _Target] = {}
    for one in _listed(wanted):
        matches = [name for name in presets.get(one, _matching(one, names, modules)) if name not in skipped]
        if not matches:
            linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
            some = ", ".join(linear[:8]) + (" and others" if len(linear) > 8 else "")
            raise ValueError(f"{_NAME}: target {one!r} matches no layer of the model; linear ones are {some or 'none'}")
        for name in matches:
            owner, rows = parts.get(name, (name, None))
            module = modules[owner]
            target = found.setdefault(
                id(module), _Target(module, [one for one in modules if one and modules[one] is module])
            )
            target.whole |= rows is None
            target.rows.update(rows or ())
    if not found:
        raise ValueError(f"{_NAME}: target_modules is empty; it must name layers")
    for target in found.values():
        _check_target(target, kind, modules)
    return list(found.values())


def _check_target(target: _Target, kind: str, modules: dict[str, nn.Module]) -> None:
    module, name = target.module, target.names[0]
    was = f"{_NAME}: {name!r} is a {type(module).__name__}"
    if getattr(module, "has_adapter", False):
        raise ValueError(f"{was}; it has an adapter already")
    for classes, replacement in zip(_ADAPTABLE, _KINDS[kind], strict=True):
        if isinstance(module, classes) and replacement is None:
            raise ValueError(f"{was}; kind {kind!r} does not serve it")
    if not isinstance(module, _ADAPTABLE):
        raise ValueError(f"{was}; it must be a torch.nn.Linear, an Embedding or a depthwise Conv1d")
    if kind in ("dora", "multi") and not target.whole:
        raise ValueError(f"{_NAME}: parts of {name!r} came with kind {kind!r}; it must be the whole of it")
    for one in target.names:
        reason = bypasses(modules[one.rpartition(".")[0]])
        if reason is not None:
            raise ValueError(f"{_NAME}: an adapter on {one!r} would not count: {reason}")


def _listed(names: str | Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _matching(wanted: str, names: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """The names that are or end with what is wanted; else those of adaptable layers that it describes in whole."""
    ending = [name for name in names if name == wanted or name.endswith(f".{wanted}")]
    if ending:
        return ending
    try:
        expression = re.compile(wanted)
    except re.error as error:
        raise ValueError(
            f"{_NAME}: target {wanted!r} is the end of no name, and no regular expression ({error})"
        ) from error
    return [
        name
        for name in names
        if expression.fullmatch(name) and (name not in modules or isinstance(modules[name], _ADAPTABLE))
    ]


def _all_linear(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Every linear layer but the output head, and those in torch.nn.MultiheadAttention, which are never called."""
    embeddings = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    head = None
    if hasattr(model, "get_output_embeddings"):
        try:
            head = model.get_output_embeddings()
        except NotImplementedError:
            head = None
    return [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
        and name
        and not (module is head or name.rpartition(".")[2] == "lm_head" or id(module.weight) in embeddings)
        and not isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention)
    ]


def _pattern(name: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        try:
            found = re.fullmatch(rf"(.*\.)?({pattern})", name)
        except re.error as error:
            raise ValueError(f"{_NAME}: a pattern is {pattern!r}, no regular expression ({error})") from error
        if found:
            return value
    return default


def _adapted(target: _Target, kind: str, rank: int, alpha: float | None, options: dict[str, Any]) -> Any:
    """The layer that takes the place of a target."""
    module, name = target.module, target.names[0]
    linear, convolution, embedding = _KINDS[kind]
    check_options(f"{_NAME}: {name}", rank, alpha, 0.0, options["scaling"])
    own = {"rank": rank, "alpha": alpha, "scaling": options["scaling"], "adapter_dtype": options["adapter_dtype"]}
    more = {"frozen": options["frozen"]} if kind == "dylora" else {}
    if isinstance(module, nn.Embedding):
        return embedding.from_embedding(module, **own)
    if isinstance(module, nn.Conv1d):
        own["rank"], own["alpha"] = min(rank, module.kernel_size[0]), rank if alpha is None else alpha
        if kind != "dylora":  # there the scale is that of the active rank, in all layers
            scale = scale_of(own["alpha"], rank, options["scaling"])
            own["alpha"] = scale / scale_of(1.0, own["rank"], options["scaling"])
        return convolution.from_conv1d(module, **own, **more)
    if kind == "multi":
        layer = linear.from_linear(module, adapter_dtype=options["adapter_dtype"])
        for adapter in _listed(options["adapters"]):
            layer.add_adapter(adapter, rank, alpha, scaling=options["scaling"])
        return layer
    if options["nested_ranks"] is not None:
        more["nested_ranks"] = options["nested_ranks"]
    rows = None if target.whole else sorted(target.rows)
    return linear.from_linear(module, rows=rows, dropout=options["dropout"], **own, **more)


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Who holds each parameter, by its identity."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append((name, module))
    return owners


def _do_nothing(module: nn.Module, arguments: tuple) -> None:
    return None


def _check_bias(name: str, bias: str) -> None:
    if bias not in _BIASES:
        raise ValueError(f'{name}: bias is {bias!r}; it must be "none", "all" or "lora_only"')


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Train the adapters of a model (parameters with ``lora_`` in their names) and nothing else.

    Args:
        model: whatever holds the adapters.
        bias: ``"none"``; ``"all"`` biases are trained too; ``"lora_only"`` those of the adapted layers.

    Raises:
        ValueError: the model has no adapter.
    """
    _check_bias("mark_only_lora_as_trainable", bias)
    names = [name for name, _ in model.named_parameters()]
    if not any(adapted_by(name) is not None for name in names):
        raise ValueError("mark_only_lora_as_trainable: the model has no adapters; trifuse.apply_lora makes them")
    trained = set(_chosen(names, bias))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """What a checkpoint of the adapters alone holds; ``model.load_state_dict(..., strict=False)`` reads it.

    Args:
        model: whatever holds the adapters.
        bias: which biases are in it: those that ``mark_only_lora_as_trainable`` names so.
    """
    _check_bias("lora_state_dict", bias)
    state = model.state_dict()
    return {name: state[name] for name in _chosen(list(state), bias)}


def _chosen(names: list[str], bias: str) -> list[str]:
    adapted = {adapted_by(name) for name in names}
    return [
        name
        for name in names
        if adapted_by(name) is not None
        or (bias == "all" and name.rpartition(".")[2] == "bias")
        or (bias == "lora_only" and name.rpartition(".")[2] == "bias" and name.removesuffix("bias") in adapted)
    ]

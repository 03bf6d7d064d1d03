"""PEFT's ``adapter_config.json`` for LoRA: what it says, what of it is served, and which layers it means."""

from __future__ import annotations

import dataclasses
import json
import numbers
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["CONFIG", "Config", "exact_targets", "read_config"]

CONFIG = "adapter_config.json"
_CALLER = "load_peft"

# Options that say nothing about what the adapters compute: where they come from, or how they began.
_NO_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ephemeral_gpu_offload", "eva_config", "inference_mode",
    "fan_in_fan_out", "loftq_config", "lora_ga_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# Starts that leave the base weight as it is; the others change it, and the file says nothing of that change.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_BIASES = ("none", "all", "lora_only")


@dataclass
class Config:
    """What of the configuration is served, under PEFT's names."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    @property
    def scaling(self) -> str:
        return "rslora" if self.use_rslora else "lora"

    def rank_of(self, name: str) -> int:
        return _of_pattern(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        return _of_pattern(self.alpha_pattern, name, self.lora_alpha)

    def means_all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def targets(self, names: Iterable[str]) -> set[str]:
        """Which of a model's modules have an adapter."""
        return {name for name in names if name and self._is_target(name)}

    def saved(self, names: Iterable[str]) -> list[str]:
        """Which of a model's modules are in the file whole; PEFT asks for any ending, dot or not."""
        endings = tuple(self.modules_to_save or ())
        return [name for name in names if name.endswith(endings)] if endings else []

    def _is_target(self, name: str) -> bool:
        if self.exclude_modules and _is_meant(self.exclude_modules, name):
            return False
        if any(re.match(rf"(^|.*\.){one}($|\..*)", name) for one in self.modules_to_save or ()):
            return False
        wanted = self.target_modules or []
        if not _is_meant(wanted, name):
            return False
        layers = self.layers_to_transform
        if isinstance(wanted, str) or name in wanted or layers is None or layers == []:
            return True  # a whole name is meant in whatever layer
        place = self._layer_of(name)
        return place is not None and (place == layers if isinstance(layers, int) else place in layers)

    def _layer_of(self, name: str) -> int | None:
        """The number of the layer that a module is in."""
        patterns = self.layers_pattern or []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
            if found:
                return int(found.group(1))
        found = None if patterns else re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return int(found.group(1)) if found else None


def _is_meant(wanted: list[str] | str, name: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return name in wanted or any(name.endswith(f".{one}") for one in wanted)


def _of_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def read_config(folder: Path) -> Config:
    """The configuration in a folder; raises ValueError, naming the option, where it asks for what is not served."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{_CALLER}: there is no {path}; the folder must be one that PEFT saved an adapter in")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{_CALLER}: {path} is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{_CALLER}: {path} holds {type(values).__name__}; it must hold the options of one adapter")
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{_CALLER}: peft_type is {kind!r}; it must be 'LORA'")
    start = values.pop("init_lora_weights", True)
    if not any(start is one or start == one for one in _STARTS):
        raise ValueError(
            f"{_CALLER}: init_lora_weights is {start!r}, which changes the base weights too; PEFT's save_pretrained "
            "with path_initial_model_for_weight_conversion writes an adapter that does not"
        )
    own = Config.__dataclass_fields__
    for option, value in values.items():
        if option not in own and option not in _NO_EFFECT and value not in (None, False, "", [], {}):
            raise ValueError(f"{_CALLER}: {option} is {value!r}, which is not supported; it must be unset")
    config = Config(**{name: value for name, value in values.items() if name in own and value is not None})
    _check(config)
    return config


def _check(config: Config) -> None:
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, option)
        if not isinstance(patterns, dict):
            raise ValueError(f"{_CALLER}: {option} is {patterns!r}; it must be a dictionary of names")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{_CALLER}: {option} holds {pattern!r}, no regular expression ({error})") from error
    for option in ("use_rslora", "use_dora"):
        if not isinstance(getattr(config, option), bool):
            raise ValueError(f"{_CALLER}: {option} is {getattr(config, option)!r}; it must be true or false")
    dropout = config.lora_dropout
    if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real):
        raise ValueError(f"{_CALLER}: lora_dropout is {dropout!r}; it must be a number")
    for option, ranks in (("r", [config.r]), ("rank_pattern", config.rank_pattern.values())):
        for rank in ranks:
            if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
                raise ValueError(f"{_CALLER}: {option} is or holds {rank!r}; it must be an int of at least 1")
    for option, alphas in (("lora_alpha", [config.lora_alpha]), ("alpha_pattern", config.alpha_pattern.values())):
        for alpha in alphas:
            if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real) or not alpha > 0:
                raise ValueError(f"{_CALLER}: {option} is or holds {alpha!r}; it must be a positive number")
    if not 0 <= config.lora_dropout < 1:
        raise ValueError(f"{_CALLER}: lora_dropout is {config.lora_dropout!r}; it must be in [0, 1)")
    if config.bias not in _BIASES:
        raise ValueError(f"{_CALLER}: bias is {config.bias!r}; it must be one of {', '.join(_BIASES)}")
    if not config.target_modules:
        raise ValueError(f"{_CALLER}: target_modules is {config.target_modules!r}; it must name layers")
    for option in ("target_modules", "exclude_modules"):
        wanted = getattr(config, option)
        if isinstance(wanted, str):
            try:
                re.compile(wanted)
            except re.error as error:
                raise ValueError(f"{_CALLER}: {option} is {wanted!r}, no regular expression ({error})") from error


def exact_targets(config: Config, names: Iterable[str], layers: set[str]) -> list[str] | str:
    """``target_modules`` that mean these layers among a model's modules, and no others: endings if that is enough."""
    names = list(names)
    for wanted in ({name.rpartition(".")[2] for name in layers}, layers):
        if dataclasses.replace(config, target_modules=sorted(wanted)).targets(names) == layers:
            return sorted(wanted)
    return "|".join(re.escape(name) for name in sorted(layers))

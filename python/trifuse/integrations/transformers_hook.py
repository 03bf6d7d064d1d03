"""Puts trifuse into transformers' model code, when it is imported and, as far as that goes, afterwards.

transformers asks for the functions of ``mamba_ssm`` and ``causal_conv1d`` once, when a ``modeling_*`` module is
imported, and keeps what it found. Its mixers read the weights of some submodules and hand them to those functions,
which passes adapters by. So two things happen to a module here: its mixers get a forward that calls submodules
(``mixers.py``), and the functions that it found are looked up again where it was imported too early or too late.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import warnings
from collections.abc import Sequence
from types import FunctionType, ModuleType

from trifuse.integrations import mixers
from trifuse.integrations.stand_ins import VERSIONS

__all__ = ["MIXERS", "Hook"]

# The class in transformers/models/<model>/modeling_<model>.py, and the forward that replaces its own.
MIXERS = {
    "mamba": ("MambaMixer", mixers.mamba),
    "falcon_mamba": ("FalconMambaMixer", mixers.mamba),
    "jamba": ("JambaMambaMixer", mixers.mamba),
    "zamba": ("ZambaMambaMixer", mixers.zamba),
    "mamba2": ("Mamba2Mixer", mixers.mamba2),
    "bamba": ("BambaMixer", mixers.mamba2),
    "zamba2": ("Zamba2MambaMixer", mixers.mamba2),
    "nemotron_h": ("NemotronHMamba2Mixer", mixers.mamba2),
    "granitemoehybrid": ("GraniteMoeHybridMambaLayer", mixers.mamba2),
    "falcon_h1": ("FalconH1Mixer", mixers.mamba2),
}

MODELING = re.compile(r"transformers\.models\.(\w+)\.modeling_\1")
AVAILABILITY = (
    "is_mamba_ssm_available",
    "is_mamba_2_ssm_available",
    "is_causal_conv1d_available",
    "_package_distribution_mapping",
)


class Hook(importlib.abc.MetaPathFinder):
    """Changes transformers' modeling modules as they are imported, and back again."""

    def __init__(self, mixers: bool):
        self.mixers = mixers
        self._forwards: dict[type, FunctionType] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not MODELING.fullmatch(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader, self)
        return spec

    def start(self) -> None:
        early = _modeling_modules()
        sys.meta_path.insert(0, self)
        _forget_availability()
        for module in early:
            _look_up_again(module)
            self.patch(module)
        names = sorted(module.__name__ for module in early if _concerns(module))
        if names:
            warnings.warn(_too_early(names), RuntimeWarning, stacklevel=3)

    def stop(self) -> None:
        sys.meta_path.remove(self)
        for mixer, forward in self._forwards.items():
            mixer.forward = forward
        self._forwards.clear()
        _forget_availability()
        for module in _modeling_modules():
            _look_up_again(module)

    def patch(self, module: ModuleType) -> None:
        """Replace the forward of a module's mixer, if it is one that ``MIXERS`` knows."""
        model = module.__name__.rpartition(".modeling_")[2]
        if not self.mixers or model not in MIXERS:
            return
        name, forward = MIXERS[model]
        mixer = getattr(module, name, None)
        if not _is_known_layout(mixer):
            version = getattr(sys.modules.get("transformers"), "__version__", "of this version")
            warnings.warn(
                f"trifuse.integrations: transformers {version} has no {name} of the form that trifuse knows in "
                f"{module.__name__}; it stays as it is, and runs on trifuse only where it calls mamba_ssm and "
                "causal_conv1d by itself. Use a transformers whose caches have get_conv_state.",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        own = mixer.forward
        self._forwards[mixer] = own

        @functools.wraps(own)
        def replaced(self, *args, **kwargs):
            if "cache" in kwargs:  # as newer versions call it
                kwargs["cache_params"] = kwargs.pop("cache")
            return forward(self, *args, **kwargs)

        replaced.calls_submodules = True
        mixer.forward = replaced


class _PatchingLoader(importlib.abc.Loader):
    """Loads a module as its own loader does, then patches it."""

    def __init__(self, loader: importlib.abc.Loader, hook: Hook):
        self._loader = loader
        self._hook = hook

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._hook.patch(module)


def _modeling_modules() -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if MODELING.fullmatch(name) and module is not None]


def _concerns(module: ModuleType) -> bool:
    model = module.__name__.rpartition(".modeling_")[2]
    return model in MIXERS or any(_lookup_of(value) for value in vars(module).values())


def _is_known_layout(mixer: type | None) -> bool:
    if mixer is None:
        return False
    cache = getattr(sys.modules.get("transformers.cache_utils"), "Cache", None)
    parameters = list(inspect.signature(mixer.forward).parameters)
    expected = ["self", "hidden_states", "cache_params", "attention_mask"]
    parameters = ["cache_params" if name == "cache" else name for name in parameters[:4]]
    return parameters == expected and hasattr(cache, "get_conv_state") and hasattr(cache, "is_recording_past")


def _lookup_of(value: object) -> tuple[str, str, FunctionType] | None:
    """``(function, package, torch fallback)`` that transformers' decorator made a module's function of."""
    if not isinstance(value, FunctionType) or value.__code__.co_name != "wrapped" or not value.__closure__:
        return None
    kept = dict(zip(value.__code__.co_freevars, (cell.cell_contents for cell in value.__closure__), strict=True))
    if kept.get("package") not in VERSIONS or not {"func_name", "torch_function"} <= kept.keys():
        return None
    return kept["func_name"], kept["package"], kept["torch_function"]


def _look_up_again(module: ModuleType) -> None:
    """Let a module find its functions anew, in what is importable now."""
    for name, value in list(vars(module).items()):
        lookup = _lookup_of(value)
        if lookup is not None:
            from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

            function, package, fallback = lookup
            setattr(module, name, use_kernel_func_from_hub_with_fallback(function, package)(fallback))


def _forget_availability() -> None:
    """transformers remembers for a process which packages there are."""
    known = sys.modules.get("transformers.utils.import_utils")
    for name in AVAILABILITY:
        forget = getattr(getattr(known, name, None), "cache_clear", None)
        if forget is not None:
            forget()


def _too_early(names: list[str]) -> str:
    few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"trifuse.integrations.install() came after transformers had imported {few}: model code looks for its "
        "kernels when it is imported. Its classes and functions have been switched to trifuse now, and models use it "
        "from here on; only what was compiled, exported, wrapped by accelerate or copied out of these modules before "
        "keeps the slow path. To be sure, call trifuse.integrations.install() first, before anything that imports "
        "transformers' models."
    )

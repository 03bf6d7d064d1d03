"""trifuse's kernels under the names that other people's code imports, and in other people's models and files.

``install()`` makes ``mamba_ssm``, ``causal_conv1d`` and ``gaussian_adaptive_attention`` importable, and transformers'
Mamba models use the kernels.
``accelerate_peft`` fuses the LoRA layers of a live PEFT model; ``load_peft``, ``save_peft`` and ``load_loralib`` read
and write adapters as PEFT and loralib keep them.
Importing trifuse, or this module, changes nothing.
"""

from __future__ import annotations

from trifuse.integrations import stand_ins, transformers_hook
from trifuse.integrations.loralib_files import load_loralib
from trifuse.integrations.peft_files import load_peft, save_peft
from trifuse.integrations.peft_layers import Acceleration, accelerate_peft, restore_peft

__all__ = [
    "Acceleration",
    "accelerate_peft",
    "install",
    "load_loralib",
    "load_peft",
    "restore_peft",
    "save_peft",
    "uninstall",
]

_finder: stand_ins.Finder | None = None
_hook: transformers_hook.Hook | None = None

# What transformers' models ask for.
OF_TRANSFORMERS = {"mamba_ssm", "causal_conv1d"}


def install(force: bool = False) -> tuple[str, ...]:
    """Serve ``mamba_ssm``, ``causal_conv1d`` and ``gaussian_adaptive_attention`` with trifuse, and put it into
    transformers' Mamba models.

    Call it before transformers' models are imported. The modules have the usual paths, names and signatures
    (``mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined``, ``causal_conv1d.causal_conv1d_fn``,
    ``mamba_ssm.Mamba``, ...) and work on CPUs and GPUs. In transformers the mixers of mamba, falcon_mamba, jamba,
    zamba, mamba2, bamba, zamba2, nemotron_h, granitemoehybrid and falcon_h1 then run on trifuse, each calling its
    submodules, so that adapters on them are honoured; every other model that asks for these packages finds them.
    The classes of ``gaussian_adaptive_attention`` are those of ``trifuse.nn`` with ``normalization="clamped"``, which
    gives what the package gives; their ``eps`` is obeyed.

    Calling it again is allowed; it then only adds what ``force`` adds.

    Args:
        force: also stand in for a package that is installed. Without it an installed package is left alone.

    Returns:
        The names of the packages that trifuse stands in for: with all installed and no ``force``, none. Without
        ``mamba_ssm`` and ``causal_conv1d`` among them transformers is left alone too.

    Warns:
        RuntimeWarning: transformers' model code was imported before; it says what that means and what to do.
    """
    global _finder, _hook
    wanted = tuple(name for name in stand_ins.VERSIONS if force or not stand_ins.is_installed(name))
    if _finder is not None:
        if set(wanted) <= set(_finder.packages):
            return _finder.packages
        uninstall()
    if not wanted:
        return ()
    _finder = stand_ins.Finder(wanted)
    _finder.start()
    if OF_TRANSFORMERS & set(wanted):
        _hook = transformers_hook.Hook(mixers="mamba_ssm" in wanted)
        _hook.start()
    return wanted


def uninstall() -> None:
    """Undo ``install()``: modules, metadata, and everything that was changed in transformers."""
    global _finder, _hook
    if _finder is None:
        return
    _finder.stop()
    if _hook is not None:
        _hook.stop()
    _finder = _hook = None

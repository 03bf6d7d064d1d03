"""Makes the packages in ``VERSIONS`` importable: a finder of modules and of their metadata."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

__all__ = ["VERSIONS", "Finder", "is_installed", "is_ours"]

ROOT = Path(__file__).parent / "published"

# The releases whose interfaces the stand-ins have. The local part says whose code answers; versions compare as usual.
VERSIONS = {
    "mamba_ssm": "2.3.2+trifuse",
    "causal_conv1d": "1.6.1+trifuse",
    "gaussian_adaptive_attention": "0.1.5+trifuse",
}


class _Distribution(importlib.metadata.Distribution):
    """What ``importlib.metadata`` says of a stand-in, as of any installed package."""

    def __init__(self, package: str):
        self.package = package

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            name, version = self.package.replace("_", "-"), VERSIONS[self.package]
            return f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: trifuse's kernels by this name\n"
        return f"{self.package}\n" if filename == "top_level.txt" else None

    def locate_file(self, path) -> Path:
        return ROOT / path


class Finder(importlib.abc.MetaPathFinder):
    """Stands first on ``sys.meta_path`` and answers for some of the names in ``VERSIONS``."""

    def __init__(self, packages: Iterable[str]):
        self.packages = tuple(packages)
        self._hidden: dict[str, ModuleType] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.packages:
            return None  # what is inside a package is found along its __path__, as always
        folder = ROOT / fullname
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterator[importlib.metadata.Distribution]:
        wanted = None if context is None or context.name is None else _normalized(context.name)
        for package in self.packages:
            if wanted in (None, _normalized(package)):
                yield _Distribution(package)

    def start(self) -> None:
        """Answer from now on; modules of the same names that were imported before are put aside."""
        self._hidden = _remove_modules(self.packages)
        sys.meta_path.insert(0, self)
        importlib.invalidate_caches()

    def stop(self) -> None:
        """Answer no more, and put back what was there before."""
        sys.meta_path.remove(self)
        _remove_modules(self.packages)
        sys.modules.update(self._hidden)
        self._hidden = {}
        importlib.invalidate_caches()


def is_installed(package: str) -> bool:
    """Whether a package can be imported that is not one of the stand-ins."""
    if package in sys.modules:
        return not is_ours(sys.modules[package])
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    return spec is not None and not (spec.origin or "").startswith(str(ROOT))


def is_ours(module: ModuleType) -> bool:
    """Whether a module is one of the stand-ins."""
    return str(getattr(module, "__file__", None) or "").startswith(str(ROOT))


def _remove_modules(packages: Iterable[str]) -> dict[str, ModuleType]:
    roots = tuple(packages)
    names = [name for name in sys.modules if name.partition(".")[0] in roots]
    return {name: sys.modules.pop(name) for name in names}


def _normalized(name: str) -> str:
    return name.replace("-", "_").replace(".", "_").lower()

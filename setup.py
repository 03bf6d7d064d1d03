"""Drives CMakeLists.txt. Facts of torch are asked of a child Python: this file never imports it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CUDA_CHOICE = {None: "AUTO", "": "AUTO", "1": "ON", "0": "OFF"}
ASK_TORCH = "import torch, os; print(torch.__version__); print(os.path.dirname(torch.__file__))"


def torch_facts() -> tuple[str, Path]:
    """The version and the folder of the torch that this build is for."""
    answer = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True)
    if answer.returncode:
        raise SystemExit(
            "trifuse is built against an installed torch (2.10 or newer), and this Python has none.\n"
            "Install torch, then: pip install --no-build-isolation .\n" + answer.stderr
        )
    version, folder = answer.stdout.strip().splitlines()[-2:]
    return version, Path(folder)


def cuda_choice() -> str:
    value = os.environ.get("TRIFUSE_BUILD_CUDA")
    if value not in CUDA_CHOICE:
        raise SystemExit(f"TRIFUSE_BUILD_CUDA is {value!r}; it must be 1, 0 or unset")
    return CUDA_CHOICE[value]


class CMakeBuild(build_ext):
    """Builds everything compiled, as one step, into the folder of the package."""

    def run(self) -> None:
        if self.editable_mode:
            self.inplace = True
        package = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        # An editable installation is built again and again: its folder is kept, and only changes are compiled.
        build = (
            ROOT.resolve() / "build" / "editable" if self.editable_mode else Path(self.build_temp).resolve() / "cmake"
        )
        build.mkdir(parents=True, exist_ok=True)
        version, torch = torch_facts()
        configure = [
            "cmake", "-S", str(ROOT.resolve()), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
            f"-DTRIFUSE_OUTPUT={package}",
            f"-DTRIFUSE_TORCH_INCLUDE={torch / 'include'}",
            f"-DTRIFUSE_TORCH_LIB={torch / 'lib'}",
            f"-DTRIFUSE_TORCH_VERSION={version}",
            f"-DTRIFUSE_BUILD_CUDA={cuda_choice()}",
            f"-DTRIFUSE_BUILD_EMULATED={'ON' if self.editable_mode else 'OFF'}",  # only the tests use it
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={self.pybind11_folder()}",
        ]  # fmt: skip
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)

    @staticmethod
    def pybind11_folder() -> str:
        return subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()


setup(
    ext_modules=[Extension("trifuse._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    packages=[
        "trifuse",
        "trifuse.analysis",
        "trifuse.integrations",
        "trifuse.integrations.published.causal_conv1d",
        "trifuse.integrations.published.gaussian_adaptive_attention",
        "trifuse.integrations.published.mamba_ssm",
        "trifuse.integrations.published.mamba_ssm.models",
        "trifuse.integrations.published.mamba_ssm.modules",
        "trifuse.integrations.published.mamba_ssm.ops",
        "trifuse.integrations.published.mamba_ssm.ops.triton",
        "trifuse.integrations.published.mamba_ssm.utils",
        "trifuse.nn",
        "trifuse.ops",
        "trifuse.optim",
        "trifuse.reference",
        "trifuse.registration",
        "trifuse.report",
        "trifuse.report.subjects",
        "trifuse.triton_kernels",
    ],
    package_dir={"": "python", "trifuse.triton_kernels": "triton_kernels"},
    package_data={"trifuse": ["py.typed"], "trifuse.report": ["*.j2"]},
)

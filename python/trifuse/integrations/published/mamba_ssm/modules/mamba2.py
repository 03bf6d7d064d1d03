"""The Mamba-2 block."""

from trifuse.nn import Mamba2

__all__ = ["Mamba2"]

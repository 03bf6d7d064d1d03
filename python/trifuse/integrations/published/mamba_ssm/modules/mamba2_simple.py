"""The Mamba-2 block without a cache."""

from trifuse.nn import Mamba2Simple

__all__ = ["Mamba2Simple"]

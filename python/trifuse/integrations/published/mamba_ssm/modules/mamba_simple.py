"""The Mamba block."""

from trifuse.nn import Mamba

from .block import Block

__all__ = ["Block", "Mamba"]

"""Drop-in ``torch.nn`` modules."""

from trifuse.nn.block import InferenceParams
from trifuse.nn.mamba import Mamba

__all__ = ["InferenceParams", "Mamba"]

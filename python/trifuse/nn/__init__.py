"""Drop-in ``torch.nn`` modules."""

from trifuse.nn.mamba import InferenceParams, Mamba

__all__ = ["InferenceParams", "Mamba"]

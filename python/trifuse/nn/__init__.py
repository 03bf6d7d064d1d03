"""Drop-in ``torch.nn`` modules."""

from trifuse.nn.bidirectional_mamba import BidirectionalMamba
from trifuse.nn.block import InferenceParams
from trifuse.nn.mamba import Mamba
from trifuse.nn.mamba2 import Mamba2
from trifuse.nn.mamba2_simple import Mamba2Simple
from trifuse.nn.norm import RMSNormGated

__all__ = ["BidirectionalMamba", "InferenceParams", "Mamba", "Mamba2", "Mamba2Simple", "RMSNormGated"]

"""trifuse under the name ``causal_conv1d``: see ``trifuse.integrations.install``."""

from trifuse.integrations.stand_ins import VERSIONS

from .causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update
from .causal_conv1d_varlen import causal_conv1d_varlen_states

__version__ = VERSIONS["causal_conv1d"]

__all__ = ["__version__", "causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states"]

"""trifuse under the name ``gaussian_adaptive_attention``: see ``trifuse.integrations.install``."""

from trifuse.integrations.stand_ins import VERSIONS

from .GaussianBlock import GaussianAdaptiveAttention, GaussianBlock, MultiHeadGaussianAdaptiveAttention

__version__ = VERSIONS["gaussian_adaptive_attention"]

__all__ = ["GaussianAdaptiveAttention", "GaussianBlock", "MultiHeadGaussianAdaptiveAttention", "__version__"]

"""What trained models have learned, measured over data."""

from trifuse.analysis.importance import ImportanceFactor, LayerImportance, importance_factor
from trifuse.analysis.lyapunov import lyapunov_exponents

__all__ = ["ImportanceFactor", "LayerImportance", "importance_factor", "lyapunov_exponents"]

"""What trained models have learned, measured over data."""

from trifuse.analysis.importance import ImportanceFactor, LayerImportance, importance_factor

__all__ = ["ImportanceFactor", "LayerImportance", "importance_factor"]

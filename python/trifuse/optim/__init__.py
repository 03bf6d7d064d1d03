"""Optimizers."""

from trifuse.optim.low_rank_adamw import LowRankAdamW

__all__ = ["LowRankAdamW"]

"""Plain PyTorch definitions of every op: readable, float64-clean, differentiable without limit."""

from trifuse.reference.causal_conv1d import causal_conv1d, causal_conv1d_update
from trifuse.reference.linear_scan import linear_scan
from trifuse.reference.selective_scan import selective_scan, selective_state_update
from trifuse.reference.ssd import ssd

__all__ = ["causal_conv1d", "causal_conv1d_update", "linear_scan", "selective_scan", "selective_state_update", "ssd"]

"""Plain PyTorch definitions of every op: readable, float64-clean, differentiable without limit."""

from trifuse.reference.selective_scan import selective_scan, selective_state_update

__all__ = ["selective_scan", "selective_state_update"]

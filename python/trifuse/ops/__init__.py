"""The public functions."""

from trifuse.ops.selective_scan import selective_scan
from trifuse.ops.selective_state_update import selective_state_update

__all__ = ["selective_scan", "selective_state_update"]

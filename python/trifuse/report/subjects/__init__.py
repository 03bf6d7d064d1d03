"""What the report measures, one room per subject; their order decides among equally important workloads."""

from __future__ import annotations

from trifuse.report.subject import OpSubject, Subject
from trifuse.report.subjects.selective_scan import SelectiveScan
from trifuse.report.subjects.selective_state_update import SelectiveStateUpdate

__all__ = ["OPS", "SUBJECTS"]

SUBJECTS: dict[str, Subject] = {one.op: one for one in (SelectiveScan(), SelectiveStateUpdate())}

OPS: dict[str, OpSubject] = {name: one for name, one in SUBJECTS.items() if isinstance(one, OpSubject)}

"""What the rows say: speed-ups within a group, distance from the floors, and the headline figures."""

from __future__ import annotations

from trifuse.report.headlines import median
from trifuse.report.subject import Subject
from trifuse.report.subjects import SUBJECTS
from trifuse.report.timing import Measured
from trifuse.report.workloads import Workload, every

__all__ = ["groups", "headlines", "reasons"]


def groups(workloads: tuple[Workload, ...], measured: Measured) -> list[dict]:
    """The report's tables: one per workload and direction, each row compared with its rivals and floor.

    A row whose kernel failed its check carries ``failed`` (the figures) and no time.
    """
    out, order = [], list(SUBJECTS)
    for workload in sorted(workloads, key=lambda one: order.index(one.op)):
        subject = SUBJECTS[workload.op]
        for direction in workload.directions:
            name = f"{workload.name} {direction}"
            rows = [{**row, **_split(row["id"], subject)} for row in measured.rows if row["group"] == name]
            _annotate(rows, subject)
            failed = [
                {"id": one["entry"], **_split(one["entry"], subject), "failed": one["reason"]}
                for one in measured.failed
                if one["entry"].startswith(f"{workload.name}/{direction}/")
            ]
            if rows or failed:
                out.append({
                    "name": name, "workload": workload.name, "title": workload.title, "op": workload.op,
                    "shape": workload.shape(), "sizes": workload.sizes, "direction": direction,
                    "floor": subject.measure_text,
                    "rows": sorted(rows + failed, key=lambda row, subject=subject: _order(row, subject)),
                })  # fmt: skip
    return out


def _split(entry: str, subject: Subject) -> dict:
    _, _, contender, dtype, *layout = entry.split("/")
    return {
        "contender": contender, "title": subject.title(contender), "kind": subject.kind(contender), "dtype": dtype,
        "layout": layout[0] if layout else "",
    }  # fmt: skip


def _order(row: dict, subject: Subject) -> tuple:
    place = ("kernel", "reference", "rival", "floor").index(row["kind"])
    names = list(subject.floors if row["kind"] == "floor" else subject.contenders)
    return place, names.index(row["contender"]), row["dtype"] != "float32", row["layout"]


def _annotate(rows: list[dict], subject: Subject) -> None:
    others = [row for row in rows if row["kind"] in ("reference", "rival")]
    best = min(others, key=median, default=None)
    floors = [row for row in rows if row["contender"] == subject.measure]
    for row in rows:
        if row["kind"] == "floor":
            continue
        if best is not None and row["kind"] == "kernel":
            row["speedup"] = median(best) / median(row)
            row["speedup_over"] = best["title"]
            row["speedups"] = {other["contender"]: median(other) / median(row) for other in others}
        floor = next((one for one in floors if one["dtype"] == row["dtype"]), floors[0] if floors else None)
        seconds = median(floor) if floor is not None else row.get("floor_computed")
        if seconds is not None:
            row["floor_ratio"] = median(row) / seconds
            row["floor_note"] = floor["note"] if floor is not None else row["floor_computed_note"]
        if row.get("peak_extra_bytes") is not None and row.get("bytes"):
            row["memory_ratio"] = row["peak_extra_bytes"] / row["bytes"]


def reasons(measured: Measured) -> list[dict]:
    """Why contenders are absent: one line per contender and reason, with the entries it stands for."""
    subjects = {one.name: SUBJECTS[one.op] for one in every()}
    out: dict[tuple[str, str], list[str]] = {}
    for one in measured.absent:
        if not one["failed"]:
            parts = one["entry"].split("/")
            key = (subjects[parts[0]].title(parts[2]), one["reason"])
            out.setdefault(key, []).append(f"{parts[0]} {parts[1]}")
    return [{"title": title, "reason": reason, "entries": sorted(set(names))} for (title, reason), names in out.items()]


def headlines(tables: list[dict], device: str) -> list[dict]:
    """The figures to read first, subject by subject."""
    rows = {table["name"]: [row for row in table["rows"] if "seconds" in row] for table in tables}
    return [line | {"op": name} for name, one in SUBJECTS.items() for line in one.headlines(rows, device)]

"""What the rows say: speed-ups within a group, distance from the floors, and the headline figures."""

from __future__ import annotations

from trifuse.report.arena import COPY_FLOOR, EXP_FLOOR
from trifuse.report.contenders import CONTENDERS
from trifuse.report.timing import Measured
from trifuse.report.workloads import FWD, FWD_BWD, Workload

__all__ = ["groups", "headlines", "kind", "reasons", "title"]

_FLOOR_TITLES = {EXP_FLOOR: "floor: the exponentials alone", COPY_FLOOR: "floor: copying inputs and outputs"}


def title(contender: str) -> str:
    return _FLOOR_TITLES[contender] if contender in _FLOOR_TITLES else CONTENDERS[contender].title


def kind(contender: str) -> str:
    return "floor" if contender in _FLOOR_TITLES else CONTENDERS[contender].kind


def groups(workloads: tuple[Workload, ...], measured: Measured) -> list[dict]:
    """The report's tables: one per workload and direction, each row compared with its rivals and floor.

    A row whose kernel failed its check carries ``failed`` (the figures) and no time.
    """
    out = []
    for workload in workloads:
        for direction in workload.directions:
            name = f"{workload.name} {direction}"
            rows = [dict(row) for row in measured.rows if row["group"] == name]
            _annotate(rows)
            failed = [
                {"id": one["entry"], **_split(one["entry"]), "failed": one["reason"]}
                for one in measured.failed
                if one["entry"].startswith(f"{workload.name}/{direction}/")
            ]
            if rows or failed:
                out.append({
                    "name": name, "workload": workload.name, "title": workload.title, "op": workload.op,
                    "shape": workload.shape(), "seqlen": workload.seqlen, "dim": workload.dim,
                    "direction": direction, "rows": sorted(rows + failed, key=_order),
                })  # fmt: skip
    return out


def _split(entry: str) -> dict:
    _, _, contender, dtype, *layout = entry.split("/")
    return {
        "contender": contender, "title": title(contender), "kind": kind(contender), "dtype": dtype,
        "layout": layout[0] if layout else "",
    }  # fmt: skip


def _order(row: dict) -> tuple:
    place = ("kernel", "reference", "rival", "floor").index(row["kind"])
    return place, list(CONTENDERS).index(row["contender"]) if place < 3 else 0, row["dtype"] != "float32", row["layout"]


def _annotate(rows: list[dict]) -> None:
    for row in rows:
        row.update(_split(row["id"]))
    others = [row for row in rows if row["kind"] in ("reference", "rival")]
    best = min(others, key=_median, default=None)
    floor = next((row for row in rows if row["contender"] == EXP_FLOOR), None)
    for row in rows:
        if row["kind"] == "floor":
            continue
        if best is not None and row["kind"] == "kernel":
            row["speedup"] = _median(best) / _median(row)
            row["speedup_over"] = best["title"]
            row["speedups"] = {other["contender"]: _median(other) / _median(row) for other in others}
        computed = row.get("exp_floor_computed")
        seconds = _median(floor) if floor is not None else computed
        if seconds is not None:
            row["floor_ratio"] = _median(row) / seconds
            row["floor_note"] = floor["note"] if floor is not None else row["exp_floor_note"]
        if row.get("peak_extra_bytes") is not None:
            row["memory_ratio"] = row["peak_extra_bytes"] / row["bytes"]


def _median(row: dict) -> float:
    return row["seconds"]["median"]


def reasons(measured: Measured) -> list[dict]:
    """Why contenders are absent: one line per contender and reason, with the entries it stands for."""
    out: dict[tuple[str, str], list[str]] = {}
    for one in measured.absent:
        if not one["failed"]:
            parts = one["entry"].split("/")
            out.setdefault((parts[2], one["reason"]), []).append(f"{parts[0]} {parts[1]}")
    return [
        {"title": title(contender), "reason": reason, "entries": sorted(set(names))}
        for (contender, reason), names in out.items()
    ]


def headlines(tables: list[dict], device: str) -> list[dict]:
    """The figures to read first: label, value, and what exactly was divided by what."""
    name = "mamba-130m" if device == "cpu" else "mamba-370m"
    found = {table["name"]: [row for row in table["rows"] if "seconds" in row] for table in tables}
    out = []
    for direction in (FWD, FWD_BWD):
        rows = found.get(f"{name} {direction}", [])
        for layout in ("bld", "bdl"):
            row = _pick(rows, "kernel", "float32", layout)
            if row is None:
                continue
            for rival, ratio in sorted(row.get("speedups", {}).items(), key=lambda item: item[1]):
                out.append(_line(f"{direction}, {layout}, against {rival}", times(ratio),
                                 f"{title(rival)} / {row['title']}, medians, float32, {name}"))  # fmt: skip
            older = next((one for one in rows if (one["contender"], one["layout"]) == ("cpp-avx2", layout)), None)
            for rival, ratio in sorted(older["speedups"].items() if older else ()):
                if rival in ("reference", "mambapy"):
                    out.append(_line(f"{direction}, {layout}, AVX2 build against {rival}", times(ratio),
                                     f"{title(rival)} / {older['title']}, medians, float32, {name}"))  # fmt: skip
            if direction == FWD and "floor_ratio" in row:
                out.append(_line(f"fwd, {layout}, over the exponential floor", f"{row['floor_ratio']:.2f} x",
                                 f"{row['title']} / {row['floor_note']}"))  # fmt: skip
            half = _pick(rows, "kernel", "bfloat16", layout)
            if half is not None:
                out.append(_line(f"{direction}, {layout}, bfloat16 / float32", f"{_median(half) / _median(row):.2f} x",
                                 f"time of {row['title']} in bfloat16 / in float32"))  # fmt: skip
    long = _pick(found.get(f"long-64k {FWD_BWD}", []), "kernel", "float32", "bld")
    if long is not None and "memory_ratio" in long:
        out.append(_line("fwd+bwd, 65536 tokens, peak extra memory", f"{long['memory_ratio']:.2f} x",
                         f"peak extra memory ({long['memory_method']}) / (inputs + output + gradients)"))  # fmt: skip
    return out


def times(ratio: float) -> str:
    return f"{ratio:.0f} x" if ratio >= 100 else f"{ratio:.3g} x"


def _line(label: str, value: str, detail: str) -> dict:
    return {"label": label, "value": value, "detail": detail}


def _pick(rows: list[dict], of: str, dtype: str, layout: str) -> dict | None:
    """The fastest kernel at its default settings of one dtype and layout."""
    fit = [row for row in rows if (row["kind"], row["dtype"], row["layout"]) == (of, dtype, layout)]
    return min((row for row in fit if row["contender"] != "cpp-avx2"), key=_median, default=None)

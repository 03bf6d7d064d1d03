"""Lines of the headline table: a label, a value, and what exactly was divided by what."""

from __future__ import annotations

from trifuse.report.contenders import AVX2

__all__ = ["against", "line", "median", "pick", "times"]


def times(ratio: float) -> str:
    return f"{ratio:.0f} x" if ratio >= 100 else f"{ratio:.3g} x"


def line(label: str, value: str, detail: str, asked: str = "") -> dict:
    """A line; `asked` is what the project set out to reach, in words."""
    return {"label": label, "value": value, "detail": f"{detail}; asked for: {asked}" if asked else detail}


def median(row: dict) -> float:
    return row["seconds"]["median"]


def pick(rows: list[dict], kind: str = "kernel", dtype: str = "float32", layout: str = "") -> dict | None:
    """The fastest row of a kind at its default settings, of one dtype and layout."""
    fit = [row for row in rows if (row["kind"], row["dtype"], row["layout"]) == (kind, dtype, layout)]
    return min((row for row in fit if row["contender"] != AVX2), key=median, default=None)


def against(
    rows: list[dict],
    row: dict,
    label: str,
    rivals: tuple[str, ...] | None = None,
    where: str = "",
    asked: dict[str, float] | None = None,
) -> list[dict]:
    """A line for every rival of a row (or the named ones), the closest first; `asked` of some of them."""
    names = {one["contender"]: one["title"] for one in rows}
    out, suffix = [], f", {where}" if where else ""
    for rival, ratio in sorted(row.get("speedups", {}).items(), key=lambda item: item[1]):
        if rivals is None or rival in rivals:
            detail = f"{names[rival]} / {row['title']}, medians, {row['dtype']}{suffix}"
            least = (asked or {}).get(rival)
            goal = f"at least {least:g} x" if least else ""
            out.append(line(f"{label} against {rival}", times(ratio), detail, goal))
    return out

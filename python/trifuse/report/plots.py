"""The page's plots, as self-contained SVG images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable

__all__ = ["all_plots", "loss_plot"]

_COLOURS = {
    "cpp": "#0b7a75", "cpp-avx2": "#5fb3ae", "cuda": "#0b7a75", "triton": "#3d5a9e", "reference": "#b3541e",
    "loop-compiled": "#d98e04", "mambapy": "#8e3b8f", "transformers": "#c23b5a", "mamba_ssm": "#555555",
    "exp-floor": "#999999", "copy-floor": "#cccccc",
}  # fmt: skip


def all_plots(groups: list[dict]) -> list[dict]:
    """Every plot that the rows suffice for: title, caption and the image as a data URI."""
    found = []
    for title, caption, draw in (
        ("Time against length", "float32, D 1536, N 16. Solid: forward; dashed: forward + backward.", _lengths),
        ("Speed-up", "The fastest trifuse kernel over each rival of the same workload, float32.", _speedups),
        ("Fraction of the floor", "Time of the floor named with the table over that of the kernel, forward.", _floors),
        ("Peak extra memory", "Beyond the inputs, over the bytes of inputs, output and (backward) gradients.", _memory),
    ):  # fmt: skip
        image = _draw(lambda axes, draw=draw: draw(axes, groups))
        if image is not None:
            found.append({"title": title, "caption": caption, "image": image})
    return found


def loss_plot(data: dict) -> str | None:
    """The example's losses, in bits per byte, with the fast backend and with the reference."""
    fast, reference = data.get("losses"), data.get("reference_losses")

    def draw(axes) -> bool:
        axes.plot([loss / math.log(2) for loss in fast], color=_COLOURS["cpp"], label=data.get("backend", "trifuse"))
        if reference:
            axes.plot([loss / math.log(2) for loss in reference], ".", color=_COLOURS["reference"], label="reference")
        axes.set(xlabel="step", ylabel="bits per byte")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        return True

    return _draw(draw) if fast else None


def _draw(draw: Callable) -> str | None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "path"}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(6.4, 3.9), layout="constrained")
        try:
            if not draw(axes):
                return None
            stream = io.BytesIO()
            figure.savefig(stream, format="svg", metadata={"Date": None})
        finally:
            pyplot.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def _timed(groups: list[dict], op: str | None = "selective_scan"):
    for group in groups:
        if op is None or group["op"] == op:
            for row in group["rows"]:
                if "seconds" in row:
                    yield group, row


def _lengths(axes, groups: list[dict]) -> bool:
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for group, row in _timed(groups):
        same = row["dtype"] == "float32" and row["contender"] not in ("cpp-avx2", "copy-floor")
        if not same or group["sizes"]["D"] != 1536 or (row["kind"] == "kernel" and row["layout"] != "bld"):
            continue
        if row["contender"] == "exp-floor" and group["direction"] != "fwd":
            continue
        points = lines.setdefault((row["contender"], group["direction"]), {})
        points[group["sizes"]["L"]] = row["seconds"]["median"]
    named: set[str] = set()
    for (contender, direction), points in lines.items():
        lengths = sorted(points)
        style = "-" if direction == "fwd" else "--"
        axes.plot(lengths, [points[one] for one in lengths], style, marker="o", markersize=3.5,
                  color=_COLOURS.get(contender), label=None if contender in named else contender)  # fmt: skip
        named.add(contender)
    axes.set(xscale="log", yscale="log", xlabel="sequence length", ylabel="seconds, median")
    axes.set_xticks(ticks := sorted({length for points in lines.values() for length in points}), map(str, ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    if lines:
        axes.legend(fontsize=7.5, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return bool(lines)


def _bars(axes, labels: list[str], values: list[float], colours: list[str], text: Callable[[float], str]) -> bool:
    if not labels:
        return False
    places = range(len(labels))
    axes.figure.set_figheight(max(2.2, 0.22 * len(labels) + 0.8))
    axes.barh(places, values, color=colours, height=0.7)
    axes.set_yticks(places, labels, fontsize=7.5)
    axes.invert_yaxis()
    for place, value in zip(places, values, strict=True):
        axes.annotate(text(value), (value, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.margins(x=0.12)
    return True


def _speedups(axes, groups: list[dict]) -> bool:
    labels, values, colours = [], [], []
    for group in groups:
        rows = [row for row in group["rows"] if row.get("speedups") and row["dtype"] == "float32"]
        rows = [row for row in rows if row["contender"] != "cpp-avx2"]
        if not rows:
            continue
        best = min(rows, key=lambda row: row["seconds"]["median"])
        for rival, ratio in best["speedups"].items():
            labels.append(f"{group['name']} / {rival}")
            values.append(ratio)
            colours.append(_COLOURS.get(rival, "#777777"))
    axes.set(xscale="log", xlabel="times faster")
    return _bars(axes, labels, values, colours, lambda value: f"{value:.0f}" if value >= 10 else f"{value:.1f}")


def _floors(axes, groups: list[dict]) -> bool:
    labels, values, colours = [], [], []
    for group, row in _timed(groups, None):
        if group["direction"] in ("fwd", "forward") and row["kind"] == "kernel" and "floor_ratio" in row:
            labels.append(f"{group['workload']} {row['contender']} {row['dtype']} {row['layout']}")
            values.append(1 / row["floor_ratio"])
            colours.append(_COLOURS.get(row["contender"], "#777777"))
    axes.axvline(1.0, color="#999999", linewidth=1)
    axes.set(xlabel="fraction of the floor")
    return _bars(axes, labels, values, colours, lambda value: f"{value:.2f}")


def _memory(axes, groups: list[dict]) -> bool:
    labels, values, colours = [], [], []
    for group, row in _timed(groups, None):
        # Small calls are below what a resident set can resolve.
        if row["kind"] == "floor" or "memory_ratio" not in row or row["dtype"] != "float32" or row["bytes"] < 8e6:
            continue
        if row["contender"] == "cpp-avx2" or (row["kind"] == "kernel" and row["layout"] == "bdl"):
            continue
        labels.append(f"{group['name']} {row['contender']}")
        values.append(max(row["memory_ratio"], 1e-3))
        colours.append(_COLOURS.get(row["contender"], "#777777"))
    axes.set(xscale="log", xlabel="peak extra bytes / (inputs + output + gradients)")
    return _bars(axes, labels, values, colours, lambda value: f"{value:.2f}")

"""The report as one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path

from trifuse.report import plots, table

__all__ = ["write_page"]


def write_page(report: dict, path: Path) -> None:
    """Render the template, which ships with the package, with plots embedded as images."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    template = environment.get_template("template.html.j2")
    page = template.render(
        report=report, plots=plots.all_plots(report["groups"]), headers=table.HEADERS, cells=table.cells,
        verdicts=_worst_per_contender(report["verdicts"]), facts=_facts(report["machine"]), number=_number,
        losses=plots.loss_plot(report["byte_lm"]["data"]) if report["byte_lm"] else None,
    )  # fmt: skip
    path.write_text(page, encoding="utf-8")


def _worst_per_contender(verdicts: list[dict]) -> list[dict]:
    """One line per verdict: its entry, and its check nearest to (or furthest beyond) the bound."""
    out = []
    for verdict in verdicts:
        worst = max(verdict["checks"], key=lambda one: one["error"] / (one["bound"] or 1e-300), default=None)
        out.append({"entry": verdict["entry"], "ok": verdict["ok"], "count": len(verdict["checks"]),
                    "summary": verdict["summary"], "worst": worst})  # fmt: skip
    return out


def _facts(machine: dict) -> list[tuple[str, str]]:
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    build = ", ".join(f"{name} {value}" for name, value in machine["build"].items())
    rows = [
        ("processor", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads used"),
        ("instruction sets", f"{machine['isa'] or 'none'} in use; can use: {', '.join(machine['isas']) or 'none'}"),
        ("GPU", "; ".join(machine["cuda"]) or "none"),
        ("torch", machine["torch"]),
        ("packages", packages),
        ("trifuse", f"{machine['trifuse']}, commit {machine['commit'] or 'unknown'}"),
        ("build", build or "not recorded"),
        ("libraries", "; ".join(f"{name}: {state}" for name, state in machine["libraries"].items())),
        ("system", f"{machine['system']}, Python {machine['python']}"),
    ]
    return rows


def _number(value: object) -> str:
    return f"{value:,.5g}" if isinstance(value, float) else str(value)

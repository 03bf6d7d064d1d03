"""The report in the terminal: a progress bar while it runs, tables when it is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from trifuse.report.headlines import times

__all__ = ["cells", "console", "print_report", "progress", "si_bytes", "si_time"]


def console() -> Console:
    """A console as wide as the tables need where the output is a file or a pipe."""
    found = Console()
    return found if found.is_terminal else Console(width=150)


@contextmanager
def progress(on: Console) -> Iterator:
    """A bar that follows the events of the benchmarks; yields the callable that takes them."""
    columns = (
        TextColumn("[progress.description]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=on, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def take(event: dict) -> None:
            if event["kind"] == "plan":
                bar.update(task, total=(bar.tasks[0].total or 0) + event["turns"])
            elif event["kind"] == "turn":
                bar.update(task, description=event["entry"], advance=1)
            elif event["kind"] == "verdict" and not event["ok"]:
                bar.console.print(f"[bold red]FAILED[/] {event['entry']}: {event['summary']}")

        yield take


def si_time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 100 * scale else f"{seconds / scale:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def si_bytes(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


HEADERS = ("contender", "dtype", "layout", "median", "quartiles", "rounds", "speed-up", "x floor", "extra memory")


def cells(row: dict) -> tuple[str, ...]:
    """A row as text, the same in the terminal and on the page. A failed kernel has no speed."""
    first = (row["title"], row["dtype"], row["layout"] or "-")
    if "failed" in row:
        return (*first, "FAILED", "", "", "", "", "")
    seconds = row["seconds"]
    return (
        *first,
        si_time(seconds["median"]),
        f"{si_time(seconds['q1'])} … {si_time(seconds['q3'])}",
        str(row["rounds"]),
        times(row["speedup"]) if "speedup" in row else "",
        times(row["floor_ratio"]) if "floor_ratio" in row else "",
        _memory(row),
    )


def _memory(row: dict) -> str:
    if row.get("peak_extra_bytes") is None:
        return ""
    ratio = f" ({row['memory_ratio']:.2f} x)" if "memory_ratio" in row else ""
    return si_bytes(row["peak_extra_bytes"]) + ratio


def print_report(on: Console, report: dict) -> None:
    machine = report["machine"]
    on.print(f"[bold]trifuse {machine['trifuse']}[/] on {machine['cpu']}, {machine['threads']} threads, "
             f"kernels {machine['isa'] or 'not compiled'}, torch {machine['torch']}, "
             + (", ".join(machine["cuda"]) or "no CUDA device"))  # fmt: skip
    for group in report["groups"]:
        heading = f"{group['title']}: {group['op']} {group['direction']} ({group['shape']})"
        heading += f"; floor: {group['floor']}" if group["floor"] else ""
        table = Table(title=heading, title_justify="left")
        for index, header in enumerate(HEADERS):
            table.add_column(header, justify="left" if index < 3 else "right", no_wrap=True)
        style = {"kernel": "bold green", "floor": "dim"}
        for row in group["rows"]:
            line = [Text(cell) for cell in cells(row)]
            table.add_row(*line, style="bold red" if "failed" in row else style.get(row["kind"], ""))
        on.print(table)
        for row in group["rows"]:
            if "failed" in row:
                text = f"  FAILED {row['title']} {row['dtype']} {row['layout']}: {row['failed']}"
                on.print(Text(text, style="bold red"))
    on.print("[dim]speed-up: over the fastest rival of the table. x floor: time over that of the named floor. "
             "extra memory: peak beyond the inputs (over inputs + outputs + gradients).[/]")  # fmt: skip
    if report["absent"]:
        on.print("\n[bold]Not measured[/]")
        for one in report["absent"]:
            on.print(Text(f"  {one['title']} ({', '.join(one['entries'])}): {one['reason']}"), style="dim")
    if report["headlines"]:
        table = Table(title="Headline figures", title_justify="left", show_header=False)
        for line in report["headlines"]:
            table.add_row(line["label"], Text(line["value"], style="bold"), Text(line["detail"], style="dim"))
        on.print(table)

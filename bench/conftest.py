"""Options and turns of the benchmarks; ``python -m trifuse report`` runs them with all of these set."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from trifuse.report import arena as arenas
from trifuse.report import contenders, machine, workloads


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("trifuse")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure")
    group.addoption("--full", action="store_true", help="the whole grid of shapes, dtypes and layouts")
    group.addoption("--ops", default="", help="only these ops, comma-separated")
    group.addoption("--workloads", default="", help="only these workloads, comma-separated")
    group.addoption("--time-limit", type=float, default=float("inf"), help="start no new entry after so many seconds")
    group.addoption("--events", default=None, help="file to append progress to, one JSON object a line")


def pytest_configure(config: pytest.Config) -> None:
    contenders.add_rivals_folder()
    full = config.getoption("--full")
    config.trifuse_events = _Events(config.getoption("--events"))
    config.trifuse_arena = arenas.Arena(
        config.getoption("--device"),
        budget=3.0 if full else 1.0,
        minimum_rounds=arenas.FULL_ROUNDS if full else arenas.QUICK_ROUNDS,
        limit=config.getoption("--time-limit"),
        report=config.trifuse_events,
    )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


class _Events:
    def __init__(self, path: str | None):
        self.path = None if path is None else Path(path)
        self.start = time.monotonic()

    def __call__(self, event: dict) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"at": round(time.monotonic() - self.start, 3), **event}) + "\n")


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict:
    return machine.facts(config.getoption("--device"))


def pytest_unconfigure(config: pytest.Config) -> None:
    if hasattr(config, "trifuse_arena"):
        config.trifuse_arena.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order is that of the workloads, whichever file an op's turns come from."""

    def place(item: pytest.Item) -> tuple[int, int]:
        found = item.callspec.params.get("place") if hasattr(item, "callspec") else None
        return found if isinstance(found, tuple) else (-1, 0)  # an op of which nothing was asked has no place

    items.sort(key=place)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    names = _listed(option("--workloads"))
    device = option("--device")
    chosen = workloads.select(full=option("--full"), device=device, ops=_listed(option("--ops")), names=names)
    mine = tuple(one for one in chosen if one.op in metafunc.module.OPS)
    turns, absent = arenas.schedule(mine, device)
    places = {one: place for place, one in enumerate(chosen)}
    events = metafunc.config.trifuse_events
    for entry, reason in absent:
        events({"kind": "absent", "entry": entry.id, "reason": reason, "failed": False})
    events({"kind": "plan", "turns": len(turns)})
    clock = arenas.timer(device)
    metafunc.parametrize(
        ("entry", "block", "place"),
        [
            pytest.param(entry, block, (places[entry.workload], number), id=f"{entry.id}-{block}",
                         marks=pytest.mark.benchmark(group=entry.group, timer=clock, disable_gc=True))
            for number, (entry, block) in enumerate(turns)
        ],
    )  # fmt: skip


@pytest.fixture(scope="session")
def arena(pytestconfig: pytest.Config) -> arenas.Arena:
    return pytestconfig.trifuse_arena


@pytest.fixture
def turn(arena: arenas.Arena, entry: workloads.Entry, block: int, place: tuple[int, int]):
    """The entry's block, ready to be timed; a skip with the reason, or a failure, if it may not be."""
    arena.report({"kind": "turn", "entry": entry.id, "block": block})
    try:
        found = arena.turn(entry, block)
    except arenas.NotTimed as reason:
        if reason.failed:
            pytest.fail(f"{entry.id} failed its check against the float64 reference: {reason}", pytrace=False)
        pytest.skip(str(reason))
    with found.around():
        yield found

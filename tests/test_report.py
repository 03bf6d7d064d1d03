"""The report: what may have a speed, how it was measured, and that the page stands on its own."""
# ruff: noqa: E402  (the package's report can be imported only where its extra is installed)

import html.parser
import importlib
import json
import math
import sys

import pytest
import torch

for _module in ("rich", "jinja2", "matplotlib", "pytest_benchmark"):
    pytest.importorskip(_module, reason=f"the report needs {_module} (extra trifuse[report])")

from trifuse import backends
from trifuse import report as reports
from trifuse.report import arena, memory, page, summary, timing, validation, workloads
from trifuse.report.inputs import Draw
from trifuse.report.subjects import OPS, SUBJECTS
from trifuse.report.subjects import transformers_models as models

PLANTED = """
from dataclasses import replace
import torch
from trifuse.report.contenders import Contender
from trifuse.report.subjects import OPS

CONTENDERS = OPS["selective_scan"].contenders
reference = CONTENDERS["reference"].run

class Skewed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, D):
        return D.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.001 * grad

def wrong(inputs):
    return reference(inputs) * 1.0001

def wrong_gradient(inputs):
    return reference(replace(inputs, tensors={**inputs.tensors, "D": Skewed.apply(inputs["D"])}))

def raises(inputs):
    raise RuntimeError("no such luck")

for name, run in (("wrong", wrong), ("wrong-gradient", wrong_gradient), ("raises", raises)):
    CONTENDERS[name] = Contender(name, f"planted: {name}", "kernel", run, layouts=("bdl",), checked=("small", "full"))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of the smallest workload in which three wrong kernels take part: (folder, report, exit code)."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "planted_kernels.py").write_text(PLANTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder), prepend=":")
        patch.setenv("PYTEST_PLUGINS", "planted_kernels")
        # Two threads that wait for each other on a machine busy with other tests take seconds.
        patch.setenv("OMP_NUM_THREADS", "1")
        contenders_of_scan = SUBJECTS["selective_scan"].contenders
        before = dict(contenders_of_scan)
        importlib.import_module("planted_kernels")
        try:
            options = reports.Options(out=folder / "out", workloads=("smoke",), example=False)
            code = reports.run(options)
        finally:
            contenders_of_scan.clear()
            contenders_of_scan.update(before)
            sys.modules.pop("planted_kernels", None)
    return folder / "out", json.loads((folder / "out" / "report.json").read_text()), code


def rows(report):
    return {row["id"]: row for group in report["groups"] for row in group["rows"]}


def test_a_validated_entry_has_its_median_quartiles_and_peak_memory(made):
    row = rows(made[1])["smoke/fwd+bwd/reference/float32/bdl"]
    seconds = row["seconds"]
    assert 0 < seconds["min"] <= seconds["q1"] <= seconds["median"] <= seconds["q3"] <= seconds["max"]
    assert row["rounds"] >= 2
    assert row["peak_extra_bytes"] is None or row["peak_extra_bytes"] >= 0
    assert row["floor_ratio"] > 1


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
def test_a_wrong_kernel_gets_its_errors_printed_and_no_speed(made, direction):
    folder, report, code = made
    entry = f"smoke/{direction}/wrong/float32/bdl"
    row = rows(report)[entry]
    assert "seconds" not in row and "speedup" not in row
    assert "error" in row["failed"] and " > " in row["failed"]
    assert entry in report["failed"] and code == 1
    timed = {one["extra_info"]["id"] for one in json.loads((folder / "benchmarks.json").read_text())["benchmarks"]}
    assert entry not in timed
    assert row["failed"].replace(">", "&gt;") in (folder / "index.html").read_text()


def test_a_kernel_whose_gradient_alone_is_wrong_is_timed_forward_only(made):
    found = rows(made[1])
    assert "seconds" in found["smoke/fwd/wrong-gradient/float32/bdl"]
    assert " dD: error" in found["smoke/fwd+bwd/wrong-gradient/float32/bdl"]["failed"]


def test_a_kernel_that_raises_gets_no_speed(made):
    assert "raised RuntimeError: no such luck" in rows(made[1])["smoke/fwd/raises/float32/bdl"]["failed"]


def test_a_failed_kernel_is_no_rival_to_be_faster_than(made):
    kernels = [row for row in rows(made[1]).values() if row["kind"] == "kernel" and "seconds" in row]
    assert kernels
    assert all(set(row.get("speedups", {})) <= {"reference"} for row in kernels)


def test_blocks_of_the_entries_of_a_group_alternate(made):
    data = json.loads((made[0] / "benchmarks.json").read_text())["benchmarks"]
    measured = [(one["extra_info"]["id"], one["extra_info"]["block"]) for one in data]
    turns, _ = arena.schedule(workloads.select(names=("smoke",)), "cpu")
    planned = [(entry.id, block) for entry, block in turns]
    assert [turn for turn in measured if turn in planned] == [turn for turn in planned if turn in measured]
    forward = [turn for turn in planned if "/fwd/" in turn[0]]
    first, second = ([entry for entry, block in forward if block == one] for one in (0, 1))
    assert len(first) >= 3 and second == first[::-1]
    assert forward[: len(first)] == [(entry, 0) for entry in first]


def test_the_page_stands_on_its_own_and_shows_every_row(made):
    folder, report, _ = made
    text = (folder / "index.html").read_text()

    class Reader(html.parser.HTMLParser):
        loaded, open_tags = [], []

        def handle_starttag(self, tag, attributes):
            self.loaded += [value for name, value in attributes if name in ("src", "href")]

    reader = Reader()
    reader.feed(text)
    assert reader.loaded and all(one.startswith("data:image/svg+xml;base64,") for one in reader.loaded)
    for row in rows(report).values():
        assert row["title"] in text
    assert report["machine"]["torch"] in text


def test_the_example_s_figures_and_sample_are_on_the_page(made, tmp_path):
    example = tmp_path / "byte_lm.py"
    example.write_text(
        "import json, sys\n"
        "figures = {'bits_per_byte_after': 2.125, 'tokens_per_second': {'trifuse': 1234.5}}\n"
        "figures['losses'] = [3.0, 2.0]\n"
        "figures['sample'] = 'def f():\\n  x'\n"
        "json.dump(figures, open(sys.argv[sys.argv.index('--json') + 1], 'w'))\n"
    )
    found = reports.run_example(example)
    assert found["figures"] == {"bits per byte after": 2.125, "tokens per second: trifuse": 1234.5}
    assert found["texts"] == {"sample": "def f():\n  x"}
    page.write_page(made[1] | {"byte_lm": found}, tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    assert "Training loss" in text and "1,234.5" in text and "def f():\n  x" in text
    example.write_text("raise SystemExit(3)")
    failed = reports.run_example(example)
    assert failed["error"] == "examples/byte_lm.py ended with exit code 3"
    page.write_page(made[1] | {"byte_lm": failed}, tmp_path / "index.html")
    assert failed["error"] in (tmp_path / "index.html").read_text()


def test_a_crash_of_the_benchmarks_names_the_entry_it_happened_in(tmp_path, monkeypatch):
    (tmp_path / "crashing.py").write_text(
        "import os\nfrom trifuse.report import validation\n"
        "validation.Validator.verdict = lambda self, contender, entry: os._exit(139)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("PYTEST_PLUGINS", "crashing")
    with pytest.raises(timing.BenchmarkError, match=r"exit code 139 at smoke/fwd/"):
        timing.run_benchmarks(
            timing.bench_folder(), ["--workloads=smoke"], 60.0, lambda event: None, tmp_path / "samples.json"
        )


def test_a_folder_without_benchmarks_is_named(tmp_path):
    with pytest.raises(timing.BenchmarkError, match="there are no benchmarks in"):
        timing.bench_folder(tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e-3])
def test_a_bad_element_fails_the_check(bad):
    exact = torch.linspace(-1, 1, 100, dtype=torch.float64)
    eager = exact.float()
    assert validation.compare("case", "out", eager, exact, eager).ok
    wrong = eager.clone()
    wrong[50] += bad
    assert not validation.compare("case", "out", wrong, exact, eager).ok


def test_a_check_that_allows_nothing_passes_only_what_is_exact():
    exact, odd = (validation.Check("case", "tokens", error, 0.0, 0.0) for error in (0.0, 1.0))
    assert validation.Verdict((exact,)).ok and "0.00e+00 <= 0.00e+00" in str(validation.Verdict((exact,)))
    assert not validation.Verdict((exact, odd)).ok and "1.00e+00 > 0.00e+00" in str(validation.Verdict((exact, odd)))


def test_a_wrong_shape_fails_the_check():
    exact = torch.zeros(3, dtype=torch.float64)
    assert not validation.compare("case", "out", torch.zeros(4), exact, exact.float()).ok


@pytest.mark.parametrize("op", [name for name, one in OPS.items() if "dout" in one.axes.of])
def test_places_probed_at_full_size_have_the_gradients_of_the_whole_call(op):
    subject = OPS[op]
    workload = workloads.Workload("probe", "", op, {**subject.explained, **subject.small, subject.probed: 5})
    inputs = subject.make(workload, Draw("cpu")).to(dtype=torch.float64)
    places = torch.tensor([0, 2, 4])
    axis = subject.axes.of["dout"].index(subject.probed)
    inputs.dout.index_fill_(axis, torch.tensor([1, 3]), 0)
    run = subject.contenders["reference"].run
    whole = validation.answers(run, inputs, True)
    part = validation.answers(run, inputs.take(subject.probed, places), True)
    assert len(whole) == 1 + len(inputs.leaves) and whole.keys() == part.keys()
    for name, one in whole.items():
        argument = "out" if name == "out" else name[1:]
        one = validation.taken(subject.axes, argument, one, inputs.layout, subject.probed, places)
        torch.testing.assert_close(one, part[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 50])
def test_no_round_is_lost_between_blocks(rounds):
    assert sum(arena.rounds_in(block, rounds) for block in range(arena.BLOCKS)) == rounds


def test_an_entry_after_the_time_limit_is_listed_and_not_timed():
    events = []
    late = arena.Arena("cpu", budget=1.0, minimum_rounds=3, limit=-1.0, report=events.append)
    turns, _ = arena.schedule(workloads.select(names=("smoke",)), "cpu")
    with pytest.raises(arena.NotTimed, match="time limit"):
        late.turn(*turns[0])
    assert events[-1]["kind"] == "absent" and not events[-1]["failed"]


def test_statistics_are_of_all_blocks_together():
    def block(number, data):
        facts = {"id": "smoke/fwd/reference/float32/bdl", "group": "smoke fwd", "block": number}
        return {"extra_info": facts, "stats": {"iterations": 1, "data": data}}

    (row,) = timing.merge([block(0, [1.0, 2.0]), block(1, [3.0, 4.0, 5.0])])
    assert row["rounds"] == 5 and row["blocks"] == [0, 1]
    assert (row["seconds"]["min"], row["seconds"]["median"], row["seconds"]["max"]) == (1.0, 3.0, 5.0)


def test_a_speed_up_is_over_the_fastest_rival_of_the_table():
    def row(entry, seconds):
        return {"id": entry, "group": "smoke fwd", "seconds": {"median": seconds}}

    measured = timing.Measured(rows=[
        row("smoke/fwd/reference/float32/bdl", 8.0), row("smoke/fwd/mambapy/float32/bld", 4.0),
        row("smoke/fwd/cpp/float32/bld", 2.0), {**row("smoke/fwd/exp-floor/float32", 1.0), "note": "exponentials"},
    ])  # fmt: skip
    (group,) = summary.groups(workloads.select(names=("smoke",)), measured)
    kernel = next(one for one in group["rows"] if one["kind"] == "kernel")
    assert kernel["speedup"] == 2.0 and "mambapy" in kernel["speedup_over"]
    assert kernel["speedups"] == {"reference": 4.0, "mambapy": 2.0}
    assert kernel["floor_ratio"] == 2.0


def test_peak_memory_counts_what_a_call_allocates_and_nothing_from_before():
    megabytes = 1 << 20
    # Freed heap that malloc kept would hide the call's own use.
    kept = [torch.ones(megabytes // 8) for _ in range(64)]
    del kept
    peak, how = memory.peak_extra(lambda: torch.ones(32 * megabytes // 4).add_(1), "cpu")
    if peak is None:
        pytest.skip(f"peak memory is {how}")
    assert 31 * megabytes < peak < 40 * megabytes
    assert memory.peak_extra(lambda: None, "cpu")[0] < megabytes


@pytest.mark.parametrize("wrong", [{"names": ("no-such",)}, {"ops": ("no_such",)}])
def test_an_unknown_workload_or_op_is_named_with_those_that_exist(wrong):
    with pytest.raises(ValueError, match=r"there is no (op|workload) 'no.such'; choose from .*s"):
        workloads.select(**wrong)


def test_every_rival_of_a_workload_exists():
    for full in (False, True):
        for workload in workloads.every(full=full):
            for direction in workload.directions:
                assert set(workload.rivals_in(direction)) <= set(SUBJECTS[workload.op].contenders)


def test_names_of_workloads_are_unique_and_the_quick_ones_are_in_the_full_grid():
    for full in (False, True):
        names = [one.name for one in workloads.every(full=full)]
        assert len(names) == len(set(names))
    assert {one.name for one in workloads.every(full=False)} <= set(names)


def test_the_headline_of_every_subject_comes_before_the_details_of_any():
    ranks = [one.rank for one in workloads.select()]
    assert ranks == sorted(ranks)


def test_every_op_has_a_room_in_the_report_and_benchmarks_of_its_own():
    assert set(OPS) == set(backends.Op.registry)
    bench = timing.bench_folder()
    listed = [set(_ops_of(path)) for path in bench.glob("bench_*.py")]
    assert set().union(*listed) == set(SUBJECTS)
    assert sum(map(len, listed)) == len(SUBJECTS)


def _ops_of(path):
    space = {}
    exec(compile(path.read_text(), str(path), "exec"), space)
    return space["OPS"]


@pytest.mark.parametrize("op", OPS)
def test_inputs_of_a_room_are_what_its_op_takes_in_every_layout_and_dtype(op):
    subject = OPS[op]
    for workload in subject.quick():
        shape = workload.sized(**{axis: min(size, 4) for axis, size in workload.sizes.items()})
        base = subject.make(shape, Draw("cpu"))
        for layout in workload.layouts:
            for dtype in workload.dtypes:
                inputs = base.to(dtype=workloads.DTYPES[dtype], layout=layout)
                assert set(inputs.tensors) <= set(subject.axes.of)
                assert all(tensor.is_contiguous() for tensor in inputs.tensors.values())
                out = validation.answers(subject.contenders["reference"].run, inputs, False)["out"]
                assert bool(torch.isfinite(out.abs().float()).all())
                if "dout" in inputs.tensors:
                    assert out.shape == inputs.dout.shape


_RIVALS = [
    (op, name)
    for op, subject in OPS.items()
    for name, one in subject.contenders.items()
    if one.kind == "rival" and "cpu" in one.devices
]


@pytest.mark.parametrize(("op", "name"), _RIVALS)
def test_a_rival_computes_the_same_function(op, name):
    subject = OPS[op]
    contender = subject.contenders[name]
    reason = contender.missing("cpu")
    if reason is None and contender.compiles:
        reason = "compiling takes longer than a test may; the report checks it before timing it"
    if reason is not None:
        pytest.skip(reason)
    validator, checked = validation.Validator(subject, "cpu"), set()
    for workload in subject.quick():
        for direction in workload.directions:
            if name not in workload.rivals_in(direction):
                continue
            shape = workload.sized(**{axis: min(size, subject.small.get(axis, size))
                                      for axis, size in workload.sizes.items()})  # fmt: skip
            layout = (contender.layouts or workload.layouts)[0] if subject.axes.has_layouts else ""
            dtype = next(one for one in workload.dtypes if one in contender.dtypes)
            entry = workloads.Entry(shape, direction, name, dtype, layout)
            key = (shape.shape(), direction, dtype)
            if key not in checked and contender.refusal(entry, "cpu") is None:
                verdict = validator.verdict(contender, entry)
                assert verdict.ok and verdict.checks, f"{entry.id}: {verdict}"
                checked.add(key)
    assert checked


def test_a_model_with_trifuse_passes_only_if_logits_gradients_and_tokens_agree():
    alone = {"logits": torch.randn(4, 8), "loss": torch.tensor(2.0), "layer.weight": 1e-3 * torch.randn(5)}
    alone["tokens"] = torch.arange(6)

    def passes(**changed):
        return all(check.ok for check in models._compared(alone | changed, alone))

    assert passes()
    assert passes(logits=alone["logits"] + 5e-5) and not passes(logits=alone["logits"] + 2e-4)
    assert not passes(loss=alone["loss"] + 2e-4)
    gradient = alone["layer.weight"]
    step = gradient.abs().max() * torch.eye(5)[0]
    assert passes(**{"layer.weight": gradient + 5e-4 * step})
    assert not passes(**{"layer.weight": gradient + 2e-3 * step})
    assert not passes(**{"layer.weight": gradient * math.nan})
    assert not passes(tokens=torch.tensor([0, 1, 2, 3, 4, 6]))
    assert not passes(**{"only.here": gradient})


def test_the_process_of_a_model_answers_names_its_errors_and_outlives_them(tmp_path):
    if reason := models.missing("cpu"):
        pytest.skip(reason)
    entry = workloads.Entry(
        workloads.Workload("hf-mamba-small", "", "transformers", workloads.sizes(B=1, L=7, D=768, layers=1, new=3)),
        models.GENERATE, models.WITHOUT, "float32", "",
    )  # fmt: skip
    side = models.Side(False, "cpu")
    try:
        with pytest.raises(RuntimeError, match="no_such"):
            side.ask(ask="run", **(models._what(entry) | {"do": "no_such"}))
        path = tmp_path / "answer.pt"
        side.ask(ask="answer", path=str(path), **models._what(entry))
        assert torch.load(path)["tokens"].shape == (1, 7 + 3)
        found = side.ask(ask="peak", **models._what(entry))
        assert found["bytes"] is None or found["bytes"] >= 0
    finally:
        side.close()
    assert side.process.returncode == 0


def test_a_step_of_a_block_has_the_floor_of_its_own_products():
    subject = SUBJECTS["mamba_step"]
    for workload, names in zip(subject.quick(), (4, 2, 4), strict=True):
        small = workload.sized(D=64, B=2)
        bench = subject.bench("cpu")
        bench.enter(small)
        for entry, reason in subject.entries(small, "cpu"):
            assert reason is None
            verdict = bench.verdict(entry)
            assert verdict.ok and len(verdict.checks) == 5, f"{entry.id}: {verdict}"
        floor = subject.floor_entries(small, "fwd", "cpu")[0]
        assert len(bench.timed(floor).facts["note"].split(" by ")[0].split(", ")) == names

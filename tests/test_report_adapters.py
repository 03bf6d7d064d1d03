"""The report's subjects of low-rank adapters: who is compared, on what, and that a wrong one is not timed."""
# ruff: noqa: E402  (the package's report can be imported only where its extra is installed)

from dataclasses import replace

import pytest

for _module in ("rich", "jinja2", "matplotlib", "pytest_benchmark"):
    pytest.importorskip(_module, reason=f"the report needs {_module} (extra trifuse[report])")

from trifuse.report import adapters, validation, workloads
from trifuse.report.contenders import Contender, forced
from trifuse.report.inputs import Draw
from trifuse.report.subjects import OPS, lora_adamw, lora_update

SUBJECTS = {name: one for name, one in OPS.items() if name.startswith(("lora_", "dora_"))}
TINY = {"M": 5, "K": 12, "N": 10, "R": 3, "J": 3, "P": 2}


def tiny(workload):
    return workload.sized(**{axis: TINY.get(axis, size) for axis, size in workload.sizes.items()})


def entry_of(op, name=None):
    """The float32 entry of an op's first workload, or a named one, at a tiny size."""
    found = {one.name: one for one in OPS[op].quick()}
    workload = tiny(found[name] if name else next(iter(found.values())))
    return workloads.Entry(workload, workload.directions[-1], "planted", "float32", "")


def judged(op, run, name=None):
    planted = Contender("planted", "planted", "kernel", run, checked=("small", "full"))
    return validation.Validator(OPS[op], "cpu").verdict(planted, entry_of(op, name))


@pytest.mark.parametrize("op", SUBJECTS)
def test_whoever_takes_part_passes_its_check_and_can_be_timed(op):
    subject = SUBJECTS[op]
    bench, taken, absent = subject.bench("cpu"), set(), set()
    for workload in map(tiny, subject.quick()):
        bench.enter(workload)
        for entry, reason in subject.entries(workload, "cpu"):
            if reason is not None:
                absent.add((entry.contender, reason))
                continue
            verdict = bench.verdict(entry)
            assert verdict.ok and verdict.checks, f"{entry.id}: {verdict}"
            bench.timed(entry).call()
            taken.add(entry.contender)
        for direction in workload.directions:
            for floor in subject.floor_entries(workload, direction, "cpu"):
                timed = bench.timed(floor)
                timed.call()
                assert timed.facts["note"]
    assert "cpp" in taken, absent
    assert all("not installed" in reason or "PEFT refuses" in reason for _, reason in absent), absent


# The product that DoRA's magnitude scales is kept in half precision, and so its gradients are no better than that: the
# report measures it in float32 only.
@pytest.mark.parametrize("op", [op for op in SUBJECTS if op != "dora_linear"])
def test_half_precision_passes_its_check_too(op):
    subject = SUBJECTS[op]
    kernel, validator = subject.contenders["cpp"], validation.Validator(subject, "cpu")
    if reason := kernel.missing("cpu"):
        pytest.skip(reason)
    for workload in map(tiny, subject.quick()):
        for direction in workload.directions:
            verdict = validator.verdict(kernel, workloads.Entry(workload, direction, "cpp", "bfloat16", ""))
            assert verdict.ok, f"{workload.name}: {verdict}"


@pytest.mark.parametrize(("op", "asked"), [
    ("lora_linear", {"x", "lora_A", "lora_B"}), ("dora_linear", {"x", "lora_A", "lora_B", "magnitude"}),
    ("lora_linear_multi", {"x", *(factor + number for factor in "AB" for number in "012")}),
])  # fmt: skip
def test_the_layer_is_frozen_and_the_adapter_is_not(op, asked):
    subject = SUBJECTS[op]
    workload = entry_of(op).workload
    inputs = subject.make(workload, Draw("cpu"))
    assert set(inputs.leaves) == asked
    answers = validation.answers(subject.contenders["reference"].run, inputs, True)
    assert set(answers) == {"out", *("d" + name for name in asked)}
    gradients = sum(inputs[name].nbytes for name in asked)
    assert inputs.bytes(True) == inputs.bytes(False) + gradients
    note = adapters.BASE.make(workload, inputs, workloads.FWD_BWD)[1]
    assert note == "F.linear of (5, 12) with a frozen (10, 12), and the gradient of its input"


def test_another_dropout_mask_fails():
    subject = SUBJECTS["lora_linear"]
    right = forced("reference", subject.ours)

    def reseeded(inputs):
        return right(replace(inputs, options=inputs.options | {"seed": 77}))

    assert judged("lora_linear", right, "lora-1024-dropout").ok
    verdict = judged("lora_linear", reseeded, "lora-1024-dropout")
    # The small case, on which others with masks of their own are checked, drops nothing.
    assert {check.case.split()[0] for check in verdict.checks if not check.ok} == {"full"}


def test_the_adapter_of_another_row_fails():
    subject = SUBJECTS["lora_linear_multi"]
    right = forced("reference", subject.ours)

    def shifted(inputs):
        return right(replace(inputs, tensors={**inputs.tensors, "index": inputs["index"].roll(1)}))

    assert judged("lora_linear_multi", right).ok
    assert not judged("lora_linear_multi", shifted).ok


def test_an_optimizer_without_weight_decay_or_with_stale_moments_fails():
    def without_decay(params, count):
        optimizer = lora_adamw.low_rank(params, count)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        return optimizer

    step = lora_adamw.Stepped(lora_adamw.low_rank)

    def stale(inputs):
        kept = {name: inputs[name].clone() for name in inputs.axes.mutated if name.startswith("exp_avg_sq")}
        step(inputs)
        for name, tensor in kept.items():
            inputs[name].copy_(tensor)
        return inputs["A"]

    assert judged("lora_adamw", forced("reference", lora_adamw.Stepped(lora_adamw.low_rank))).ok
    failed = [check.tensor for check in judged("lora_adamw", lora_adamw.Stepped(without_decay)).checks if not check.ok]
    assert set(failed) == {"out", "A", "B"}
    failed = [check.tensor for check in judged("lora_adamw", stale).checks if not check.ok]
    assert set(failed) == {"exp_avg_sq_A", "exp_avg_sq_B"}


def test_an_optimizer_goes_on_from_its_own_state_and_starts_anew_with_other_tensors():
    subject, step = SUBJECTS["lora_adamw"], lora_adamw.Stepped(lora_adamw.low_rank)
    inputs = subject.make(entry_of("lora_adamw").workload, Draw("cpu"))
    counts = []
    for given in (inputs, inputs, inputs.fresh()):
        step(given)
        counts.append({int(count) for state in step._optimizer.state.values() for count in state["steps"]})
    assert counts == [{11}, {12}, {11}]


def test_a_merge_that_subtracts_or_forgets_the_scale_fails():
    def unscaled(inputs):
        inputs["weight"].addmm_(inputs["lora_B"], inputs["lora_A"])
        return inputs["weight"]

    assert judged("lora_merge_", lora_update.add).ok
    assert not judged("lora_merge_", unscaled).ok
    assert not judged("lora_swap_", lora_update.add).ok


def test_headlines_give_the_distance_from_the_layer_alone_and_what_was_asked_for():
    subject = SUBJECTS["lora_linear"]

    def row(contender, kind, seconds, **more):
        return {"contender": contender, "kind": kind, "dtype": "float32", "layout": "", "title": contender,
                "seconds": {"median": seconds}, **more}  # fmt: skip

    ours = row("cpp", "kernel", 1.04, floor_ratio=1.04, floor_note="the layer", speedups={"peft": 1.25})
    found = {"lora-4096 fwd+bwd": [ours, row("peft", "rival", 1.3), row("base-floor", "floor", 1.0)]}
    lines = {one["label"]: (one["value"], one["detail"]) for one in subject.headlines(found, "cpu")}
    base = lines["LoRA 4096 -> 4096, 512 rows, fwd+bwd over the frozen layer alone"]
    assert base == ("1.04 x", "cpp / the layer; asked for: at most 1.05 x")
    assert lines["LoRA 4096 -> 4096, 512 rows, fwd+bwd against peft"][0] == "1.25 x"


def test_no_dtype_is_measured_that_would_not_pass():
    assert {dtype for one in SUBJECTS["dora_linear"].full() for dtype in one.dtypes} == {"float32"}
    assert {dtype for one in SUBJECTS["lora_linear"].full() for dtype in one.dtypes} == {"float32", "bfloat16"}


def test_the_grid_has_every_shape_at_every_number_of_rows():
    grid = {(one["K"], one["N"], one["M"]) for one in SUBJECTS["lora_linear"].full()}
    shapes = [(768, 3072), (1536, 80), (48, 1536), (1536, 768), (1024, 1024), (4096, 4096), (4096, 14336)]
    assert {(*shape, rows) for shape in shapes for rows in (1, 32, 512, 4096)} <= grid
    assert {1, 4, 8, 16, 64} <= {one["R"] for one in SUBJECTS["lora_linear"].full()}

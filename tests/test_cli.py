"""``python -m trifuse info | explain | report``: what they print and what they refuse."""

import json
import os
import subprocess
import sys

import pytest
import torch

import trifuse
from trifuse import __main__ as cli
from trifuse import backends


def test_info_names_versions_libraries_and_every_backend_of_every_op(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert trifuse.__version__ in text and torch.__version__ in text
    for op in backends.Op.registry:
        section = text.split(f"\n{op}\n")[1]
        for name in backends.NAMES:
            assert f"  {name}" in section
    assert "reference  available" in text
    assert "CUDA devices" in text and "kernels use" in text


def test_info_says_why_a_backend_is_not_available(capsys, monkeypatch):
    monkeypatch.setitem(trifuse._library._missing, "cpp", "it was left at home")
    cli.main(["info"])
    text = capsys.readouterr().out
    assert "library: CPU kernels" in text
    assert "cpp        unavailable: it was left at home" in text


def test_explain_prints_the_choice_and_the_refusals(capsys):
    assert cli.main(["explain", "selective_scan", "--shape", "2,64,100,8", "--backend", "reference"]) == 0
    text = capsys.readouterr().out
    assert "selective_scan(B=2, D=64, L=100, N=8, float32, A float32, layout bdl, cpu)" in text
    assert "runs on: reference (forced)" in text
    assert "cuda cannot: it computes on CUDA tensors" in text


def test_explain_allocates_nothing_and_needs_no_gpu(capsys):
    # 4096 x 5120 x 65536 float32 numbers would be five terabytes.
    command = ["explain", "selective_scan", "--shape", "4096,5120,65536,16", "--device", "cuda", "--dtype", "bfloat16"]
    assert cli.main([*command, "--layout", "bld", "--complex"]) == 0
    text = capsys.readouterr().out
    assert "bfloat16, A complex64, layout bld, cuda" in text
    assert "triton cannot: its triton kernels take real A" in text


def test_explain_takes_the_one_token_form(capsys):
    assert cli.main(["explain", "selective_state_update", "--shape", "3,64,8"]) == 0
    assert "selective_state_update(B=3, H=1, P=64, N=8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ssd", "--shape", "2,100000,80,64,1,128", "--dtype", "bfloat16"], ["B=2", "L=100000", "H=80", "bfloat16"]),
        (["causal_conv1d", "--shape", "2,64,100,4", "--layout", "bld"], ["B=2", "D=64", "L=100", "bld"]),
        (["causal_conv1d_update", "--shape", "3,64,4"], ["B=3", "D=64"]),
        (["linear_scan", "--shape", "2,64,100", "--complex"], ["B=2", "D=64", "complex64"]),
    ],
)
def test_explain_takes_every_op(arguments, said, capsys):
    assert cli.main(["explain", *arguments]) == 0
    text = capsys.readouterr().out
    assert text.startswith(arguments[0] + "(") and all(one in text for one in said), text
    assert "runs on: " in text


def test_explain_knows_every_op_there_is():
    assert set(cli.OPS) == set(backends.Op.registry)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "selective_scan", "--shape", "1,2"], "it must be B,D,L,N"),
        (["explain", "selective_state_update", "--shape", "1,2,x"], "it must be B,D,N"),
        (["explain", "selective_state_update", "--complex"], "real A only"),
        (["explain", "ssd", "--complex"], "real A only"),
        (["explain", "selective_scan", "--backend", "cuda", "--device", "nowhere"], "nowhere"),
        (["report", "--workloads", "no-such"], "there is no workload 'no-such'"),
        (["report", "--ops", "no_such"], "there is no op 'no_such'"),
        (["report", "--workloads", "smoke", "--bench", "/nowhere"], "there are no benchmarks in /nowhere"),
    ],
)
def test_bad_arguments_end_with_a_message_that_names_them(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["explain"], ["report", "--time-limit", "-1"]])
def test_unparsable_arguments_show_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m trifuse" in capsys.readouterr().err


def test_a_report_without_its_packages_says_what_to_install(capsys, monkeypatch):
    from trifuse import report

    monkeypatch.setattr(report, "missing_packages", lambda: ["rich", "jinja2"])
    assert cli.main(["report"]) == 2
    assert "rich, jinja2 not installed; pip install 'trifuse[report]'" in capsys.readouterr().err


def test_machine_facts_are_plain_json():
    from trifuse.report import machine

    facts = machine.facts()
    assert json.loads(json.dumps(facts)) == facts


def test_the_module_runs():
    found = subprocess.run([sys.executable, "-m", "trifuse", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"trifuse {trifuse.__version__}"


def test_an_instruction_set_that_does_not_exist_is_refused_by_name():
    if missing := trifuse._library.missing("cpp") or trifuse._library.missing("native"):
        pytest.skip(missing)
    command, environment = [sys.executable, "-m", "trifuse", "explain", "selective_scan"], os.environ.copy()
    found = subprocess.run(command, env=environment | {"TRIFUSE_CPU_ISA": "sse9"}, capture_output=True, text=True)
    assert found.returncode == 2
    assert "TRIFUSE_CPU_ISA is 'sse9'; on this machine and build it must be one of " in found.stderr
    assert "portable" in found.stderr

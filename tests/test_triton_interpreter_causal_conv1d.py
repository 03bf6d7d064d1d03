"""The Triton kernels of causal_conv1d, run by Triton's interpreter on CPU tensors, against the float64 reference.

See test_triton_interpreter.py: a process of its own with TRITON_INTERPRET=1, float32 and float16, tiny shapes.
"""

import functools
import mmap
import os

import conv_cases as cases
import pytest
import torch
from conv_cases import recurring_ids, run

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs only with TRITON_INTERPRET=1 in the environment of its own process", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

import trifuse

pytestmark = pytest.mark.usefixtures("poisoned_memory")
check = functools.partial(cases.check, "triton")
make = functools.partial(cases.make, dim=3, seqlen=12, batch=1)
PACKED = torch.tensor([0, 2, 2, 8, 9, 12, 12])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    from trifuse.triton_kernels import causal_conv1d as kernels

    monkeypatch.setattr(kernels, "_blocks", lambda *_: (2, 8))


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("cu_seqlens", [None, PACKED])
@pytest.mark.parametrize("with_ids", [False, True])
def test_all_options_at_once(with_ids, cu_seqlens, layout):
    dtype = torch.float16 if layout == "bld" else torch.float32
    tensors = make(layout=layout, dtype=dtype, cu_seqlens=cu_seqlens)
    ids = recurring_ids(1, 12, run=4) if with_ids else None
    check(tensors, dtype, layout=layout, cu_seqlens=cu_seqlens, seq_idx=ids, activation="silu")


@pytest.mark.parametrize("width", range(2, 9))
def test_widths(width):
    ids = recurring_ids(1, 12, run=5) if width % 2 else None
    check(make(width=width, dim=1), seq_idx=ids, activation="silu" if width < 7 else None)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"initial": False}, {"bias": False, "initial": False}])
def test_optional_arguments_may_be_absent(options):
    tensors = make(**options)
    check(tensors, final_grad=False)
    args = {name: x.float() for name, x in tensors.items() if x is not None}
    with trifuse.backend("triton"):
        y, _ = trifuse.causal_conv1d(**args, return_final_states=True)
        assert torch.equal(trifuse.causal_conv1d(**args), y)


@pytest.mark.parametrize("seqlen", [0, 1, 3, 8, 9, 17])
def test_lengths_around_a_tile(seqlen):
    check(make(seqlen=seqlen, dim=1, batch=2), activation="silu")


def test_real_tiles(monkeypatch):
    monkeypatch.undo()
    check(make(seqlen=300, dim=1), activation="silu")
    check(make(seqlen=20, dim=70, layout="bld"), layout="bld", activation="silu")


@pytest.mark.parametrize("ids", [
    [0, 0, 0, 0, 0, 0], [-1, -1, -1, -1, -1, -1], [-1, -1, 2, 2, 2, 2], [0, 0, 1, 1, 0, 0], [5, 5, 5, 5, 5, 6],
    [1, -1, 1, -1, 1, -1], [7, -1, -1, -1, -1, -1],
])  # fmt: skip
def test_ids_of_every_kind(ids):
    check(make(seqlen=6, dim=1, batch=2), seq_idx=torch.tensor([ids, list(reversed(ids))]))


@pytest.mark.parametrize("shape", [{"batch": 0}, {"seqlen": 0}, {"dim": 0}])
def test_empty_inputs(shape):
    check(make(**shape), activation="silu")


def test_packed_sequences_may_all_be_empty():
    cu_seqlens = torch.tensor([0, 0, 0])
    check(make(seqlen=0, cu_seqlens=cu_seqlens), cu_seqlens=cu_seqlens)


def test_strided_and_expanded_inputs_are_read_in_place():
    tensors = make(seqlen=12)
    wide = torch.full((1, 3, 36), float("nan")).double()
    wide[..., 1::3] = tensors["x"]
    check(tensors | {"x": wide[..., 1::3]})
    check(tensors | {"x": tensors["x"][:, :1].expand(1, 3, 12)})


@pytest.mark.parametrize("by_id", [False, True])
def test_nan_does_not_cross_the_boundary_of_sequences(by_id):
    cu_seqlens = torch.tensor([0, 7, 12, 20])
    tensors = make(seqlen=20, dim=1, width=3, cu_seqlens=None if by_id else cu_seqlens)
    ids = torch.repeat_interleave(torch.arange(3), cu_seqlens.diff())[None]
    options = {"activation": "silu"} | ({"seq_idx": ids} if by_id else {"cu_seqlens": cu_seqlens})
    clean = run("triton", tensors, torch.float32, **options)
    tensors["x"][0, :, [7, 11]] = float("nan")
    dirty = run("triton", tensors, torch.float32, **options)
    for name in ("y", "dx"):
        for part in (slice(0, 7), slice(12, 20)):
            assert torch.equal(clean[name][..., part], dirty[name][..., part]), name
    assert torch.equal(clean["final_states"][-1], dirty["final_states"][-1])
    assert torch.equal(clean["dinitial_states"][0], dirty["dinitial_states"][0])


def test_padding_may_hold_anything_and_gives_nothing():
    ids = torch.tensor([[-1, -1, -1, 0, 0, 0, 0, -1, -1, 1, 1, 1, -1, -1]])
    tensors = make(seqlen=14, dim=1)
    clean = run("triton", tensors, torch.float32, seq_idx=ids, activation="silu")
    tensors["x"].transpose(1, 2)[ids < 0] = float("nan")
    dirty = run("triton", tensors, torch.float32, seq_idx=ids, activation="silu")
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name


check_update = functools.partial(
    cases.check_update, lambda tensors, **options: cases.run_update("triton", tensors, **options)
)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_update(dtype, state_dtype):
    check_update(cases.make_update(dim=130, seqlen=0, dtype=dtype, state_dtype=state_dtype), activation="silu")


@pytest.mark.parametrize("size", [None, 9])
@pytest.mark.parametrize("seqlen", [1, 11])
@pytest.mark.parametrize("width", [2, 4, 8])
def test_update_of_any_width_by_several_tokens(width, seqlen, size):
    tensors = cases.make_update(width=width, seqlen=seqlen, size=size, dim=3)
    check_update(tensors)
    check_update(tensors, cache_seqlens=torch.tensor([0, 4, 2**40 + 3]), activation="silu")
    check_update(tensors, cache_seqlens=torch.tensor([-1, -4, -9]), activation="silu")  # no place before the row


def test_update_picks_rows_and_leaves_padding_alone():
    tensors = cases.make_update(batch=4, rows=7, seqlen=2)
    indices = torch.tensor([5, -1, 0, -1])
    check_update(tensors, conv_state_indices=indices)
    check_update(tensors, conv_state_indices=indices.int(), cache_seqlens=torch.tensor([9, 1, 2, 0], dtype=torch.int32))


@pytest.fixture(scope="module")
def reserved():
    """2^34 numbers of address space, of which only what is touched comes to exist."""
    try:
        mapping = mmap.mmap(-1, 2**36, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    except OSError as error:
        pytest.skip(f"this machine does not reserve 64 GiB of address space: {error}")
    return torch.frombuffer(mapping, dtype=torch.float32)


@pytest.mark.parametrize("far", [0, 1, 2])
def test_inputs_are_read_beyond_two_to_the_31(reserved, far):
    tensors = {name: x.float() for name, x in make(batch=2, dim=2, seqlen=5).items()}
    strides = [100, 10, 1]
    strides[far] = 2**31 + 64
    distant = reserved.as_strided(tensors["x"].shape, strides)
    distant.copy_(tensors["x"])
    near, result = (run("triton", tensors | {"x": x}, torch.float32) for x in (tensors["x"], distant))
    for name, value in near.items():
        assert torch.equal(value, result[name]), name


def test_state_is_changed_beyond_two_to_the_31(reserved):
    tensors = cases.make_update(size=4, dim=3)
    state = reserved.as_strided((3, 3, 4), (2**31 + 64, 16, 2**31 + 7), 3)
    state.copy_(tensors["conv_state"])
    near = cases.run_update("triton", tensors)
    with trifuse.backend("triton"):
        y = trifuse.causal_conv1d_update(**(tensors | {"conv_state": state}))
    assert torch.equal(y, near["y"])
    assert torch.equal(state, near["conv_state"])


def test_float64_is_refused_in_a_sentence():
    tensors = {name: x.double() for name, x in make(seqlen=3).items()}
    with trifuse.backend("triton"), pytest.raises(trifuse.BackendUnavailable, match="computes in float32, and the"):
        trifuse.causal_conv1d(**tensors)

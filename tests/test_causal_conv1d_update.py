"""causal_conv1d_update, the step form: every kernel that this machine can run, against the whole convolution and
against the reference."""

import pytest
import torch
from backends_here import HAS_CPP, cpp_only
from conv_cases import make
from test_causal_conv1d import kernels
from tolerance import compare, error

import trifuse


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(poisoned_memory):
    """Every test runs on poisoned allocations."""


@kernels
@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("width, size", [(2, 1), (3, 2), (4, 3), (4, 4), (4, 7), (8, 7), (5, 9)])
def test_steps_give_what_the_whole_gives(backend, device, width, size, circular):
    t = {k: v.float().to(device) for k, v in make(width=width, dim=37, seqlen=12).items()}
    state = torch.zeros(2, 37, size, device=device)
    state[:, :, size - (width - 1) :] = t["initial_states"]  # input number i stands at i % size: -1 at size - 1
    with trifuse.backend(backend):
        whole, final = trifuse.causal_conv1d(**t, activation="silu", return_final_states=True)
        ys, at = [], 0
        for count in (1, 1, 3, 1, 0, 5, 1):
            cache = torch.full((2,), at, dtype=torch.int32, device=device) if circular else None
            x = t["x"][:, :, at : at + count]
            x = x.squeeze(2) if count == 1 and at else x
            y = trifuse.causal_conv1d_update(x, state, t["weight"], t["bias"], "silu", cache)
            assert y.shape == x.shape
            ys.append(y if y.dim() == 3 else y.unsqueeze(2))
            at += count
    torch.testing.assert_close(torch.cat(ys, dim=2), whole, rtol=1e-5, atol=1e-5)
    if circular:
        state = state.roll(-(at % size), dims=2)
    assert torch.equal(state[:, :, size - (width - 1) :], final)


def _update(backend, x, state, *args):
    own = state.clone(memory_format=torch.preserve_format)
    with trifuse.backend(backend):
        y = trifuse.causal_conv1d_update(x, own, *args)
    return {"y": y.cpu(), "state": own.cpu()}


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_update_reads_and_writes_the_rows_it_is_told(backend, device, dtype, state_dtype):
    g = torch.Generator().manual_seed(0)
    x, state = torch.randn(4, 37, generator=g).to(dtype), torch.randn(6, 37, 4, generator=g).to(state_dtype)
    weight, bias = torch.randn(37, 4, generator=g), torch.randn(37, generator=g)
    rows = torch.tensor([5, -1, 0, 2])
    cache = torch.tensor([3, 1, 1000, 0])
    for cached in (None, cache):
        tail = (weight, bias, "silu", cached, rows)
        exact = _update("reference", x.double(), state.double(), weight.double(), bias.double(), *tail[2:])
        eager = _update("reference", x, state, *tail)
        found = _update(backend, x.to(device), state.to(device), *(
            v.to(device) if torch.is_tensor(v) else v for v in tail))  # fmt: skip
        assert not found["y"][1].any() and found["y"].dtype == dtype and found["state"].dtype == state_dtype
        for row in (1, 3, 4):
            assert torch.equal(found["state"][row], state[row]), "a row that nobody asked for has changed"
        compare(found, exact, {name: error(eager[name], exact[name]) for name in exact})


@cpp_only
@pytest.mark.parametrize("dim", [1, 16, 70])
@pytest.mark.parametrize("size", [3, 4, 6])
@pytest.mark.parametrize("turned", [False, True])
def test_update_of_every_instruction_set_and_state_layout(isa, dim, size, turned):
    g = torch.Generator().manual_seed(1)
    for dtypes in ((torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float16,) * 2, (torch.float64,) * 2):
        x, state = torch.randn(3, dim, generator=g).to(dtypes[0]), torch.randn(3, dim, size, generator=g).to(dtypes[1])
        if turned:
            state = state.transpose(1, 2).contiguous().transpose(1, 2)
        kind = torch.promote_types(dtypes[0], torch.float32)
        weight, bias = torch.randn(dim, 4, generator=g).to(kind), torch.randn(dim, generator=g).to(kind)
        exact = _update("reference", x.double(), state.double(), weight.double(), bias.double(), "silu")
        eager = _update("reference", x, state, weight, bias, "silu")
        found = _update("cpp", x, state, weight, bias, "silu")
        assert torch.equal(found["state"], eager["state"])
        compare(found, exact, {name: error(eager[name], exact[name]) for name in exact})


@kernels
def test_update_keeps_nan_in_its_channel_and_row(backend, device):
    x, state = torch.randn(3, 40, device=device), torch.randn(3, 40, 4, device=device)
    weight = torch.randn(40, 4, device=device)
    clean = _update(backend, x, state, weight)
    state[1, 7, 2] = float("nan")
    found = _update(backend, x, state, weight)
    keep = torch.ones(3, 40, dtype=torch.bool)
    keep[1, 7] = False
    assert found["y"][1, 7].isnan()
    for name in clean:
        assert torch.equal(found[name][keep], clean[name][keep]), name


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_update_of_a_state_of_the_other_precision_runs_on_the_reference(dtypes):
    x, state, weight = torch.ones(2, 5, dtype=dtypes[0]), torch.ones(2, 5, 3, dtype=dtypes[1]), torch.ones(5, 4)
    y = trifuse.causal_conv1d_update(x, state, weight)
    assert y.dtype == dtypes[0] and torch.equal(y, torch.full_like(y, 4)) and state.dtype == dtypes[1]
    if HAS_CPP:
        with trifuse.backend("cpp"), pytest.raises(trifuse.BackendUnavailable, match="float64 beside float64 only"):
            trifuse.causal_conv1d_update(x, state, weight)


@pytest.mark.parametrize("width, size", [(2, 1), (4, 4), (8, 9)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_plain_token_takes_a_shorter_way_to_the_same_numbers(width, size, activation):
    """One float32 token (B, D) goes to the kernel almost as it is; (B, D, 1) is checked at length."""
    torch.manual_seed(0)
    x, weight, state = torch.randn(3, 80)[:, ::2], torch.randn(40, width), torch.randn(3, 40, size)
    for bias in (None, torch.randn(40)):
        short, long = state.clone(), state.clone()
        y = trifuse.causal_conv1d_update(x, short, weight, bias, activation)
        expected = trifuse.causal_conv1d_update(x.unsqueeze(2), long, weight, bias, activation)
        assert torch.equal(y, expected.squeeze(2)) and torch.equal(short, long)

"""The step of AdamW over some ranks: the reference against torch's own, every kernel against the reference; the
optimizer is in test_low_rank_adamw.py."""

import pytest
import torch
from backends_here import cpp_only, kernels_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_adamw_cases import SHAPES, by, by_reference, check, gradients, make, run

kernels = kernels_of("cuda", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(poisoned_memory):
    """Every test runs on poisoned allocations."""


def everything(step, ranks):
    return 0, ranks


def last_of_some(step, ranks):
    """DyLoRA's frozen mode: one rank, another each time."""
    return (7 * step) % ranks, (7 * step) % ranks + 1


def first_of_some(step, ranks):
    return 0, (5 * step) % ranks + 1


def none_or_middle(step, ranks):
    return ranks // 3, ranks // 3 if step % 2 else ranks


WAYS = (everything, last_of_some, first_of_some, none_or_middle)


@pytest.mark.parametrize("maximize", [False, True])
def test_reference_is_torchs_adamw_where_all_ranks_are_active(maximize):
    made = make(torch.float64)
    found = run(by_reference, made, everything, maximize=maximize)
    params = [torch.nn.Parameter(one.clone()) for one, _ in made]
    groups = [{"params": [one], "lr": 1e-2 * (1 + at)} for at, one in enumerate(params)]
    torchs = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.1, maximize=maximize, foreach=False)
    for step in range(5):
        for param, grad in zip(params, gradients(made, step), strict=True):
            param.grad = grad
        torchs.step()
    for at, param in enumerate(params):
        torch.testing.assert_close(found[f"param {at}"], param.detach(), rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(found[f"exp_avg_sq {at}"], torchs.state[param]["exp_avg_sq"], rtol=1e-13, atol=0)


def test_reference_of_a_rank_that_is_trained_rarely_is_that_of_training_it_alone():
    """Bias correction counts the steps of a rank: resting in between changes nothing."""
    made = make(torch.float64, [((3, 8), 0)])
    ranks = [(0, 1), (2, 3), (0, 1), (1, 2), (0, 1)]
    found = run(by_reference, made, lambda step, _: ranks[step])
    alone = [(made[0][0][:1].clone(), 0)]
    state = [torch.zeros(1, 8, dtype=torch.float64) for _ in range(2)]
    counts = torch.zeros(1)
    for step in (0, 2, 4):
        grad = gradients(made, step)[0][:1]
        options = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
        by_reference([alone[0][0]], [grad], state[:1], state[1:], [counts], [0], [(0, 1)], [1e-2], **options)
    assert torch.equal(found["param 0"][:1], alone[0][0])
    assert found["steps 0"].tolist() == [3, 1, 1]


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("active", WAYS)
@pytest.mark.parametrize("maximize", [False, True])
def test_every_dtype_and_any_ranks(backend, device, dtype, active, maximize):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("GPUs compute in float32")
    check(by(backend), make(dtype), active, device=device, maximize=maximize)


@kernels
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 8, 15, 16, 17, 33, 64])
@pytest.mark.parametrize("active", WAYS)
def test_any_number_of_ranks(backend, device, ranks, active):
    shapes = [((ranks, 13), 0), ((29, ranks), 1), ((2, ranks, 5), 1)]
    check(by(backend), make(torch.float32, shapes), active, device=device, steps=4)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("active", [last_of_some, first_of_some])
def test_ranks_that_rest_keep_every_bit_and_their_gradients_are_not_looked_at(backend, device, dtype, active):
    """Fifty steps with weight decay, NaN where the gradients of resting ranks would be."""
    made = make(dtype, SHAPES[:5])
    before = run(by(backend), made, everything, device=device, steps=3)
    params = [before[f"param {at}"].to(device) for at in range(5)]
    moments = [[before[f"{name} {at}"].to(device) for at in range(5)] for name in ("exp_avg", "exp_avg_sq")]
    counts = [before[f"steps {at}"].to(device) for at in range(5)]
    dims = [dim for _, dim in made]
    for step in range(50):
        ranks = [active(step, one.shape[dim]) for one, dim in zip(params, dims, strict=True)]
        grads = [torch.full_like(one, float("nan")) for one in params]
        for grad, dim, (first, last), fresh in zip(grads, dims, ranks, gradients(made, step), strict=True):
            grad.narrow(dim, first, last - first).copy_(fresh.narrow(dim, first, last - first))
        was = [one.clone() for one in (*params, *moments[0], *moments[1])]
        counted = [one.clone() for one in counts]
        by(backend)(params, grads, *moments, counts, dims, ranks, [1e-2] * 5, weight_decay=0.1)
        for at, (one, old) in enumerate(zip((*params, *moments[0], *moments[1]), was, strict=True)):
            dim, (first, last) = dims[at % 5], ranks[at % 5]
            for begin, end in ((0, first), (last, one.shape[dim])):
                rest, unchanged = one.narrow(dim, begin, end - begin), old.narrow(dim, begin, end - begin)
                assert torch.equal(rest, unchanged)
            part = one.narrow(dim, first, last - first)
            assert part.isfinite().all()
            if at >= 5:  # moments: a parameter may round to what it was
                assert not torch.equal(part, old.narrow(dim, first, last - first))
        for count, old, (first, last) in zip(counts, counted, ranks, strict=True):
            old[first:last] += 1
            assert torch.equal(count, old)


@st.composite
def cases(draw):
    size = st.integers(1, 40)
    shapes = draw(st.lists(st.lists(size, min_size=1, max_size=3).flatmap(
        lambda shape: st.tuples(st.just(tuple(shape)), st.integers(0, len(shape) - 1))), min_size=1, max_size=4
    ))  # fmt: skip
    part = draw(st.tuples(st.floats(0, 1), st.floats(0, 1)))

    def active(step, ranks):
        first, last = sorted(int(ranks * share) for share in part)
        return (first, last) if step % 2 else (0, ranks)

    dtype = draw(st.sampled_from(DTYPES[:3]))
    options = {"beta1": draw(st.sampled_from([0.0, 0.9])), "beta2": draw(st.sampled_from([0.5, 0.999]))}
    return make(dtype, shapes, seed=draw(st.integers(0, 99))), active, options | {"maximize": draw(st.booleans())}


@kernels
@given(case=cases())
@settings(max_examples=40, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
def test_any_step_keeps_the_tolerance(backend, device, case):
    made, active, options = case
    check(by(backend), made, active, device=device, steps=3, **options)


@kernels
def test_gradients_that_lie_loosely(backend, device):
    made = make(torch.float32, SHAPES[:2])

    def loosely(params, grads, *args, **options):
        turned = [grad.t().contiguous().t() for grad in grads]
        by(backend)(params, turned, *args, **options)

    check(loosely, made, everything, device=device)


@kernels
def test_parameters_without_numbers(backend, device):
    check(by(backend), make(torch.float32, [((2, 0), 0), ((0, 3), 1), ((4, 5), 0)]), everything, device=device)


@kernels
def test_many_parameters_are_one_call(backend, device):
    shapes = [((4, 30 + at), 0) if at % 2 else ((30 + at, 4), 1) for at in range(70)]
    check(by(backend), make(torch.float32, shapes), last_of_some, device=device, steps=2)


@cpp_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("active", WAYS)
def test_every_instruction_set(isa, dtype, active):
    check(by("cpp"), make(dtype), active)


@cpp_only
def test_results_do_not_depend_on_the_number_of_threads(threads):
    made = make(torch.float32, [((3, 30001), 0), ((9001, 7), 1), ((5, 5), 0)])
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(run(by("cpp"), made, last_of_some, steps=3))
    for again in found[1:]:
        assert all(torch.equal(again[name], found[0][name]) for name in again)


@cpp_only
def test_parameters_of_several_dtypes_are_one_call():
    made = make(torch.float32, SHAPES[:2]) + make(torch.bfloat16, SHAPES[:2]) + make(torch.float64, SHAPES[2:4])
    check(by("cpp"), made, first_of_some)


@cpp_only
def test_wrong_states_are_refused_below_the_checks_too():
    param = torch.zeros(3, 4)
    step = torch.ops.trifuse.lora_adamw
    options = ([1e-3], 0.9, 0.999, 1e-8, 0.0, False)

    def call(grad=param, moment=param, counts=None, dim=0, first=0, last=3):
        counts = torch.zeros(3) if counts is None else counts
        step([param], [grad], [moment.clone()], [moment.clone()], [counts], [dim], [first], [last], *options)

    call()
    with pytest.raises(RuntimeError, match="a gradient or a moment does not fit its parameter"):
        call(grad=param[:2])
    with pytest.raises(RuntimeError, match="a gradient or a moment does not fit its parameter"):
        call(moment=param.double())
    with pytest.raises(RuntimeError, match=r"steps must be \(r,\), of float32"):
        call(counts=torch.zeros(4))
    with pytest.raises(RuntimeError, match="a rank_dim is not an axis of its parameter"):
        call(dim=2)
    with pytest.raises(RuntimeError, match="active ranks must lie in those of their parameter"):
        call(last=4)


@cpp_only
def test_opcheck():
    made = make(torch.float32, SHAPES[:3])
    params = [one for one, _ in made]
    lists = [params, gradients(made, 0), [one.clone() for one in params], [one.abs() for one in params]]
    counts = [torch.zeros(one.shape[dim]) for one, dim in made]
    ranks = [[0, 1, 0], [one.shape[dim] for one, dim in made]]
    args = (*lists, counts, [dim for _, dim in made], *ranks, [1e-3] * 3, 0.9, 0.999, 1e-8, 0.1, False)
    torch.library.opcheck(torch.ops.trifuse.lora_adamw.default, args)

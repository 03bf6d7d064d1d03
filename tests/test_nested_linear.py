"""nested_linear: the reference against torch's own layers, then the products on each device against the reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nested_cases import check, make, run
from tolerance import compare, error

import trifuse
from trifuse.nn import NestedLinear

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(poisoned_memory):
    """Every test runs on poisoned allocations."""


# ---- the reference, against layers that are cut by hand


def test_reference_is_a_linear_layer_of_the_first_columns():
    made = make(dtype=torch.float64)
    logits = run("reference", made, needs=())["logits"]
    for found, width in zip(logits, made["widths"], strict=True):
        layer = torch.nn.Linear(width, 11, dtype=torch.float64)
        layer.load_state_dict({"weight": made["weight"][:, :width], "bias": made["bias"]})
        torch.testing.assert_close(found, layer(made["x"][..., :width]))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_pass_gradcheck(backend):
    made = make(rows=(3,), inner=9, outer=4, widths=(2, 3, 7), dtype=torch.float64)
    inputs = [made[name].requires_grad_() for name in ("x", "weight", "bias")]
    with trifuse.backend(backend):
        assert torch.autograd.gradcheck(lambda *args: trifuse.nested_linear(*args, made["widths"]), inputs)
        if backend == "reference":
            assert torch.autograd.gradgradcheck(lambda *args: trifuse.nested_linear(*args, made["widths"]), inputs)


# ---- the products


@devices
@every_dtype
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(), (1,), (63,), (64,), (65,), (2, 3, 5)])
def test_every_dtype_and_leading_shape(device, dtype, bias, rows):
    check(make(rows=rows, dtype=dtype, bias=bias), device)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(1,), (40,), (39, 40), (1, 2, 4, 8, 16, 32), (3,), tuple(range(1, 41))])
def test_any_widths(device, dtype, widths):
    check(make(widths=widths, dtype=dtype), device)


@devices
@every_dtype
@pytest.mark.parametrize("count", [2, 100])
def test_errors_do_not_grow_with_the_number_of_widths(device, dtype, count):
    """In half precision, logits rounded once for every width before them would be off by ten roundings."""
    made = make(rows=(16,), inner=400, outer=8, widths=range(400 // count, 401, 400 // count), dtype=dtype)
    check(made, device)
    exact, found = run("reference", made, exact=True), run("torch", made, device=device)
    last = exact["logits"][-1]
    off = (found["logits"][-1].double() - last).abs() / (torch.finfo(dtype).eps / 2 * last.abs().clamp(min=1))
    assert off.square().mean().sqrt() < (2 if dtype.itemsize == 2 else 8)


@devices
@every_dtype
def test_columns_beyond_the_last_width_have_no_part(device, dtype):
    made = make(widths=(2, 13), dtype=dtype)
    # torch's own bfloat16 product on a CPU reads an entry beyond a row of odd length, times zero: NaN would be seen.
    beyond = 3e4 if (device, dtype) == ("cpu", torch.bfloat16) else float("nan")
    clean, spoiled = ({**made, "x": made["x"].clone(), "weight": made["weight"].clone()} for _ in range(2))
    for arguments, value in ((clean, 0.0), (spoiled, beyond)):
        arguments["x"][..., 13:] = value
        arguments["weight"][:, 13:] = value
    expected, found = run("torch", clean, device=device), run("torch", spoiled, device=device)
    assert not found["dx"][..., 13:].any() and not found["dweight"][:, 13:].any()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    check(clean, device)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, outer", [((0,), 11), ((2, 0), 11), ((4,), 0), ((0,), 0)])
def test_empty_inputs(device, dtype, rows, outer):
    found = run("torch", make(rows=rows, outer=outer, dtype=dtype), device=device)
    assert found["logits"].shape == (5, *rows, outer) and found["dx"].shape == (*rows, 40)
    assert not found["dx"].any() and not found["dweight"].any() and not found["dbias"].any()


@devices
@every_dtype
def test_strided_and_expanded_inputs(device, dtype):
    made = make(rows=(6, 8), inner=80, dtype=dtype)
    turned = {**made, "x": made["x"].transpose(0, 1), "weight": made["weight"].t().contiguous().t()}
    for changed in (
        turned,
        {**made, "x": made["x"][..., ::2], "weight": made["weight"][:, 1::2]},
        {**made, "x": made["x"][..., :1].expand(-1, -1, 80)},
        {**made, "x": made["x"][:1].expand(6, -1, -1)[:, ::3], "bias": made["bias"][:1].expand(11)},
    ):
        check(changed, device)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_come_in_may_have_any_strides(device, dtype):
    made = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in make(dtype=dtype).items()}
    wanted = [made[name].requires_grad_() for name in ("x", "weight", "bias")]
    gradient = torch.randn(11, 7, 5, 5, device=device).to(dtype).permute(3, 2, 1, 0)
    with trifuse.backend("torch"):
        logits = trifuse.nested_linear(**made)
        found = torch.autograd.grad(logits, wanted, gradient, retain_graph=True)
        expected = torch.autograd.grad(logits, wanted, gradient.contiguous(), retain_graph=True)
        of_a_sum = torch.autograd.grad(logits.sum(), wanted, retain_graph=True)
        of_ones = torch.autograd.grad(logits, wanted, torch.ones_like(logits))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(of_a_sum, of_ones)


@devices
@pytest.mark.parametrize("needs", [("x",), ("weight",), ("bias",), ("x", "bias")])
def test_only_the_gradients_asked_for(device, needs):
    made = make()
    everything, some = run("torch", made, device=device), run("torch", made, device=device, needs=needs)
    assert set(some) == {"logits", *(f"d{name}" for name in needs)}
    assert all(torch.equal(some[name], everything[name]) for name in some)


def test_a_gradient_that_comes_in_is_left_as_it_was():
    made = make(rows=(4,))
    wanted, gradient = made["x"].requires_grad_(), torch.randn(5, 4, 11)
    before = gradient.clone()
    with trifuse.backend("torch"):
        torch.autograd.grad(trifuse.nested_linear(**made), wanted, gradient)
    assert torch.equal(gradient, before)


@devices
def test_results_are_bitwise_repeatable(device):
    first, second = (run("torch", make(rows=(300,)), device=device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_kept_for_the_backward_pass_is_x_and_the_weight():
    made, saved = make(rows=(50,)), []
    wanted = {made[name].requires_grad_().data_ptr() for name in ("x", "weight")}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        trifuse.nested_linear(**made)
    assert set(saved) == wanted and len(saved) == 2


def test_every_column_is_multiplied_once(monkeypatch):
    """Forward and backward take the multiplications of the widest layer, however many widths there are."""
    made = make(rows=(64,), inner=128, outer=32, widths=range(1, 129))
    made = {name: x.requires_grad_() if isinstance(x, torch.Tensor) else x for name, x in made.items()}
    seen = []

    def counted(original):
        def product(*args, out):
            seen.append(args[-2].shape[0] * args[-2].shape[1] * args[-1].shape[1])
            return original(*args, out=out)

        return product

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, counted(getattr(torch, name)))
    trifuse.nested_linear(**made).sum().backward()
    assert sum(seen) == 3 * 64 * 128 * 32


@st.composite
def cases(draw):
    inner = draw(st.integers(1, 90))
    widths = sorted(draw(st.sets(st.integers(1, inner), min_size=1, max_size=12)))
    made = make(
        rows=tuple(draw(st.lists(st.integers(0, 9), max_size=3))), inner=inner, outer=draw(st.integers(0, 40)),
        widths=widths, dtype=draw(st.sampled_from(DTYPES)), bias=draw(st.booleans()), seed=draw(st.integers(0, 999)),
    )  # fmt: skip
    if draw(st.booleans()) and made["x"].dim() > 1:
        made["x"] = made["x"].transpose(0, -2)
    return made


@devices
@given(made=cases())
@settings(max_examples=60, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
def test_any_call_keeps_the_tolerance(device, made):
    check(made, device)


# ---- the loss


def logits_and_target(dtype=torch.float32, rows=(6, 5), classes=9):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, *rows, classes, generator=g, dtype=torch.float64)).to(dtype)
    target = torch.randint(classes, rows, generator=g)
    target.view(-1)[::4] = -100
    return logits, target


OPTIONS = [{}, {"weights": [1.0, 0.5, 0.0, 2.0]}, {"weights": torch.tensor([1.0, 0.5, 0.25, 2.0])},
           {"label_smoothing": 0.1}, {"ignore_index": 3}]  # fmt: skip


@devices
@every_dtype
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_the_weighted_sum_of_cross_entropies(device, dtype, options, reduction):
    logits, target = logits_and_target(dtype)
    if "ignore_index" in options:
        target = target.clamp(min=0)

    def results(call, exact, device="cpu"):
        leaf = (logits.double() if exact else logits).to(device).detach().requires_grad_()
        given = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        loss = call(leaf, target.to(device), **given, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return {"loss": loss.detach().cpu(), "dlogits": gradient.cpu()}

    exact, eager = (results(trifuse.reference.nested_cross_entropy, one) for one in (True, False))
    found = results(trifuse.nested_cross_entropy, False, device)
    compare(found, exact, {name: error(eager[name], exact[name]) for name in eager})
    assert found["loss"].dtype == torch.promote_types(dtype, torch.float32)


def test_the_reference_of_the_loss_is_a_sum_of_torchs():
    logits, target = logits_and_target(torch.float64)
    expected = sum(w * F.cross_entropy(one.flatten(0, 1), target.flatten())
                   for w, one in zip((1, 2, 3, 4), logits, strict=True))  # fmt: skip
    torch.testing.assert_close(trifuse.reference.nested_cross_entropy(logits, target, [1, 2, 3, 4]), expected)


def test_weights_of_the_loss_can_be_learned():
    logits, target = logits_and_target()
    weights = torch.ones(4, requires_grad=True)
    trifuse.nested_cross_entropy(logits, target, weights).backward()
    each = [F.cross_entropy(one.flatten(0, 1), target.flatten()) for one in logits]
    torch.testing.assert_close(weights.grad, torch.stack(each))


def test_a_mean_over_no_row_is_nan_as_in_torch_and_a_sum_is_zero():
    logits, target = logits_and_target()
    ignored = torch.full_like(target, -100)
    assert trifuse.nested_cross_entropy(logits, ignored).isnan()
    assert trifuse.nested_cross_entropy(logits, ignored, reduction="sum") == 0


# ---- the module


def test_the_module_loads_and_is_a_linear_layer():
    layer, nested = torch.nn.Linear(24, 5), NestedLinear(24, 5)
    assert isinstance(nested, torch.nn.Linear) and nested.widths == (1, 2, 4, 8, 16, 24)
    nested.load_state_dict(layer.state_dict())
    x = torch.randn(3, 4, 24)
    assert nested(x).shape == (6, 3, 4, 5)
    torch.testing.assert_close(nested(x)[-1], layer(x))
    layer.load_state_dict(nested.state_dict())
    torch.manual_seed(0)
    first = torch.nn.Linear(24, 5, bias=False, dtype=torch.float64)
    torch.manual_seed(0)
    second = NestedLinear(24, 5, False, dtype=torch.float64, widths=[3, 9])
    assert torch.equal(first.weight, second.weight) and second.bias is None and second.widths == (3, 9)
    assert "widths=(3, 9)" in repr(second)


def test_the_module_at_one_width_is_that_piece_of_the_whole():
    nested = NestedLinear(16, 5)
    x = torch.randn(3, 16)
    for logits, width in zip(nested(x), nested.widths, strict=True):
        torch.testing.assert_close(nested(x, width=width), logits)
        torch.testing.assert_close(nested(x[:, :width], width=width), logits)
    assert nested(x, width=11).shape == (3, 5)  # any width, also one that was not trained


def test_training_puts_what_matters_into_the_first_columns():
    """An encoder and a NestedLinear learn classes; cut to a few columns the nested one still knows them."""
    torch.manual_seed(0)
    centres = torch.randn(4, 20)
    label = torch.randint(4, (512,))
    x = centres[label] + 0.3 * torch.randn(512, 20)

    def accuracy_at_4(loss_of):
        torch.manual_seed(1)
        encoder, head = torch.nn.Linear(20, 32), NestedLinear(32, 4, widths=[4, 8, 16, 32])
        optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            loss_of(head, encoder(x)).backward()
            optimizer.step()
        return (head(encoder(x), width=4).argmax(-1) == label).float().mean()

    nested = accuracy_at_4(lambda head, code: trifuse.nested_cross_entropy(head(code), label))
    plain = accuracy_at_4(lambda head, code: F.cross_entropy(head(code, width=32), label))
    assert nested > 0.95 and nested > plain

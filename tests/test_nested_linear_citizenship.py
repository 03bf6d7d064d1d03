"""nested_linear behaves as torch's own ops do, and refuses bad input with sentences."""

import re

import citizenship
import pytest
import torch
import torch.nn.functional as F
from nested_cases import make
from torch._subclasses.fake_tensor import FakeTensorMode

import trifuse
from trifuse.backends import NAMES
from trifuse.nn import NestedLinear
from trifuse.ops.nested_linear import NESTED, prepare

PLACES = [("cpu", "torch"), pytest.param("cuda", "torch", marks=pytest.mark.gpu)]
OPTIONS = {"float32": {}, "no bias": {"bias": False}, "bfloat16": {"dtype": torch.bfloat16},
           "float64": {"dtype": torch.float64}, "no rows": {"rows": (0,)}}  # fmt: skip
places = pytest.mark.parametrize(("device", "backend"), PLACES)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def arguments(device="cpu", **options):
    made = {"bias": None} | make(**{"rows": (6,), "inner": 12, "outer": 5, "widths": (2, 5, 11)} | options)
    return {
        name: value.to(device).requires_grad_() if isinstance(value, torch.Tensor) else value
        for name, value in made.items()
    }


def served(device, backend, **options):
    return citizenship.served(NESTED, arguments, device, backend, **options)


def nested(made):
    return trifuse.nested_linear(**made)


def loss(logits):
    return logits.float().square().sum()


@every_option
@places
def test_opcheck_of_forward_and_backward(device, backend, options):
    call = prepare(**served(device, backend, **options))
    torch.library.opcheck(citizenship.op("nested_linear", "fwd", backend), tuple(call))
    x, weight, bias = (None if one is None else one.detach() for one in call[:3])
    dout = torch.randn_like(torch.ops.trifuse.nested_linear_fwd(x, weight, bias, call.widths))
    for needs in ([True, True, True], [True, False, False], [False, True, False], [False, False, True]):
        torch.library.opcheck(
            citizenship.op("nested_linear", "bwd", backend), (dout, x, weight, list(call.widths), needs)
        )


@every_option
@places
def test_a_fake_call_has_the_shapes_strides_and_dtypes_of_the_real_one(device, backend, options):
    made = served(device, backend, **options)

    def look(tensors):
        return [(tuple(one.shape), one.stride(), one.dtype, one.device.type) for one in tensors]

    real = nested(made)
    grads = torch.autograd.grad(loss(real), citizenship.gradients_of(made))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake_made = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for name, value in made.items()
        }
        fake = nested(fake_made)
        fake_grads = torch.autograd.grad(loss(fake), citizenship.gradients_of(fake_made))
    assert look([fake, *fake_grads]) == look([real, *grads])


@pytest.mark.parametrize(("device", "backend"), [("cpu", "reference"), *PLACES])
def test_compile_without_graph_breaks_gives_the_same(device, backend):
    made = served(device, backend, rows=(2, 3))
    compiled = torch.compile(nested, fullgraph=True, backend="aot_eager")
    with trifuse.backend(backend):
        found, expected = compiled(made), nested(made)
        torch.testing.assert_close(found, expected)
        grads = citizenship.gradients_of(made)
        torch.testing.assert_close(torch.autograd.grad(loss(found), grads), torch.autograd.grad(loss(expected), grads))


def test_compile_takes_any_number_of_rows_without_compiling_again():
    compiled = torch.compile(nested, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(arguments(rows=(4,)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (9, 33):
            made = arguments(rows=(rows,))
            torch.testing.assert_close(compiled(made), nested(made))


def test_the_loss_and_the_module_compile():
    layer, x, target = NestedLinear(12, 5), torch.randn(6, 12), torch.randint(5, (6,))

    def step(x):
        return trifuse.nested_cross_entropy(layer(x), target, [1.0, 0.5, 0.5, 1.0, 1.0])

    found = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, step(x))


def test_export_keeps_one_op():
    class Step(torch.nn.Module):
        def forward(self, x, weight, bias):
            return trifuse.nested_linear(x, weight, bias, [2, 5, 11])

    x, weight, bias = (one.detach() for one in prepare(**arguments())[:3])
    program = torch.export.export(Step(), (x, weight, bias))
    assert "trifuse.nested_linear_fwd.default" in {str(node.target) for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(x, weight, bias), Step()(x, weight, bias))


@pytest.mark.parametrize(("device", "backend"), [("cpu", "reference"), *PLACES])
def test_autocast_casts_as_a_linear_layer_does(device, backend):
    made = served(device, backend)
    with trifuse.backend(backend), torch.autocast(device, dtype=torch.bfloat16):
        found, layer = nested(made), F.linear(made["x"], made["weight"], made["bias"])
        assert found.dtype == layer.dtype == torch.bfloat16
        grads = torch.autograd.grad(loss(found), citizenship.gradients_of(made))
    assert all(grad.dtype == torch.float32 for grad in grads)
    cast = {name: x.detach().bfloat16() if isinstance(x, torch.Tensor) else x for name, x in made.items()}
    with trifuse.backend(backend):
        assert torch.equal(found, nested(cast))
        wide = {name: x.detach().double() if isinstance(x, torch.Tensor) else x for name, x in made.items()}
        with torch.autocast(device, dtype=torch.bfloat16):
            assert nested(wide).dtype == torch.float64


def test_the_loss_is_the_same_under_autocast():
    logits, target = torch.randn(3, 6, 5), torch.randint(5, (6,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = trifuse.nested_cross_entropy(logits, target)
    assert torch.equal(found, trifuse.nested_cross_entropy(logits, target))


@places
def test_checkpointing_gives_the_same_gradients(device, backend):
    citizenship.checkpointing_gives_the_same_gradients(nested, loss, served(device, backend), backend)


@places
def test_a_second_derivative_is_refused_and_the_reference_has_it(device, backend):
    citizenship.a_second_derivative_is_refused("nested_linear", nested, loss, served(device, backend), backend)


@places
def test_forward_mode_is_refused(device, backend):
    citizenship.forward_mode_is_refused("nested_linear", nested, served(device, backend), "x", backend)


# ---- who serves a call


def test_explain_says_that_torch_serves_every_device(capsys):
    choice = trifuse.explain(trifuse.nested_linear, **arguments())
    assert choice.chosen == "torch" and choice.order == ("torch", "reference")
    assert choice.inputs == "rows 6, 12 -> 5, widths 2, 5, 11, float32, cpu"
    assert "cuda cannot: it has no kernel of this op, which is matrix products of torch's" in capsys.readouterr().out
    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in arguments().items()}
    assert trifuse.explain("nested_linear", **meta).chosen == "torch"
    assert trifuse.nested_linear(**meta).shape == (3, 6, 5)


@pytest.mark.parametrize("name", ["cpp", "cuda", "triton"])
def test_a_kernel_that_is_not_there_is_refused_by_name(name):
    with trifuse.backend(name), pytest.raises(trifuse.BackendUnavailable, match="that can: reference, torch"):
        trifuse.nested_linear(**arguments())


def test_other_ops_have_no_torch_backend_and_explain_says_so_only_where_it_was_asked_for():
    a, b = torch.rand(2, 3, 5, 8)[:, 0], torch.rand(2, 5, 8)
    with trifuse.backend("torch"), pytest.raises(trifuse.BackendUnavailable, match="linear_scan has no torch kernel"):
        trifuse.linear_scan(a, b)
    assert "torch" not in trifuse.explain("linear_scan", a, b).refusals
    with trifuse.backend("torch"):
        assert trifuse.explain("linear_scan", a, b).refusals["torch"] == ["linear_scan has no torch kernel"]


# ---- bad input

zeros = torch.zeros
CASES = [
    ({"x": [1.0]}, TypeError, "x is list; it must be a torch.Tensor"),
    ({"weight": None}, TypeError, "weight is NoneType; it must be a torch.Tensor"),
    ({"x": zeros(())}, ValueError, "x has shape (); it must be (..., K)"),
    ({"x": zeros(6, 13)}, ValueError, "x has shape (6, 13); its last size must be the weight's, K = 12"),
    ({"x": zeros(6, 12).long()}, TypeError, "x is int64; it must be one of float32, float16"),
    ({"weight": zeros(5)}, ValueError, "weight has shape (5,); it must be (N, K)"),
    ({"weight": zeros(5, 12).double()}, TypeError, "weight is float64; it must be float32 like x"),
    ({"bias": zeros(4)}, ValueError, "bias has shape (4,); it must be (N,) = (5,)"),
    ({"bias": zeros(5, device="meta")}, ValueError, "bias is on meta; it must be on cpu"),
    ({"widths": 3}, TypeError, "widths is int; it must be a sequence of ints"),
    ({"widths": torch.tensor([1, 2])}, TypeError, "widths is Tensor; it must be a sequence of ints"),
    ({"widths": [1, 2.5]}, TypeError, "widths holds a float; it must hold ints"),
    ({"widths": [True, 2]}, TypeError, "widths holds a bool; it must hold ints"),
    ({"widths": []}, ValueError, "widths is (); it must be strictly increasing, from 1 to 12"),
    ({"widths": [0, 2]}, ValueError, "widths is (0, 2); it must be strictly increasing, from 1 to 12"),
    ({"widths": [2, 2]}, ValueError, "widths is (2, 2); it must be strictly increasing, from 1 to 12"),
    ({"widths": [4, 2]}, ValueError, "widths is (4, 2); it must be strictly increasing, from 1 to 12"),
    ({"widths": [4, 13]}, ValueError, "widths is (4, 13); it must be strictly increasing, from 1 to 12"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), CASES, ids=[case[2][:40] for case in CASES])
def test_bad_arguments_are_named(changes, error, message):
    call = arguments() | changes
    with pytest.raises(error, match="^nested_linear: " + re.escape(message)) as free:
        trifuse.nested_linear(**call)
    for name in NAMES:
        with trifuse.backend(name), pytest.raises(error) as forced:
            trifuse.nested_linear(**call)
        assert str(forced.value) == str(free.value)


LOGITS, TARGET = zeros(3, 6, 5), zeros(6).long()
LOSS_CASES = [
    ((None, TARGET), {}, TypeError, "logits is NoneType; it must be a torch.Tensor"),
    ((LOGITS.long(), TARGET), {}, TypeError, "logits is int64; it must be one of float32"),
    ((zeros(5), TARGET), {}, ValueError, "logits has shape (5,); it must be (n, ..., C)"),
    ((LOGITS, TARGET.float()), {}, TypeError, "target is float32; it must be one of int64"),
    ((LOGITS, zeros(5).long()), {}, ValueError, "target has shape (5,); it must be (...) of logits (n, ..., C) = (6,)"),
    ((LOGITS, TARGET + 5), {}, ValueError, "target holds 5; it must hold classes from 0 to 4"),
    ((LOGITS, TARGET - 1), {}, ValueError, "target holds -1; it must hold classes from 0 to 4"),
    ((LOGITS, TARGET, [1.0, 2.0]), {}, ValueError, "weights has 2 numbers; it must have one per width, 3"),
    ((LOGITS, TARGET, zeros(4)), {}, ValueError, "weights has shape (4,); it must be (n,) = (3,)"),
    ((LOGITS, TARGET, 1.0), {}, TypeError, "weights is float; it must be a sequence of numbers or a tensor"),
    ((LOGITS, TARGET), {"reduction": "max"}, ValueError, "reduction is 'max'; it must be \"mean\", \"sum\" or "),
    ((LOGITS, TARGET), {"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5; it must be in [0, 1]"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "options", "error", "message"), LOSS_CASES, ids=[one[3][:40] for one in LOSS_CASES])
def test_bad_arguments_of_the_loss_are_named(given, options, error, message):
    with pytest.raises(error, match="^nested_cross_entropy: " + re.escape(message)):
        trifuse.nested_cross_entropy(*given, **options)


def test_bad_arguments_of_the_module_are_named():
    with pytest.raises(ValueError, match=r"^NestedLinear: widths is \(4, 40\); .* from 1 to 12"):
        NestedLinear(12, 5, widths=[4, 40])
    layer = NestedLinear(12, 5)
    for width, error, message in (
        (0, ValueError, "width is 0; it must be from 1 to in_features, 12"),
        (13, ValueError, "width is 13"),
        (2.0, TypeError, "width is float; it must be an int or None"),
    ):
        with pytest.raises(error, match=f"^NestedLinear: {message}"):
            layer(zeros(3, 12), width=width)
    with pytest.raises(ValueError, match=r"x has shape \(3, 5\); its last size must be in_features, 12, or width, 4"):
        layer(zeros(3, 5), width=4)

"""lora_linear behaves as torch's own ops do: opcheck, compile, export, autocast, fake tensors, checkpointing."""

import citizenship
import pytest
import torch
import torch.nn.functional as F
from citizenship import gradients_of
from lora_linear_cases import make
from torch._subclasses.fake_tensor import FakeTensorMode

import trifuse
from trifuse.ops.lora_linear import LINEAR, prepare

NATIVE = [
    ("cpu", "cpp"),
    ("cpu", "triton"),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", marks=pytest.mark.gpu),
]
PLACES = [("cpu", "reference"), ("cpu", "cpp"), *NATIVE[2:]]
OPTIONS = {
    "number": {},
    "vector": {"vector": True, "active_rank": 3},
    "no bias, three axes": {"bias": False, "lead": (2,)},
    "frozen": {"vector": True, "active_rank": 3, "frozen": True},
    "dropout": {"vector": True, "dropout": 0.3, "seed": 5},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16 adapter": {"dtype": torch.float16, "adapter_dtype": torch.float16, "dropout": 0.3, "seed": 5},
    "float64": {"dtype": torch.float64, "vector": True},
    "no rows": {"rows": 0},
}
CALL = ("active_rank", "frozen", "dropout", "seed")
native = pytest.mark.parametrize(("device", "backend"), NATIVE)
places = pytest.mark.parametrize(("device", "backend"), PLACES)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def arguments(device="cpu", **options):
    given = {name: options.pop(name) for name in CALL if name in options}
    made = {"bias": None} | make(**{"rows": 6, "columns": 10, "out": 7} | options)
    return given | {
        name: x.to(device).requires_grad_() if isinstance(x, torch.Tensor) else x for name, x in made.items()
    }


def served(device, backend, **options):
    return citizenship.served(LINEAR, arguments, device, backend, **options)


def linear(made):
    return trifuse.lora_linear(**made)


def loss(y):
    return y.float().square().sum()


def mark_fake(made, mode):
    return {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in made.items()}


@every_option
@native
@pytest.mark.parametrize("merged", [False, True])
def test_opcheck_of_forward_and_backward(device, backend, options, merged):
    call = prepare(**served(device, backend, **options))
    if merged and (backend != "cpp" or call.seed is not None or call.lora_A.dtype != call.weight.dtype):
        pytest.skip("there is no merged form of dropout, of half precision, or on GPUs")
    forward, backward = (citizenship.op("lora_linear", part, backend) for part in ("fwd", "bwd"))
    call = call._replace(x=call.x.detach().flatten(0, -2).requires_grad_())
    torch.library.opcheck(forward, (*call, merged, True))
    x, weight, bias, A, B, scale, p, *rest = (x.detach() if isinstance(x, torch.Tensor) else x for x in call)
    torch.library.opcheck(forward, (x, weight, bias, A, B, scale, p, *rest, merged, False))
    y, S = forward(x, weight, bias, A, B, scale, p, *rest, merged, True)
    for needs in ([True] * 5 + [p is not None], [True] + [False] * 5, [False, False, True, False, True, False]):
        torch.library.opcheck(backward, (torch.randn_like(y), x, weight, A, B, S, scale, p, *rest, merged, needs))


@pytest.mark.parametrize("name", ["number", "no bias, three axes", "bfloat16", "no rows"])
def test_opcheck_of_the_short_way(name):
    made = {key: x.detach() if isinstance(x, torch.Tensor) else x for key, x in served("cpu", "cpp").items()}
    five = [made[key] for key in ("x", "weight", "bias", "lora_A", "lora_B")]
    for seed in (None, torch.tensor([3])):
        torch.library.opcheck(
            torch.ops.trifuse.lora_linear_plain.default,
            (*five, 0.5, 3, 0.0 if seed is None else 0.2, seed, False, True),
        )


@every_option
@native
def test_a_fake_call_has_the_shapes_strides_and_dtypes_of_the_real_one(device, backend, options):
    made = served(device, backend, **options)

    def look(tensors):
        return [(tuple(one.shape), one.stride(), one.dtype, one.device.type) for one in tensors]

    with trifuse.backend(backend):
        real = linear(made)
        real_grads = torch.autograd.grad(loss(real), gradients_of(made))
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake_made = mark_fake(made, mode)
            fake = linear(fake_made)
            fake_grads = torch.autograd.grad(loss(fake), gradients_of(fake_made))
    assert look([fake, *fake_grads]) == look([real, *real_grads])


@pytest.mark.parametrize("name", ["number", "frozen", "dropout", "no bias, three axes", "bfloat16"])
@pytest.mark.parametrize(("device", "backend"), [("cpu", "reference"), *NATIVE])
def test_compile_gives_the_eager_result_and_gradients(device, backend, name):
    made = served(device, backend, **OPTIONS[name])
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    with trifuse.backend(backend):
        results = [(out, *torch.autograd.grad(loss(out), gradients_of(made))) for out in (compiled(made), linear(made))]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@places
def test_a_compiled_call_draws_a_new_mask_each_time(device, backend):
    made = served(device, backend)
    torch._dynamo.reset()
    compiled = torch.compile(lambda made: trifuse.lora_linear(**made, dropout=0.5), fullgraph=True, backend="aot_eager")
    with trifuse.backend(backend):
        torch.manual_seed(0)
        first, second = compiled(made), compiled(made)
        torch.manual_seed(0)
        assert torch.equal(compiled(made), first) and not torch.equal(first, second)


def test_one_graph_serves_every_number_of_rows():
    served("cpu", "cpp")
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(trifuse.lora_linear, fullgraph=True, dynamic=True, backend=count)
    for rows in (40, 41, 7, 900):
        one = make(rows=rows, columns=64, out=48)
        args = [one[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
        torch.testing.assert_close(compiled(*args), trifuse.lora_linear(*args))
    assert len(graphs) == 1


def test_a_graph_of_one_shape_merges_where_that_is_cheaper():
    served("cpu", "cpp")
    torch._dynamo.reset()
    graphs = []
    one = make(rows=1000, columns=64, out=64)
    args = [one[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    compiled = torch.compile(
        trifuse.lora_linear, fullgraph=True, dynamic=False, backend=lambda g, _: graphs.append(g) or g
    )
    assert torch.equal(compiled(*args), trifuse.lora_linear(*args))
    calls = [node for node in graphs[0].graph.nodes if "lora_linear_fwd" in str(node.target)]
    assert len(calls) == 1 and calls[0].args[-2] is True


def test_one_graph_serves_every_shape():
    served("cpu", "cpp")
    torch._dynamo.reset()
    compiled = torch.compile(trifuse.lora_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, columns, out, rank in ((40, 20, 30, 4), (41, 33, 65, 7), (9, 128, 50, 16)):
            one = make(rows, columns, out, rank, vector=True)
            args = [one[name] for name in ("x", "weight", "bias", "lora_A", "lora_B", "scale")]
            torch.testing.assert_close(compiled(*args), trifuse.lora_linear(*args))


def test_a_layer_is_exported():
    served("cpu", "cpp")
    made = make(columns=10, out=7)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return trifuse.lora_linear(x, *(made[name] for name in ("weight", "bias", "lora_A", "lora_B")), 0.5)

    rows = torch.export.Dim("rows")
    program = torch.export.export(Layer(), (torch.randn(3, 5, 10),), dynamic_shapes=({1: rows},))
    assert "trifuse.lora_linear_fwd.default" in {str(node.target) for node in program.graph.nodes}
    x = torch.randn(3, 90, 10)
    torch.testing.assert_close(program.module()(x), Layer()(x))


@places
@pytest.mark.parametrize("vector", [False, True])
def test_autocast_casts_as_a_linear_layer_does(device, backend, vector):
    made = served(device, backend, vector=vector)
    with trifuse.backend(backend), torch.autocast(device, dtype=torch.bfloat16):
        found, layer = linear(made), F.linear(made["x"], made["weight"], made["bias"])
        assert found.dtype == layer.dtype == torch.bfloat16
        grads = torch.autograd.grad(loss(found), gradients_of(made), retain_graph=True)
    assert all(grad.dtype == torch.float32 for grad in grads)
    outside = torch.autograd.grad(loss(found), gradients_of(made))
    if backend == "reference":  # autocast changes what torch's own gradients are made of
        grads = outside
    cast = made | {name: made[name].bfloat16() for name in ("x", "weight", "bias")}
    with trifuse.backend(backend):
        same = linear(cast)
        expected = torch.autograd.grad(loss(same), gradients_of(made))
        assert torch.equal(found, same)
        wide = {name: x.detach().double() if isinstance(x, torch.Tensor) else x for name, x in made.items()}
        with torch.autocast(device, dtype=torch.bfloat16):
            assert backend in ("cuda", "triton") or linear(wide).dtype == torch.float64
    for got, other, wanted in zip(grads, outside, expected, strict=True):
        assert torch.equal(got, wanted) and torch.equal(other, wanted)


@native
@pytest.mark.parametrize("name", ["number", "frozen", "dropout"])
def test_checkpointing_gives_the_same_gradients(device, backend, name):
    citizenship.checkpointing_gives_the_same_gradients(linear, loss, served(device, backend, **OPTIONS[name]), backend)


@native
@pytest.mark.parametrize("name", ["number", "vector"])
def test_a_second_derivative_is_refused_and_the_reference_has_it(device, backend, name):
    made = served(device, backend, **OPTIONS[name])
    citizenship.a_second_derivative_is_refused("lora_linear", linear, loss, made, backend)


@native
@pytest.mark.parametrize("argument", ["x", "lora_A", "bias"])
def test_forward_mode_is_refused(device, backend, argument):
    citizenship.forward_mode_is_refused("lora_linear", linear, served(device, backend), argument, backend)


@native
def test_x_that_the_backward_pass_needs_is_not_changed_in_silence(device, backend):
    made = served(device, backend)
    with trifuse.backend(backend):
        x = made["x"].detach().clone().requires_grad_() * 1
        y = linear(made | {"x": x})
        x += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@native
@pytest.mark.parametrize("options", [{}, {"vector": True}, {"lead": (2,)}, {"lead": (2,), "vector": True}], ids=str)
def test_the_output_may_be_changed_in_place(device, backend, options):
    made = served(device, backend, **options)
    with trifuse.backend(backend):
        expected = torch.autograd.grad(2 * linear(made).sum(), gradients_of(made))
        y = linear(made)
        y *= 2
        found = torch.autograd.grad(y.sum(), gradients_of(made))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@native
@pytest.mark.parametrize("vector", [False, True])
def test_a_graph_may_be_walked_twice(device, backend, vector):
    made = served(device, backend, vector=vector)
    with trifuse.backend(backend):
        y = loss(linear(made))
        first = torch.autograd.grad(y, gradients_of(made), retain_graph=True)
        for one, other in zip(first, torch.autograd.grad(y, gradients_of(made)), strict=True):
            assert torch.equal(one, other)

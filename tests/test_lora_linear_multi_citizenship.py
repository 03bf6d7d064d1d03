"""lora_linear_multi behaves as torch's own ops do: opcheck, compile, export, autocast, fake tensors, checkpointing."""

import citizenship
import pytest
import torch
import torch.nn.functional as F
from lora_linear_multi_cases import make
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import trifuse
from trifuse.ops.lora_linear_multi import MULTI, prepare

NATIVE = [("cpu", "cpp"), ("cpu", "triton"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)]
OPTIONS = {
    "float32": {},
    "no bias, three axes": {"bias": False, "lead": (2,)},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16 adapters": {"dtype": torch.float16, "adapter_dtype": torch.float16},
    "float64": {"dtype": torch.float64},
    "no rows": {"rows": 0},
}
native = pytest.mark.parametrize(("device", "backend"), NATIVE)
places = pytest.mark.parametrize(("device", "backend"), [("cpu", "reference"), ("cpu", "cpp"), NATIVE[2]])
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def arguments(device="cpu", **options):
    made = {"bias": None} | make(**{"rows": 6, "columns": 10, "out": 7, "ranks": (3, 1, 2)} | options)
    made = {name: None if x is None else x.to(device).requires_grad_(x.is_floating_point()) for name, x in made.items()}
    lists = {f"{name}_list": [made.pop(f"{name}{i}") for i in range(3)] for name in "AB"}
    return made | lists


def served(device, backend, **options):
    return citizenship.served(MULTI, arguments, device, backend, **options)


def floats(made):
    return citizenship.gradients_of(made) + made["A_list"] + made["B_list"]


def multi(made):
    return trifuse.lora_linear_multi(**made)


def loss(y):
    return y.float().square().sum()


def gradients(y, made):
    return torch.autograd.grad(loss(y), floats(made), allow_unused=True, materialize_grads=True)


@every_option
@native
def test_opcheck_of_forward_and_backward(device, backend, options):
    x, weight, bias, A, B, scales, index = prepare(**served(device, backend, **options))
    forward, backward = (citizenship.op("lora_linear_multi", part, backend) for part in ("fwd", "bwd"))
    x, index = x.detach().flatten(0, -2).requires_grad_(), index.flatten()
    torch.library.opcheck(forward, (x, weight, bias, A, B, scales.detach(), index, True))
    A, B = ([one.detach() for one in factors] for factors in (A, B))
    x, weight, bias, scales = (None if one is None else one.detach() for one in (x, weight, bias, scales))
    torch.library.opcheck(forward, (x, weight, bias, A, B, scales, index, False))
    y, S = forward(x, weight, bias, A, B, scales, index, True)
    for needs in ([True] * 6, [True] + [False] * 5, [False, False, True, False, True, False]):
        torch.library.opcheck(backward, (torch.randn_like(y), x, weight, A, B, S, scales, index, needs))


@every_option
@native
def test_a_fake_call_has_the_shapes_strides_and_dtypes_of_the_real_one(device, backend, options):
    made = served(device, backend, **options)

    def look(tensors):
        return [(tuple(one.shape), one.stride(), one.dtype, one.device.type) for one in tensors]

    with trifuse.backend(backend):
        real = multi(made)
        real_grads = gradients(real, made)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake_made = {
                name: None if value is None else [mode.from_tensor(one) for one in value] if isinstance(value, list)
                else mode.from_tensor(value) for name, value in made.items()
            }  # fmt: skip
            found = multi(fake_made)
            fake_grads = gradients(found, fake_made)
    assert look([found, *fake_grads]) == look([real, *real_grads])


@pytest.mark.parametrize("name", ["float32", "no bias, three axes", "bfloat16"])
@pytest.mark.parametrize(("device", "backend"), [("cpu", "reference"), *NATIVE])
def test_compile_gives_the_eager_result_and_gradients(device, backend, name):
    made = served(device, backend, **OPTIONS[name])
    torch._dynamo.reset()
    compiled = torch.compile(multi, fullgraph=True, backend="aot_eager")
    with trifuse.backend(backend):
        results = [(out, *gradients(out, made)) for out in (compiled(made), multi(made))]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_one_graph_serves_every_number_of_rows():
    served("cpu", "cpp")
    torch._dynamo.reset()
    compiled = torch.compile(multi, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (40, 41, 900):
            made = arguments(rows=rows)
            torch.testing.assert_close(compiled(made), multi(made))


def test_a_layer_is_exported():
    served("cpu", "cpp")
    made = {name: [one.detach() for one in x] if isinstance(x, list) else x.detach() for name, x in arguments().items()}

    class Layer(torch.nn.Module):
        def forward(self, x, index):
            return multi(made | {"x": x, "index": index})

    rows = torch.export.Dim("rows")
    program = torch.export.export(Layer(), (made["x"], made["index"]), dynamic_shapes=({0: rows}, {0: rows}))
    assert "trifuse.lora_linear_multi_fwd.default" in {str(node.target) for node in program.graph.nodes}
    x, index = torch.randn(90, 10), torch.arange(90) % 4 - 1
    torch.testing.assert_close(program.module()(x, index), Layer()(x, index))


@places
def test_autocast_casts_as_a_linear_layer_does(device, backend):
    made = served(device, backend)
    with trifuse.backend(backend), torch.autocast(device, dtype=torch.bfloat16):
        found, layer = multi(made), F.linear(made["x"], made["weight"], made["bias"])
        assert found.dtype == layer.dtype == torch.bfloat16
    cast = made | {name: made[name].bfloat16() for name in ("x", "weight", "bias")}
    with trifuse.backend(backend):
        same = multi(cast)
        assert torch.equal(found, same)
    for got, wanted in zip(gradients(found, made), gradients(same, made), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, wanted)


@native
def test_checkpointing_gives_the_same_gradients(device, backend):
    made = served(device, backend)
    with trifuse.backend(backend):
        results = [gradients(y, made) for y in (checkpoint(multi, made, use_reentrant=False), multi(made))]
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


@native
def test_a_second_derivative_is_refused_and_the_reference_has_it(device, backend):
    made = served(device, backend)
    citizenship.a_second_derivative_is_refused("lora_linear_multi", multi, loss, made, backend)


@native
@pytest.mark.parametrize("argument", ["x", "scales"])
def test_forward_mode_is_refused(device, backend, argument):
    citizenship.forward_mode_is_refused("lora_linear_multi", multi, served(device, backend), argument, backend)


@native
@pytest.mark.parametrize("lead", [(), (2,)])
def test_the_output_may_be_changed_in_place(device, backend, lead):
    made = served(device, backend, lead=lead)
    with trifuse.backend(backend):
        expected = torch.autograd.grad(2 * multi(made).sum(), made["x"])
        y = multi(made)
        y *= 2
        found = torch.autograd.grad(y.sum(), made["x"])
    torch.testing.assert_close(found, expected)

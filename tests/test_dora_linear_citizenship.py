"""dora_linear and dora_norm behave as torch's own ops do: opcheck, compile, export, autocast, fake tensors,
checkpointing."""

import citizenship
import pytest
import torch
import torch.nn.functional as F
from citizenship import gradients_of
from dora_linear_cases import make
from torch._subclasses.fake_tensor import FakeTensorMode

import trifuse
from trifuse.ops.dora_linear import DORA, prepare
from trifuse.registration import common

NATIVE = [
    ("cpu", "cpp"),
    ("cpu", "triton"),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", marks=pytest.mark.gpu),
]
OPTIONS = {
    "number": {},
    "vector, gradient of the norm": {"vector": True, "detach_norm": False},
    "no bias, three axes": {"bias": False, "lead": (2,)},
    "dropout": {"dropout": 0.3, "seed": 5},
    "bfloat16": {"dtype": torch.bfloat16, "detach_norm": False},
    "float16 adapter": {"dtype": torch.float16, "adapter_dtype": torch.float16, "dropout": 0.3, "seed": 5},
    "float64": {"dtype": torch.float64, "vector": True},
    "no rows": {"rows": 0},
}
CALL = ("dropout", "seed", "detach_norm")
native = pytest.mark.parametrize(("device", "backend"), NATIVE)
places = pytest.mark.parametrize(("device", "backend"), [("cpu", "reference"), ("cpu", "cpp"), *NATIVE[2:]])
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def arguments(device="cpu", **options):
    given = {name: options.pop(name) for name in CALL if name in options}
    made = {"bias": None} | make(**{"rows": 6, "columns": 10, "out": 7} | options)
    return given | {
        name: x.to(device).requires_grad_() if isinstance(x, torch.Tensor) else x for name, x in made.items()
    }


def served(device, backend, **options):
    return citizenship.served(DORA, arguments, device, backend, **options)


def dora(made):
    return trifuse.dora_linear(**made)


def norm_of(made):
    return trifuse.dora_norm(*(made[name] for name in ("weight", "lora_A", "lora_B", "scale")))


def loss(y):
    return y.float().square().sum()


@every_option
@native
def test_opcheck_of_forward_and_backward(device, backend, options):
    call = prepare(**served(device, backend, **options))
    one = call.lora
    x = one.x.detach().flatten(0, -2).requires_grad_()
    acc = common.accumulation_dtype(x)
    factors = call.magnitude.detach().to(acc).requires_grad_()
    rest = one.scale, one.p, one.dropout, one.seed
    forward, backward = (citizenship.op("dora_linear", part, backend) for part in ("fwd", "bwd"))
    args = (x, one.weight, call.bias, one.lora_A, one.lora_B, factors, *rest)
    torch.library.opcheck(forward, (*args, True))
    args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
    torch.library.opcheck(forward, (*args, False))
    x, weight, _, A, B, factors, *rest = args
    y, plain, S = forward(*args, True)
    for needs in ([True] * 6 + [one.p is not None], [True] + [False] * 6, [False] * 3 + [True, False, True, False]):
        torch.library.opcheck(
            backward, (torch.randn_like(y), x, weight, A, B, factors, plain, S, *rest, needs)
        )  # fmt: skip


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_what_norms_are_made_of(device, backend, dtype):
    made = served(device, backend, dtype=dtype)
    suffix = "_triton" if backend == "triton" else ""
    down, gradient = (getattr(torch.ops.trifuse, name + suffix).default for name in ("lora_down", "lora_down_bwd"))
    torch.library.opcheck(down, (made["weight"], made["lora_A"]))
    weight, A = made["weight"].detach(), made["lora_A"].detach()
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(gradient, (torch.randn_like(down(weight, A)), weight, A, *needs))
    if backend == "cpp":
        for p in (None, torch.rand(4)):
            torch.library.opcheck(torch.ops.trifuse.dora_norm_fwd.default, (weight, A, made["lora_B"].detach(), 0.5, p))


@every_option
@native
def test_a_fake_call_has_the_shapes_strides_and_dtypes_of_the_real_one(device, backend, options):
    made = served(device, backend, **options)

    def look(tensors):
        return [(tuple(one.shape), one.stride(), one.dtype, one.device.type) for one in tensors]

    with trifuse.backend(backend):
        real = dora(made)
        real_grads = torch.autograd.grad(loss(real), gradients_of(made))
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake_made = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in made.items()}
            fake = dora(fake_made)
            fake_grads = torch.autograd.grad(loss(fake), gradients_of(fake_made))
    assert look([fake, *fake_grads]) == look([real, *real_grads])


@pytest.mark.parametrize("name", ["number", "vector, gradient of the norm", "dropout", "bfloat16"])
@pytest.mark.parametrize(("device", "backend"), [("cpu", "reference"), *NATIVE])
def test_compile_gives_the_eager_result_and_gradients(device, backend, name):
    made = served(device, backend, **OPTIONS[name])
    torch._dynamo.reset()
    compiled = torch.compile(dora, fullgraph=True, backend="aot_eager")
    with trifuse.backend(backend):
        results = [(out, *torch.autograd.grad(loss(out), gradients_of(made))) for out in (compiled(made), dora(made))]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@places
def test_norms_compile(device, backend):
    made = served(device, backend)
    wanted = [made[name] for name in ("weight", "lora_A", "lora_B")]
    torch._dynamo.reset()
    compiled = torch.compile(norm_of, fullgraph=True, backend="aot_eager")
    with trifuse.backend(backend):
        results = [(out, *torch.autograd.grad(loss(out), wanted)) for out in (compiled(made), norm_of(made))]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_one_graph_serves_every_number_of_rows():
    served("cpu", "cpp")
    torch._dynamo.reset()
    compiled = torch.compile(dora, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (40, 41, 900):
            made = arguments(rows=rows)
            torch.testing.assert_close(compiled(made), dora(made))


def test_a_layer_is_exported():
    served("cpu", "cpp")
    made = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in arguments().items()}

    class Layer(torch.nn.Module):
        def forward(self, x):
            return dora(made | {"x": x})

    program = torch.export.export(Layer(), (made["x"],), dynamic_shapes=({0: torch.export.Dim("rows")},))
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    assert "trifuse.dora_linear_fwd.default" in {str(node.target) for graph in graphs for node in graph.nodes}
    x = torch.randn(90, 10)
    torch.testing.assert_close(program.module()(x), Layer()(x))


@places
@pytest.mark.parametrize("detach_norm", [True, False])
def test_autocast_casts_as_a_linear_layer_does(device, backend, detach_norm):
    made = served(device, backend, detach_norm=detach_norm)
    with trifuse.backend(backend), torch.autocast(device, dtype=torch.bfloat16):
        found, layer = dora(made), F.linear(made["x"], made["weight"], made["bias"])
        assert found.dtype == layer.dtype == torch.bfloat16
        norm = norm_of(made)
    cast = made | {name: made[name].bfloat16() for name in ("x", "weight", "bias")}
    with trifuse.backend(backend):
        same = dora(cast)
        assert torch.equal(found, same) and torch.equal(norm, norm_of(made))
    results = [torch.autograd.grad(loss(y), gradients_of(made)) for y in (found, same)]
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, wanted)


@native
@pytest.mark.parametrize("name", ["number", "vector, gradient of the norm", "dropout"])
def test_checkpointing_gives_the_same_gradients(device, backend, name):
    citizenship.checkpointing_gives_the_same_gradients(dora, loss, served(device, backend, **OPTIONS[name]), backend)


@native
@pytest.mark.parametrize("name", ["number", "vector, gradient of the norm"])
def test_a_second_derivative_is_refused_and_the_reference_has_it(device, backend, name):
    made = served(device, backend, **OPTIONS[name])
    citizenship.a_second_derivative_is_refused("dora_linear", dora, loss, made, backend)


@native
@pytest.mark.parametrize("argument", ["x", "lora_A", "magnitude"])
def test_forward_mode_is_refused(device, backend, argument):
    citizenship.forward_mode_is_refused("dora_linear", dora, served(device, backend), argument, backend)


@native
def test_forward_mode_of_norms_is_refused(device, backend):
    citizenship.forward_mode_is_refused("dora_norm", norm_of, served(device, backend), "weight", backend)


@native
@pytest.mark.parametrize("options", [{}, {"lead": (2,)}], ids=str)
def test_the_output_may_be_changed_in_place(device, backend, options):
    made = served(device, backend, **options)
    with trifuse.backend(backend):
        expected = torch.autograd.grad(2 * dora(made).sum(), gradients_of(made))
        y = dora(made)
        y *= 2
        found = torch.autograd.grad(y.sum(), gradients_of(made))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)

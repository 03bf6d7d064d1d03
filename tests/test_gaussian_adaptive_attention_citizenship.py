"""gaussian_adaptive_attention behaves as torch's own ops do: opcheck, compile, export, autocast, fake tensors,
checkpointing."""

import citizenship
import pytest
import torch
from citizenship import gradients_of
from torch._subclasses.fake_tensor import FakeTensorMode

import trifuse
from trifuse.ops.gaussian_adaptive_attention import ATTENTION, prepare

NATIVE = [
    ("cpu", "cpp"),
    ("cpu", "triton"),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", marks=pytest.mark.gpu),
]
OPTIONS = {
    "last axis": {},
    "middle axis": {"dim": 1},
    "mask": {"dim": 0, "masked": True},
    "padding, clamped": {"padding_value": 0.5, "normalization": "clamped"},
    "bfloat16": {"dtype": torch.bfloat16, "dim": 1},
    "float64, transposed": {"dtype": torch.float64, "transposed": True},
}
native = pytest.mark.parametrize(("device", "backend"), NATIVE)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def arguments(device="cpu", dtype=torch.float32, masked=False, transposed=False, **options):
    torch.manual_seed(0)
    acc = torch.promote_types(dtype, torch.float32)
    x = torch.randn(3, 6, 5, device=device).to(dtype)
    if transposed:
        x = x.transpose(0, 2).contiguous().transpose(0, 2)
    made = {
        "x": x.requires_grad_(),
        "mean_offset": torch.randn(2, 3, device=device).to(acc).requires_grad_(),
        "width": (torch.rand(2, 3, device=device) + 1).to(acc).requires_grad_(),
        "num_heads": 2,
    }
    if masked:
        made["mask"] = torch.rand(3, 6, 1, device=device) < 0.8
    return made | options


def served(device, backend, **options):
    return citizenship.served(ATTENTION, arguments, device, backend, **options)


def op(part, backend):
    return citizenship.op("gaussian_adaptive_attention", part, backend)


def attend(made):
    return trifuse.gaussian_adaptive_attention(**made, return_weights=True)


def loss(out, weights):
    return out.float().square().sum() + weights.float().square().sum()


@every_option
@native
def test_opcheck_of_forward_and_backward(device, backend, options):
    call = prepare(**served(device, backend, **options), return_weights=True)
    forward, backward = op("fwd", backend), op("bwd", backend)
    inputs = call[:8]
    torch.library.opcheck(forward, inputs)
    inputs = [value.detach() if isinstance(value, torch.Tensor) else value for value in inputs]
    x, mean_offset, width, mask, *flags, _ = inputs
    out, weights, stats = forward(*inputs)
    for dout, dweights in ((torch.randn_like(out), None), (None, torch.randn_like(weights))):
        torch.library.opcheck(backward, (dout, dweights, x, mean_offset, width, mask, stats, *flags))


@every_option
@native
def test_a_fake_call_has_the_shapes_strides_and_dtypes_of_the_real_one(device, backend, options):
    made = served(device, backend, **options)

    def look(tensors):
        return [(tuple(one.shape), one.stride(), one.dtype, one.device.type) for one in tensors]

    with trifuse.backend(backend):
        real = attend(made)
        real_grads = torch.autograd.grad(loss(*real), gradients_of(made))
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake_made = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in made.items()}
            fake = attend(fake_made)
            fake_grads = torch.autograd.grad(loss(*fake), gradients_of(fake_made))
    assert look(fake) == look(real)
    assert look(fake_grads) == look(real_grads)


@pytest.mark.parametrize("name", ["middle axis", "mask", "padding, clamped"])
@pytest.mark.parametrize(("device", "backend"), [("cpu", "reference"), *NATIVE])
def test_compile_gives_the_eager_result_and_gradients(device, backend, name):
    made = served(device, backend, **OPTIONS[name])
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with trifuse.backend(backend):
        results = [
            (*out, *torch.autograd.grad(loss(*out), gradients_of(made))) for out in (compiled(made), attend(made))
        ]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_one_graph_serves_every_length():
    made = served("cpu", "cpp")
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(trifuse.gaussian_adaptive_attention, fullgraph=True, dynamic=True, backend=count)
    for length in (40, 41, 64, 1500):
        call = {name: made[name].detach() for name in ("mean_offset", "width")} | {"num_heads": 2}
        x = torch.randn(2, 3, length)
        torch.testing.assert_close(compiled(x, **call), trifuse.gaussian_adaptive_attention(x, **call))
    assert len(graphs) == 1


def test_an_attention_is_exported():
    made = served("cpu", "cpp")

    class Attention(torch.nn.Module):
        def forward(self, x, mean_offset, width):
            return trifuse.gaussian_adaptive_attention(x, mean_offset, width, num_heads=2, dim=1)

    parameters = made["mean_offset"].detach(), made["width"].detach()
    length = torch.export.Dim("length", min=2)
    program = torch.export.export(
        Attention(), (torch.randn(2, 7, 4), *parameters), dynamic_shapes=({1: length}, None, None)
    )
    targets = {str(node.target) for node in program.graph.nodes}
    assert "trifuse.gaussian_adaptive_attention_fwd.default" in targets
    x = torch.randn(2, 90, 4)
    torch.testing.assert_close(program.module()(x, *parameters), Attention()(x, *parameters))


@pytest.mark.parametrize(("device", "backend"), [("cpu", "reference"), ("cpu", "cpp"), *NATIVE[2:]])
def test_autocast_changes_nothing(device, backend):
    citizenship.autocast_changes_nothing(attend, served(device, backend), device, backend)


@native
def test_checkpointing_gives_the_same_gradients(device, backend):
    citizenship.checkpointing_gives_the_same_gradients(attend, loss, served(device, backend), backend)


@native
def test_a_second_derivative_is_refused_and_the_reference_has_it(device, backend):
    citizenship.a_second_derivative_is_refused(
        "gaussian_adaptive_attention", attend, loss, served(device, backend), backend
    )


@native
def test_forward_mode_is_refused(device, backend):
    citizenship.forward_mode_is_refused("gaussian_adaptive_attention", attend, served(device, backend), "x", backend)


@native
def test_an_output_may_be_changed_in_place(device, backend):
    made = served(device, backend)
    with trifuse.backend(backend):
        expected = torch.autograd.grad(attend(made)[0].sum(), gradients_of(made))
        out = trifuse.gaussian_adaptive_attention(**made)
        out += 1
        found = torch.autograd.grad(out.sum(), gradients_of(made))
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)

"""gaussian_gate behaves as torch's own ops do: opcheck, compile, export, autocast, fake tensors, checkpointing."""

import citizenship
import pytest
import torch
from citizenship import gradients_of
from torch._subclasses.fake_tensor import FakeTensorMode

import trifuse
from trifuse.ops._slices import slices_along
from trifuse.ops.gaussian_gate import GATE, kernel_arguments, prepare

NATIVE = [
    ("cpu", "cpp"),
    ("cpu", "triton"),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", marks=pytest.mark.gpu),
]
OPTIONS = {
    "feature": {"kind": "feature"},
    "feature, columns": {"kind": "feature", "dim": 0},
    "context": {"kind": "context"},
    "density": {"kind": "density"},
    "masked, permuted": {"kind": "density", "masked": True, "permuted": True},
    "bfloat16 gate": {"kind": "feature", "dtype": torch.bfloat16, "multiply": False},
    "float64": {"kind": "density", "dtype": torch.float64},
}
native = pytest.mark.parametrize(("device", "backend"), NATIVE)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def arguments(device="cpu", kind="feature", dtype=torch.float32, dim=1, masked=False, permuted=False, multiply=True):
    torch.manual_seed(0)
    acc = torch.promote_types(dtype, torch.float32)
    x = torch.randn(4, 6, 5, device=device).to(dtype)
    x = x.permute(2, 1, 0).contiguous().permute(2, 1, 0) if permuted else x
    shape = {"feature": (5,), "context": (), "density": (2, 3)}[kind]
    made = {"x": x.requires_grad_(), "width": (0.5 + torch.rand(shape, device=device)).to(acc).requires_grad_()}
    if kind != "context":
        made["mean_offset"] = torch.randn(shape, device=device).to(acc).requires_grad_()
    if kind == "density":
        made |= {"alpha": torch.rand(2, device=device).to(acc).requires_grad_(), "num_heads": 2}
    if masked:
        made["mask"] = torch.rand(6, 5, device=device) < 0.7
    return made | {"kind": kind, "dim": dim, "multiply": multiply}


def served(device, backend, **options):
    return citizenship.served(GATE, arguments, device, backend, **options)


def op(part, backend):
    return citizenship.op("gaussian_gate", part, backend)


def gate(made):
    return trifuse.gaussian_gate(**made)


def loss(out):
    return out.float().square().sum()


@every_option
@native
def test_opcheck_of_forward_and_backward(device, backend, options):
    call = prepare(**served(device, backend, **options))
    args = [
        one.detach().requires_grad_(one.is_floating_point()) if isinstance(one, torch.Tensor) else one
        for one in kernel_arguments(call, slices_along(call.x, call.dim))
    ]
    torch.library.opcheck(op("fwd", backend), tuple(args))
    args = [one.detach() if isinstance(one, torch.Tensor) else one for one in args]
    torch.library.opcheck(op("fwd", backend), tuple(args))
    out, stats = op("fwd", backend)(*args)
    torch.library.opcheck(op("bwd", backend), (torch.randn_like(out), *args[:5], stats, *args[5:]))


@every_option
@native
def test_a_fake_call_has_the_shapes_strides_and_dtypes_of_the_real_one(device, backend, options):
    made = served(device, backend, **options)

    def look(tensors):
        return [(tuple(one.shape), one.stride(), one.dtype, one.device.type) for one in tensors]

    with trifuse.backend(backend):
        real = gate(made)
        real_grads = torch.autograd.grad(loss(real), gradients_of(made))
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake_made = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in made.items()}
            fake = gate(fake_made)
            fake_grads = torch.autograd.grad(loss(fake), gradients_of(fake_made))
    assert look([fake]) == look([real])
    assert look(fake_grads) == look(real_grads)


@pytest.mark.parametrize("name", ["feature", "context", "masked, permuted"])
@pytest.mark.parametrize(("device", "backend"), [("cpu", "reference"), *NATIVE])
def test_compile_gives_the_eager_result_and_gradients(device, backend, name):
    made = served(device, backend, **OPTIONS[name])
    torch._dynamo.reset()
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    with trifuse.backend(backend):
        results = [(out, *torch.autograd.grad(loss(out), gradients_of(made))) for out in (compiled(made), gate(made))]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_one_graph_serves_every_length():
    served("cpu", "cpp")
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def feature(x, mean_offset, width):
        return trifuse.gaussian_gate(x, mean_offset, width, dim=1)

    compiled = torch.compile(feature, fullgraph=True, dynamic=True, backend=count)
    for length in (40, 41, 64, 1500):
        args = (torch.randn(3, length, 5), torch.randn(5), 0.5 + torch.rand(5))
        torch.testing.assert_close(compiled(*args), feature(*args))
    assert len(graphs) == 1


def test_a_gate_is_exported():
    served("cpu", "cpp")

    class Gate(torch.nn.Module):
        def forward(self, x):
            return trifuse.gaussian_gate(x, kind="context", dim=1)

    length = torch.export.Dim("length")
    program = torch.export.export(Gate(), (torch.randn(3, 7, 4),), dynamic_shapes=({1: length},))
    assert "trifuse.gaussian_gate_fwd.default" in {str(node.target) for node in program.graph.nodes}
    x = torch.randn(3, 90, 4)
    torch.testing.assert_close(program.module()(x), Gate()(x))


@pytest.mark.parametrize(("device", "backend"), [("cpu", "reference"), ("cpu", "cpp"), *NATIVE[2:]])
def test_autocast_changes_nothing(device, backend):
    citizenship.autocast_changes_nothing(gate, served(device, backend), device, backend)


@native
def test_checkpointing_gives_the_same_gradients(device, backend):
    citizenship.checkpointing_gives_the_same_gradients(gate, loss, served(device, backend), backend)


@native
def test_a_second_derivative_is_refused_and_the_reference_has_it(device, backend):
    citizenship.a_second_derivative_is_refused("gaussian_gate", gate, loss, served(device, backend), backend)


@native
def test_forward_mode_is_refused(device, backend):
    citizenship.forward_mode_is_refused("gaussian_gate", gate, served(device, backend), "x", backend)


@native
def test_x_that_the_backward_pass_needs_is_not_changed_in_silence(device, backend):
    made = served(device, backend)
    with trifuse.backend(backend):
        x = made["x"].detach().clone().requires_grad_() * 1
        out = gate(made | {"x": x})
        x += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@native
def test_the_output_may_be_changed_in_place(device, backend):
    made = served(device, backend)
    with trifuse.backend(backend):
        expected = torch.autograd.grad(2 * gate(made).sum(), gradients_of(made))
        out = gate(made)
        out *= 2
        found = torch.autograd.grad(out.sum(), gradients_of(made))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)

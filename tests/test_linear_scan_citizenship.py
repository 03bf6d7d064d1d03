"""linear_scan behaves as torch's own ops do: opcheck, compile, export, autocast, fake tensors, checkpointing."""

import citizenship
import pytest
import torch
from citizenship import gradients_of
from torch._subclasses.fake_tensor import FakeTensorMode

import trifuse
from trifuse.ops.linear_scan import SCAN, prepare

BATCH, DIM, LENGTH = 2, 6, 5
NATIVE = [
    ("cpu", "cpp"),
    ("cpu", "triton"),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", marks=pytest.mark.gpu),
]
OPTIONS = {
    "bdl": {},
    "bld": {"layout": "bld"},
    "packed": {"packed": True},
    "reverse, bare": {"layout": "bld", "reverse": True, "bare": True},
    "bfloat16": {"layout": "bld", "dtype": torch.bfloat16},
    "complex": {"dtype": torch.complex64},
    "real beside complex": {"dtype": torch.complex64, "a_dtype": torch.float32},
    "complex128": {"dtype": torch.complex128, "layout": "bld"},
}
native = pytest.mark.parametrize(("device", "backend"), NATIVE)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def arguments(device="cpu", layout="bdl", dtype=torch.float32, a_dtype=None, packed=False, reverse=False, bare=False):
    torch.manual_seed(0)
    batch, rows = (1, 3) if packed else (BATCH, BATCH)
    shape = (batch, DIM, LENGTH) if layout == "bdl" else (batch, LENGTH, DIM)
    acc = torch.promote_types(dtype, torch.float32)
    made = {
        "a": torch.rand(shape, device=device).to(a_dtype or dtype).requires_grad_(),
        "b": torch.randn(shape, device=device).to(dtype).requires_grad_(),
    }
    if not bare:
        made["initial_state"] = torch.randn(rows, DIM, device=device).to(acc).requires_grad_()
    if packed:
        made["cu_seqlens"] = torch.tensor([0, 2, 2, LENGTH], device=device)
    return made | {"reverse": reverse, "layout": layout}


def served(device, backend, **options):
    return citizenship.served(SCAN, arguments, device, backend, **options)


def op(part, backend):
    return citizenship.op("linear_scan", part, backend)


def scan(made):
    return trifuse.linear_scan(**made, return_last_state=True)


def loss(h, last_state):
    return sum(torch.view_as_real(x).square().sum() if x.is_complex() else x.float().square().sum()
               for x in (h, last_state))  # fmt: skip


@every_option
@native
def test_opcheck_of_forward_and_backward(device, backend, options):
    call = prepare(**served(device, backend, **options))
    forward, backward = op("fwd", backend), op("bwd", backend)
    torch.library.opcheck(forward, tuple(call))
    a, b, *rest = (value.detach() if isinstance(value, torch.Tensor) else value for value in call)
    torch.library.opcheck(forward, (a, b, *rest))
    h, last_state = forward(a, b, *rest)
    for dlast_state in (None, torch.randn_like(last_state)):
        torch.library.opcheck(backward, (torch.randn_like(h), dlast_state, a, h, *rest))


@every_option
@native
def test_a_fake_call_has_the_shapes_strides_and_dtypes_of_the_real_one(device, backend, options):
    made = served(device, backend, **options)

    def look(tensors):
        return [(tuple(one.shape), one.stride(), one.dtype, one.device.type) for one in tensors]

    with trifuse.backend(backend):
        real = scan(made)
        real_grads = torch.autograd.grad(loss(*real), gradients_of(made))
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake_made = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in made.items()}
            fake = scan(fake_made)
            fake_grads = torch.autograd.grad(loss(*fake), gradients_of(fake_made))
    assert look(fake) == look(real)
    assert look(fake_grads) == look(real_grads)


@pytest.mark.parametrize("name", ["bld", "packed", "complex"])
@pytest.mark.parametrize(("device", "backend"), [("cpu", "reference"), *NATIVE])
def test_compile_gives_the_eager_result_and_gradients(device, backend, name):
    made = served(device, backend, **OPTIONS[name])
    if backend == "reference" and name == "packed":
        pytest.skip("the reference's loop reads the offsets of packed sequences, which no graph can")
    torch._dynamo.reset()
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    with trifuse.backend(backend):
        results = [(*out, *torch.autograd.grad(loss(*out), gradients_of(made))) for out in (compiled(made), scan(made))]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_one_graph_serves_every_length():
    served("cpu", "cpp")
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(trifuse.linear_scan, fullgraph=True, dynamic=True, backend=count)
    for length in (40, 41, 64, 1500):
        a, b = torch.rand(2, 3, 4, length)
        torch.testing.assert_close(compiled(a, b), trifuse.linear_scan(a, b))
    assert len(graphs) == 1


def test_a_scan_is_exported():
    served("cpu", "cpp")

    class Scan(torch.nn.Module):
        def forward(self, a, b):
            return trifuse.linear_scan(a, b, layout="bld")

    a, b = torch.rand(2, 2, 7, 4)
    length = torch.export.Dim("length")
    program = torch.export.export(Scan(), (a, b), dynamic_shapes=({1: length}, {1: length}))
    assert "trifuse.linear_scan_fwd.default" in {str(node.target) for node in program.graph.nodes}
    a, b = torch.rand(2, 2, 90, 4)
    torch.testing.assert_close(program.module()(a, b), Scan()(a, b))


@pytest.mark.parametrize(("device", "backend"), [("cpu", "reference"), ("cpu", "cpp"), *NATIVE[2:]])
def test_autocast_changes_nothing(device, backend):
    citizenship.autocast_changes_nothing(scan, served(device, backend), device, backend)


@native
def test_checkpointing_gives_the_same_gradients(device, backend):
    citizenship.checkpointing_gives_the_same_gradients(scan, loss, served(device, backend), backend)


@native
def test_a_second_derivative_is_refused_and_the_reference_has_it(device, backend):
    citizenship.a_second_derivative_is_refused("linear_scan", scan, loss, served(device, backend), backend)


@native
def test_forward_mode_is_refused(device, backend):
    citizenship.forward_mode_is_refused("linear_scan", scan, served(device, backend), "b", backend)


@native
def test_an_output_that_the_backward_pass_needs_is_not_changed_in_silence(device, backend):
    made = served(device, backend)
    with trifuse.backend(backend):
        h = trifuse.linear_scan(**made)
        h += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            h.sum().backward()

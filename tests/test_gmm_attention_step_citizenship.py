"""gmm_attention_step behaves as torch's own ops do: opcheck, compile, export, autocast, fake tensors, checkpointing."""

import citizenship
import pytest
import torch
from citizenship import gradients_of
from torch._subclasses.fake_tensor import FakeTensorMode

import trifuse
from trifuse.ops.gmm_attention_step import STEP, prepare

BATCH, LENGTH, WIDTH, COMPONENTS = 2, 6, 5, 3
NATIVE = [("cpu", "cpp"), ("cpu", "triton"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)]
OPTIONS = {
    "float32": {},
    "padding, strided": {"masked": True, "strided": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16 mixture": {"dtype": torch.float16, "mixture_dtype": torch.float16},
    "float64": {"dtype": torch.float64, "masked": True},
}
native = pytest.mark.parametrize(("device", "backend"), NATIVE)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def arguments(device="cpu", dtype=torch.float32, mixture_dtype=None, masked=False, strided=False):
    torch.manual_seed(0)
    mixture_dtype = mixture_dtype or torch.promote_types(dtype, torch.float32)
    values = torch.randn(BATCH, LENGTH, WIDTH, device=device).to(dtype)
    if strided:
        values = values.transpose(1, 2).contiguous().transpose(1, 2)
    made = {"values": values.requires_grad_()}
    for name in ("weight", "delta", "sigma", "mean"):
        scale = 4.0 if name == "mean" else 1.0
        made[name] = (scale * torch.rand(BATCH, COMPONENTS, device=device) + 0.5).to(mixture_dtype).requires_grad_()
    if masked:
        made["key_padding_mask"] = torch.arange(LENGTH, device=device).expand(BATCH, -1) >= LENGTH - 2
    return made


def served(device, backend, **options):
    return citizenship.served(STEP, arguments, device, backend, **options)


def op(part, backend):
    return citizenship.op("gmm_attention_step", part, backend)


def step(made):
    return trifuse.gmm_attention_step(**made, return_alignment=True)


def loss(*outs):
    return sum(out.float().square().sum() for out in outs)


@every_option
@native
def test_opcheck_of_forward_and_backward(device, backend, options):
    call = prepare(**served(device, backend, **options))
    forward, backward = op("fwd", backend), op("bwd", backend)
    torch.library.opcheck(forward, tuple(call))
    values, weight, delta, sigma, mean, padding = (None if x is None else x.detach() for x in call)
    outs = forward(values, weight, delta, sigma, mean, padding)
    grads = [torch.randn_like(out) for out in outs]
    for wanted, values_grad in ((grads, True), ([grads[0], None, None], False), ([None, None, grads[2]], False)):
        saved = (values, weight, delta, sigma, *outs[1:], padding)
        torch.library.opcheck(backward, (*wanted, *saved, values_grad))


@every_option
@native
def test_a_fake_call_has_the_shapes_strides_and_dtypes_of_the_real_one(device, backend, options):
    made = served(device, backend, **options)

    def look(tensors):
        return [(tuple(one.shape), one.stride(), one.dtype, one.device.type) for one in tensors]

    with trifuse.backend(backend):
        real = step(made)
        real_grads = torch.autograd.grad(loss(*real), gradients_of(made))
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake_made = {name: mode.from_tensor(value) for name, value in made.items()}
            fake = step(fake_made)
            fake_grads = torch.autograd.grad(loss(*fake), gradients_of(fake_made))
    assert look(fake) == look(real)
    assert look(fake_grads) == look(real_grads)


@pytest.mark.parametrize("name", ["float32", "padding, strided", "bfloat16"])
@pytest.mark.parametrize(("device", "backend"), [("cpu", "reference"), *NATIVE])
def test_compile_gives_the_eager_result_and_gradients(device, backend, name):
    made = served(device, backend, **OPTIONS[name])
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with trifuse.backend(backend):
        results = [(*out, *torch.autograd.grad(loss(*out), gradients_of(made))) for out in (compiled(made), step(made))]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_one_graph_serves_every_shape():
    served("cpu", "cpp")
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(trifuse.gmm_attention_step, fullgraph=True, dynamic=True, backend=count)
    for batch, length, width, components in ((2, 40, 8, 5), (2, 41, 8, 5), (7, 1000, 24, 10), (4, 64, 9, 3)):
        values = torch.randn(batch, length, width)
        weight, delta, sigma, mean = torch.rand(4, batch, components) + 0.1
        found = compiled(values, weight, delta, sigma, mean)
        torch.testing.assert_close(found, trifuse.gmm_attention_step(values, weight, delta, sigma, mean))
    assert len(graphs) == 1


def test_a_step_is_exported():
    served("cpu", "cpp")

    class Step(torch.nn.Module):
        def forward(self, values, mixture, mean):
            return trifuse.gmm_attention_step(values, *mixture.unbind(1), mean)

    def inputs(length):
        return torch.randn(2, length, 4), torch.rand(2, 3, 5) + 0.1, torch.rand(2, 5)

    length = torch.export.Dim("length")
    program = torch.export.export(Step(), inputs(7), dynamic_shapes=({1: length}, None, None))
    assert "trifuse.gmm_attention_step_fwd.default" in {str(node.target) for node in program.graph.nodes}
    longer = inputs(90)
    torch.testing.assert_close(program.module()(*longer), Step()(*longer))


@pytest.mark.parametrize(("device", "backend"), [("cpu", "reference"), ("cpu", "cpp"), NATIVE[2]])
def test_autocast_changes_nothing(device, backend):
    citizenship.autocast_changes_nothing(step, served(device, backend), device, backend)


@native
def test_checkpointing_gives_the_same_gradients(device, backend):
    citizenship.checkpointing_gives_the_same_gradients(step, loss, served(device, backend), backend)


@native
def test_a_second_derivative_is_refused_and_the_reference_has_it(device, backend):
    citizenship.a_second_derivative_is_refused("gmm_attention_step", step, loss, served(device, backend), backend)


@native
def test_forward_mode_is_refused(device, backend):
    citizenship.forward_mode_is_refused("gmm_attention_step", step, served(device, backend), "mean", backend)


@native
@pytest.mark.parametrize("name", ["mean_new", "alignment"])
def test_an_output_that_the_backward_pass_needs_is_not_changed_in_silence(device, backend, name):
    made = served(device, backend)
    with trifuse.backend(backend):
        context, mean_new, alignment = step(made)
        (mean_new if name == "mean_new" else alignment).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            context.sum().backward()

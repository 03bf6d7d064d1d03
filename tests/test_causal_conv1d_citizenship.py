"""causal_conv1d behaves as torch's own ops do: opcheck, compile, export, autocast, fake tensors, checkpointing."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import trifuse
from trifuse.ops.causal_conv1d import CONV, prepare
from trifuse.ops.causal_conv1d_update import prepare_update

BATCH, DIM, LENGTH, WIDTH = 2, 6, 5, 4
GRADIENTS = ("x", "weight", "bias", "initial_states")

# Every native backend, on each device it could serve; what this machine lacks is skipped with the reason.
NATIVE = [
    ("cpu", "cpp"),
    ("cpu", "triton"),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", marks=pytest.mark.gpu),
]
EVERY = [("cpu", "reference"), *NATIVE]
OPTIONS = {
    "bdl": {},
    "bld": {"layout": "bld"},
    "packed": {"packed": True, "layout": "bld"},
    "named": {"named": True},
    "bfloat16": {"layout": "bld", "dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "bare": {"bare": True},
}


def conv_arguments(
    device="cpu", layout="bdl", dtype=torch.float32, packed=False, named=False, bare=False, length=LENGTH,
    requires_grad=True,
):  # fmt: skip
    torch.manual_seed(0)
    batch, rows = (1, 3) if packed else (BATCH, BATCH)

    def random(*shape, dtype=dtype):
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_(requires_grad)

    weights = torch.promote_types(dtype, torch.float32)
    arguments = {
        "x": random(*((batch, DIM, length) if layout == "bdl" else (batch, length, DIM))),
        "weight": random(DIM, WIDTH, dtype=weights),
    }
    if not bare:
        arguments |= {"bias": random(DIM, dtype=weights), "initial_states": random(rows, DIM, WIDTH - 1)}
    if packed:
        arguments["cu_seqlens"] = torch.tensor([0, 2, 2, length], device=device)
    if named:
        arguments["seq_idx"] = (torch.arange(length, device=device) // 3).expand(batch, length)
    return arguments | {"activation": "silu", "layout": layout}


def update_arguments(device="cpu", dtype=torch.float32, requires_grad=False):
    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_(requires_grad)

    return {
        "x": random(BATCH, DIM, dtype=dtype), "conv_state": torch.randn(4, DIM, WIDTH, device=device),
        "weight": random(DIM, WIDTH), "bias": random(DIM), "activation": "silu",
        "cache_seqlens": torch.tensor([2, 9], device=device),
        "conv_state_indices": torch.tensor([3, -1], device=device),
    }  # fmt: skip


def served(device, backend, **options):
    """The arguments of a call; skips, with the reasons, where the backend cannot serve it on this machine."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{backend} on cuda: torch sees no CUDA device here")
    arguments = conv_arguments(device, **options)
    reasons = CONV.refusals[backend](prepare(**arguments))
    if reasons:
        pytest.skip(f"{backend} on {device}: " + "; ".join(reasons))
    return arguments


def native_op(part, backend):
    return getattr(torch.ops.trifuse, f"causal_conv1d_{part}" + ("_triton" if backend == "triton" else "")).default


def detached(values):
    return [value.detach() if isinstance(value, torch.Tensor) else value for value in values]


def gradients_of(arguments):
    return [arguments[name] for name in GRADIENTS if arguments.get(name) is not None]


def conv(arguments):
    return trifuse.causal_conv1d(**arguments, return_final_states=True)


def loss(y, final_states):
    return y.float().square().sum() + final_states.float().square().sum()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_opcheck_of_forward_and_backward(device, backend, options):
    call = prepare(**served(device, backend, **options))
    forward, backward = native_op("fwd", backend), native_op("bwd", backend)
    torch.library.opcheck(forward, (*call, True))
    call = detached(call)
    torch.library.opcheck(forward, (*call, False))
    y, final_states = forward(*call, True)
    for dfinal_states in (None, torch.randn_like(final_states)):
        torch.library.opcheck(backward, (torch.randn_like(y), dfinal_states, *call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_opcheck_of_the_update(device, backend, dtype):
    served(device, backend, dtype=dtype)
    torch.library.opcheck(native_op("update", backend), tuple(prepare_update(**update_arguments(device, dtype))))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_a_fake_call_has_the_shapes_strides_and_dtypes_of_the_real_one(device, backend, options):
    arguments = served(device, backend, **options)

    def look(tensors):
        return [(tuple(one.shape), one.stride(), one.dtype, one.device.type) for one in tensors]

    with trifuse.backend(backend):
        real = conv(arguments)
        real_grads = torch.autograd.grad(loss(*real), gradients_of(arguments))
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake_arguments = {
                name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
            fake = conv(fake_arguments)
            fake_grads = torch.autograd.grad(loss(*fake), gradients_of(fake_arguments))
    assert look(fake) == look(real)
    assert look(fake_grads) == look(real_grads)


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize(("device", "backend"), EVERY)
def test_compile_gives_the_eager_result_and_gradients(device, backend, layout):
    arguments = served(device, backend, layout=layout)
    torch._dynamo.reset()
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    with trifuse.backend(backend):
        results = [(*out, *torch.autograd.grad(loss(*out), gradients_of(arguments)))
                   for out in (compiled(arguments), conv(arguments))]  # fmt: skip
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_a_compiled_update_changes_the_state_in_place(device, backend):
    served(device, backend)
    torch._dynamo.reset()
    arguments = update_arguments(device)
    again = arguments | {"conv_state": arguments["conv_state"].clone()}
    compiled = torch.compile(lambda a: trifuse.causal_conv1d_update(**a), fullgraph=True, backend="aot_eager")
    with trifuse.backend(backend):
        torch.testing.assert_close(compiled(arguments), trifuse.causal_conv1d_update(**again))
    assert torch.equal(arguments["conv_state"], again["conv_state"])


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(torch.randn(shape)) for shape in ((DIM, WIDTH), (DIM,)))

    def forward(self, x):
        return trifuse.causal_conv1d(x, self.weight, self.bias, activation="silu", layout="bld").square()


def test_one_compiled_function_serves_every_length():
    served("cpu", "cpp")
    torch._dynamo.reset()
    block, graphs = Block(), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=count)
    for length in (40, 41, 300):
        x = torch.randn(2, length, DIM)
        torch.testing.assert_close(compiled(x), block(x))
    assert len(graphs) == 1


def test_it_is_exported_for_any_batch_and_length():
    served("cpu", "cpp")
    block, size = Block(), torch.export.Dim
    shapes = ({0: size("batch"), 1: size("length")},)
    program = torch.export.export(block, (torch.randn(2, 6, DIM),), dynamic_shapes=shapes)
    assert "trifuse.causal_conv1d_fwd.default" in {str(node.target) for node in program.graph.nodes}
    for shape in ((3, 11, DIM), (1, 300, DIM)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize(("device", "backend"), [("cpu", "reference"), ("cpu", "cpp"), *NATIVE[2:]])
def test_autocast_narrows_the_sequences_and_nothing_else(device, backend):
    arguments = served(device, backend, layout="bld")
    narrow = {k: v.detach().bfloat16() if k in ("x", "initial_states") else v for k, v in arguments.items()}
    with trifuse.backend(backend):
        expected, expected_states = conv(narrow)
        with torch.autocast(device, dtype=torch.bfloat16):
            call = prepare(**arguments)
            y, final_states = conv(arguments)
        grads = torch.autograd.grad(loss(y, final_states), gradients_of(arguments))
    assert call.x.dtype == call.initial_states.dtype == y.dtype == final_states.dtype == torch.bfloat16
    assert call.weight.dtype == call.bias.dtype == torch.float32
    assert torch.equal(y, expected) and torch.equal(final_states, expected_states)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trifuse.causal_conv1d(**conv_arguments(dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpointed_call_has_the_same_gradients(use_reentrant):
    block, x = Block(), torch.randn(2, LENGTH, DIM, requires_grad=True)
    results = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        block.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        results.append([one.grad.clone() for one in (x, *block.parameters())])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("length", [0, LENGTH])
@pytest.mark.parametrize(("device", "backend"), EVERY)
def test_results_may_be_changed_in_place(device, backend, length, layout):
    arguments = served(device, backend, layout=layout, length=length)
    before = arguments["initial_states"].detach().clone()

    def grads(results):
        outs = [x.sum() for x in results]
        return torch.autograd.grad(outs, gradients_of(arguments), allow_unused=True, materialize_grads=True)

    with trifuse.backend(backend):
        expected = grads([3 * x for x in conv(arguments)])
        found = grads([x.mul_(3) for x in conv(arguments)])
    assert torch.equal(arguments["initial_states"], before)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_a_second_derivative_of_a_native_kernel_is_refused_by_name(device, backend):
    arguments = served(device, backend)
    with trifuse.backend(backend):
        results = conv(arguments)
    for result in results:
        (grad,) = torch.autograd.grad(result.square().sum(), arguments["x"], create_graph=True)
        with pytest.raises(RuntimeError, match=r'causal_conv1d.*no second derivative.*trifuse\.backend\("reference"\)'):
            torch.autograd.grad(grad.sum(), arguments["weight"])


@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_a_forward_mode_derivative_of_a_native_kernel_is_refused_by_name(device, backend):
    arguments = served(device, backend, bare=True, requires_grad=False)

    def y(x):
        return trifuse.causal_conv1d(x, arguments["weight"])

    x = arguments["x"]
    with trifuse.backend(backend), pytest.raises(RuntimeError, match=r'trifuse.backend\("reference"\)'):
        torch.func.jvp(y, (x,), (torch.ones_like(x),))
    with trifuse.backend("reference"):
        assert torch.func.jvp(y, (x,), (torch.ones_like(x),))[1].abs().max() > 0


def test_deterministic_follows_torch():
    assert prepare(**conv_arguments()).deterministic is False
    torch.use_deterministic_algorithms(True)
    try:
        assert prepare(**conv_arguments()).deterministic is True
        assert prepare(**conv_arguments(), deterministic=False).deterministic is False
    finally:
        torch.use_deterministic_algorithms(False)
    assert prepare(**conv_arguments(), deterministic=True).deterministic is True


@pytest.mark.parametrize(("device", "backend"), EVERY)
def test_no_graph_is_kept_without_gradients(device, backend):
    arguments = served(device, backend)
    with trifuse.backend(backend):
        with torch.no_grad():
            assert not conv(arguments)[0].requires_grad
        with torch.inference_mode():
            torch.testing.assert_close(conv(arguments)[0].clone(), conv(arguments)[0])
        assert not conv(conv_arguments(device, requires_grad=False))[0].requires_grad
        assert not trifuse.causal_conv1d_update(**update_arguments(device, requires_grad=True)).requires_grad


@pytest.mark.parametrize(("device", "backend"), EVERY)
def test_only_the_asked_gradients_are_needed(device, backend):
    arguments = served(device, backend, requires_grad=False)
    everything = conv_arguments(device)
    with trifuse.backend(backend):
        wanted = torch.autograd.grad(loss(*conv(everything)), gradients_of(everything))
        for name, expected in zip(GRADIENTS, wanted, strict=True):
            one = arguments | {name: arguments[name].clone().requires_grad_()}
            (grad,) = torch.autograd.grad(loss(*conv(one)), one[name])
            torch.testing.assert_close(grad, expected)
        y_alone = trifuse.causal_conv1d(**everything)
        torch.autograd.grad(y_alone.sum(), gradients_of(everything))


def test_explain_names_the_choice():
    choice = trifuse.explain(trifuse.causal_conv1d, **conv_arguments())
    assert choice.inputs == "B=2, D=6, L=5, W=4, float32, layout bdl, cpu"
    assert choice.refusals["reference"] == []

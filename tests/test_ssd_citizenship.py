"""ssd behaves as torch's own operations do: opcheck, compile, export, autocast, fake tensors, checkpointing."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import trifuse
from trifuse.ops.ssd import SSD, prepare
from trifuse.registration.ssd import chunk_size

BATCH, LENGTH, HEADS, HEADDIM, STATE = 2, 20, 4, 3, 5
GRADIENTS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
NATIVE = [("cpu", "cpp"), ("cpu", "triton"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)]
EVERY = [("cpu", "reference"), *NATIVE]
OPTIONS = {
    "full": {},
    "packed": {"packed": True},
    "runs": {"runs": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "bare": {"bare": True},
}


def ssd_arguments(
    device="cpu", dtype=torch.float32, packed=False, runs=False, bare=False, length=LENGTH, requires_grad=True
):
    torch.manual_seed(0)
    batch, rows = (1, 3) if packed else (BATCH, BATCH)

    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_(requires_grad)

    arguments = {
        "x": random(batch, length, HEADS, HEADDIM, dtype=dtype), "dt": random(batch, length, HEADS, dtype=dtype),
        "A": (-torch.rand(HEADS, device=device) - 0.1).requires_grad_(requires_grad),
        "B": random(batch, length, 2, STATE, dtype=dtype), "C": random(batch, length, 2, STATE, dtype=dtype),
    }  # fmt: skip
    if not bare:
        arguments |= {
            "D": random(HEADS), "z": random(batch, length, HEADS, HEADDIM, dtype=dtype), "dt_bias": random(HEADS),
            "initial_states": random(rows, HEADS, HEADDIM, STATE),
        }  # fmt: skip
    if packed:
        arguments["cu_seqlens"] = torch.tensor([0, 2, 2, length], device=device)
    if runs:
        arguments["seq_idx"] = (torch.arange(length, device=device) // 7).expand(batch, length)
    return arguments | {"dt_softplus": True}


def served(device, backend, **options):
    """The arguments of a call; skips, with the reasons, where the backend cannot serve it on this machine."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{backend} on cuda: torch sees no CUDA device here")
    arguments = ssd_arguments(device, **options)
    reasons = SSD.refusals[backend](prepare(**arguments))
    if reasons:
        pytest.skip(f"{backend} on {device}: " + "; ".join(reasons))
    return arguments


def native_op(part, backend):
    return getattr(torch.ops.trifuse, f"ssd_{part}" + ("_triton" if backend == "triton" else "")).default


def gradients_of(arguments):
    return [arguments[name] for name in GRADIENTS if arguments.get(name) is not None]


def ssd(arguments):
    return trifuse.ssd(**arguments, return_final_states=True)


def loss(out, final_states):
    return out.float().square().sum() + final_states.square().sum()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_opcheck_of_forward_and_backward(device, backend, options):
    arguments = served(device, backend, **options)
    call, chunk = prepare(**arguments, return_final_states=True)[:-1], chunk_size(backend, 16)
    forward, backward = native_op("fwd", backend), native_op("bwd", backend)
    torch.library.opcheck(forward, (*call, chunk, True))
    call = [value.detach() if isinstance(value, torch.Tensor) else value for value in call]
    torch.library.opcheck(forward, (*call[:-1], False, chunk, False))
    out, final_states, chunk_states = forward(*call, chunk, True)
    for dfinal_states in (None, torch.randn_like(final_states)):
        gradients = torch.randn_like(out), dfinal_states
        torch.library.opcheck(backward, (*gradients, *call[:11], chunk_states, *call[11:-1], chunk))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_a_fake_call_has_the_shapes_strides_and_dtypes_of_the_real_one(device, backend, options):
    arguments = served(device, backend, **options)

    def look(tensors):
        return [(tuple(one.shape), one.stride(), one.dtype, one.device.type) for one in tensors]

    with trifuse.backend(backend):
        real = ssd(arguments)
        real_grads = torch.autograd.grad(loss(*real), gradients_of(arguments))
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake_arguments = {
                name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
            fake = ssd(fake_arguments)
            fake_grads = torch.autograd.grad(loss(*fake), gradients_of(fake_arguments))
    assert look(fake) == look(real)
    assert look(fake_grads) == look(real_grads)


@pytest.mark.parametrize("options", [{}, {"packed": True}], ids=["full", "packed"])
@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_compile_gives_the_eager_result_and_gradients(device, backend, options):
    arguments = served(device, backend, **options)
    torch._dynamo.reset()
    compiled = torch.compile(ssd, fullgraph=True, backend="aot_eager")
    with trifuse.backend(backend):
        results = [(*out, *torch.autograd.grad(loss(*out), gradients_of(arguments)))
                   for out in (compiled(arguments), ssd(arguments))]  # fmt: skip
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


class Block(torch.nn.Module):
    """The smallest module that calls ssd."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(6, HEADS * HEADDIM + 4 * STATE + HEADS)
        self.A_log = torch.nn.Parameter(torch.zeros(HEADS))

    def forward(self, tokens):
        x, B, C, dt = self.project(tokens).split([HEADS * HEADDIM, 2 * STATE, 2 * STATE, HEADS], dim=-1)
        B, C = B.unflatten(-1, (2, STATE)), C.unflatten(-1, (2, STATE))
        return trifuse.ssd(
            x.unflatten(-1, (HEADS, HEADDIM)), dt, -self.A_log.exp(), B, C, dt_softplus=True, dt_limit=(0.0, math.inf)
        )


def test_two_compiled_blocks_serve_every_length():
    """One for sequences of a single chunk, which save no states, and one for longer ones."""
    served("cpu", "cpp")  # the reference's loop over time is unrolled for each length
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer, graphs = Block(), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for length in (40, 41, 128, 129, 300):
        tokens = torch.randn(2, length, 6)
        torch.testing.assert_close(compiled(tokens), layer(tokens))
    assert len(graphs) == 2


def test_a_block_is_exported_for_any_batch_and_length():
    served("cpu", "cpp")
    torch.manual_seed(0)
    layer, size = Block(), torch.export.Dim
    shapes = ({0: size("batch"), 1: size("length")},)
    program = torch.export.export(layer, (torch.randn(2, 6, 6),), dynamic_shapes=shapes).module()
    for shape in ((3, 11, 6), (1, 300, 6)):
        tokens = torch.randn(shape)
        torch.testing.assert_close(program(tokens), layer(tokens))
        program(tokens).square().sum().backward()
        layer(tokens).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    torch.testing.assert_close({name: parameter.grad for name, parameter in program.named_parameters()}, grads)


@pytest.mark.parametrize(("device", "backend"), EVERY)
def test_autocast_narrows_the_sequences_and_nothing_else(device, backend):
    if backend == "triton" and device == "cpu":
        pytest.skip("triton on cpu: Triton's interpreter computes bfloat16 wrongly")
    arguments = served(device, backend)
    narrow = {
        name: value.detach().bfloat16() if name in ("x", "B", "C", "z") else value for name, value in arguments.items()
    }
    with trifuse.backend(backend):
        expected, expected_states = ssd(narrow)
        with torch.autocast(device, dtype=torch.bfloat16):
            call = prepare(**arguments)
            out, final_states = ssd(arguments)
        grads = torch.autograd.grad(loss(out, final_states), gradients_of(arguments))
    assert all(getattr(call, name).dtype == torch.bfloat16 for name in ("x", "B", "C", "z"))
    assert all(getattr(call, name).dtype == torch.float32 for name in ("dt", "A", "D", "dt_bias", "initial_states"))
    assert out.dtype == torch.bfloat16 and final_states.dtype == torch.float32
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(final_states, expected_states)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trifuse.ssd(**ssd_arguments(dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpointed_block_has_the_same_gradients(use_reentrant):
    torch.manual_seed(0)
    layer, tokens = Block(), torch.randn(2, LENGTH, 6, requires_grad=True)
    results = []
    for run in (layer, lambda tokens: checkpoint(layer, tokens, use_reentrant=use_reentrant)):
        layer.zero_grad()
        tokens.grad = None
        run(tokens).square().sum().backward()
        results.append([one.grad.clone() for one in (tokens, *layer.parameters())])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("length", [0, LENGTH])
@pytest.mark.parametrize(("device", "backend"), EVERY)
def test_results_may_be_changed_in_place(device, backend, length):
    arguments = served(device, backend, length=length)
    before = arguments["initial_states"].detach().clone()

    def grads(results):
        outs = [one.sum() for one in results]
        return torch.autograd.grad(outs, gradients_of(arguments), allow_unused=True, materialize_grads=True)

    with trifuse.backend(backend):
        expected = grads([3 * one for one in ssd(arguments)])
        found = grads([one.mul_(3) for one in ssd(arguments)])
    assert torch.equal(arguments["initial_states"], before)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_a_second_derivative_of_a_native_kernel_is_refused_by_name(device, backend):
    arguments = served(device, backend)
    with trifuse.backend(backend):
        out, final_states = ssd(arguments)
    for result in (out, final_states):
        (grad,) = torch.autograd.grad(result.sum(), arguments["dt"], create_graph=True)
        with pytest.raises(RuntimeError, match=r'ssd: .*no second derivative.*trifuse\.backend\("reference"\)'):
            torch.autograd.grad(grad.sum(), arguments["A"])


@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_a_forward_mode_derivative_of_a_native_kernel_is_refused_by_name(device, backend):
    x, *rest, _ = served(device, backend, bare=True, requires_grad=False).values()

    def out(x):
        return trifuse.ssd(x, *rest)

    with trifuse.backend(backend), pytest.raises(RuntimeError, match=r'ssd: .*trifuse.backend\("reference"\)'):
        torch.func.jvp(out, (x,), (torch.ones_like(x),))


def test_deterministic_follows_torch():
    assert prepare(**ssd_arguments()).deterministic is False
    torch.use_deterministic_algorithms(True)
    try:
        assert prepare(**ssd_arguments()).deterministic is True
        assert prepare(**ssd_arguments(), deterministic=False).deterministic is False
    finally:
        torch.use_deterministic_algorithms(False)
    assert prepare(**ssd_arguments(), deterministic=True).deterministic is True


@pytest.mark.parametrize(("device", "backend"), EVERY)
def test_no_graph_is_kept_without_gradients(device, backend):
    arguments = served(device, backend)
    with trifuse.backend(backend):
        with torch.no_grad():
            assert not ssd(arguments)[0].requires_grad
        with torch.inference_mode():
            torch.testing.assert_close(ssd(arguments)[0].clone(), ssd(arguments)[0])
        assert not ssd(ssd_arguments(device, requires_grad=False))[0].requires_grad


@pytest.mark.parametrize(("device", "backend"), EVERY)
def test_only_the_asked_gradients_are_needed(device, backend):
    arguments, everything = served(device, backend, requires_grad=False), ssd_arguments(device)
    with trifuse.backend(backend):
        wanted = torch.autograd.grad(loss(*ssd(everything)), gradients_of(everything))
        for name, expected in zip(GRADIENTS, wanted, strict=True):
            one = arguments | {name: arguments[name].clone().requires_grad_()}
            (grad,) = torch.autograd.grad(loss(*ssd(one)), one[name])
            torch.testing.assert_close(grad, expected)

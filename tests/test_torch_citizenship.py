"""The ops behave as torch's own do: opcheck, compile, export, autocast, fake tensors, checkpointing, errors."""

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import trifuse
from trifuse.nn import InferenceParams, Mamba
from trifuse.ops.selective_scan import SCAN, prepare
from trifuse.ops.selective_state_update import prepare_update
from trifuse.registration.selective_scan import CHUNK_SIZE

BATCH, DIM, LENGTH, STATE = 2, 6, 5, 3
GRADIENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")

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
    "packed": {"packed": True},
    "reverse": {"layout": "bld", "reverse": True},
    "bfloat16": {"layout": "bld", "dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "complex": {"A_dtype": torch.complex64},
    "constant B and C": {"constant": True},
    "bare": {"bare": True},
}


def scan_arguments(
    device="cpu", layout="bdl", dtype=torch.float32, A_dtype=torch.float32, packed=False, reverse=False, constant=False,
    bare=False, length=LENGTH, requires_grad=True,
):  # fmt: skip
    torch.manual_seed(0)
    batch, rows = (1, 3) if packed else (BATCH, BATCH)

    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_(requires_grad)

    def sequence(*channels):
        shape = (batch, *channels, length) if layout == "bdl" else (batch, length, *channels)
        return random(*shape, dtype=dtype)

    A = -torch.rand(DIM, STATE, device=device).add(0.1).to(A_dtype)
    arguments = {"u": sequence(DIM), "delta": sequence(DIM), "A": A.requires_grad_(requires_grad)}
    arguments |= {name: random(DIM, STATE, dtype=A_dtype) if constant else sequence(2, STATE) for name in "BC"}
    if not bare:
        arguments |= {
            "D": random(DIM), "z": sequence(DIM), "delta_bias": random(DIM),
            "initial_state": random(rows, DIM, STATE, dtype=A_dtype),
        }  # fmt: skip
    if packed:
        arguments["cu_seqlens"] = torch.tensor([0, 2, 2, length], device=device)
    return arguments | {"delta_softplus": True, "reverse": reverse, "layout": layout}


def update_arguments(device="cpu", dtype=torch.float32, requires_grad=False):
    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_(requires_grad)

    return {
        "state": torch.randn(4, DIM, STATE, device=device), "x": random(BATCH, DIM, dtype=dtype),
        "dt": random(BATCH, DIM, dtype=dtype), "A": -torch.rand(DIM, STATE, device=device),
        "B": random(BATCH, STATE, dtype=dtype), "C": random(BATCH, STATE, dtype=dtype), "D": random(DIM),
        "z": random(BATCH, DIM, dtype=dtype), "dt_bias": random(DIM), "dt_softplus": True,
        "state_batch_indices": torch.tensor([3, -1], device=device),
    }  # fmt: skip


def served(device, backend, **options):
    """The arguments of a call; skips, with the reasons, where the backend cannot serve it on this machine."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{backend} on cuda: torch sees no CUDA device here")
    arguments = scan_arguments(device, **options)
    reasons = SCAN.refusals[backend](prepare(**arguments))
    if reasons:
        pytest.skip(f"{backend} on {device}: " + "; ".join(reasons))
    return arguments


def native_op(part, backend):
    return getattr(torch.ops.trifuse, f"selective_{part}" + ("_triton" if backend == "triton" else "")).default


def detached(values):
    return [value.detach() if isinstance(value, torch.Tensor) else value for value in values]


def gradients_of(arguments):
    return [arguments[name] for name in GRADIENTS if arguments.get(name) is not None]


def scan(arguments):
    return trifuse.selective_scan(**arguments, return_last_state=True)


def loss(out, last_state):
    return out.float().square().sum() + (last_state.abs() ** 2).sum()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_opcheck_of_forward_and_backward(device, backend, options):
    arguments = served(device, backend, length=70, **options)
    call, chunk = prepare(**arguments), CHUNK_SIZE[backend]
    forward, backward = native_op("scan_fwd", backend), native_op("scan_bwd", backend)
    torch.library.opcheck(forward, (*call, chunk))
    torch.library.opcheck(forward, (*detached(call), 0))
    call = detached(call)
    out, last_state, chunk_states = forward(*call, chunk)
    tensors, flags = call[:10], call[10:]
    for dlast_state in (None, torch.randn_like(last_state)):
        torch.library.opcheck(backward, (torch.randn_like(out), dlast_state, *tensors, chunk_states, *flags, chunk))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_opcheck_of_the_state_update(device, backend, dtype):
    served(device, backend, dtype=dtype)
    torch.library.opcheck(native_op("state_update", backend), tuple(prepare_update(**update_arguments(device, dtype))))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_a_fake_call_has_the_shapes_strides_and_dtypes_of_the_real_one(device, backend, options):
    arguments = served(device, backend, **options)

    def look(tensors):
        return [(tuple(one.shape), one.stride(), one.dtype, one.device.type) for one in tensors]

    with trifuse.backend(backend):
        real = scan(arguments)
        real_grads = torch.autograd.grad(loss(*real), gradients_of(arguments))
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake_arguments = {
                name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
            fake = scan(fake_arguments)
            fake_grads = torch.autograd.grad(loss(*fake), gradients_of(fake_arguments))
    assert look(fake) == look(real)
    assert look(fake_grads) == look(real_grads)


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize(("device", "backend"), EVERY)
def test_compile_gives_the_eager_result_and_gradients(device, backend, layout):
    arguments = served(device, backend, layout=layout)
    torch._dynamo.reset()
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    with trifuse.backend(backend):
        results = [(*out, *torch.autograd.grad(loss(*out), gradients_of(arguments)))
                   for out in (compiled(arguments), scan(arguments))]  # fmt: skip
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_block_gives_the_eager_result_and_gradients(backend):
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer, x = Mamba(16, d_state=4), torch.randn(2, LENGTH, 16, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    results = []
    for call in (compiled, layer):
        out = call(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_one_compiled_block_serves_every_length():
    served("cpu", "cpp")  # the reference's loop over time is unrolled for each length
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = Mamba(16, d_state=4)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for length in (40, 41, 64, 65, 200):
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1


@torch.no_grad()
def test_a_compiled_block_reads_in_pieces_and_steps():
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer, x = Mamba(16, d_state=4, layer_idx=0), torch.randn(2, 7, 16)
    forward = torch.compile(layer, fullgraph=True, backend="aot_eager")
    cache = InferenceParams()
    outs = []
    for piece in x.split([3, 2, 1, 1], dim=1):
        outs.append(forward(piece, cache))
        cache.seqlen_offset += piece.shape[1]
    torch.testing.assert_close(torch.cat(outs, dim=1), layer(x))

    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    states = layer.allocate_inference_cache(2)
    outs = [step(token, *states)[0] for token in x.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(outs, dim=1), layer(x))
    for state, wanted in zip(states, cache.key_value_memory_dict[0], strict=True):
        torch.testing.assert_close(state, wanted)


def graph_ops(function, *args):
    """Runs `function` compiled; returns, for every graph compiled so far, how many native scans it holds."""
    counts = []

    def record(graph, inputs):
        counts.append(sum("trifuse" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=record), counts


def test_compiled_code_follows_the_forced_backend():
    served("cpu", "cpp")
    arguments = scan_arguments(requires_grad=False)
    expected = scan(arguments)[0]

    def nested(arguments):
        with trifuse.backend("reference"):
            first = scan(arguments)[0]
        return first, scan(arguments)[0]

    compiled, counts = graph_ops(scan)
    torch.testing.assert_close(compiled(arguments)[0], expected)
    with trifuse.backend("reference"):
        torch.testing.assert_close(compiled(arguments)[0], expected)
    compiled(arguments)  # nothing is forced any more: the first graph again
    assert counts == [1, 0]
    compiled, counts = graph_ops(nested)
    for out in compiled(arguments):
        torch.testing.assert_close(out, expected)
    assert counts == [1]
    with trifuse.backend("cuda"), pytest.raises(Exception, match="backend 'cuda' was asked for and cannot serve"):
        compiled(arguments)


def test_a_thread_forces_a_backend_for_itself_only():
    seen, go, done = {}, threading.Event(), threading.Event()

    def other():
        go.wait(10)
        seen["before"] = trifuse.backends.forced_backend()
        with trifuse.backend("reference"):
            seen["inside"] = trifuse.backends.forced_backend()
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with trifuse.backend("cpp"):
        go.set()
        done.wait(10)
        thread.join()
        assert trifuse.backends.forced_backend() == "cpp"
        with trifuse.backend("triton"):
            assert trifuse.backends.forced_backend() == "triton"
        assert trifuse.backends.forced_backend() == "cpp"
    assert seen == {"before": None, "inside": "reference"}


def test_a_forced_backend_is_given_up_after_an_error():
    before = trifuse.backends.forced_backend()
    with pytest.raises(KeyError), trifuse.backend("reference"):
        raise KeyError
    assert trifuse.backends.forced_backend() == before


def test_a_block_is_exported():
    torch.manual_seed(0)
    layer, x = Mamba(16, d_state=4), torch.randn(2, LENGTH, 16)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    served("cpu", "cpp")
    assert "trifuse.selective_scan_fwd.default" in {str(node.target) for node in program.graph.nodes}


def test_a_block_is_exported_for_any_batch_and_length():
    served("cpu", "cpp")  # the reference's loop over time would be unrolled
    torch.manual_seed(0)
    layer, size = Mamba(16, d_state=4), torch.export.Dim
    shapes = ({0: size("batch"), 1: size("length")},)
    program = torch.export.export(layer, (torch.randn(2, 6, 16),), dynamic_shapes=shapes).module()
    for shape in ((3, 11, 16), (1, 300, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), layer(x))
        program(x).square().sum().backward()
        layer(x).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    torch.testing.assert_close({name: parameter.grad for name, parameter in program.named_parameters()}, grads)


@pytest.mark.parametrize(("device", "backend"), [("cpu", "reference"), ("cpu", "cpp"), *NATIVE[2:]])
def test_autocast_narrows_the_sequences_and_nothing_else(device, backend):
    arguments = served(device, backend, layout="bld")
    narrow = {
        name: value.detach().bfloat16() if name in ("u", "delta", "z", "B", "C") else value
        for name, value in arguments.items()
    }
    with trifuse.backend(backend):
        expected, expected_state = scan(narrow)
        with torch.autocast(device, dtype=torch.bfloat16):
            call = prepare(**arguments)
            out, last_state = scan(arguments)
        grads = torch.autograd.grad(loss(out, last_state), gradients_of(arguments))
    assert all(getattr(call, name).dtype == torch.bfloat16 for name in ("u", "delta", "B", "C", "z"))
    assert all(getattr(call, name).dtype == torch.float32 for name in ("A", "D", "delta_bias", "initial_state"))
    assert out.dtype == torch.bfloat16 and last_state.dtype == torch.float32
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last_state, expected_state)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_autocast_lets_a_token_mix_dtypes(backend):
    served("cpu", backend)
    arguments = update_arguments()
    mixed = {name: value.bfloat16() if name in ("dt", "B") else value for name, value in arguments.items()}
    wide = {name: value.float() if name in ("dt", "B") else value for name, value in mixed.items()}
    wide["state"] = wide["state"].clone()
    with trifuse.backend(backend):
        expected = trifuse.selective_state_update(**wide)
        with pytest.raises(TypeError, match="dt is bfloat16; it must be float32 like x"):
            trifuse.selective_state_update(**mixed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = trifuse.selective_state_update(**mixed)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected) and torch.equal(mixed["state"], wide["state"])


def test_autocast_leaves_float64_and_constant_coefficients_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trifuse.selective_scan(**scan_arguments(dtype=torch.float64)).dtype == torch.float64
        call = prepare(**scan_arguments(constant=True))
    assert call.u.dtype == torch.bfloat16
    assert call.B.dtype == call.C.dtype == torch.float32


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_block_under_autocast(compiled):
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer, x = Mamba(16, d_state=4), torch.randn(2, LENGTH, 16, requires_grad=True)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=2**-5, atol=2**-6)
    out.float().square().sum().backward()
    assert all(one.grad.dtype == torch.float32 and one.grad.isfinite().all() for one in (x, *layer.parameters()))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpointed_block_has_the_same_gradients(use_reentrant):
    torch.manual_seed(0)
    layer, x = Mamba(16, d_state=4), torch.randn(2, LENGTH, 16, requires_grad=True)
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        layer.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        results.append([one.grad.clone() for one in (x, *layer.parameters())])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("length", [0, LENGTH])
@pytest.mark.parametrize(("device", "backend"), EVERY)
def test_results_may_be_changed_in_place(device, backend, length, layout):
    arguments = served(device, backend, layout=layout, length=length)
    before = arguments["initial_state"].detach().clone()

    def grads(results):
        outs = [x.sum() for x in results]
        return torch.autograd.grad(outs, gradients_of(arguments), allow_unused=True, materialize_grads=True)

    with trifuse.backend(backend):
        expected = grads([3 * x for x in scan(arguments)])
        found = grads([x.mul_(3) for x in scan(arguments)])
    assert torch.equal(arguments["initial_state"], before)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_a_second_derivative_of_a_native_kernel_is_refused_by_name(device, backend):
    arguments = served(device, backend)
    with trifuse.backend(backend):
        out, last_state = scan(arguments)
    for result in (out, last_state):
        (grad,) = torch.autograd.grad(result.sum(), arguments["delta"], create_graph=True)
        with pytest.raises(RuntimeError, match=r'no second derivative.*trifuse\.backend\("reference"\)'):
            torch.autograd.grad(grad.sum(), arguments["A"])


@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_a_forward_mode_derivative_of_a_native_kernel_is_refused_by_name(device, backend):
    u, *rest = served(device, backend, bare=True, requires_grad=False).values()

    def out(u):
        return trifuse.selective_scan(u, *rest[:4])

    with trifuse.backend(backend), pytest.raises(RuntimeError, match=r'trifuse.backend\("reference"\)'):
        torch.func.jvp(out, (u,), (torch.ones_like(u),))
    with trifuse.backend("reference"):
        assert torch.func.jvp(out, (u,), (torch.ones_like(u),))[1].abs().max() > 0


@pytest.mark.parametrize("options", [{}, {"packed": True, "layout": "bld"}, {"reverse": True}], ids=str)
def test_the_reference_has_second_derivatives(options):
    arguments = scan_arguments(dtype=torch.float64, length=3, **options)
    names = [name for name in GRADIENTS if name in arguments]
    values = [arguments[name].detach().double().requires_grad_() for name in names]

    def function(*values):
        with trifuse.backend("reference"):
            return scan(arguments | dict(zip(names, values, strict=True)))

    assert torch.autograd.gradgradcheck(function, values)


def test_deterministic_follows_torch():
    assert prepare(**scan_arguments()).deterministic is False
    torch.use_deterministic_algorithms(True)
    try:
        assert prepare(**scan_arguments()).deterministic is True
        assert prepare(**scan_arguments(), deterministic=False).deterministic is False
        trifuse.selective_scan(**scan_arguments())
    finally:
        torch.use_deterministic_algorithms(False)
    assert prepare(**scan_arguments(), deterministic=True).deterministic is True


@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_deterministic_gradients_repeat_bit_for_bit(device, backend):
    arguments = served(device, backend, layout="bld", length=100) | {"deterministic": True}
    with trifuse.backend(backend):
        runs = [torch.autograd.grad(loss(*scan(arguments)), gradients_of(arguments)) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(("device", "backend"), EVERY)
def test_no_graph_is_kept_without_gradients(device, backend):
    arguments = served(device, backend)
    with trifuse.backend(backend):
        with torch.no_grad():
            assert not scan(arguments)[0].requires_grad
        with torch.inference_mode():
            torch.testing.assert_close(scan(arguments)[0].clone(), scan(arguments)[0])
        assert not scan(scan_arguments(device, requires_grad=False))[0].requires_grad
        state = update_arguments(device, requires_grad=True)
        assert not trifuse.selective_state_update(**state).requires_grad


@pytest.mark.parametrize(("device", "backend"), EVERY)
def test_only_the_asked_gradients_are_needed(device, backend):
    arguments = served(device, backend, requires_grad=False)
    everything = scan_arguments(device)
    with trifuse.backend(backend):
        wanted = torch.autograd.grad(loss(*scan(everything)), gradients_of(everything))
        for name, expected in zip(GRADIENTS, wanted, strict=True):
            one = arguments | {name: arguments[name].clone().requires_grad_()}
            (grad,) = torch.autograd.grad(loss(*scan(one)), one[name])
            torch.testing.assert_close(grad, expected)

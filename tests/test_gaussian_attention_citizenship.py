"""gaussian_attention behaves as torch's own ops do: opcheck, compile, export, autocast, fake tensors, checkpointing."""

import citizenship
import pytest
import torch
from citizenship import gradients_of
from torch._subclasses.fake_tensor import FakeTensorMode

import trifuse
from trifuse.ops.gaussian_attention import ATTENTION, prepare

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, DIM, VALUE_DIM = 2, 4, 2, 6, 7, 5, 3
NATIVE = [("cpu", "cpp"), ("cpu", "triton"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)]
EVERY = [("cpu", "reference"), *NATIVE]
OPTIONS = {
    "distance": {"kind": "g"},
    "window": {"kind": "s"},
    "everything": {"kind": "gcs", "masked": True, "causal": True},
    "moved window per head": {"kind": "cs", "per_head": True},
    "packed": {"kind": "gs", "packed": True},
    "blhd": {"kind": "g", "blhd": True},
    "unnormalized": {"kind": "g", "normalized": False},
    "bfloat16": {"kind": "gcs", "dtype": torch.bfloat16},
    "float64": {"kind": "gcs", "dtype": torch.float64},
}
native = pytest.mark.parametrize(("device", "backend"), NATIVE)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def arguments(device="cpu", kind="gcs", dtype=torch.float32, packed=False, masked=False, causal=False, per_head=False,
              blhd=False, normalized=True):  # fmt: skip
    g = torch.Generator().manual_seed(0)
    batch, acc = 1 if packed else BATCH, torch.promote_types(dtype, torch.float32)

    def normal(heads, length, dim):
        x = torch.randn(batch, length, heads, dim, generator=g).to(dtype).to(device).transpose(1, 2)
        return (x if blhd else x.contiguous()).requires_grad_()

    def uniform(*shape):
        return (1 + torch.rand(shape, generator=g)).to(acc).to(device).requires_grad_()

    made = {
        "q": normal(HEADS, QUERIES, DIM), "k": normal(KV_HEADS, KEYS, DIM), "v": normal(KV_HEADS, KEYS, VALUE_DIM),
        "is_causal": causal, "enable_gqa": True, "normalized": normalized,
    }  # fmt: skip
    rows = (HEADS,) if per_head else (batch, HEADS, QUERIES)
    made |= {name: uniform(*(rows if letter in "cs" else (HEADS,)))
             for letter, name in (("g", "gamma"), ("c", "center"), ("s", "sigma")) if letter in kind}  # fmt: skip
    if masked:
        made["attn_mask"] = (torch.rand(QUERIES, KEYS, generator=g) < 0.7).to(device)
        made["key_padding_mask"] = (torch.arange(KEYS) >= torch.tensor([[KEYS], [KEYS - 2]])).to(device)
    if packed:
        made["cu_seqlens_q"] = torch.tensor([0, 2, 2, QUERIES], device=device)
        made["cu_seqlens_k"] = torch.tensor([0, 3, 4, KEYS], device=device)
    return made


def served(device, backend, **options):
    return citizenship.served(ATTENTION, arguments, device, backend, **options)


def op(part, backend):
    return citizenship.op("gaussian_attention", part, backend)


def attend(made):
    return trifuse.gaussian_attention(**made, return_lse=True)


def loss(out, lse):
    return out.float().square().sum() + lse.masked_fill(lse == -torch.inf, 0).square().sum()


@every_option
@native
def test_opcheck_of_forward_and_backward(device, backend, options):
    call = prepare(**served(device, backend, **options))
    forward, backward = op("fwd", backend), op("bwd", backend)
    torch.library.opcheck(forward, tuple(call))
    values = [value.detach() if isinstance(value, torch.Tensor) else value for value in call]
    tensors, flags = values[:10], values[10:]
    saved = forward(*tensors, *flags)
    out, lse, _ = saved
    comes = torch.randn_like(lse)
    for dlse in (None, comes) if options is OPTIONS["everything"] else (comes,):
        torch.library.opcheck(backward, (torch.randn_like(out), dlse, *tensors, *saved, *flags))


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


@pytest.mark.parametrize("name", ["distance", "everything", "packed"])
@pytest.mark.parametrize(("device", "backend"), EVERY)
def test_compile_gives_the_eager_result_and_gradients(device, backend, name):
    made = served(device, backend, **OPTIONS[name])
    if backend == "reference" and name == "packed":
        pytest.skip("the reference reads the offsets of packed sequences, which no graph can")
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with trifuse.backend(backend):
        results = [
            (*out, *torch.autograd.grad(loss(*out), gradients_of(made))) for out in (compiled(made), attend(made))
        ]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_one_graph_serves_every_length_and_takes_numbers():
    served("cpu", "cpp")
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def attention(q, k, v):
        return trifuse.gaussian_attention(q, k, v, gamma=0.2, sigma=3.0, center=2, is_causal=True)

    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=count)
    for length in (40, 41, 64, 700):
        q, k, v = torch.randn(3, 2, 3, length, 8)
        torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))
    assert len(graphs) == 1


def test_an_attention_is_exported():
    served("cpu", "cpp")

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.sigma = torch.nn.Parameter(torch.tensor([2.0, 3.0]))

        def forward(self, q, k, v):
            return trifuse.gaussian_attention(q, k, v, sigma=self.sigma, is_causal=True)

    q, k, v = torch.randn(3, 2, 2, 7, 4)
    length = torch.export.Dim("length")
    program = torch.export.export(Attention(), (q, k, v), dynamic_shapes=({2: length}, {2: length}, {2: length}))
    assert "trifuse.gaussian_attention_fwd.default" in {str(node.target) for node in program.graph.nodes}
    q, k, v = torch.randn(3, 2, 2, 90, 4)
    torch.testing.assert_close(program.module()(q, k, v), Attention()(q, k, v))


@pytest.mark.parametrize(("device", "backend"), EVERY)
def test_autocast_takes_the_sequences_to_its_dtype_and_leaves_the_rest(device, backend):
    made = served(device, backend, kind="gcs")
    bfloat16 = made | {name: made[name].detach().bfloat16() for name in "qkv"}
    with trifuse.backend(backend):
        expected = attend(bfloat16)
        with torch.autocast(device, dtype=torch.bfloat16):
            found = attend(made)
        assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
        assert all(torch.equal(got, wanted) for got, wanted in zip(found, expected, strict=True))
        assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(loss(*found), gradients_of(made)))


@pytest.mark.parametrize(("device", "backend"), EVERY)
def test_autocast_leaves_double_precision(device, backend):
    made = served(device, backend, dtype=torch.float64)
    with trifuse.backend(backend):
        expected = attend(made)
        with torch.autocast(device, dtype=torch.bfloat16):
            found = attend(made)
    assert all(torch.equal(got, wanted) for got, wanted in zip(found, expected, strict=True))


@native
def test_only_what_requires_a_gradient_gets_one(device, backend):
    made = served(device, backend)
    with trifuse.backend(backend):
        whole = dict(zip("qkv", torch.autograd.grad(loss(*attend(made)), [made[name] for name in "qkv"]), strict=True))
        for name in "qkv":
            alone = {key: value.detach() if isinstance(value, torch.Tensor) else value for key, value in made.items()}
            alone[name].requires_grad_()
            assert torch.equal(torch.autograd.grad(loss(*attend(alone)), alone[name])[0], whole[name])


@native
def test_checkpointing_gives_the_same_gradients(device, backend):
    citizenship.checkpointing_gives_the_same_gradients(attend, loss, served(device, backend), backend)


@native
def test_a_second_derivative_is_refused_and_the_reference_has_it(device, backend):
    citizenship.a_second_derivative_is_refused("gaussian_attention", attend, loss, served(device, backend), backend)


@native
def test_forward_mode_is_refused(device, backend):
    citizenship.forward_mode_is_refused("gaussian_attention", attend, served(device, backend), "q", backend)


@native
def test_an_output_that_the_backward_pass_needs_is_not_changed_in_silence(device, backend):
    made = served(device, backend)
    with trifuse.backend(backend):
        out = trifuse.gaussian_attention(**made)
        out += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

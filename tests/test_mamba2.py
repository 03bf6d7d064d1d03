"""trifuse.nn.Mamba2: the well-known block's parameters and mathematics, one result however a text is cut."""

import copy
import io
import itertools
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trifuse.nn import BidirectionalMamba, InferenceParams, Mamba, Mamba2, Mamba2Simple, RMSNormGated

OPTIONS = [
    {},
    {"ngroups": 4, "bias": True},
    {"D_has_hdim": True, "conv_bias": False, "d_conv": 2},
    {"rmsnorm": False, "ngroups": 2},
    {"norm_before_gate": True, "dt_limit": (0.05, 0.4)},
    {"d_ssm": 16, "ngroups": 2, "d_conv": 3},
    {"d_ssm": 8, "rmsnorm": False, "D_has_hdim": True},
    {"learnable_init_states": True, "expand": 1.5, "headdim": 3, "d_conv": 1},
]


def make(seed=0, dtype=torch.float64, cls=Mamba2, **options):
    torch.manual_seed(seed)
    sizes = {"d_state": 6, "headdim": 4, "chunk_size": 8, "layer_idx": 0, "dtype": dtype}
    layer = cls(16, **(sizes | options))
    with torch.no_grad():  # initial values of one, and of one size, would hide a mix-up of heads or channels
        layer.D.add_(torch.randn_like(layer.D))
        layer.dt_bias.add_(2 + torch.randn_like(layer.dt_bias))
        if layer.rmsnorm:
            layer.norm.weight.add_(0.3 * torch.randn_like(layer.norm.weight))
        if layer.learnable_init_states:
            layer.init_states.add_(torch.randn_like(layer.init_states))
    return layer


def by_definition(layer, u):
    """The block written out: the recurrence step by step, with torch's own operations."""
    batch, length, _ = u.shape
    heads, groups, states, size = layer.nheads, layer.ngroups, layer.d_state, layer.headdim
    mlp = layer.d_inner - layer.d_ssm
    z0, x0, z, xBC, dt = layer.in_proj(u).split(
        [mlp, mlp, layer.d_ssm, layer.d_ssm + 2 * groups * states, heads], dim=-1
    )
    xBC = F.silu(layer.conv1d(xBC.transpose(1, 2))[..., :length]).transpose(1, 2)
    x, B, C = xBC.split([layer.d_ssm, groups * states, groups * states], dim=-1)
    x = x.reshape(batch, length, heads, size)
    B, C = (one.reshape(batch, length, groups, states).repeat_interleave(heads // groups, dim=2) for one in (B, C))
    dt = F.softplus(dt + layer.dt_bias).clamp(*layer.dt_limit)
    decay = torch.exp(-dt * layer.A_log.exp())
    state = u.new_zeros(batch, heads, size, states)
    if layer.learnable_init_states:
        state = state + layer.init_states
    D = layer.D.to(u.dtype).reshape(heads, -1)
    outs = []
    for t in range(length):
        kick = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        state = decay[:, t, :, None, None] * state + kick
        outs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + D * x[:, t])
    y = torch.stack(outs, dim=1).flatten(2)
    gate = F.silu(z)
    if layer.rmsnorm:
        if not layer.norm_before_gate:
            y = y * gate
        y = y.unflatten(-1, (groups, -1))
        y = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * layer.norm.weight
    if not layer.rmsnorm or layer.norm_before_gate:
        y = y * gate
    return layer.out_proj(torch.cat((F.silu(z0) * x0, y), dim=-1)), state


def read_in_pieces(layer, x, sizes, cache=None, **options):
    cache = cache or InferenceParams()
    outs = []
    for piece in x.split(sizes, dim=1):
        outs.append(layer(piece, inference_params=cache, **options))
        cache.seqlen_offset += piece.shape[1]
    return torch.cat(outs, dim=1), cache.key_value_memory_dict[layer.layer_idx]


def test_parameters_have_the_well_known_names_shapes_and_dtypes():
    layer = Mamba2(64, dtype=torch.bfloat16)
    expected = {
        "dt_bias": ((2,), torch.bfloat16), "A_log": ((2,), torch.bfloat16), "D": ((2,), torch.float32),
        "in_proj.weight": ((514, 64), torch.bfloat16), "conv1d.weight": ((384, 1, 4), torch.bfloat16),
        "conv1d.bias": ((384,), torch.bfloat16), "norm.weight": ((128,), torch.bfloat16),
        "out_proj.weight": ((64, 128), torch.bfloat16),
    }  # fmt: skip
    found = {name: (tuple(value.shape), value.dtype) for name, value in layer.state_dict().items()}
    assert found == expected and list(found) == list(expected)
    undecayed = {name for name, one in layer.named_parameters() if getattr(one, "_no_weight_decay", False)}
    assert undecayed == {"dt_bias", "A_log", "D"}
    assert layer.norm.group_size == 128 and layer.norm.bias is None and layer.norm.eps == 1e-5


def test_options_change_the_parameters():
    layer = Mamba2(
        12, d_state=5, d_conv=3, conv_init=0.1, expand=3, headdim=6, d_ssm=24, ngroups=2, D_has_hdim=True,
        rmsnorm=False, bias=True, conv_bias=False, learnable_init_states=True,
    )  # fmt: skip
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "init_states": (4, 6, 5), "dt_bias": (4,), "A_log": (4,), "D": (24,), "in_proj.weight": (96, 12),
        "in_proj.bias": (96,), "conv1d.weight": (44, 1, 3), "out_proj.weight": (12, 36), "out_proj.bias": (12,),
    }  # fmt: skip
    assert layer.conv1d.weight.abs().max() <= 0.1 and layer.init_states._no_weight_decay
    assert Mamba2(8, expand=1.5, headdim=3).nheads == 4
    assert Mamba2(32, ngroups=2, headdim=8).norm.group_size == 32
    assert Mamba2(8, headdim=4, device="meta").A_log.is_meta


@pytest.mark.parametrize("cls", [Mamba2, Mamba2Simple])
def test_initial_values_are_the_well_known_draws_of_the_seed(cls):
    torch.manual_seed(7)
    layer = cls(24, d_state=6, headdim=8, conv_init=0.3, A_init_range=(2, 5), dt_min=0.01, dt_max=0.2,
                dt_init_floor=0.05)  # fmt: skip
    after = torch.rand(1)
    torch.manual_seed(7)
    in_proj, conv1d = nn.Linear(24, 2 * 48 + 12 + 6, bias=False), nn.Conv1d(60, 60, 4, groups=60)
    conv1d.weight.data.uniform_(-0.3, 0.3)
    dt = torch.exp(torch.rand(6) * (math.log(0.2) - math.log(0.01)) + math.log(0.01)).clamp(min=0.05)
    rates = torch.empty(6).uniform_(2, 5)
    out_proj = nn.Linear(48, 24, bias=False)
    for name, module in {"in_proj": in_proj, "conv1d": conv1d, "out_proj": out_proj}.items():
        for key, value in module.state_dict().items():
            assert torch.equal(getattr(layer, name).state_dict()[key], value), (name, key)
    torch.testing.assert_close(F.softplus(layer.dt_bias.detach()), dt)
    assert torch.equal(layer.A_log.detach(), rates.log())
    assert torch.equal(layer.D.detach(), torch.ones(6)) and torch.equal(layer.norm.weight.detach(), torch.ones(48))
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_output_and_gradients_are_those_of_the_definition(options):
    layer, u = make(**options), torch.randn(2, 19, 16, dtype=torch.float64, requires_grad=True)
    expected, _ = by_definition(layer, u)
    weight = torch.randn_like(expected)
    inputs = [u, *layer.parameters()]
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    out = layer(u)
    torch.testing.assert_close(out, expected)
    for got, want in zip(torch.autograd.grad((out * weight).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", [1, 7, [5, 1, 0, 8, 5], [0, 19]], ids=str)
@torch.no_grad()
def test_a_prompt_in_pieces_is_the_prompt_in_one(sizes, options):
    layer, u = make(**options), torch.randn(2, 19, 16, dtype=torch.float64)
    expected, last_state = by_definition(layer, u)
    out, (conv_state, ssm_state) = read_in_pieces(layer, u, sizes)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(ssm_state, last_state)
    inputs = layer.in_proj(u).split(layer._pieces(), dim=-1)[3]
    torch.testing.assert_close(conv_state, inputs.transpose(1, 2)[..., -layer.d_conv :])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_step_is_forward_of_one_token(options, grad):
    layer, u = make(**options), torch.randn(3, 6, 16, dtype=torch.float64)
    states = layer.allocate_inference_cache(3, max_seqlen=6)
    outs = []
    with torch.set_grad_enabled(grad):
        for token in u.split(1, dim=1):
            out, *returned = layer.step(token, *states)
            assert all(one is other for one, other in zip(returned, states, strict=True))
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, dim=1), layer(u))


@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.02, 0.5)], ids=str)
@torch.no_grad()
def test_transformers_mixer_of_the_same_weights_agrees(n_groups, limit):
    """An implementation by others: prefill and decode."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        hidden_size=32, num_heads=8, head_dim=8, state_size=16, n_groups=n_groups, expand=2, chunk_size=8,
        num_hidden_layers=1, time_step_limit=limit,
    )  # fmt: skip
    mixer = modeling.Mamba2Mixer(config, 0).eval()
    mixer.D.normal_()
    layer = Mamba2(32, d_state=16, headdim=8, ngroups=n_groups, chunk_size=8, dt_limit=limit, layer_idx=0)
    layer.load_state_dict(mixer.state_dict())
    mixer.load_state_dict(layer.state_dict())
    u = torch.randn(2, 21, 32)
    torch.testing.assert_close(layer(u), mixer(u), rtol=0, atol=1e-5)
    theirs, ours = transformers.DynamicCache(config=config), InferenceParams()
    torch.testing.assert_close(layer(u, inference_params=ours), mixer(u, cache_params=theirs), rtol=0, atol=1e-5)
    if limit != (0.0, math.inf):
        return  # their decode step leaves the limit out
    for token in torch.randn(2, 5, 32).split(1, dim=1):
        ours.seqlen_offset += 21
        expected = mixer(token, cache_params=theirs)
        torch.testing.assert_close(layer(token, inference_params=ours), expected, rtol=0, atol=1e-5)


BOUNDS = [[0, 4, 5, 5, 12], [0, 12], [0, 0, 12, 12], [0, 1, 2, 12]]


class Wrapped(nn.Module):
    """The wrapped layer and no more, which a block has no way to know."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)

    def parameters(self, recurse=True):
        return self.base.parameters(recurse)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_packed_texts_do_not_see_each_other(bounds, wrapped):
    layer, u = make(), torch.randn(1, 12, 16, dtype=torch.float64, requires_grad=True)
    parts = torch.cat([layer(u[:, start:end]) for start, end in itertools.pairwise(bounds)], dim=1)
    weight = torch.randn_like(parts)
    (wanted,) = torch.autograd.grad((parts * weight).sum(), u)
    if wrapped:
        layer.conv1d = Wrapped(layer.conv1d)
    sequence = torch.repeat_interleave(torch.arange(len(bounds) - 1), torch.tensor(bounds).diff()).unsqueeze(0)
    offsets = torch.tensor(bounds, dtype=torch.int32)
    for options in ({"cu_seqlens": offsets}, {"seq_idx": sequence.int()}, {"seq_idx": sequence, "cu_seqlens": offsets}):
        out = layer(u, **options)
        torch.testing.assert_close(out, parts)
        torch.testing.assert_close(torch.autograd.grad((out * weight).sum(), u)[0], wanted)


@pytest.mark.parametrize("wrapped", [False, True])
@torch.no_grad()
def test_rows_may_be_cut_at_different_places(wrapped):
    layer, u = make(), torch.randn(2, 10, 16, dtype=torch.float64)
    seq_idx = torch.tensor([[0] * 3 + [1] * 7, [4] * 2 + [9] + [7] * 7])
    expected = torch.cat(
        [
            torch.cat([layer(u[:1, :3]), layer(u[:1, 3:])], dim=1),
            torch.cat([layer(u[1:, :2]), layer(u[1:, 2:3]), layer(u[1:, 3:])], dim=1),
        ]
    )
    if wrapped:
        layer.conv1d = Wrapped(layer.conv1d)
    torch.testing.assert_close(layer(u, seq_idx=seq_idx), expected)
    cache = InferenceParams()
    torch.testing.assert_close(layer(u, seq_idx=seq_idx, inference_params=cache), expected)
    cache.seqlen_offset = 10  # what follows goes on from the last text of each row
    token = torch.randn(2, 1, 16, dtype=torch.float64)
    following = torch.cat(
        [layer(torch.cat((u[row : row + 1, 3:], token[row : row + 1]), dim=1))[:, -1:] for row in (0, 1)]
    )
    torch.testing.assert_close(layer(token, inference_params=cache), following)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("learnable", [False, True])
@torch.no_grad()
def test_packed_texts_are_read_in_pieces(learnable, wrapped):
    layer = make(learnable_init_states=learnable)
    texts = [torch.randn(length, 16, dtype=torch.float64) for length in (9, 4, 6)]
    expected = [layer(text.unsqueeze(0))[0] for text in texts]
    if wrapped:
        layer.conv1d = Wrapped(layer.conv1d)
    cache, outs = InferenceParams(), [[], [], []]
    for cuts in ([(0, 5), (0, 0), (0, 1)], [(5, 6), (0, 3), (1, 4)], [(6, 9), (3, 4), (4, 6)]):
        pieces = [text[start:end] for text, (start, end) in zip(texts, cuts, strict=True)]
        lengths = [piece.shape[0] for piece in pieces]
        offsets = torch.tensor([0, *itertools.accumulate(lengths)])
        out = layer(torch.cat(pieces).unsqueeze(0), cu_seqlens=offsets, inference_params=cache)
        cache.seqlen_offset += 1
        for own, part in zip(outs, out[0].split(lengths), strict=True):
            own.append(part)
    for own, whole in zip(outs, expected, strict=True):
        torch.testing.assert_close(torch.cat(own), whole)


@pytest.mark.parametrize("padding", [-1, 3])
def test_padding_behind_packed_texts_reaches_nothing(padding: int) -> None:
    """Offsets that end before L, with another id behind them: how engines fill a batch up to a fixed length."""
    torch.manual_seed(0)
    layer = Mamba2(16, d_state=8, headdim=8, layer_idx=0)
    u = torch.randn(1, 12, 16)
    offsets, ids = torch.tensor([0, 4, 7, 7]), torch.tensor([[0] * 4 + [1] * 3 + [padding] * 5])
    caches = [InferenceParams(), InferenceParams()]
    with torch.no_grad():
        padded = layer(u, seq_idx=ids, cu_seqlens=offsets, inference_params=caches[0])
        alone = layer(u[:, :7], seq_idx=ids[:, :7], cu_seqlens=offsets, inference_params=caches[1])
    assert torch.equal(padded[:, :7], alone)
    assert not padded[:, 7:].any()
    for left, right in zip(*(cache.key_value_memory_dict[0] for cache in caches), strict=True):
        assert torch.equal(left, right)
    with pytest.raises(ValueError, match="cu_seqlens ends at 7; it must end at L = 12"):
        layer(u, seq_idx=ids.clamp(max=1).abs(), cu_seqlens=offsets)  # the last text goes on


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "dt_limit": (0.1, 1.0), "learnable_init_states": True}], ids=str
)
def test_padding_changes_neither_a_text_nor_its_states(side, options):
    layer, lengths = make(**options), (7, 3, 9)
    u, mask = torch.full((3, 9, 16), float("nan"), dtype=torch.float64), torch.zeros(3, 9, dtype=torch.int64)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(9 - length, 9)
        u[row, place], mask[row, place] = torch.randn(length, 16, dtype=torch.float64), 1
    u.requires_grad_()
    cache, live = InferenceParams(), mask.bool()
    out = layer(u, attention_mask=mask)
    cached = layer(u, attention_mask=mask, inference_params=cache)
    cache.seqlen_offset = 9
    token = torch.randn(3, 1, 16, dtype=torch.float64)
    following = layer(token, inference_params=cache, attention_mask=torch.ones(3, 1))
    (grad,) = torch.autograd.grad(out.square().sum(), u)
    assert (out[~live] == 0).all() and (grad[~live] == 0).all()
    for row in range(3):
        text = torch.cat((u[row, live[row]].detach(), token[row])).unsqueeze(0).requires_grad_()
        alone = layer(text)[0]
        torch.testing.assert_close(out[row, live[row]], alone[:-1])
        torch.testing.assert_close(cached[row, live[row]], alone[:-1])
        torch.testing.assert_close(following[row], alone[-1:])
        (wanted,) = torch.autograd.grad(alone[:-1].square().sum(), text)
        torch.testing.assert_close(grad[row, live[row]], wanted[0, :-1])


@pytest.mark.parametrize("options", [OPTIONS[4], OPTIONS[7]], ids=str)
def test_gradcheck_of_a_tiny_block(options):
    torch.manual_seed(0)
    layer = Mamba2(4, d_state=2, dtype=torch.float64, chunk_size=2, **({"headdim": 2} | options))
    layer.D = nn.Parameter(layer.D.detach().double())  # a float32 parameter has no finite differences to speak of
    names, values = zip(*layer.named_parameters(), strict=True)
    u = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)

    def run(u, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (u,))

    assert torch.autograd.gradcheck(run, (u, *values))


@torch.no_grad()
def test_bfloat16_agrees_with_float32_and_pieces_with_the_whole():
    layer, u = make(dtype=torch.bfloat16), torch.randn(2, 24, 16, dtype=torch.bfloat16)
    expected = copy.deepcopy(layer).float()(u.float())
    whole = layer(u)
    assert whole.dtype == torch.bfloat16
    torch.testing.assert_close(whole.float(), expected, rtol=2**-5, atol=2**-6 * expected.abs().max().item())
    for sizes in (1, 5):
        out, (conv_state, ssm_state) = read_in_pieces(layer, u, sizes)
        assert (out.dtype, conv_state.dtype, ssm_state.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        torch.testing.assert_close(out.float(), whole.float(), rtol=2**-6, atol=2**-7 * expected.abs().max().item())


def test_autocast_computes_in_its_dtype_and_reaches_every_parameter():
    layer, u = make(dtype=torch.float32), torch.randn(2, 9, 16)
    expected = layer(u)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(u)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    out.float().square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_a_new_text_forgets_the_old_one_and_keeps_the_buffers():
    layer, u = make(learnable_init_states=True), torch.randn(2, 5, 16, dtype=torch.float64)
    cache = InferenceParams()
    with torch.no_grad():
        _, states = read_in_pieces(layer, u, 5, cache)
        cache.seqlen_offset = 0
        again, kept = read_in_pieces(layer, u, [1, 4], cache)
        assert all(one is other for one, other in zip(states, kept, strict=True))
        torch.testing.assert_close(again, layer(u))
    cache.seqlen_offset = 0
    layer(u, inference_params=cache).sum().backward()  # the first piece still reaches the trained start
    assert layer.init_states.grad.abs().sum() > 0


def test_flat_tokens_with_seqlen():
    layer, u = make(), torch.randn(3, 5, 16, dtype=torch.float64)
    out = layer(u.flatten(0, 1), seqlen=5)
    assert out.shape == (15, 16)
    torch.testing.assert_close(out.unflatten(0, (3, 5)), layer(u))


@pytest.mark.parametrize("shape", [(2, 0, 16), (0, 3, 16), (0, 0, 16)], ids=str)
def test_empty_input_gives_empty_output(shape):
    layer = make()
    u = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out = layer(u)
    assert out.shape == shape
    out.sum().backward()
    assert u.grad.shape == shape


def test_copies_pickles_and_files_compute_the_same(tmp_path):
    layer, u = make(), torch.randn(1, 4, 16, dtype=torch.float64)
    expected = layer(u)
    assert torch.equal(copy.deepcopy(layer)(u), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(u), expected)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = make(seed=1)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(u), expected)


@pytest.mark.parametrize("cls", [Mamba, Mamba2, BidirectionalMamba])
def test_a_compiled_block_computes_the_same(cls):
    torch.manual_seed(0)
    layer = cls(16, d_state=4, **({"headdim": 4} if cls is Mamba2 else {}))
    u = torch.randn(2, 9, 16, requires_grad=True)
    expected = layer(u)
    (wanted,) = torch.autograd.grad(expected.square().sum(), u)
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(u)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), u)[0], wanted)
    if cls is BidirectionalMamba:
        return
    states, own = layer.allocate_inference_cache(2), layer.allocate_inference_cache(2)
    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for token in u.split(1, dim=1):
            torch.testing.assert_close(step(token, *states)[0], layer.step(token, *own)[0])
    torch.testing.assert_close(states, own)


def test_the_simple_form_has_its_own_arguments_and_the_same_mathematics():
    layer = Mamba2Simple(64)
    assert (layer.d_state, layer.headdim, layer.nheads, layer.activation) == (64, 128, 1, "swish")
    simple = make(cls=Mamba2Simple, learnable_init_states=True, activation="silu", ngroups=2)
    assert next(iter(simple.state_dict())) == "init_states"
    u = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(simple(u), by_definition(simple, u)[0])
    seq_idx = torch.tensor([[0] * 4 + [1] * 5]).expand(2, -1)
    plain = make(cls=Mamba2Simple)
    torch.testing.assert_close(plain(u, seq_idx), torch.cat((plain(u[:, :4]), plain(u[:, 4:])), dim=1))
    with pytest.raises(ValueError, match='Mamba2Simple: activation is \'relu\'; it must be "silu" or "swish"'):
        Mamba2Simple(64, activation="relu")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("group_size", [None, 4, 12])
def test_gated_norm_is_its_definition(group_size, before):
    torch.manual_seed(0)
    norm = RMSNormGated(12, eps=1e-3, group_size=group_size, norm_before_gate=before, dtype=torch.float64)
    norm.weight.data.normal_()
    x, z = torch.randn(2, 3, 12, dtype=torch.float64), torch.randn(2, 3, 12, dtype=torch.float64)
    for gate in (z, None):
        y = x if gate is None or before else x * F.silu(gate)
        y = y.unflatten(-1, (-1, group_size or 12))
        y = (y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-3)).flatten(-2) * norm.weight
        torch.testing.assert_close(norm(x, gate), y if gate is None or not before else y * F.silu(gate))
    with pytest.raises(ValueError, match="RMSNormGated: group_size is 5, which does not divide 12 channels"):
        RMSNormGated(12, group_size=5)


def test_bad_input_is_refused_before_any_state_moves():
    layer, cache = make(), InferenceParams()
    u = torch.randn(2, 3, 16, dtype=torch.float64)
    read_in_pieces(layer, u, 3, cache)
    states = cache.key_value_memory_dict[0]
    before = [state.clone() for state in states]

    def refused(message, function, *args, error=ValueError, **kwargs):
        with pytest.raises(error, match=re.escape(message)):
            function(*args, **kwargs)
        assert all(torch.equal(one, other) for one, other in zip(states, before, strict=True))

    shape = "it must be (B, L, d_model) with d_model = 16"
    refused(f"Mamba2: hidden_states has shape (2, 3, 15); {shape}", layer, u[..., :15], inference_params=cache)
    refused("Mamba2: u has shape (2, 3, 16); with seqlen it must be (B * seqlen, d_model)", layer, u, seqlen=3)
    refused("Mamba2: u has shape (6, 16); with seqlen it must be", layer, u.flatten(0, 1), seqlen=4)
    refused("Mamba2: hidden_states has 3 tokens; step takes 1", layer.step, u, *states)
    refused("Mamba2: seq_idx is float32; it must be", layer, u, seq_idx=torch.zeros(2, 3), error=TypeError)
    ids = torch.zeros(2, 3, dtype=torch.int32)
    refused("Mamba2: seq_idx has shape (2, 2); it must be (B, L) = (2, 3)", layer, u, seq_idx=ids[:, :2])
    refused("Mamba2: attention_mask came with seq_idx", layer, u, seq_idx=ids, attention_mask=ids)
    refused("Mamba2: conv_state has shape (2, 44, 4); it must be (B, d_ssm + 2 G N, d_conv) = (1, 44, 4)",
            layer, u[:1], inference_params=cache)  # fmt: skip
    refused("Mamba2: ssm_state has shape (2, 8, 4, 5); it must be (B, H, P, N) = (2, 8, 4, 6)",
            layer.step, u[:, :1], states[0], states[1][..., :5])  # fmt: skip
    refused("Mamba2: cu_seqlens ends at 2; it must end at L = 3", layer, u[:1], cu_seqlens=torch.tensor([0, 2]))
    refused("Mamba2: layer_idx is None; a layer needs one", Mamba2(16, headdim=4), u.float(),
            inference_params=InferenceParams())  # fmt: skip
    refused("Mamba2: d_state is 0; it must be a positive int", Mamba2, 16, d_state=0)
    refused("Mamba2: headdim is 5, which does not divide d_ssm = 32", Mamba2, 16, headdim=5)
    refused("Mamba2: ngroups is 3, which does not divide the 8 heads", Mamba2, 16, headdim=4, ngroups=3)
    refused("Mamba2: d_ssm is 64; it must be at most d_inner = 32", Mamba2, 16, headdim=4, d_ssm=64)
    refused(
        "Mamba2: A_init_range is (0, 1); it must be two positive numbers", Mamba2, 16, headdim=4, A_init_range=(0, 1)
    )
    refused("Mamba2: process_group is 'tp'; it must be None", Mamba2, 16, headdim=4, process_group="tp")

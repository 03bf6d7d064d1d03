"""trifuse.nn.Mamba: the well-known block's parameters, one result however a text is cut, any wrapper honoured."""

import copy
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trifuse
import trifuse.nn.mamba as mamba_module
from trifuse import _library
from trifuse.nn import InferenceParams, Mamba

needs_cpp = pytest.mark.skipif(_library.missing("cpp") is not None, reason="the cpp library is not built")
SUBMODULES = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")


def make(d_model=16, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    layer = Mamba(d_model, layer_idx=0, dtype=dtype, **({"d_state": 4} | options))
    with torch.no_grad():  # the initial D of one and its like would hide a mix-up of channels
        layer.D.add_(torch.randn_like(layer.D))
        layer.A_log.add_(0.1 * torch.randn_like(layer.A_log))
    return layer


def by_definition(layer, x):
    """The block written out with torch's own operations and the reference scan."""
    u, z = layer.in_proj(x).transpose(1, 2).chunk(2, dim=1)
    u = F.silu(layer.conv1d(u)[..., : x.shape[1]])
    dt, B, C = layer.x_proj(u.transpose(1, 2)).split([layer.dt_rank, layer.d_state, layer.d_state], dim=-1)
    y, state = trifuse.reference.selective_scan(
        u, layer.dt_proj(dt).transpose(1, 2), -torch.exp(layer.A_log.to(u.dtype)),
        B.transpose(1, 2).unsqueeze(1), C.transpose(1, 2).unsqueeze(1), layer.D, z, delta_softplus=True,
    )  # fmt: skip
    return layer.out_proj(y.transpose(1, 2)), state


def read_in_pieces(layer, x, sizes, cache=None):
    cache = cache or InferenceParams()
    outs = []
    for piece in x.split(sizes, dim=1):
        outs.append(layer(piece, cache))
        cache.seqlen_offset += piece.shape[1]
    return torch.cat(outs, dim=1), cache.key_value_memory_dict[layer.layer_idx]


def test_parameters_have_the_well_known_names_shapes_and_dtypes():
    layer = Mamba(40, dtype=torch.bfloat16)
    expected = {
        "A_log": ((80, 16), torch.float32), "D": ((80,), torch.float32),
        "in_proj.weight": ((160, 40), torch.bfloat16), "conv1d.weight": ((80, 1, 4), torch.bfloat16),
        "conv1d.bias": ((80,), torch.bfloat16), "x_proj.weight": ((35, 80), torch.bfloat16),
        "dt_proj.weight": ((80, 3), torch.bfloat16), "dt_proj.bias": ((80,), torch.bfloat16),
        "out_proj.weight": ((40, 80), torch.bfloat16),
    }  # fmt: skip
    found = {name: (tuple(value.shape), value.dtype) for name, value in layer.state_dict().items()}
    assert found == expected and list(found) == list(expected)
    assert {name for name, one in layer.named_parameters() if getattr(one, "_no_weight_decay", False)} == {"A_log", "D"}
    assert layer.dt_proj.bias._no_reinit


def test_options_change_the_parameters():
    layer = Mamba(12, d_state=5, d_conv=3, expand=3, dt_rank=2, conv_bias=False, bias=True, use_fast_path=False)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "A_log": (36, 5), "D": (36,), "in_proj.weight": (72, 12), "in_proj.bias": (72,), "conv1d.weight": (36, 1, 3),
        "x_proj.weight": (12, 36), "dt_proj.weight": (36, 2), "dt_proj.bias": (36,), "out_proj.weight": (12, 36),
        "out_proj.bias": (12,),
    }  # fmt: skip
    assert Mamba(8, expand=1.5).d_inner == 12
    assert Mamba(8, device="meta").A_log.is_meta


def test_initial_values_are_the_well_known_draws_of_the_seed():
    torch.manual_seed(7)
    layer = Mamba(24, d_state=6, dt_min=0.01, dt_max=0.2, dt_scale=0.5, dt_init_floor=0.02)
    after = torch.rand(1)
    torch.manual_seed(7)
    in_proj, conv1d = nn.Linear(24, 96, bias=False), nn.Conv1d(48, 48, 4, groups=48)
    x_proj, dt_proj = nn.Linear(48, 2 + 12, bias=False), nn.Linear(2, 48)
    weight = torch.empty_like(dt_proj.weight).uniform_(-0.5 / math.sqrt(2), 0.5 / math.sqrt(2))
    dt = torch.exp(torch.rand(48) * (math.log(0.2) - math.log(0.01)) + math.log(0.01)).clamp(min=0.02)
    out_proj = nn.Linear(48, 24, bias=False)
    for name, module in {"in_proj": in_proj, "conv1d": conv1d, "x_proj": x_proj, "out_proj": out_proj}.items():
        for key, value in module.state_dict().items():
            assert torch.equal(getattr(layer, name).state_dict()[key], value), (name, key)
    torch.testing.assert_close(layer.dt_proj.weight.detach(), weight, rtol=0, atol=0)
    torch.testing.assert_close(F.softplus(layer.dt_proj.bias.detach()), dt)
    torch.testing.assert_close(layer.A_log.detach().exp(), torch.arange(1.0, 7.0).expand(48, 6))
    assert torch.equal(layer.D.detach(), torch.ones(48))
    assert torch.equal(after, torch.rand(1))
    constant = Mamba(24, dt_rank=4, dt_scale=3.0, dt_init="constant").dt_proj.weight
    assert torch.equal(constant.detach(), torch.full_like(constant, 1.5))


@pytest.mark.parametrize("options", [{}, {"d_conv": 2, "bias": True}, {"d_conv": 1}, {"conv_bias": False}], ids=str)
def test_output_and_gradients_are_those_of_the_definition(options):
    layer, x = make(**options), torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    expected, _ = by_definition(layer, x)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), [x, *layer.parameters()])
    out = layer(x)
    torch.testing.assert_close(out, expected)
    for got, want in zip(torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()]), wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("d_conv", [1, 2, 4, 7])
@pytest.mark.parametrize("sizes", [1, 2, 3, 7, 17, [5, 1, 0, 8, 3], [1, 16], [16, 1], [0, 17]], ids=str)
@torch.no_grad()
def test_a_prompt_in_pieces_is_the_prompt_in_one(sizes, d_conv):
    layer, x = make(d_conv=d_conv), torch.randn(2, 17, 16, dtype=torch.float64)
    expected, last_state = by_definition(layer, x)
    out, (conv_state, ssm_state) = read_in_pieces(layer, x, sizes)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(ssm_state, last_state)
    inputs = F.pad(layer.in_proj(x)[..., : layer.d_inner].transpose(1, 2), (d_conv, 0))
    torch.testing.assert_close(conv_state, inputs[..., -d_conv:])


@torch.no_grad()
def test_bfloat16_pieces_agree_with_the_whole():
    layer, x = make(dtype=torch.bfloat16), torch.randn(2, 24, 16, dtype=torch.bfloat16)
    expected = layer(x)
    for sizes in (1, 5, 24):
        out, (conv_state, ssm_state) = read_in_pieces(layer, x, sizes)
        assert (out.dtype, conv_state.dtype, ssm_state.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-8)


@torch.no_grad()
def test_step_is_forward_of_one_token():
    layer, x = make(), torch.randn(3, 6, 16, dtype=torch.float64)
    states = layer.allocate_inference_cache(3, max_seqlen=6)
    outs = []
    for token in x.split(1, dim=1):
        out, *returned = layer.step(token, *states)
        assert all(one is other for one, other in zip(returned, states, strict=True))
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), layer(x))


@torch.no_grad()
def test_a_new_text_forgets_the_old_one_and_keeps_the_buffers():
    layer, x = make(), torch.randn(2, 5, 16, dtype=torch.float64)
    cache = InferenceParams()
    _, states = read_in_pieces(layer, x, 5, cache)
    cache.seqlen_offset = 0
    again, kept = read_in_pieces(layer, x, [1, 4], cache)
    assert all(one is other for one, other in zip(states, kept, strict=True))
    torch.testing.assert_close(again, layer(x))
    cache.seqlen_offset = 0
    other, _ = read_in_pieces(layer, x[:1], 5, cache)  # another batch size gets buffers of its own
    torch.testing.assert_close(other, layer(x[:1]))


@torch.no_grad()
def test_states_of_a_callers_own_dtype_are_used():
    layer, x = make(dtype=torch.float32), torch.randn(1, 4, 16)
    conv_state, ssm_state = layer.allocate_inference_cache(1, 4, dtype=torch.bfloat16)
    assert conv_state.shape == (1, 32, 4) and ssm_state.shape == (1, 32, 4)
    assert conv_state.dtype == ssm_state.dtype == torch.bfloat16
    cache = InferenceParams(key_value_memory_dict={0: (conv_state, ssm_state)})
    out, _ = read_in_pieces(layer, x, [2, 1, 1], cache)
    torch.testing.assert_close(out, layer(x), rtol=2**-6, atol=2**-6)
    assert ssm_state.abs().sum() > 0


class LowRank(nn.Module):
    """A stand-in for an adapter: the wrapped layer, plus a low-rank layer that starts at random."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        if isinstance(base, nn.Conv1d):
            self.delta = nn.Parameter(torch.randn_like(base.weight))
        else:
            self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
            self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x):
        if isinstance(self.base, nn.Conv1d):
            padding = self.base.padding
            return self.base(x) + F.conv1d(x, self.delta, padding=padding, groups=self.base.groups)
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)

    @torch.no_grad()
    def merged(self):
        plain = copy.deepcopy(self.base)
        plain.weight += self.delta if isinstance(plain, nn.Conv1d) else self.up @ self.down
        return plain


@pytest.mark.parametrize("call", ["forward", "step", "pieces", "packed"])
@pytest.mark.parametrize("name", SUBMODULES)
def test_a_wrapped_submodule_is_honoured(name, call):
    layer, x = make(), torch.randn(1, 7, 16, dtype=torch.float64)

    def run(layer):
        if call == "forward":
            return layer(x)
        if call == "pieces":
            return read_in_pieces(layer, x, [3, 1, 2, 1])[0]
        if call == "packed":
            return layer(x, cu_seqlens=torch.tensor([0, 2, 7]))
        states = [torch.ones_like(state) for state in layer.allocate_inference_cache(1)]
        return layer.step(x[:, :1], *states)[0]

    before = run(layer).detach()
    merged, wrapped = copy.deepcopy(layer).requires_grad_(False), copy.deepcopy(layer).requires_grad_(False)
    adapter = LowRank(getattr(layer, name))
    setattr(wrapped, name, adapter)
    setattr(merged, name, adapter.merged())
    out = run(wrapped)
    assert not torch.allclose(out, before)
    torch.testing.assert_close(out.detach(), run(merged).detach())
    out.square().sum().backward()
    for key, parameter in adapter.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", ["A_log", "D", "dt_proj.bias", "conv1d.bias", "x_proj.weight", "in_proj.weight"])
def test_any_one_parameter_can_be_trained_through_a_step(name):
    layer = make().requires_grad_(False)
    parameter = layer.get_parameter(name).requires_grad_()
    states = [torch.ones_like(state) for state in layer.allocate_inference_cache(1)]
    layer.step(torch.randn(1, 1, 16, dtype=torch.float64), *states)[0].square().sum().backward()
    assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", SUBMODULES)
def test_hooks_and_replaced_forwards_of_submodules_run(name):
    layer, x = make(), torch.randn(1, 3, 16, dtype=torch.float64)
    expected, seen = layer(x), []
    module = getattr(layer, name)
    handle = module.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    torch.testing.assert_close(layer(x), expected)
    handle.remove()
    original = module.forward
    module.forward = lambda value: (seen.append("called"), original(value))[1]
    torch.testing.assert_close(layer(x), expected)
    assert len(seen) == 2


@pytest.mark.parametrize("bounds", [[0, 4, 5, 5, 12], [0, 12], [0, 0, 12, 12], [0, 1, 2, 12]], ids=str)
def test_packed_texts_do_not_see_each_other(bounds):
    layer, x = make(), torch.randn(1, 12, 16, dtype=torch.float64)
    out = layer(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    parts = [layer(x[:, start:end]) for start, end in itertools.pairwise(bounds)]
    torch.testing.assert_close(out, torch.cat(parts, dim=1))


def texts_and_padding(lengths, size, side, seed=3, d_model=16):
    """Texts of these lengths in one batch, padded with NaN on one side (or on both), and the mask."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((len(lengths), size, d_model), float("nan"), dtype=torch.float64)
    mask = torch.zeros(len(lengths), size, dtype=torch.bool)
    for row, length in enumerate(lengths):
        start = {"right": 0, "left": size - length, "both": (size - length) // 2}[side]
        mask[row, start : start + length] = True
        x[row, start : start + length] = torch.randn(length, d_model, generator=generator, dtype=torch.float64)
    return x, mask


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_never_changes_a_text(side, bias, mask_dtype):
    layer = make(bias=bias)
    x, mask = texts_and_padding([7, 3, 0, 9], 9, side)
    x.requires_grad_()
    out = layer(x, attention_mask=mask.to(mask_dtype))
    assert (out[~mask] == 0).all()
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()])
    assert (grads[0][~mask] == 0).all()
    expected = 0.0
    for row in range(4):
        alone = layer(x[row : row + 1, mask[row]])
        torch.testing.assert_close(out[row, mask[row]], alone[0])
        expected = expected + (alone[0] * weight[row, mask[row]]).sum()
    wanted = torch.autograd.grad(expected, [x, *layer.parameters()])
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("d_conv", [1, 4])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_padding_never_changes_the_states(side, d_conv):
    """Pieces of a text with padding in each of them, then a token without, are the text in one."""
    layer, cache = make(d_conv=d_conv), InferenceParams()
    sizes = [([5, 2, 0], 6), ([1, 3, 4], 4), ([0, 1, 1], 1), ([1, 1, 1], 1)]
    pieces = [texts_and_padding(lengths, size, side, seed=i) for i, (lengths, size) in enumerate(sizes)]
    outs = []
    for x, mask in pieces:
        outs.append(layer(x, cache, attention_mask=mask))
        cache.seqlen_offset += x.shape[1]
    conv_state, ssm_state = cache.key_value_memory_dict[0]
    for row in range(3):
        text = torch.cat([x[row, mask[row]] for x, mask in pieces]).unsqueeze(0)
        alone = InferenceParams()
        expected = layer(text, alone)[0]
        got = torch.cat([out[row, mask[row]] for out, (_, mask) in zip(outs, pieces, strict=True)])
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(conv_state[row], alone.key_value_memory_dict[0][0][0])
        torch.testing.assert_close(ssm_state[row], alone.key_value_memory_dict[0][1][0])


@pytest.mark.parametrize("shape", [(2, 0, 16), (0, 3, 16), (0, 0, 16)], ids=str)
def test_empty_input_gives_empty_output(shape):
    layer = make()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    assert out.shape == shape
    out.sum().backward()
    assert x.grad.shape == shape


def test_a_gradient_stops_at_the_cached_states():
    layer, x = make(), torch.randn(1, 6, 16, dtype=torch.float64, requires_grad=True)
    out, states = read_in_pieces(layer, x, [4, 2])
    assert not any(state.requires_grad for state in states)
    (grad,) = torch.autograd.grad(out[:, 4:].sum(), x)
    assert grad[:, :4].abs().sum() == 0 and grad[:, 4:].abs().sum() > 0


def test_a_state_dict_goes_through_a_file(tmp_path):
    layer, other = make(seed=1), make(seed=2)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt"))
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    assert torch.equal(layer(x), other(x))


def test_bad_input_is_refused_before_any_state_moves():
    layer, cache = make(), InferenceParams()
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    read_in_pieces(layer, x, 3, cache)
    states = cache.key_value_memory_dict[0]
    before = [state.clone() for state in states]

    def refused(message, function, *args, error=ValueError, **kwargs):
        with pytest.raises(error, match=re.escape(message)):
            function(*args, **kwargs)
        assert all(torch.equal(one, other) for one, other in zip(states, before, strict=True))

    shape = "it must be (B, L, d_model) with d_model = 16"
    refused(f"Mamba: hidden_states has shape (2, 3, 15); {shape}", layer, x[..., :15], cache)
    refused(f"Mamba: hidden_states has shape (3, 16); {shape}", layer, x[0], cache)
    refused(f"Mamba: hidden_states has shape (2, 16); {shape}", layer.step, x[:, 0], *states)
    refused("Mamba: hidden_states is list; it must be a torch.Tensor", layer, [1.0], error=TypeError)
    refused("Mamba: hidden_states is int64; it must be floating point", layer, x.long(), cache, error=TypeError)
    refused("Mamba: hidden_states is on meta; it must be on cpu like the parameters", layer, x.to("meta"), cache)
    refused("Mamba: hidden_states has 3 tokens; step takes 1", layer.step, x, *states)
    refused("Mamba: conv_state has shape (2, 32, 4); it must be (B, d_inner, d_conv) = (1, 32, 4)", layer, x[:1], cache)
    refused(
        "Mamba: ssm_state has shape (2, 32, 3); it must be (B, d_inner, d_state) = (2, 32, 4)",
        layer.step, x[:, :1], states[0], states[1][..., :3],
    )  # fmt: skip
    refused("Mamba: cu_seqlens packs sequences in a batch of one", layer, x, cu_seqlens=torch.tensor([0, 3]))
    refused("Mamba: cu_seqlens ends at 2; it must end at L = 3", layer, x[:1], cu_seqlens=torch.tensor([0, 2]))
    offsets = torch.tensor([0, 3])
    refused("Mamba: cu_seqlens is on meta; it must be on cpu", layer, x[:1], cu_seqlens=offsets.to("meta"))
    mask = torch.ones(2, 3)
    refused("Mamba: attention_mask has shape (2, 2); it must be (B, L) = (2, 3)", layer, x, attention_mask=mask[:, :2])
    refused("Mamba: attention_mask is on meta; it must be on cpu", layer, x, attention_mask=mask.to("meta"))
    refused("Mamba: attention_mask is list; it must be", layer, x, attention_mask=[1], error=TypeError)
    refused("Mamba: attention_mask came with cu_seqlens", layer, x[:1], attention_mask=mask[:1], cu_seqlens=offsets)
    refused("Mamba: layer_idx is None; a layer needs one", Mamba(16), x.float(), InferenceParams())
    refused('Mamba: dt_init is \'zero\'; it must be "random" or "constant"', Mamba, 16, dt_init="zero")
    refused("Mamba: dt_rank is 'big'; it must be a positive int or \"auto\"", Mamba, 16, dt_rank="big")
    refused("Mamba: d_state is 0; it must be a positive int", Mamba, 16, d_state=0)


def test_packed_texts_keep_a_row_of_states_each():
    layer = make()
    x = torch.randn(1, 14, 16, dtype=torch.float64)
    cache = InferenceParams()
    first = layer(x[:, :9], cache, cu_seqlens=torch.tensor([0, 2, 2, 9]))
    cache.seqlen_offset = 9
    second = layer(x[:, 9:], cache, cu_seqlens=torch.tensor([0, 1, 4, 5]))
    texts = [(slice(0, 2), slice(9, 10)), (slice(2, 2), slice(10, 13)), (slice(2, 9), slice(13, 14))]
    for begun, gone_on in texts:
        alone = layer(torch.cat((x[:, begun], x[:, gone_on]), dim=1))
        found = torch.cat((first[:, begun], second[:, slice(gone_on.start - 9, gone_on.stop - 9)]), dim=1)
        torch.testing.assert_close(found, alone)


def served(monkeypatch):
    """What the one-call way of a token answered, call by call: whether it served."""
    answers = []
    mamba_token = mamba_module.mamba_token

    def spy(*tensors):
        out = mamba_token(*tensors)
        answers.append(out is not None)
        return out

    monkeypatch.setattr(mamba_module, "mamba_token", spy)
    return answers


PLAIN = [{}, {"bias": True}, {"conv_bias": False, "d_conv": 3}, {"d_conv": 8, "d_state": 5}, {"expand": 3, "d_conv": 2}]


@needs_cpp
@pytest.mark.parametrize("options", PLAIN, ids=str)
@torch.no_grad()
def test_a_plain_token_goes_through_the_block_in_one_call(options, monkeypatch):
    layer, x = make(dtype=torch.float32, **options), torch.randn(3, 6, 16)
    answers = served(monkeypatch)
    states, own = layer.allocate_inference_cache(3), layer.allocate_inference_cache(3)
    one = torch.cat([layer.step(token, *states)[0] for token in x.split(1, dim=1)], dim=1)
    assert answers == [True] * 6
    monkeypatch.setattr(mamba_module, "mamba_token", lambda *tensors: None)
    many = torch.cat([layer.step(token, *own)[0] for token in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(one, many)
    torch.testing.assert_close(states, own)
    torch.testing.assert_close(one, layer(x))


@needs_cpp
@torch.no_grad()
def test_a_parameter_changed_in_any_way_counts_in_the_next_token(monkeypatch):
    layer, token, answers = make(dtype=torch.float32), torch.randn(1, 1, 16), served(monkeypatch)

    def out():
        return layer.step(token, *(torch.ones_like(state) for state in layer.allocate_inference_cache(1)))[0]

    seen = [out()]
    layer.A_log.data.mul_(0.5)
    seen.append(out())
    layer.A_log.add_(0.3)
    seen.append(out())
    layer.load_state_dict(make(dtype=torch.float32, seed=5).state_dict())
    seen.append(out())
    layer.A_log = nn.Parameter(layer.A_log - 1)
    seen.append(out())
    assert all(answers) and len(answers) == 5
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


@needs_cpp
@torch.no_grad()
def test_what_is_not_plain_goes_the_long_way(monkeypatch):
    layer, token, answers = make(dtype=torch.float32), torch.randn(2, 1, 16), served(monkeypatch)
    expected, hooked = layer.step(token, *layer.allocate_inference_cache(2))[0], []

    def same(dtype=torch.float32):
        states = layer.allocate_inference_cache(2)
        torch.testing.assert_close(layer.step(token, *states)[0], expected, rtol=0, atol=1e-6)

    for name in SUBMODULES:
        handle = getattr(layer, name).register_forward_hook(lambda *_: hooked.append("own"))
        same()
        handle.remove()
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *_: hooked.append("global"))
    same()
    everywhere.remove()
    assert hooked.count("own") == 5 and hooked.count("global") >= 5
    with trifuse.backend("reference"):
        same()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.step(token, *layer.allocate_inference_cache(2))[0].dtype == torch.bfloat16
    layer.conv1d.weight = nn.Parameter(layer.conv1d.weight.transpose(0, 2).contiguous().transpose(0, 2))
    same()
    assert answers[0] and not any(answers[1:])
    layer.double().step(token.double(), *layer.allocate_inference_cache(2))
    assert not answers[-1]


@needs_cpp
@torch.no_grad()
def test_opcheck_of_the_one_call():
    layer = make(dtype=torch.float32).requires_grad_(False)
    tensors = (torch.randn(2, 1, 16), *layer.allocate_inference_cache(2), *layer._plain_weights())
    torch.library.opcheck(torch.ops.trifuse.mamba_token.default, tensors)

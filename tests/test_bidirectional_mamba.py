"""trifuse.nn.BidirectionalMamba: one pass forwards, one backwards, and no sequence turned around."""

import copy
import itertools
import pickle
import re

import pytest
import torch
import torch.nn.functional as F

import trifuse
from trifuse.nn import BidirectionalMamba, Mamba


def make(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    layer = BidirectionalMamba(16, dtype=dtype, **({"d_state": 4} | options))
    with torch.no_grad():
        for parameter in (layer.D, layer.D_b, layer.A_log, layer.A_b_log):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def by_definition(layer, u):
    """Both directions written out; the backward one is the forward one between two flips."""
    x, z = layer.in_proj(u).transpose(1, 2).chunk(2, dim=1)

    def one_direction(x, z, conv1d, x_proj, dt_proj, A_log, D):
        x = F.silu(conv1d(x)[..., : x.shape[2]])
        dt, B, C = x_proj(x.transpose(1, 2)).split([layer.dt_rank, layer.d_state, layer.d_state], dim=-1)
        y, _ = trifuse.reference.selective_scan(
            x, dt_proj(dt).transpose(1, 2), -torch.exp(A_log.to(x.dtype)), B.transpose(1, 2).unsqueeze(1),
            C.transpose(1, 2).unsqueeze(1), D, z, delta_softplus=True,
        )  # fmt: skip
        return y

    y = one_direction(x, z, layer.conv1d, layer.x_proj, layer.dt_proj, layer.A_log, layer.D)
    back = one_direction(
        x.flip(2), z.flip(2), layer.conv1d_b, layer.x_proj_b, layer.dt_proj_b, layer.A_b_log, layer.D_b
    )
    y = y + back.flip(2)
    out = layer.out_proj((y / 2 if layer.if_divide_out else y).transpose(1, 2))
    return out if layer.init_layer_scale is None else out * layer.gamma


def test_parameters_are_named_as_in_the_checkpoints_of_vision_mamba():
    layer = BidirectionalMamba(16, d_state=4, init_layer_scale=0.5)
    expected = {
        "gamma": (16,), "A_log": (32, 4), "D": (32,), "A_b_log": (32, 4), "D_b": (32,), "in_proj.weight": (64, 16),
        "conv1d.weight": (32, 1, 4), "conv1d.bias": (32,), "x_proj.weight": (9, 32), "dt_proj.weight": (32, 1),
        "dt_proj.bias": (32,), "conv1d_b.weight": (32, 1, 4), "conv1d_b.bias": (32,), "x_proj_b.weight": (9, 32),
        "dt_proj_b.weight": (32, 1), "dt_proj_b.bias": (32,), "out_proj.weight": (16, 32),
    }  # fmt: skip
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == expected
    undecayed = {name for name, one in layer.named_parameters() if getattr(one, "_no_weight_decay", False)}
    assert undecayed == {"A_log", "D", "A_b_log", "D_b"}
    assert (layer.gamma == 0.5).all() and layer.dt_proj_b.bias._no_reinit
    for bias in (layer.dt_proj.bias, layer.dt_proj_b.bias):  # both directions start with small steps
        assert F.softplus(bias).min() > 0.0009 and F.softplus(bias).max() < 0.11


@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize(
    "options",
    [{}, {"d_conv": 2, "bias": True, "if_divide_out": True}, {"d_conv": 1}, {"conv_bias": False, "d_conv": 5},
     {"init_layer_scale": 0.3}, {"d_conv": 9}],
    ids=str,
)  # fmt: skip
def test_output_and_gradients_are_those_of_the_definition(options, length):
    layer, u = make(**options), torch.randn(2, length, 16, dtype=torch.float64, requires_grad=True)
    expected = by_definition(layer, u)
    weight = torch.randn_like(expected)
    inputs = [u, *layer.parameters()]
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    out = layer(u)
    torch.testing.assert_close(out, expected)
    for got, want in zip(torch.autograd.grad((out * weight).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_backwards_is_forwards_of_the_text_read_from_its_end():
    layer, u = make(), torch.randn(2, 9, 16, dtype=torch.float64)
    turned = copy.deepcopy(layer)
    names = {"conv1d": "conv1d_b", "x_proj": "x_proj_b", "dt_proj": "dt_proj_b", "A_log": "A_b_log", "D": "D_b"}
    for forward, backward in names.items():
        setattr(turned, forward, getattr(layer, backward))
        setattr(turned, backward, getattr(layer, forward))
    torch.testing.assert_close(turned(u.flip(1)).flip(1), layer(u))


@torch.no_grad()
def test_without_its_backward_half_it_is_a_mamba_block():
    layer, u = make(), torch.randn(2, 9, 16, dtype=torch.float64)
    mamba = Mamba(16, d_state=4, dtype=torch.float64)
    shared = {name: value for name, value in layer.state_dict().items() if name in mamba.state_dict()}
    mamba.load_state_dict(shared)
    layer.x_proj_b.weight.zero_()
    layer.D_b.zero_()
    torch.testing.assert_close(layer(u), mamba(u))


@pytest.mark.parametrize("bounds", [[0, 4, 5, 5, 12], [0, 12], [0, 0, 12, 12], [0, 1, 2, 12]], ids=str)
def test_packed_texts_do_not_see_each_other(bounds):
    layer, u = make(), torch.randn(1, 12, 16, dtype=torch.float64, requires_grad=True)
    out = layer(u, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    parts = torch.cat([layer(u[:, start:end]) for start, end in itertools.pairwise(bounds)], dim=1)
    torch.testing.assert_close(out, parts)
    weight = torch.randn_like(out)
    got, want = (torch.autograd.grad((one * weight).sum(), u)[0] for one in (out, parts))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_changes_a_text(side, bias):
    layer = make(bias=bias)
    u, mask = torch.full((3, 9, 16), float("nan"), dtype=torch.float64), torch.zeros(3, 9, dtype=torch.bool)
    for row, length in enumerate((7, 2, 9)):
        place = slice(0, length) if side == "right" else slice(9 - length, 9)
        u[row, place], mask[row, place] = torch.randn(length, 16, dtype=torch.float64), True
    out = layer(u, attention_mask=mask)
    assert (out[~mask] == 0).all()
    for row in range(3):
        torch.testing.assert_close(out[row, mask[row]], layer(u[row : row + 1, mask[row]])[0])


@pytest.mark.parametrize("shape", [(2, 0, 16), (0, 3, 16)], ids=str)
def test_empty_input_gives_empty_output(shape):
    assert make()(torch.randn(shape, dtype=torch.float64)).shape == shape


@torch.no_grad()
def test_bfloat16_agrees_with_float32():
    layer, u = make(dtype=torch.bfloat16), torch.randn(2, 24, 16, dtype=torch.bfloat16)
    expected = copy.deepcopy(layer).float()(u.float())
    torch.testing.assert_close(layer(u).float(), expected, rtol=2**-5, atol=2**-6 * expected.abs().max().item())


def test_copies_and_pickles_compute_the_same():
    layer, u = make(), torch.randn(1, 4, 16, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(layer)(u), layer(u))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(u), layer(u))


def test_bad_arguments_are_refused():
    layer, u = make(), torch.randn(2, 3, 16, dtype=torch.float64)

    def refused(message, function, *args, **kwargs):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(*args, **kwargs)

    name = "BidirectionalMamba: "
    refused(
        name + "hidden_states has shape (2, 3, 15); it must be (B, L, d_model) with d_model = 16", layer, u[..., 1:]
    )
    refused(name + "cu_seqlens ends at 2; it must end at L = 3", layer, u[:1], cu_seqlens=torch.tensor([0, 2]))
    refused(name + "attention_mask has shape (3, 2); it must be (B, L) = (2, 3)", layer, u,
            attention_mask=torch.ones(3, 2))  # fmt: skip
    refused(name + 'dt_init is \'zero\'; it must be "random" or "constant"', BidirectionalMamba, 16, dt_init="zero")
    refused(name + "d_state is 0; it must be a positive int", BidirectionalMamba, 16, d_state=0)

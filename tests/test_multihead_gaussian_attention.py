"""MultiheadGaussianAttention: the definition, the interface of torch.nn.MultiheadAttention, what PyTorch expects."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trifuse.nn import MultiheadGaussianAttention
from trifuse.nn.explicit_attention import attend

KINDS = ("rbf", "local", "rbf+local")


def made(kind: str = "rbf", dtype=torch.float64, **options) -> MultiheadGaussianAttention:
    torch.manual_seed(0)
    options = {"embed_dim": 12, "num_heads": 3, "batch_first": True, **options}
    module = MultiheadGaussianAttention(**options, dtype=dtype, kind=kind)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith("log"):
                parameter.copy_(torch.randn_like(parameter) * 0.4)
        if module.log_sigma is not None:
            module.log_sigma.copy_(torch.tensor([0.1, 0.7, 1.5]))
        if module.log_gamma is not None:
            module.log_gamma.copy_(torch.tensor([-2.0, -1.0, 0.3]))
    return module


def expected(module, query, key, value, allowed=None, added=None):
    """The definition, for inputs (B, L, E): output, and weights (B, H, L, S), differences written out."""
    H, d, E = module.num_heads, module.head_dim, module.embed_dim
    ws = module.in_proj_weight
    ws = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight) if ws is None else ws.split(E)
    bs = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.split(E)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), ws, bs, strict=True))
    S, L = k.shape[1], q.shape[1]
    if module.bias_k is not None:
        k, v = (torch.cat([x, b.expand(len(x), 1, E)], 1) for x, b in ((k, module.bias_k), (v, module.bias_v)))
    if module.add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(len(x), 1, E)], 1) for x in (k, v))
    q, k, v = (x.unflatten(-1, (H, d)).transpose(1, 2) for x in (q, k, v))
    if module.gamma is None:
        logits = q @ k.mT / math.sqrt(d)
    else:
        logits = -module.gamma[:, None, None] * (q[:, :, :, None] - k[:, :, None]).square().sum(-1)
    if module.sigma is not None:
        away = (torch.arange(L)[:, None] - torch.arange(S)).to(q.dtype)
        logits = logits - F.pad(away.square() / (2 * module.sigma[:, None, None] ** 2), (0, k.shape[2] - S))
    if added is not None:
        logits = logits + F.pad(added, (0, k.shape[2] - S))
    if allowed is not None:
        logits = logits.masked_fill(~F.pad(allowed, (0, k.shape[2] - S), value=True), -math.inf)
    weights = torch.softmax(logits, -1)
    weights = torch.where(weights.isnan(), 0.0, weights)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return module.out_proj(out), weights


def close(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def gradients(module, loss, *inputs) -> list[torch.Tensor]:
    wanted = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    return [g for g in torch.autograd.grad(loss, wanted, allow_unused=True) if g is not None]


FORMS = {
    "plain": {}, "no bias": {"bias": False}, "other sizes": {"kdim": 7, "vdim": 5}, "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True}, "both added": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 7},
}  # fmt: skip


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_weights_and_gradients_are_the_definition_s(kind: str, form: str, need_weights: bool) -> None:
    module = made(kind, **FORMS[form])
    query = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 7, module.kdim, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 7, module.vdim, dtype=torch.float64, requires_grad=True)
    allowed = torch.rand(2, 3, 5, 7) > 0.3
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    out, weights = module(query, key, value, padding, need_weights, ~allowed.flatten(0, 1), False)
    true, true_weights = expected(module, query, key, value, allowed & ~padding[:, None, None])
    close(out, true)
    if need_weights:
        close(weights, true_weights)
        out, true = out + weights.square().sum(), true + true_weights.square().sum()
    else:
        assert weights is None
    scale = torch.randn_like(true)
    inputs = (query, key, value)
    found, wanted = (gradients(module, (one * scale).sum(), *inputs) for one in (out, true))
    assert len(found) == len(wanted) == sum(1 for _ in module.parameters()) + 3
    for one, other in zip(found, wanted, strict=True):
        close(one, other)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padding_form", [None, "bool", "float"])
@pytest.mark.parametrize("mask_form", [None, "bool", "float", "bool 3-D", "float 3-D"])
@pytest.mark.parametrize("kind", ["rbf", "rbf+local"])
def test_masks_of_every_form(kind: str, mask_form, padding_form, need_weights: bool) -> None:
    module = made(kind)
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    allowed = torch.ones(2, 3, 6, 6, dtype=torch.bool)
    added = torch.zeros(2, 3, 6, 6, dtype=torch.float64)
    mask = padding = None
    if mask_form:
        full = (6, 6, 6) if "3-D" in mask_form else (6, 6)
        mask = torch.rand(full) < 0.3 if "bool" in mask_form else torch.randn(full, dtype=torch.float64)
        wide = mask.view(2, 3, 6, 6) if mask.dim() == 3 else mask
        allowed, added = (allowed & ~wide, added) if mask.dtype == torch.bool else (allowed, added + wide)
    if padding_form:
        padding = torch.tensor([[False] * 6, [False] * 3 + [True] * 3])
        allowed = allowed & ~padding[:, None, None]
        if padding_form == "float":
            padding = torch.zeros(2, 6, dtype=torch.float64).masked_fill_(padding, -math.inf)
    out, _ = module(x, x, x, padding, need_weights, mask)
    close(out, expected(module, x, x, x, allowed, added)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["(L, B, E)", "(L, E)", "(L, E), batch_first"])
def test_layouts_are_views_of_one_another(kind: str, form: str) -> None:
    module = made(kind, batch_first="batch_first" in form)
    first = copy.deepcopy(module)
    first.batch_first = True
    query, key = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
    mask, padding = torch.rand(6, 5, 7) < 0.2, torch.rand(2, 7) < 0.2
    for need_weights, average in itertools.product((False, True), (False, True)):
        out, weights = first(query, key, key, padding, need_weights, mask, average)
        if "B" in form:
            turned = [x.transpose(0, 1) for x in (query, key, key)]
            found, found_weights = module(*turned, padding, need_weights, mask, average)
            close(found.transpose(0, 1), out)
        else:
            parts = [module(query[i], key[i], key[i], padding[i], need_weights, mask[3 * i : 3 * i + 3], average)
                     for i in range(2)]  # fmt: skip
            close(torch.stack([part[0] for part in parts]), out)
            found_weights = torch.stack([part[1] for part in parts]) if need_weights else None
        assert (found_weights is None) == (not need_weights)
        if need_weights:
            assert weights.shape == ((2, 5, 7) if average else (2, 3, 5, 7))
            close(found_weights, weights)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_causal_is_the_causal_mask_with_it_or_in_its_place(need_weights: bool, padded: bool) -> None:
    for kind, options in itertools.product(KINDS, ({}, {"add_bias_kv": True})):
        module = made(kind, **options)
        query, key = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
        padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3]) if padded else None
        above = torch.ones(5, 7, dtype=torch.bool).triu(1)
        out, weights = module(query, key, key, padding, need_weights, above)
        for mask in (None, above, torch.zeros(5, 7, dtype=torch.float64).masked_fill_(above, -math.inf)):
            found, found_weights = module(query, key, key, padding, need_weights, mask, is_causal=True)
            close(found, out)
            if need_weights:
                close(found_weights, weights)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_a_query_without_keys_gives_zero_and_no_nan(need_weights: bool, training: bool) -> None:
    for kind in KINDS:
        module = made(kind, dropout=0.5).train(training)
        x = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
        mask = torch.zeros(4, 4, dtype=torch.bool)
        mask[2] = True
        for one in (mask, torch.zeros(4, 4, dtype=torch.float64).masked_fill_(mask, -math.inf)):
            out, weights = module(x, x, x, attn_mask=one, need_weights=need_weights)
            close(out[:, 2], module.out_proj.bias.expand(2, -1))
            if need_weights:
                assert not weights[:, 2].any()
            assert all(g.isfinite().all() for g in gradients(module, out.square().sum(), x))


def test_dropout_acts_in_training_alone_and_its_expectation_is_the_output() -> None:
    module = made("rbf", dropout=0.4)
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    module.eval()
    out, weights = module(x, x, x, average_attn_weights=False)
    close(module(x, x, x, need_weights=False)[0], out)
    module.train()
    torch.manual_seed(1)
    many = [module(x, x, x, average_attn_weights=False) for _ in range(400)]
    dropped = torch.stack([one[1] for one in many])
    assert 0.37 < (dropped == 0).double().mean() < 0.43
    kept = dropped[0][dropped[0] != 0]
    close(kept, (weights / 0.6)[dropped[0] != 0])
    torch.testing.assert_close(torch.stack([one[0] for one in many]).mean(0), out, rtol=0, atol=0.2)
    torch.manual_seed(7)
    one, _ = module(x, x, x, need_weights=False)
    torch.manual_seed(7)
    assert torch.equal(module(x, x, x)[0], one)


def test_training_with_dropout_learns_gamma_and_sigma() -> None:
    module = made("rbf+local", dropout=0.2)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    module(x, x, x, need_weights=False)[0].square().sum().backward()
    assert module.log_gamma.grad.abs().min() > 0 and module.log_sigma.grad.abs().min() > 0


@pytest.mark.parametrize("options", FORMS.values(), ids=list(FORMS))
def test_parameters_have_torch_s_names_and_initial_values(options) -> None:
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(12, 3, **options)
    torch.manual_seed(3)
    ours = MultiheadGaussianAttention(12, 3, **options)
    state = ours.state_dict()
    assert [name for name in state if not name.startswith("log_")] == list(theirs.state_dict())
    assert all(torch.equal(state[name], value) for name, value in theirs.state_dict().items())
    for module in (ours, theirs):
        torch.manual_seed(5)
        module._reset_parameters()
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_the_arguments_are_torch_s() -> None:
    for ours, theirs in (
        (MultiheadGaussianAttention, nn.MultiheadAttention),
        (MultiheadGaussianAttention.forward, nn.MultiheadAttention.forward),
    ):
        mine, other = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
        assert list(mine)[: len(other)] == list(other)
        assert all(mine[name].default == other[name].default for name in other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_of_torch_loads_strictly(kind: str) -> None:
    theirs = nn.Sequential(nn.MultiheadAttention(12, 3, kdim=5))
    ours = nn.Sequential(MultiheadGaussianAttention(12, 3, kdim=5, kind=kind, sigma=3.0 if "local" in kind else None))
    before = {name: p.clone() for name, p in ours.named_parameters() if "log_" in name}
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in {**theirs.state_dict(), **before}.items())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    other = nn.Sequential(MultiheadGaussianAttention(12, 3, kdim=5, kind=kind))
    other.load_state_dict(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), ours.parameters(), strict=True))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    missing = copy.deepcopy(theirs.state_dict())
    del missing["0.out_proj.bias"]
    with pytest.raises(RuntimeError, match=r"out_proj\.bias"):
        ours.load_state_dict(missing)


def test_a_state_dict_of_torch_can_be_assigned_to_a_module_on_meta() -> None:
    theirs = nn.MultiheadAttention(12, 3)
    ours = MultiheadGaussianAttention(12, 3, device="meta", kind="rbf+local", gamma=0.25)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert all(p.device.type == "cpu" for p in ours.parameters())
    torch.testing.assert_close(ours.gamma, torch.full((3,), 0.25))


def test_gamma_and_sigma_start_as_told_and_stay_positive() -> None:
    module = MultiheadGaussianAttention(8, 4, kind="rbf+local", gamma=[0.1, 0.2, 0.3, 0.4], sigma=2)
    torch.testing.assert_close(module.gamma, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    torch.testing.assert_close(module.sigma, torch.full((4,), 2.0))
    optimizer = torch.optim.SGD([module.log_gamma, module.log_sigma], lr=100.0)
    (module.gamma.sum() + module.sigma.sum()).backward()
    optimizer.step()
    assert module.gamma.min() >= 0 and module.sigma.min() > 0  # gamma may come down to zero: no distance counts then
    x = torch.randn(3, 8)
    out = module(x, x, x, need_weights=False)[0]
    assert out.isfinite().all()
    out.sum().backward()
    fresh = MultiheadGaussianAttention(16, 4, kind="rbf+local")
    torch.testing.assert_close(fresh.gamma, torch.full((4,), 0.25))
    torch.testing.assert_close(fresh.sigma, torch.tensor([4.0, 16.0, 64.0, 256.0]))
    assert MultiheadGaussianAttention(8, 1).sigma is None
    assert MultiheadGaussianAttention(8, 1, kind="local").gamma is None


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_stands_in_torch_s_transformer_layer(kind: str, training: bool) -> None:
    """Also in inference, where that layer has a kernel of its own for the weights of dot-product attention."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 4, 16, dropout=0.0, batch_first=True)
    layer.self_attn = MultiheadGaussianAttention(12, 4, batch_first=True, kind=kind)
    layer.train(training)
    x = torch.randn(2, 6, 12)
    padding = torch.tensor([[False] * 6, [False] * 3 + [True] * 3])
    calls = []
    layer.self_attn.out_proj.register_forward_hook(lambda *args: calls.append(1))
    layer.self_attn.out_proj._forward_hooks.clear()  # hooks would keep it from its kernel, too
    with torch.no_grad():
        attended = layer.self_attn(x, x, x, padding, need_weights=False)[0]
        wanted = layer.norm1(x + attended)
        wanted = layer.norm2(wanted + layer.linear2(F.relu(layer.linear1(wanted))))
        torch.testing.assert_close(layer(x, src_key_padding_mask=padding), wanted)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
        mask = nn.Transformer.generate_square_subsequent_mask(6)
        out = encoder(x, mask=mask, is_causal=True)
        changed = x.clone()
        changed[:, 4:] += 1
        torch.testing.assert_close(encoder(changed, mask=mask, is_causal=True)[:, :4], out[:, :4])
        decoder = nn.TransformerDecoderLayer(12, 4, 16, dropout=0.0, batch_first=True)
        decoder.self_attn = decoder.multihead_attn = layer.self_attn
        assert decoder.eval()(x, out, tgt_mask=mask, tgt_is_causal=True).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, dtype) -> None:
    module = made(kind, dtype=dtype, add_bias_kv=True, add_zero_attn=True)
    exact = copy.deepcopy(module).double()
    x = torch.randn(1, 9, 12).to(dtype)
    true, true_weights = exact(*[x.double()] * 3)
    for need_weights in (False, True):
        out, weights = module(x, x, x, need_weights=need_weights)
        assert out.dtype == dtype
        assert (out.double() - true).abs().max() < 16 * torch.finfo(dtype).eps * true.abs().max()
        if need_weights:
            assert weights.dtype == dtype and (weights.double() - true_weights).abs().max() < 8 * torch.finfo(dtype).eps


def test_stored_weights_are_precise_far_from_the_origin() -> None:
    q, k, v = (torch.randn(1, 3, 9, 4) for _ in range(3))
    gamma = torch.tensor([0.1, 0.5, 1.0])
    q, k = (q + 1000, k + 1000)
    out, _ = attend(q, k, v, gamma, None, None, None, False, 0, 0.0)
    distances = (q.double()[:, :, :, None] - k.double()[:, :, None]).square().sum(-1)
    true = torch.softmax(-gamma[:, None, None] * distances, -1) @ v.double()
    assert (out - true).abs().max() < 1e-5


def test_autocast_and_mixed_dtypes() -> None:
    module = made("rbf+local", torch.float32, add_bias_kv=True)
    x = torch.randn(2, 5, 12)
    wanted = module(x, x, x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        for need_weights in (False, True):
            out = module(x, x, x, need_weights=need_weights)[0]
            assert out.dtype == torch.bfloat16
            assert (out.float() - wanted).abs().max() < 0.1
    half = made("rbf+local", torch.bfloat16)
    assert half(*[x.bfloat16()] * 3, need_weights=False)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["rbf", "rbf+local"])
def test_compiles_to_one_graph_with_gradients(kind: str) -> None:
    torch._dynamo.reset()
    module = made(kind, add_bias_kv=True)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for need_weights in (False, True):

        def run(x, need_weights=need_weights):
            return module(x, x, x, padding, need_weights)[0]

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        out, true = compiled(x), run(x)
        close(out, true)
        for one, other in zip(*(gradients(module, y.square().sum(), x) for y in (out, true)), strict=True):
            close(one, other)


def test_copies_and_pickles_are_the_same_module() -> None:
    module = made("rbf+local")
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, x, x)[0], module(x, x, x)[0])
    assert all(p.device.type == "meta" for p in made("local", device="meta").parameters())


def test_sequences_of_length_zero_and_one() -> None:
    for kind, need_weights in itertools.product(KINDS, (False, True)):
        module = made(kind)
        x = torch.randn(2, 1, 12, dtype=torch.float64)
        close(module(x, x, x, need_weights=need_weights)[0], expected(module, x, x, x)[0])
        none = x[:, :0]
        assert module(none, x, x, need_weights=need_weights)[0].shape == (2, 0, 12)
        out, weights = module(x, none, none, need_weights=need_weights)
        close(out, module.out_proj.bias.expand(2, 1, -1))
        assert weights is None or weights.shape == (2, 1, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_as_on_a_cpu(kind: str) -> None:
    module = made(kind, torch.float32, add_bias_kv=True)
    x, padding = torch.randn(2, 40, 12), torch.rand(2, 40) < 0.2
    for need_weights in (False, True):
        expected = module(x, x, x, padding, need_weights)[0]
        found = copy.deepcopy(module).cuda()(*[x.cuda()] * 3, padding.cuda(), need_weights)[0]
        assert (found.cpu() - expected).abs().max() < 1e-3 * expected.abs().max()  # perhaps in TF32


X = torch.zeros(2, 4, 12)


@pytest.mark.parametrize("call, words, kind", [
    (lambda: MultiheadGaussianAttention(12, 3, kind="dot"), "kind is 'dot'", ValueError),
    (lambda: MultiheadGaussianAttention(12, 5), "num_heads must divide embed_dim", ValueError),
    (lambda: MultiheadGaussianAttention(12, 3, 1.5), "dropout is 1.5", ValueError),
    (lambda: MultiheadGaussianAttention(12, 3, sigma=2.0), "sigma is given, and kind 'rbf' has none", ValueError),
    (lambda: MultiheadGaussianAttention(12, 3, gamma=-1.0), "gamma is -1.0; it must be a positive", ValueError),
    (lambda: MultiheadGaussianAttention(12, 3, gamma=[1.0, 2.0]), "one for each of 3 heads", ValueError),
    (lambda: made(dtype=None)(X, X, X[:, :3]), "value has shape", ValueError),
    (lambda: made(dtype=None)(X, X[:1], X[:1]), "key has a batch of 1", ValueError),
    (lambda: made(dtype=None)(X, X[0], X[0]), "key has shape", ValueError),
    (lambda: made(dtype=None)(X[..., :3], X, X), "query has shape .* with E = 12", ValueError),
    (lambda: made(dtype=None)(X, X, X, attn_mask=torch.ones(4, 3) > 0), r"must be \(4, 4\) or \(6, 4, 4\)", ValueError),
    (lambda: made(dtype=None)(X, X, X, attn_mask=torch.ones(4, 4).byte()), "attn_mask is torch.uint8", TypeError),
    (lambda: made(dtype=None)(X, X, X, torch.ones(2, 3) > 0), r"key_padding_mask has shape \(2, 3\)", ValueError),
    (lambda: made(dtype=None)(*[torch.nested.nested_tensor([X[0], X[1, :2]])] * 3), "nested", TypeError),
])  # fmt: skip
def test_errors_say_what_was_wrong(call, words: str, kind) -> None:
    with pytest.raises(kind, match=words), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nested tensors are a prototype
        call()

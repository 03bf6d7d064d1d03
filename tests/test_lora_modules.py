"""``nn.LoRALinear``: its formula, its checkpoints, its copies, and what it refuses."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from trifuse import reference
from trifuse.nn import LoRALinear

OUT, IN = 12, 10
ROWS = {
    "all": None,
    "a slice": slice(3, 9),
    "a range": range(1, 12, 2),
    "numbers": [0, 1, 5, 11],
    "one": [4],
}


def layer(seed=0, dtype=torch.float64, **options):
    """A layer whose adapter has an effect."""
    torch.manual_seed(seed)
    made = LoRALinear(IN, OUT, dtype=dtype, **{"rank": 4, "alpha": 6, **options})
    nn.init.normal_(made.lora_B)
    return made


def tokens(*shape, dtype=torch.float64):
    return torch.randn(*(shape or (2, 5)), IN, generator=torch.Generator().manual_seed(1), dtype=dtype)


def chosen_rows(rows):
    return list(range(OUT))[rows] if isinstance(rows, slice) else list(range(OUT) if rows is None else rows)


def test_it_starts_as_the_linear_layer_of_the_same_seed():
    torch.manual_seed(3)
    plain = nn.Linear(IN, OUT)
    torch.manual_seed(3)
    adapted = LoRALinear(IN, OUT, rank=4)
    x = tokens(dtype=torch.float32)
    assert torch.equal(adapted.weight, plain.weight) and torch.equal(adapted.bias, plain.bias)
    torch.testing.assert_close(adapted(x), plain(x))
    assert adapted.lora_A.abs().max() > 0 and adapted.lora_B.abs().max() == 0
    assert isinstance(adapted, nn.Linear)
    assert [name for name, one in adapted.named_parameters() if one.requires_grad] == ["lora_A", "lora_B"]


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=list(ROWS))
def test_output_and_gradients_are_those_of_the_effective_weight(rows, scaling):
    made, x = layer(rows=rows, scaling=scaling), tokens().requires_grad_()
    assert made.scale == {"lora": 6 / 4, "rslora": 6 / 2}[scaling]
    chosen = chosen_rows(rows)
    assert made.lora_B.shape == (len(chosen), 4)
    A, B = (one.detach().clone().requires_grad_() for one in (made.lora_A, made.lora_B))
    effective = made.weight.index_add(0, torch.tensor(chosen), made.scale * B @ A)
    other = x.detach().clone().requires_grad_()
    out, expected = made(x), F.linear(other, effective, made.bias)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), (x, made.lora_A, made.lora_B))
    wanted = torch.autograd.grad((expected * weight).sum(), (other, A, B))
    torch.testing.assert_close(got, wanted)


def test_nested_ranks_are_the_sum_of_the_adapters_of_the_first_ranks():
    made, x = layer(nested_ranks=(1, 3, 4)), tokens()
    update = sum(6 / m * made.lora_B[:, :m] @ made.lora_A[:m] for m in (1, 3, 4))
    torch.testing.assert_close(made(x), F.linear(x, made.weight + update, made.bias))
    with torch.no_grad():
        expected = made(x)
        made.merge()
        torch.testing.assert_close(made(x), expected)
    made.unmerge()
    torch.testing.assert_close(made.float().factor(), torch.tensor([9.5, 3.5, 3.5, 1.5]))
    assert made.bfloat16().factor().dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_half_precision_the_adapter_is_float32(dtype):
    made = layer(dtype=dtype)
    assert made.lora_A.dtype == made.lora_B.dtype == torch.float32
    out = made(tokens(dtype=dtype))
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert made.lora_A.grad.dtype == torch.float32 and made.lora_A.grad.abs().max() > 0
    assert layer(dtype=dtype, adapter_dtype=dtype).lora_A.dtype == dtype


def test_under_autocast_the_output_is_of_its_dtype():
    made, x = layer(dtype=torch.float32), tokens(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(x)
        with torch.no_grad():
            made.merge()
            merged = made(x)
    assert out.dtype == merged.dtype == torch.bfloat16
    torch.testing.assert_close(out, merged, rtol=0.02, atol=0.1)


def test_dropout_takes_its_mask_from_the_generator_and_ends_with_training():
    made, x = layer(dropout=0.4), tokens(64)
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (1,))
    mask = reference.lora_dropout_mask(seed, 64, IN, 0.4)
    dropped = x * mask / 0.6
    torch.manual_seed(5)
    update = made.scale * F.linear(F.linear(dropped, made.lora_A), made.lora_B)
    torch.testing.assert_close(made(x), F.linear(x, made.weight, made.bias) + update)
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))
    torch.testing.assert_close(made(x), made.to_linear()(x))


def test_dropout_is_the_same_under_activation_checkpointing():
    made, x = layer(dropout=0.3), tokens(32)
    gradients = []
    for run in (made, lambda x: checkpoint(made, x, use_reentrant=False)):
        torch.manual_seed(7)
        made.zero_grad()
        run(x).square().sum().backward()
        gradients.append((made.lora_A.grad.clone(), made.lora_B.grad.clone()))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_a_plain_checkpoint_loads_and_leaves_the_adapter():
    made, plain = layer(), nn.Linear(IN, OUT, dtype=torch.float64)
    before = made.lora_B.detach().clone()
    made.load_state_dict(plain.state_dict())
    assert torch.equal(made.weight, plain.weight) and torch.equal(made.lora_B, before)


def test_a_checkpoint_with_half_an_adapter_is_refused():
    made = layer()
    state = made.state_dict()
    del state["lora_B"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"lora_B"'):
        made.load_state_dict(state)


def test_from_linear_takes_over_what_the_layer_is():
    plain, calls = nn.Linear(IN, OUT, dtype=torch.bfloat16).eval(), []
    plain.weight.custom = "kept"
    handle = plain.register_forward_hook(lambda *_: calls.append(1))
    made = LoRALinear.from_linear(plain, rank=2)
    assert made.weight is plain.weight and made.bias is plain.bias and made.weight.custom == "kept"
    assert not made.weight.requires_grad and made.bias.requires_grad and not made.training
    assert made.lora_A.dtype == torch.float32 and made.weight.dtype == torch.bfloat16
    made(tokens(dtype=torch.bfloat16))
    handle.remove()
    made(tokens(dtype=torch.bfloat16))
    assert calls == [1]
    assert list(plain._parameters) == ["weight", "bias"]


def test_from_linear_refuses_what_is_more_than_a_linear_layer():
    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    replaced = nn.Linear(IN, OUT)
    replaced.forward = lambda x: x
    for wrong, error in (
        (Other(IN, OUT), "Other with a forward of its own"),
        (replaced, "with a forward of its own"),
        (nn.LazyLinear(OUT), "forward of its own|not made yet"),
        (nn.Bilinear(2, 2, 2), "Bilinear; it must be a torch.nn.Linear"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT)), "computed"),
    ):
        with pytest.raises(TypeError, match=error):
            LoRALinear.from_linear(wrong)
    with pytest.raises(ValueError, match="has an adapter already"):
        LoRALinear.from_linear(layer())


@pytest.mark.parametrize("merged", [False, True])
def test_to_linear_with_and_without_the_update(merged):
    made, x = layer(rows=slice(2, 7)), tokens()
    expected, weight = made(x).detach(), made.weight.detach().clone()
    if merged:
        made.merge()
    plain, bare = made.to_linear(), made.to_linear(merged=False)
    assert type(plain) is type(bare) is nn.Linear and bare.bias is made.bias
    torch.testing.assert_close(plain(x).detach(), expected)
    assert torch.equal(bare.weight, weight) and (bare.weight is made.weight) != merged


def test_it_compiles_in_one_graph():
    made, x = layer(dropout=0.0), tokens()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), made(x))


def test_it_can_be_copied_pickled_and_made_on_meta():
    made, x = layer(rows=[1, 4, 5], nested_ranks=(2, 4)), tokens()
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(x), made(x))
    kept = io.BytesIO()
    torch.save(made.state_dict(), kept)
    kept.seek(0)
    meta = LoRALinear(IN, OUT, device="meta", dtype=torch.float64, rank=4, alpha=6, rows=[1, 4, 5], nested_ranks=(2, 4))
    assert meta.lora_A.is_meta
    empty = LoRALinear(IN, OUT, dtype=torch.float64, rank=4, alpha=6, rows=[1, 4, 5], nested_ranks=(2, 4))
    empty.load_state_dict(torch.load(kept))
    assert torch.equal(empty(x), made(x))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rank": 0}, "rank is 0; it must be an int of at least 1"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"alpha": 0}, "alpha is 0; it must be a positive number"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"scaling": "dora"}, 'scaling is \'dora\'; it must be "lora" or "rslora"'),
        ({"rows": []}, "rows is empty"),
        ({"rows": [3, 3]}, "must ascend within 0 to 11"),
        ({"rows": [0, 12]}, "must ascend within 0 to 11"),
        ({"rows": [-1, 3]}, "must ascend within 0 to 11"),
        ({"nested_ranks": (1, 2)}, "must ascend from at least 1 to the rank, 4"),
        ({"nested_ranks": (2, 2, 4)}, "must ascend"),
        ({"nested_ranks": (0, 4)}, "must ascend"),
    ],
)
def test_bad_options_are_named(options, error):
    with pytest.raises(ValueError, match=error):
        LoRALinear(IN, OUT, **{"rank": 4, **options})
    with pytest.raises(ValueError, match=error):
        LoRALinear.from_linear(nn.Linear(IN, OUT), **{"rank": 4, **options})


def test_an_adapter_of_a_dtype_that_kernels_do_not_take_is_refused():
    with pytest.raises(TypeError, match=r"adapter_dtype is torch\.bfloat16; it must be torch\.float32"):
        LoRALinear(IN, OUT, adapter_dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"it must be torch\.float16 or torch\.float32"):
        LoRALinear(IN, OUT, dtype=torch.float16, adapter_dtype=torch.float64)

"""gaussian_attention: the reference against closed forms and torch's own attention, then every kernel that this machine
can run against the reference. On a GPU the same statements are made of `triton`."""

import math

import pytest
import torch
import torch.nn.functional as F
from backends_here import cpp_only, kernels_of
from gaussian_attention_cases import KINDS, check, make, masks, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trifuse

PACKED_Q = torch.tensor([0, 5, 5, 38, 64, 100, 100])
PACKED_K = torch.tensor([0, 9, 12, 12, 77, 90, 95])

kernels = kernels_of("triton")
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(poisoned_memory):
    """Every test runs on poisoned allocations."""


def attend(backend, *args, **options):
    with trifuse.backend(backend):
        return trifuse.gaussian_attention(*args, **options)


def doubles(*shape, count=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(count)]


# ---- the reference, against what can be computed by hand


def test_reference_is_the_softmax_of_distances():
    q, k, v = doubles(2, 3, 9, 4)
    gamma = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    logits = -gamma[:, None, None] * (q[:, :, :, None] - k[:, :, None]).square().sum(-1)
    out, lse = attend("reference", q, k, v, gamma=gamma, return_lse=True)
    torch.testing.assert_close(out, logits.softmax(-1) @ v)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(attend("reference", q, k, v, gamma=gamma, normalized=False), logits.exp() @ v)


def test_reference_weighs_two_keys_by_the_logistic_function():
    q, k = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64), torch.tensor([0.0, 1.0]).double()[None, None, :, None]
    out = attend("reference", q, k, k, gamma=3.0)
    assert abs(out.item() - 1 / (1 + math.exp(3 * (0.7**2 - 0.3**2)))) < 1e-15


def test_reference_window_sums_to_that_of_the_continuous_gaussian():
    """Without a dot product, the sum of a Gaussian over the integers is its integral, to exp(-2 pi^2 sigma^2)."""
    k = torch.zeros(1, 1, 200, 1, dtype=torch.float64)
    v = torch.arange(200, dtype=torch.float64)[None, None, :, None]
    center = torch.tensor([70.0, 100.3, 120.5], dtype=torch.float64)[None, None]
    out, lse = attend("reference", k[:, :, :3], k, v, center=center, sigma=3.0, return_lse=True)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(3 * math.sqrt(2 * math.pi))), rtol=0, atol=1e-14)
    torch.testing.assert_close(out[..., 0], center, rtol=1e-13, atol=0)


@pytest.mark.parametrize("normalized", [True, False])
def test_reference_gradients_pass_gradcheck_twice(normalized):
    tensors = make(batch=1, queries=4, keys=5, heads=4, kv_heads=2, dim=2, dtype=torch.float64, sigma=2.0)
    tensors = [tensor.requires_grad_() for tensor in tensors.values()]
    padding = masks({"q": tensors[0], "k": tensors[1]})["key_padding_mask"]

    def attention(q, k, v, gamma, center, sigma, mask):
        out, lse = trifuse.gaussian_attention(
            q, k, v, gamma=gamma, center=center, sigma=sigma, attn_mask=mask, normalized=normalized, return_lse=True,
            key_padding_mask=padding, enable_gqa=True, is_causal=True,
        )  # fmt: skip
        return out, lse.masked_fill(lse == -torch.inf, 0)

    mask = torch.randn(1, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    with trifuse.backend("reference"):
        assert torch.autograd.gradcheck(attention, [*tensors, mask])
        assert torch.autograd.gradgradcheck(attention, [*tensors, mask], fast_mode=True)


# ---- every kernel, against torch's own attention


@kernels
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_window_without_end_is_scaled_dot_product_attention(backend, device, causal, groups):
    q, k, v = (tensor.float().to(device) for tensor in doubles(2, 4, 70, 16))
    k, v = k[:, ::groups], v[:, ::groups]
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True, scale=0.3)
    for sigma in (1e9, math.inf):
        found = attend(backend, q, k, v, sigma=sigma, is_causal=causal, enable_gqa=True, scale=0.3)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@kernels
def test_distances_are_dot_products_of_longer_vectors(backend, device):
    """exp(-gamma |q - k|^2) is, up to a factor of the row, exp(2 gamma (q, -1/2) . (k, |k|^2))."""
    q, k, v = (tensor.float().to(device) for tensor in doubles(2, 4, 70, 15))
    longer_q = torch.cat([q, torch.full_like(q[..., :1], -0.5)], -1)
    longer_k = torch.cat([k, k.square().sum(-1, keepdim=True)], -1)
    expected = F.scaled_dot_product_attention(longer_q, longer_k, v, scale=0.2)
    torch.testing.assert_close(attend(backend, q, k, v, gamma=0.1), expected, rtol=1e-5, atol=1e-6)


@kernels
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_window_is_a_score_modification_of_flex_attention(backend, device):
    flex = pytest.importorskip("torch.nn.attention.flex_attention", reason="this torch has no FlexAttention")
    q, k, v = (tensor.float().to(device) for tensor in doubles(1, 2, 70, 16))
    sigma = torch.tensor([2.0, 9.0], device=device)

    def window(score, b, h, i, j):
        return score - (j - i) ** 2 / (2 * sigma[h] ** 2)

    found, expected = attend(backend, q, k, v, sigma=sigma), flex.flex_attention(q, k, v, score_mod=window)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@kernels
def test_kernel_sums_of_ones_are_the_exponential_of_lse(backend, device):
    q, k, v = (tensor.float().to(device) for tensor in doubles(2, 2, 70, 4))
    out, lse = attend(backend, q, k, torch.ones_like(v), gamma=0.4, normalized=False, return_lse=True)
    torch.testing.assert_close(out, lse.exp()[..., None].expand_as(out), rtol=2e-6, atol=0)


@kernels
def test_gamma_zero_is_the_mean(backend, device):
    q, k, v = (tensor.float().to(device) for tensor in doubles(2, 2, 70, 4))
    torch.testing.assert_close(
        attend(backend, q, k, v, gamma=0), v.mean(2, keepdim=True).expand_as(v), atol=1e-6, rtol=0
    )


# ---- every kernel, against the reference


@kernels
@kinds
@dtypes
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_all_options_at_once(backend, device, dtype, kind, packed, causal):
    offsets = {"cu_seqlens_q": PACKED_Q, "cu_seqlens_k": PACKED_K} if packed else {}
    tensors = make(kind=kind, queries=100, keys=95, heads=4, kv_heads=2, value_dim=12, dtype=dtype,
                   cu_seqlens_q=PACKED_Q if packed else None)  # fmt: skip
    options = masks(tensors, boolean=causal) | offsets
    check(backend, tensors, device, enable_gqa=True, is_causal=causal, **options)


@kernels
@kinds
@dtypes
def test_bare_call_needs_no_optional_argument(backend, device, dtype, kind):
    check(backend, make(kind=kind, dtype=dtype, queries=70), device, lse_grad=False)


@kernels
@pytest.mark.parametrize("kind", ["g", "gcs"])
@pytest.mark.parametrize("causal", [False, True])
@dtypes
def test_unnormalized_sums(backend, device, dtype, kind, causal):
    tensors = make(kind=kind, dtype=dtype, queries=70, keys=90)
    check(backend, tensors, device, normalized=False, is_causal=causal, **masks(tensors))


@kernels
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 63, 64, 65, 127, 129, 257])
@pytest.mark.parametrize("kind", ["g", "cs"])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_around_a_tile(backend, device, length, kind, causal):
    check(backend, make(batch=1, kind=kind, queries=length), device, is_causal=causal)


@kernels
@dtypes
@pytest.mark.parametrize("kind", ["g", "s"])
def test_a_thousand_positions(backend, device, dtype, kind):
    check(backend, make(batch=1, heads=1, kind=kind, queries=1000, dim=16, dtype=dtype), device)


@kernels
@pytest.mark.parametrize("queries, keys", [(1, 1000), (1000, 1), (65, 300), (300, 65), (3, 0), (0, 3), (70, 1)])
@pytest.mark.parametrize("kind", ["g", "s", "gcs"])
def test_queries_and_keys_differ_in_number(backend, device, queries, keys, kind):
    for causal in (False, True):
        check(backend, make(kind=kind, queries=queries, keys=keys), device, is_causal=causal)


@kernels
@pytest.mark.parametrize(
    "dim", [(1, 1), (3, 5), (16, 16), (17, 33), (64, 64), (72, 40), (128, 128), (8, 200), (256, 8)]
)
@pytest.mark.parametrize("kind", ["g", "s"])
def test_any_head_size(backend, device, dim, kind):
    check(backend, make(batch=1, queries=70, keys=50, dim=dim[0], value_dim=dim[1], kind=kind), device)


@kernels
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 1), (4, 2), (6, 3), (5, 5)])
def test_query_heads_share_heads_of_keys(backend, device, heads, kv_heads):
    tensors = make(heads=heads, kv_heads=kv_heads, queries=66)
    check(backend, tensors, device, enable_gqa=True, is_causal=True, **masks(tensors))


@kernels
@pytest.mark.parametrize(
    "shape", [(), (1,), (3,), (3, 20), (1, 20), (3, 1), (2, 1, 1), (2, 3, 1), (1, 1, 20), (2, 3, 20)]
)
def test_center_and_sigma_broadcast(backend, device, shape):
    tensors = make(heads=3, queries=20, kind="gcs")
    g = torch.Generator().manual_seed(1)
    tensors["center"], tensors["sigma"] = 20 * torch.rand(shape, generator=g), 1 + 5 * torch.rand(shape, generator=g)
    tensors["gamma"] = tensors["gamma"][0]
    check(backend, tensors, device)
    found = run(backend, tensors, device=device)
    assert found["dcenter"].shape == found["dsigma"].shape == shape and found["dgamma"].shape == ()


@kernels
def test_numbers_stand_for_tensors(backend, device):
    made = {name: tensor.to(device) for name, tensor in make(kind="g", queries=40).items()}
    q, k, v = (made[name] for name in "qkv")

    def constant(value):
        return torch.tensor(value, device=device)

    found = attend(backend, q, k, v, gamma=0.2, sigma=3, center=5)
    assert torch.equal(found, attend(backend, q, k, v, gamma=constant(0.2), sigma=constant(3.0), center=constant(5.0)))


@kernels
@pytest.mark.parametrize("shape", [(1, 1, 30, 40), (2, 1, 1, 40), (40,), (30, 1), (1, 3, 30, 1), (2, 3, 30, 40)])
@pytest.mark.parametrize("kind", ["bool", "float32", "bfloat16"])
def test_attn_mask_broadcasts(backend, device, shape, kind):
    tensors = make(heads=3, queries=30, keys=40, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    g = torch.Generator().manual_seed(3)
    mask = torch.rand(shape, generator=g) < 0.6 if kind == "bool" else torch.randn(shape, generator=g)
    check(backend, tensors, device, attn_mask=mask if kind == "bool" else mask.to(getattr(torch, kind)))


@kernels
def test_attn_mask_may_have_any_strides(backend, device):
    tensors = make(queries=33, keys=70)
    g = torch.Generator().manual_seed(3)
    whole = torch.rand((2, 2, 140, 66), generator=g) < 0.6
    check(backend, tensors, device, attn_mask=whole.mT[:, :, ::2, ::2])
    added = torch.randn((70, 33, 2), generator=g).permute(2, 1, 0)[:, None].expand(2, 2, 33, 70)
    check(backend, tensors, device, attn_mask=added.transpose(0, 1))


@kernels
@dtypes
@kinds
def test_rows_without_keys_are_zero_and_move_nothing(backend, device, dtype, kind):
    tensors = make(kind=kind, queries=70, keys=70, dtype=dtype)
    padding = torch.zeros(2, 70, dtype=torch.bool)
    padding[0] = True
    mask = torch.ones(70, 70, dtype=torch.bool)
    mask[::3] = False
    mask[:, 40:] = False
    options = {"key_padding_mask": padding, "attn_mask": mask}
    check(backend, tensors, device, **options)
    found = run(backend, tensors, device=device, **options)
    assert found["dead"][0].all() and found["dead"][1, :, ::3].all() and not found["dead"][1, :, 1].any()
    for name, value in found.items():
        assert value.isfinite().all(), name
    assert not found["out"][0].any() and not found["dq"][0].any() and not found["dk"][0].any()
    assert not found["dq"][1, :, ::3].any() and not found["dk"][1, :, 40:].any() and not found["dv"][1, :, 40:].any()


@kernels
@pytest.mark.parametrize("layout", ["blhd", "every second", "expanded"])
def test_strided_and_expanded_inputs(backend, device, layout):
    tensors = make(heads=3, queries=70)
    for name in "qkv":
        if layout == "blhd":
            tensors[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "every second":
            tensors[name] = tensors[name].repeat_interleave(2, dim=3).repeat_interleave(3, dim=2)[:, :, ::3, ::2]
        else:
            tensors[name] = tensors[name][:1, :, :, :1].expand(2, -1, -1, 8)
    tensors["center"] = tensors["center"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    tensors["sigma"] = tensors["sigma"][:, :1, :].expand(-1, 3, -1)
    check(backend, tensors, device)


@kernels
def test_gradients_that_come_in_may_be_expanded(backend, device):
    made = {name: tensor.to(device).requires_grad_() for name, tensor in make(queries=70).items()}
    with trifuse.backend(backend):
        out, lse = trifuse.gaussian_attention(**made, return_lse=True)
        found = torch.autograd.grad(out.sum() + lse.mT.sum(), made.values(), retain_graph=True)
        expected = torch.autograd.grad([out, lse], made.values(), [torch.ones_like(out), torch.ones_like(lse)])
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)


@kernels
@kinds
def test_the_gradient_of_lse_alone(backend, device, kind):
    made = make(kind=kind, queries=70)
    grads = {}
    for name in ("reference", backend):
        args = {key: value.to(device).requires_grad_() for key, value in made.items()}
        _, lse = attend(name, **args, return_lse=True)
        found = torch.autograd.grad(lse.sin().sum(), args.values(), allow_unused=True, materialize_grads=True)
        grads[name] = dict(zip(args, found, strict=True))
    for name, value in grads[backend].items():
        torch.testing.assert_close(value, grads["reference"][name], rtol=1e-4, atol=1e-5, msg=name)
    assert not grads[backend]["v"].any()


@kernels
@pytest.mark.parametrize("sizes", [(0, 2, 9, 9, 4), (2, 0, 9, 9, 4), (2, 2, 0, 9, 4), (2, 2, 9, 0, 4), (2, 2, 0, 0, 4),
                                   (2, 2, 9, 9, 0)])  # fmt: skip
@kinds
def test_empty_inputs(backend, device, sizes, kind):
    batch, heads, queries, keys, value_dim = sizes
    tensors = make(batch=batch, heads=heads, queries=queries, keys=keys, value_dim=value_dim, kind=kind)
    found = run(backend, tensors, device=device)
    assert found["out"].shape == (batch, heads, queries, value_dim) and found["lse"].shape == (batch, heads, queries)
    for name, value in found.items():
        assert value.isfinite().all(), name
    if keys == 0:
        assert not found["out"].any() and found["dead"].all() and not found["dq"].any()


@kernels
def test_packed_sequences_are_what_they_are_alone(backend, device):
    tensors = make(queries=100, keys=95, kind="gcs", cu_seqlens_q=PACKED_Q)
    options = masks(tensors) | {"is_causal": True}
    whole = run(backend, tensors, device=device, cu_seqlens_q=PACKED_Q, cu_seqlens_k=PACKED_K, **options)
    q_bounds, k_bounds = PACKED_Q.tolist(), PACKED_K.tolist()
    for i in range(len(q_bounds) - 1):
        rows, columns = slice(q_bounds[i], q_bounds[i + 1]), slice(k_bounds[i], k_bounds[i + 1])
        part = {name: tensors[name][:, :, rows] for name in ("q", "center", "sigma")}
        part |= {name: tensors[name][:, :, columns] for name in "kv"} | {"gamma": tensors["gamma"]}
        own = {"attn_mask": options["attn_mask"][:, :, rows, columns], "is_causal": True,
               "key_padding_mask": options["key_padding_mask"][:, columns]}  # fmt: skip
        alone = run(backend, part, device=device, grads=False, **own)
        for name in ("out", "lse", "dead"):
            torch.testing.assert_close(whole[name][:, :, rows], alone[name], rtol=2e-6, atol=2e-6)


@kernels
def test_no_packed_sequences_at_all(backend, device):
    none = torch.zeros(1, dtype=torch.int32)
    found = run(backend, make(queries=0, cu_seqlens_q=none), device=device, cu_seqlens_q=none)
    assert found["out"].shape == (1, 2, 0, 8)


@kernels
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_stays_in_its_head(backend, device, name):
    tensors = make(heads=4, kv_heads=2, queries=70)
    clean = run(backend, tensors, device=device, enable_gqa=True)
    spoiled = dict(tensors, **{name: tensors[name].clone()})
    spoiled[name][1, 0, 5, 3] = float("nan")
    found = run(backend, spoiled, device=device, enable_gqa=True)
    reached = slice(0, 1) if name == "q" else slice(0, 2)
    for key in ("out", "lse", "dq", "dcenter", "dsigma"):
        same = torch.ones(2, 4, dtype=torch.bool)
        same[1, reached] = False
        assert torch.equal(found[key][same], clean[key][same]), key
    assert torch.equal(found["dk"][1, 1], clean["dk"][1, 1]) and torch.equal(found["dk"][0], clean["dk"][0])
    assert found["out"][1, 0, 5].isnan().any()


@kernels
@kinds
def test_results_are_bitwise_repeatable(backend, device, kind):
    tensors = make(heads=4, kv_heads=2, queries=300, kind=kind, dim=16)
    first, second = (run(backend, tensors, device=device, enable_gqa=True) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@st.composite
def cases(draw):
    """Any call: shapes, dtype, parameters, masks, packing; as arguments of `build`."""
    queries, keys = draw(st.integers(0, 80)), draw(st.integers(0, 80))
    options = {"is_causal": draw(st.booleans()), "enable_gqa": True, "lse_grad": draw(st.booleans())}
    if draw(st.booleans()):
        count = draw(st.integers(0, 3))
        for name, size in (("cu_seqlens_q", queries), ("cu_seqlens_k", keys)):
            cuts = sorted(draw(st.lists(st.integers(0, size), min_size=count, max_size=count)))
            options[name] = torch.tensor([0, *cuts, size], dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    kind, kv_heads = draw(st.sampled_from(["g", "s", "cs", "gs", "gcs"])), draw(st.integers(1, 3))
    if "g" in kind:
        options["normalized"] = draw(st.booleans())
    made = {
        "batch": draw(st.integers(1, 2)), "heads": kv_heads * draw(st.integers(1, 3)), "kv_heads": kv_heads,
        "queries": queries, "keys": keys, "dim": draw(st.integers(1, 40)), "value_dim": draw(st.integers(1, 40)),
        "kind": kind, "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "seed": draw(st.integers(0, 999)), "origin": draw(st.sampled_from([0.0, 30.0])) if "g" in kind else 0.0,
        "per_query": draw(st.booleans()), "sigma": draw(st.sampled_from([None, 1.0, 20.0])),
        "cu_seqlens_q": options.get("cu_seqlens_q"),
    }  # fmt: skip
    masked = draw(st.none() | st.fixed_dictionaries({"seed": st.integers(0, 99), "boolean": st.booleans()}))
    return made, masked, options, draw(st.sets(st.sampled_from("qkv")))


def build(made, masked, options, transposed):
    tensors = make(**made)
    if masked is not None:
        options = options | masks(tensors, **masked)
    for name in transposed:
        tensors[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    return tensors, options


any_case = given(case=cases())
fuzz = settings(max_examples=60, deadline=None, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip


@kernels
@any_case
@fuzz
def test_any_call_keeps_the_tolerance(backend, device, case):
    tensors, options = build(*case)
    check(backend, tensors, device, **options)


# ---- what only the CPU kernels do


@cpp_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@kinds
@pytest.mark.parametrize("causal", [False, True])
def test_every_instruction_set(isa, dtype, kind, causal):
    tensors = make(batch=1, heads=2, kv_heads=1, queries=131, keys=150, dim=24, value_dim=20, kind=kind, dtype=dtype)
    check("cpp", tensors, enable_gqa=True, is_causal=causal, **masks(tensors, boolean=causal))


@cpp_only
@pytest.mark.parametrize("dim", [(8, 200), (256, 8), (300, 300)])
def test_heads_beyond_what_triton_holds(dim):
    check("cpp", make(batch=1, queries=70, keys=50, dim=dim[0], value_dim=dim[1]))


@cpp_only
@any_case
@fuzz
def test_any_call_in_double_precision(case):
    made, *rest = case
    tensors, options = build(made | {"dtype": torch.float64}, *rest)
    check("cpp", tensors, **options)


@cpp_only
@kinds
def test_results_do_not_depend_on_the_number_of_threads(threads, kind):
    tensors, results = make(heads=4, kv_heads=2, queries=300, dim=16, kind=kind), []
    for count in (1, 3, 8):
        threads(count)
        results.append(run("cpp", tensors, enable_gqa=True, is_causal=True))
    for name in results[0]:
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:]), name


@cpp_only
@kinds
@pytest.mark.parametrize("normalized", [True, False])
def test_cpp_gradients_pass_gradcheck(kind, normalized):
    if not normalized and "g" not in kind:
        pytest.skip("dot products have no unnormalized form")
    tensors = make(batch=1, heads=2, kv_heads=1, queries=9, keys=11, dim=3, kind=kind, dtype=torch.float64, sigma=3.0)
    names = list(tensors)

    def attention(*values):
        return trifuse.gaussian_attention(
            **dict(zip(names, values, strict=True)), enable_gqa=True, is_causal=True, return_lse=True,
            normalized=normalized,
        )  # fmt: skip

    with trifuse.backend("cpp"):
        assert torch.autograd.gradcheck(attention, [tensor.requires_grad_() for tensor in tensors.values()])

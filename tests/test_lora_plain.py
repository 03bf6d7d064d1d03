"""The short ways of plain calls on a CPU: they give what the long ways give, are taken when they should be, and leave
the rest to the long ways."""

import importlib

import dora_linear_cases as dora
import lora_linear_cases as lora
import pytest
import torch
import torch.nn.utils.prune
from backends_here import cpp_only
from lora_linear_multi_cases import make as make_multi

import trifuse

pytestmark = [cpp_only, pytest.mark.usefixtures("poisoned_memory")]
OPS = {name: importlib.import_module(f"trifuse.ops.{name}") for name in ("lora_linear", "dora_linear")}
MULTI = importlib.import_module("trifuse.ops.lora_linear_multi")
OPTIONS = {
    "number": {},
    "no bias": {"bias": False},
    "three axes": {"lead": (2, 3)},
    "one row": {"rows": 1},
    "many rows": {"rows": 700, "columns": 130, "out": 520, "rank": 5},
    "float64": {"dtype": torch.float64},
}
SAMPLES = [(name, options) for name in OPS for options in OPTIONS]


def arguments(op, options="number", **more):
    make = lora.make if op == "lora_linear" else dora.make
    made = {"bias": None} | make(**OPTIONS[options], **more)
    return {name: x.requires_grad_() if isinstance(x, torch.Tensor) else x for name, x in made.items()}


def results(op, made, needs=None, **options):
    y = getattr(trifuse, op)(**made, **options)
    wanted = [x for name, x in made.items() if isinstance(x, torch.Tensor) and (needs is None or name in needs)]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    return y, *torch.autograd.grad(y, wanted, dy)


def by_name(op, made):
    """The gradients by the names of their arguments."""
    names = [name for name, x in made.items() if isinstance(x, torch.Tensor)]
    return dict(zip(names, results(op, made)[1:], strict=True))


def close(got, wanted):
    """Equal but for the order of sums."""
    torch.testing.assert_close(got, wanted, rtol=1.3e-6, atol=2e-6 * wanted.abs().max().item())


@pytest.fixture
def the_long_way(monkeypatch):
    """Called, it turns the short ways off."""

    def turn_off():
        for module in (*OPS.values(), MULTI):
            monkeypatch.setattr(module, "is_plain", lambda *args: False)

    return turn_off


@pytest.fixture
def taken(monkeypatch):
    """The calls that the short ways answered, by op."""
    found = []
    for name, module in (*OPS.items(), ("lora_linear_multi", MULTI)):
        plain = module.kernels.plain

        def watched(*args, name=name, plain=plain):
            y = plain(*args)
            if y is not None:
                found.append(name)
            return y

        monkeypatch.setattr(module.kernels, "plain", watched)
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("op", "options"), SAMPLES)
def test_it_gives_what_the_long_way_gives(op, options, dropout, taken, the_long_way):
    made = arguments(op, options)
    drop = {"dropout": dropout, "seed": 7} if dropout else {}
    short = results(op, made, **drop)
    assert taken == [op]
    the_long_way()
    for got, wanted in zip(short, results(op, made, **drop), strict=True):
        close(got, wanted)
    assert taken == [op]


@pytest.mark.parametrize("needs", [("x",), ("lora_A",), ("lora_B", "bias"), ("weight",), ("x", "lora_A", "lora_B")])
@pytest.mark.parametrize("op", OPS)
def test_gradients_do_not_depend_on_which_are_asked_for(op, needs):
    made = arguments(op)
    every = by_name(op, made)
    some = {name: x.detach().requires_grad_(name in needs) if isinstance(x, torch.Tensor) else x
            for name, x in made.items()}  # fmt: skip
    ordered = [name for name in some if name in needs]
    for name, got in zip(ordered, results(op, some, needs)[1:], strict=True):
        torch.testing.assert_close(got, every[name], msg=name)


def test_the_gradient_of_the_magnitude_alone():
    made = arguments("dora_linear")
    every = by_name("dora_linear", made)
    alone = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in made.items()}
    alone["magnitude"].requires_grad_()
    torch.testing.assert_close(results("dora_linear", alone, ("magnitude",))[1], every["magnitude"])


@pytest.mark.parametrize("op", OPS)
def test_without_gradients_the_output_is_the_same(op, taken):
    made = arguments(op)
    expected = results(op, made)[0]
    with torch.no_grad():
        got = getattr(trifuse, op)(**made)
    assert taken == [op, op] and torch.equal(got, expected) and not got.requires_grad


@pytest.mark.parametrize("op", OPS)
def test_a_first_gradient_that_could_be_differentiated_is_the_same(op, taken):
    made = arguments(op)
    wanted = [x for x in made.values() if isinstance(x, torch.Tensor)]
    plain = torch.autograd.grad(getattr(trifuse, op)(**made).square().sum(), wanted)
    graph = torch.autograd.grad(getattr(trifuse, op)(**made).square().sum(), wanted, create_graph=True)
    assert taken == [op, op]
    for got, expected in zip(graph, plain, strict=True):
        torch.testing.assert_close(got, expected)
    with pytest.raises(RuntimeError, match=f"{op}: a native kernel has no second derivative"):
        torch.autograd.grad(sum(grad.sum() for grad in graph), wanted)


@pytest.mark.parametrize("needs", [("x",), ("lora_A",), ("bias",), ("weight",), ("x", "lora_A", "lora_B")])
@pytest.mark.parametrize("op", OPS)
def test_so_it_is_where_only_some_are_asked_for(op, needs):
    made = {name: x.detach().requires_grad_(name in needs) if isinstance(x, torch.Tensor) else x
            for name, x in arguments(op).items()}  # fmt: skip
    wanted = [made[name] for name in needs]
    plain = torch.autograd.grad(getattr(trifuse, op)(**made).sin().sum(), wanted)
    graph = torch.autograd.grad(getattr(trifuse, op)(**made).sin().sum(), wanted, create_graph=True)
    for got, expected in zip(graph, plain, strict=True):
        close(got, expected)


def test_the_second_derivative_towards_the_magnitude_is_refused_too():
    made = arguments("dora_linear")
    (dx,) = torch.autograd.grad(trifuse.dora_linear(**made).sum(), made["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="dora_linear: a native kernel has no second derivative"):
        torch.autograd.grad(dx.sum(), made["magnitude"])


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_computed_for_many_outputs_at_once(op, taken):
    made = arguments(op)
    wanted = [x for x in made.values() if isinstance(x, torch.Tensor)]
    y = getattr(trifuse, op)(**made)
    assert taken == [op]
    dy = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(5))
    many = torch.autograd.grad(y, wanted, dy, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for got, expected in zip(many, torch.autograd.grad(y, wanted, dy[i], retain_graph=True), strict=True):
            close(got[i], expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("op", OPS)
def test_a_trace_is_of_the_long_way(op, taken):
    made = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in arguments(op).items()}
    x = made.pop("x")
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: getattr(trifuse, op)(x, **made), x, check_trace=False)
        assert not taken
        close(traced(x.T.contiguous().T), getattr(trifuse, op)(x, **made))


@pytest.mark.parametrize("rank", [2**70, -(2**70), 0])
def test_a_rank_beyond_the_factors_is_refused_by_name(rank):
    made = arguments("lora_linear")
    with pytest.raises(ValueError, match=f"active_rank is {rank}; it must be 1 to the rank of lora_A, 4"):
        trifuse.lora_linear(**made, active_rank=rank)


def test_a_norm_of_zero_gives_no_gradient():
    made = arguments("dora_linear")
    with torch.no_grad():
        made["weight"][3] = 0
        made["lora_B"][3] = 0
    y, *grads = results("dora_linear", made)
    assert torch.equal(y[:, 3], made["bias"][3].expand(y.shape[0]))
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[-1][3] == 0


@pytest.mark.parametrize("op", OPS)
def test_a_backend_of_the_environment_is_obeyed(op, taken, monkeypatch):
    made = arguments(op)
    monkeypatch.setenv("TRIFUSE_BACKEND", "reference")
    with torch.no_grad():
        got = getattr(trifuse, op)(**made)
        assert not taken
        with trifuse.backend("reference"):
            assert torch.equal(getattr(trifuse, op)(**made), got)
    monkeypatch.setenv("TRIFUSE_BACKEND", "cpp")
    with torch.no_grad():
        getattr(trifuse, op)(**made)
    assert taken == [op]


@pytest.mark.parametrize("options", ["number", "no bias", "three axes", "float64"])
def test_opcheck_of_dora_s_short_way(options):
    made = {
        name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in arguments("dora_linear", options).items()
    }
    six = [made[name] for name in ("x", "weight", "bias", "lora_A", "lora_B", "magnitude")]
    for seed, saved in ((None, (True, True)), (torch.tensor([3]), (False, True)), (None, (False, False))):
        rate = 0.0 if seed is None else 0.2
        torch.library.opcheck(torch.ops.trifuse.dora_linear_plain.default, (*six, 0.5, rate, seed, *saved))


@pytest.mark.parametrize("op", OPS)
def test_opcheck_of_the_short_way_back(op):
    made = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in arguments(op, "three axes").items()}
    x, weight, bias, *rest = (made[name] for name in ("x", "weight", "bias", "lora_A", "lora_B"))
    ops = torch.ops.trifuse
    if op == "lora_linear":
        y, S = ops.lora_linear_plain(x, weight, bias, *rest, 0.5, 4, 0.0, None, False, True)
        arguments_of_back = (*rest, S, 0.5, 4, False, 0.0, None, False, [True, False, True, True, False])
    else:
        y, plain, S, norm, factors = ops.dora_linear_plain(
            x, weight, bias, *rest, made["magnitude"], 0.5, 0.0, None, True, True
        )
        needs = [True, False, True, True, False, True]
        arguments_of_back = (*rest, S, plain, norm, factors, 0.5, 0.0, None, needs)
    torch.library.opcheck(getattr(ops, f"{op}_plain_bwd").default, (torch.randn_like(y), x, weight, *arguments_of_back))


# ---- layers, whose forward pass at inference is written out


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized(layer):
    torch.nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())


def pruned(layer):
    torch.nn.utils.prune.random_unstructured(layer, "bias", 0.5)


def a_buffer(layer):
    bias = layer.bias.detach()
    del layer.bias
    layer.register_buffer("bias", bias)


@pytest.mark.parametrize("kind", [trifuse.nn.LoRALinear, trifuse.nn.DyLoRALinear, trifuse.nn.DoRALinear])
@pytest.mark.parametrize("change", [parametrized, pruned, a_buffer, lambda layer: None])
def test_a_bias_is_added_whatever_it_is(kind, change):
    torch.manual_seed(0)
    layer = kind(16, 24, rank=4)
    torch.nn.init.normal_(layer.lora_B)
    change(layer)
    x = torch.randn(5, 16)
    expected = layer(x)
    with torch.no_grad():
        close(layer(x), expected.detach())


def test_a_layer_that_says_otherwise_is_asked():
    class Louder(trifuse.nn.LoRALinear):
        @property
        def scale(self):
            return 10 * super().scale

    torch.manual_seed(0)
    layer = Louder(16, 24, rank=4)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 16)
    expected = layer(x).detach()
    with torch.no_grad():
        close(layer(x), expected)


# ---- rows that have adapters of their own


def multi(made, scales=None):
    n = made["scales"].shape[0]
    A, B = ([made[f"{name}{i}"] for i in range(n)] for name in "AB")
    return trifuse.lora_linear_multi(
        made["x"], made["weight"], made.get("bias"), A, B, scales or [0.5 + i for i in range(n)], made["index"]
    )


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"lead": (2,)}, {"dtype": torch.bfloat16}, {"dtype": torch.float64}]
)
def test_many_adapters_give_what_the_long_way_gives(options, taken, the_long_way):
    made = make_multi(**options)
    with torch.no_grad():
        short = multi(made)
        assert taken == ["lora_linear_multi"]
        the_long_way()
        assert torch.equal(short, multi(made))
    assert len(taken) == 1


def test_what_the_short_way_of_many_adapters_cannot_serve_is_left_to_the_long_way(taken):
    made = make_multi()
    with torch.no_grad():
        multi(made | {"x": made["x"].T.contiguous().T})
        multi(made | {"index": made["index"].int()})
        multi(made, scales=[torch.ones(3), 1.0, 2.0])
        assert not taken
        with pytest.raises(ValueError, match="lora_linear_multi: index holds 3; there are only 3 adapters"):
            multi(made | {"index": torch.full_like(made["index"], 3)})
        with pytest.raises(ValueError, match=r"lora_linear_multi: A_list\[1\] has shape"):
            multi(made | {"A1": made["A1"][:, 1:]})
        with pytest.raises(ValueError, match=r"A_list\[2\] is on meta"):
            multi(made | {"A2": made["A2"].to("meta")})
    made["A0"].requires_grad_()
    assert multi(made).requires_grad and not taken

"""LowRankAdamW: the same results as torch's AdamW where all ranks are active, ranks that rest where not, and all that
an optimizer of torch has to do."""

import copy
import io
import re

import pytest
import torch
from backends_here import kernels_of
from tolerance import compare, error
from torch import nn

import trifuse
from trifuse.optim import LowRankAdamW

kernels = kernels_of("cuda", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Adapter(nn.Module):
    """x (A^T) (B^T), with a bias that is no factor."""

    def __init__(self, rank=4, columns=20, rows=12, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.lora_A = nn.Parameter(torch.randn(rank, columns, dtype=torch.float64).to(dtype))
        self.lora_B = nn.Parameter(torch.randn(rows, rank, dtype=torch.float64).to(dtype))
        self.bias = nn.Parameter(torch.randn(rows, dtype=torch.float64).to(dtype))

    def forward(self, x):
        return x @ self.lora_A.t() @ self.lora_B.t() + self.bias


def grads(model, step):
    """The same gradients for every optimizer, drawn of values that every dtype holds."""
    g = torch.Generator().manual_seed(step)
    for param in model.parameters():
        drawn = torch.randn(param.shape, generator=g, dtype=torch.float64).bfloat16()
        param.grad = drawn.to(param.device, param.dtype)


def trained(optimizer, dtype, device="cpu", backend=None, steps=50, **options):
    model = Adapter(dtype=dtype).to(device)
    made = optimizer(model, lr=1e-2, **options)
    for step in range(steps):
        grads(model, step)
        if backend is None:
            made.step()
        else:
            with trifuse.backend(backend):
                made.step()
    return {name: param.detach().cpu() for name, param in model.named_parameters()}


def torchs(model, **options):
    return torch.optim.AdamW(model.parameters(), foreach=False, **options)


def ours(model, **options):
    return LowRankAdamW(model.named_parameters(), **options)


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fifty_steps_are_those_of_torchs_adamw(backend, device, dtype, maximize, weight_decay):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("GPUs compute in float32")
    options = {"maximize": maximize, "weight_decay": weight_decay, "betas": (0.8, 0.99), "eps": 1e-6}
    exact = trained(torchs, torch.float64, **options)
    start = Adapter(dtype=torch.float64)
    if dtype == torch.bfloat16:  # from where bfloat16 starts
        exact = trained(lambda model, **options: torchs(model.to(torch.bfloat16).double(), **options), torch.float64,
                        **options)  # fmt: skip
    eager = trained(torchs, dtype, **options)
    found = trained(ours, dtype, device, backend, **options)
    if dtype == torch.float64:  # nothing is more exact: half a unit in the last place for every step
        for name, value in found.items():
            torch.testing.assert_close(value, exact[name], rtol=0, atol=25 * 2.0**-52 * exact[name].abs().max().item())
    else:
        compare(found, exact, {name: error(eager[name], exact[name]) for name in exact})
    assert all(error(found[name], start.get_parameter(name)) > 0.05 for name in found)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_ranks_that_rest_keep_every_bit_over_fifty_steps_with_weight_decay(backend, device, dtype, frozen):
    model = Adapter(dtype=dtype).to(device)
    optimizer = LowRankAdamW(model.named_parameters(), lr=1e-2, weight_decay=0.5)
    grads(model, 0)
    optimizer.step()  # from here on there are moments
    for step in range(50):
        b = 1 + step % 4
        first, last = (b - 1, b) if frozen else (0, b)
        model.lora_A.active_rows = model.lora_B.active_rows = (first, last)
        grads(model, step)
        was = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
        with trifuse.backend(backend):
            optimizer.step()
        for at, name in enumerate(("lora_A", "lora_B")):
            rest = torch.tensor([not first <= i < last for i in range(4)], device=device)
            state = optimizer.state[model.get_parameter(name)]
            pairs = [(model.state_dict()[name], was[0][name])]
            pairs += [(state[key], was[1][at][key]) for key in ("exp_avg", "exp_avg_sq")]
            for now, before in pairs:
                changed = (now != before).any(1 - at)
                assert not changed[rest].any()
            assert changed[~rest].all()
            assert torch.equal(state["steps"], was[1][at]["steps"] + (~rest).float())


def test_a_rank_that_is_trained_rarely_steps_as_in_a_training_of_its_own():
    """Its bias correction is that of its own steps: the first one is as long as any other's first."""
    model = Adapter()
    optimizer = LowRankAdamW(model.named_parameters(), lr=1e-2, weight_decay=0.0)
    for b in (0, 1, 0, 1, 3):
        model.lora_A.active_rows = model.lora_B.active_rows = (b, b + 1)
        before = model.lora_A.detach().clone()
        grads(model, b)
        optimizer.step()
    moved = (model.lora_A.detach() - before)[3]
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-2), rtol=1e-3, atol=0)
    assert optimizer.state[model.lora_A]["steps"].tolist() == [2, 2, 0, 1]


@pytest.mark.parametrize("name_of", [
    lambda factor: f"layer.lora_{factor}",
    lambda factor: f"lora_{factor}",
    lambda factor: f"base_model.model.q_proj.lora_{factor}.default.weight",
    lambda factor: f"embed.lora_embedding_{factor}.default",
])  # fmt: skip
def test_names_tell_a_from_b_and_lora_plus_scales_the_rate_of_b(name_of):
    model = Adapter()
    named = [(name_of("A"), model.lora_A), (name_of("B"), model.lora_B), ("q_proj.bias", model.bias)]
    optimizer = LowRankAdamW(named, lr=1e-3, weight_decay=0.0, lr_ratio=16.0)
    before = copy.deepcopy(model)
    grads(model, 0)
    optimizer.step()
    for name, rate in (("lora_A", 1e-3), ("lora_B", 16e-3), ("bias", 1e-3)):
        moved = (model.get_parameter(name) - before.get_parameter(name)).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=1e-6)
    assert [len(optimizer.state[one]["steps"]) for one in (model.lora_A, model.lora_B, model.bias)] == [4, 4, 1]


def test_groups_and_attributes_tell_where_ranks_lie():
    model = Adapter()
    model.lora_B.rank_dim = 1
    groups = [
        {"params": [model.lora_A], "rank_dim": 0, "active": (1, 2), "lr": 1e-2},
        {"params": [model.lora_B], "active": (1, 2)},
        {"params": [model.bias]},
    ]
    before = copy.deepcopy(model)
    optimizer = LowRankAdamW(groups, lr_ratio=1.0)
    grads(model, 0)
    optimizer.step()
    assert (model.lora_A != before.lora_A).any(1).tolist() == [False, True, False, False]
    assert (model.lora_B != before.lora_B).any(0).tolist() == [False, True, False, False]
    assert (model.bias != before.bias).all()


@kernels
@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_loaded_optimizer_goes_on_where_it_stopped(backend, device, through_a_file):
    """Moments beside bfloat16 stay float32, which torch's own loading would round."""
    model = Adapter(dtype=torch.bfloat16).to(device)
    optimizer = LowRankAdamW(model.named_parameters(), lr=1e-2, lr_ratio=4.0)
    model.lora_A.active_rows = model.lora_B.active_rows = (1, 3)

    def train(model, optimizer, steps):
        for step in steps:
            grads(model, step)
            with trifuse.backend(backend):
                optimizer.step()

    train(model, optimizer, range(3))
    again = copy.deepcopy(model)
    again.lora_A.active_rows = again.lora_B.active_rows = (1, 3)
    loaded = LowRankAdamW(again.named_parameters())
    state = optimizer.state_dict()
    if through_a_file:
        torch.save(state, file := io.BytesIO())
        file.seek(0)
        state = torch.load(file, weights_only=True)
    loaded.load_state_dict(state)
    assert loaded.param_groups[0]["lr_ratio"] == 4.0
    assert loaded.state[again.lora_A]["exp_avg"].dtype == torch.float32
    assert loaded.state[again.lora_A]["exp_avg"] is not optimizer.state[model.lora_A]["exp_avg"]
    train(model, optimizer, range(3, 6))
    train(again, loaded, range(3, 6))
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
        for name, value in optimizer.state[one].items():
            assert torch.equal(value, loaded.state[other][name]), name


def test_a_schedule_and_a_closure_work_as_with_torchs_optimizers():
    model, x = Adapter(), torch.randn(8, 20)
    optimizer = LowRankAdamW(model.named_parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 5e-3


def test_parameters_without_a_gradient_rest():
    model = Adapter()
    before = model.lora_A.detach().clone()
    optimizer = LowRankAdamW(model.named_parameters())
    grads(model, 0)
    model.lora_A.grad = None
    optimizer.step()
    assert torch.equal(model.lora_A, before) and model.lora_A not in optimizer.state


def test_dylora_announces_its_ranks():
    """The module's frozen mode and the optimizer together: one row and one column move."""
    torch.manual_seed(0)
    layer = trifuse.nn.DyLoRALinear(10, 6, rank=4, frozen=True)
    nn.init.normal_(layer.lora_B)
    optimizer = LowRankAdamW(layer.named_parameters(), lr=1e-2, weight_decay=0.3)
    for b in (3, 1, 4, 3):
        layer.set_rank(b)
        before = copy.deepcopy(layer.state_dict())
        optimizer.zero_grad()
        layer(torch.randn(5, 10)).square().sum().backward()
        optimizer.step()
        rows = (layer.lora_A != before["lora_A"]).any(1)
        columns = (layer.lora_B != before["lora_B"]).any(0)
        assert rows.tolist() == columns.tolist() == [i == b - 1 for i in range(4)]
    assert torch.equal(layer.weight, before["weight"])


def test_graphs_that_kept_a_parameter_are_told():
    model = Adapter()
    optimizer = LowRankAdamW(model.named_parameters())
    loss = (model.lora_A * model.lora_A).sum()
    grads(model, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter(torch.zeros(*shape, dtype=dtype))


def with_rows(rows):
    made = parameter(4, 6)
    made.active_rows = rows
    return made


BAD = [
    (lambda: LowRankAdamW([parameter(3)], lr=-1.0), ValueError, "lr is -1.0; it must be at least 0 and finite"),
    (lambda: LowRankAdamW([parameter(3)], lr="1"), TypeError, "lr is str; it must be a number"),
    (lambda: LowRankAdamW([parameter(3)], eps=float("inf")), ValueError, "eps is inf; it must be at least 0"),
    (lambda: LowRankAdamW([parameter(3)], weight_decay=-0.1), ValueError, "weight_decay is -0.1; it must be at"),
    (lambda: LowRankAdamW([parameter(3)], betas=(0.9, 1.0)), ValueError, "betas is (0.9, 1.0); each must be in [0, 1)"),
    (lambda: LowRankAdamW([parameter(3)], betas=0.9), TypeError, "betas is 0.9; it must be two numbers"),
    (lambda: LowRankAdamW([parameter(3, 4)], lr_ratio=2.0), ValueError,
     "lr_ratio is 2.0 and no parameter is known to be an adapter's A or B; pass model.named_parameters()"),
    (lambda: LowRankAdamW([{"params": [parameter(3, 4)], "rank_dim": 2}]), ValueError,
     "rank_dim is 2; for parameter 0 of shape (3, 4) it must be 0 to 1"),
    (lambda: LowRankAdamW([{"params": [parameter(3, 4)], "rank_dim": 0.5}]), TypeError, "rank_dim is float; it must"),
    (lambda: LowRankAdamW([parameter(3, dtype=torch.cfloat)]), TypeError, "parameter 0 is torch.complex64; it must be"),
    (lambda: stepped([with_rows((0, 2))]), ValueError, "parameter 0 has active rows (0, 2) and is not known to be"),
    (lambda: stepped([("lora_A", with_rows((0, 5)))]), ValueError,
     "active rows of 'lora_A' are (0, 5); they must lie in its 4 ranks"),
    (lambda: stepped([("lora_A", with_rows(3))]), TypeError, "active rows of 'lora_A' are 3; they must be (first"),
]  # fmt: skip


def stepped(params):
    optimizer = LowRankAdamW(params)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[case[2][:45] for case in BAD])
def test_bad_options_are_named(call, kind, message):
    with pytest.raises(kind, match="^LowRankAdamW: " + re.escape(message)):
        call()


def test_a_group_that_is_refused_is_not_added():
    optimizer = LowRankAdamW([parameter(3, 4)])
    with pytest.raises(ValueError, match="rank_dim is 7"):
        optimizer.add_param_group({"params": [parameter(3, 4)], "rank_dim": 7})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="LowRankAdamW: 'weight' has a sparse gradient; it must be dense"):
        LowRankAdamW(embedding.named_parameters()).step()


def test_parameters_that_lie_loosely_take_the_reference():
    model = nn.Linear(6, 4, bias=False)
    model.weight = nn.Parameter(torch.randn(6, 4).t())
    other = torch.optim.AdamW(copy.deepcopy(model).parameters())
    optimizer = LowRankAdamW([{"params": [model.weight], "rank_dim": 0}])
    for made in (optimizer, other):
        made.param_groups[0]["params"][0].grad = torch.ones(4, 6)
        made.step()
    torch.testing.assert_close(model.weight, other.param_groups[0]["params"][0])

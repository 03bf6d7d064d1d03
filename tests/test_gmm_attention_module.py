"""nn.MonotonicGMMAttention: the paper's equations, one step after another or all at once; it learns to read."""

import math

import pytest
import torch
import torch.nn.functional as F
from backends_here import cpp_only
from torch import nn

import trifuse
from trifuse.nn import MonotonicGMMAttention

BATCH, LENGTH, WIDTH, QUERY, STEPS = 2, 30, 6, 4, 7


def make(dtype=torch.float64, **options):
    torch.manual_seed(0)
    module = MonotonicGMMAttention(QUERY, dtype=dtype, hidden_dim=8, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    queries = torch.randn(BATCH, STEPS, QUERY, generator=g, dtype=torch.float64).to(dtype)
    return queries, torch.randn(BATCH, LENGTH, WIDTH, generator=g, dtype=torch.float64).to(dtype)


def run_steps(module, queries, values, state=None, **options):
    steps = []
    for query in queries.unbind(1):
        steps.append(module.step(query, values, state, return_alignment=True, **options))
        state = steps[-1][1]
    contexts, states, alignments = (torch.stack(part, 1) for part in zip(*steps, strict=True))
    return contexts, states, alignments


def test_a_step_is_the_papers_equations():
    module, (queries, values) = make(), inputs()
    state = 5 * torch.rand(BATCH, 5, dtype=torch.float64)
    context, after, alignment = module.step(queries[:, 0], values, state, return_alignment=True)
    raw = torch.tanh(queries[:, 0] @ module.hidden.weight.T + module.hidden.bias) @ module.mixture.weight.T
    weight, delta, width = (raw + module.mixture.bias).split(5, 1)
    weight, mean, sigma = weight.softmax(1), state + (1 + delta.exp()).log(), (1 + width.exp()).log() + 1e-5
    normal = torch.distributions.Normal(mean, sigma)
    density = torch.stack([normal.log_prob(torch.tensor(float(j))).exp() for j in range(LENGTH)], 1)
    expected = (weight[:, None] * density).sum(2)
    torch.testing.assert_close(after, mean)
    torch.testing.assert_close(alignment, expected)
    torch.testing.assert_close(context, torch.einsum("bt,bte->be", expected, values))


def test_the_first_step_moves_and_reaches_as_asked():
    for step, width in ((1.0, 10.0), (0.25, 3.0)):
        module = MonotonicGMMAttention(QUERY, initial_step=step, initial_width=width, dtype=torch.float64)
        nn.init.zeros_(module.mixture.weight)
        values = torch.eye(LENGTH, dtype=torch.float64)[None]
        context, state = module.step(torch.randn(1, QUERY, dtype=torch.float64), values)
        torch.testing.assert_close(state, torch.full((1, 5), step, dtype=torch.float64))
        expected = torch.exp(-0.5 * ((torch.arange(LENGTH) - step) / width) ** 2) / (width * math.sqrt(2 * math.pi))
        torch.testing.assert_close(context[0], expected.double(), rtol=1e-5, atol=1e-7)  # eps widens it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_all_at_once_is_one_after_another(dtype, masked, resumed):
    module, (queries, values) = make(dtype, initial_width=2.0), inputs(dtype)
    padding = torch.arange(LENGTH).expand(BATCH, -1) >= torch.tensor([[LENGTH], [6]]) if masked else None
    if masked:
        values[padding] = float("nan")  # never read
    state = torch.rand(BATCH, 5, dtype=dtype).requires_grad_() if resumed else None
    contexts, states, alignments = run_steps(module, queries, values, state, key_padding_mask=padding)
    found = module(queries, values, state, key_padding_mask=padding, return_alignment=True)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    for got, wanted in zip(found, (contexts, states[:, -1], alignments), strict=True):
        torch.testing.assert_close(got, wanted, **tolerance)
    assert all(torch.equal(x, y) for x, y in zip(module(queries, values, state, key_padding_mask=padding), found[:2],
                                                 strict=True))  # fmt: skip
    wanted = [*module.parameters(), *([state] if resumed else [])]
    gradients = [
        torch.autograd.grad(out.square().sum() + last.sum(), wanted)
        for out, last in ((found[0], found[1]), (contexts, states[:, -1]))
    ]
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


def test_pieces_of_queries_give_what_the_whole_gives():
    module, (queries, values) = make(), inputs()
    whole, last = module(queries, values)
    first, state = module(queries[:, :3], values)
    nothing, same = module(queries[:, :0], values, state)
    second, state = module(queries[:, 3:], values, state)
    assert nothing.shape == (BATCH, 0, WIDTH) and torch.equal(same, module(queries[:, :3], values)[1])
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(state, last)


def test_means_never_move_back():
    module, (queries, values) = make(torch.float32), inputs(torch.float32)
    with torch.no_grad():
        module.mixture.weight.mul_(20)  # from almost no position to many
    _, states, _ = run_steps(module, queries, values)
    moves = states.diff(dim=1)
    assert (moves >= 0).all() and moves.max() > 10 and moves.min() < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_place(dtype):
    """Means beyond 256 are no whole numbers in bfloat16; the state is float32."""
    module = MonotonicGMMAttention(QUERY, dtype=dtype)
    state, query, values = None, torch.randn(1, QUERY, dtype=dtype), torch.randn(1, 700, WIDTH, dtype=dtype)
    with torch.no_grad():
        moves = [(state := module.step(query, values, state)[1]).clone() for _ in range(600)]
    assert state.dtype == torch.float32 and module.step(query, values)[0].dtype == dtype
    moves = torch.stack(moves).diff(dim=0)
    torch.testing.assert_close(moves, moves[:1].expand_as(moves), rtol=2e-3, atol=0)


def test_autocast_keeps_the_mixture_in_float32():
    module, (queries, values) = make(torch.float32), inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context, state, alignment = module(queries, values, return_alignment=True)
        one, after = module.step(queries[:, 0], values)
    assert {x.dtype for x in (context, state, alignment, one, after)} == {torch.float32}
    torch.testing.assert_close(context, module(queries, values)[0], rtol=0.1, atol=0.02)


def test_it_learns_to_read_at_its_own_pace():
    """Say which of eight symbols stands where, two steps to each position: the alignment is a diagonal."""
    torch.manual_seed(0)
    length, steps, symbols = 10, 20, 8
    module = MonotonicGMMAttention(QUERY, num_mixtures=2, hidden_dim=16, initial_width=1.5)
    embedding, out = nn.Embedding(symbols, 16), nn.Linear(16, symbols)
    parameters = [*module.parameters(), *embedding.parameters(), *out.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    queries = torch.ones(16, steps, QUERY)
    losses = []
    for _ in range(150):
        text = torch.randint(symbols, (16, length))
        contexts, _ = module(queries, embedding(text))
        loss = F.cross_entropy(out(contexts).flatten(0, 1), text.repeat_interleave(2, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2 and sum(losses[-10:]) / 10 < 0.7  # of log 8 = 2.08
    _, _, alignment = module(queries, embedding(text), return_alignment=True)
    assert (alignment.argmax(2) - torch.arange(steps) / 2).abs().max() <= 1


@cpp_only
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_once_for_every_shape(whole):
    module = make(torch.float32)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(module if whole else module.step, fullgraph=True, dynamic=True, backend=count)
    for batch, length, steps in ((2, 30, 7), (3, 41, 9), (8, 200, 5)):
        shape = (batch, steps, QUERY) if whole else (batch, QUERY)
        queries, values, state = torch.randn(shape), torch.randn(batch, length, WIDTH), torch.rand(batch, 5)
        wanted = (module if whole else module.step)(queries, values, state)
        for got, want in zip(compiled(queries, values, state), wanted, strict=True):
            torch.testing.assert_close(got, want)
    assert len(graphs) == 1


def test_a_checkpoint_of_it_has_four_tensors():
    module = make()
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == {
        "hidden.weight": (8, QUERY), "hidden.bias": (8,), "mixture.weight": (15, 8), "mixture.bias": (15,),
    }  # fmt: skip
    other = MonotonicGMMAttention(QUERY, hidden_dim=8, dtype=torch.float64)
    other.load_state_dict(module.state_dict())
    queries, values = inputs()
    assert torch.equal(other(queries, values)[0], module(queries, values)[0])
    assert repr(module) == repr(other) and "num_mixtures=5" in repr(module)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "query_dim is 4.0; it must be an int", {"query_dim": 4.0}),
        (ValueError, "num_mixtures is 0; it must be at least 1", {"num_mixtures": 0}),
        (ValueError, "initial_step is 0.0; it must be above 0", {"initial_step": 0.0}),
        (ValueError, "initial_width is -1.0; it must be above 0", {"initial_width": -1.0}),
        (ValueError, "eps is nan; it must be above 0", {"eps": math.nan}),
        (TypeError, "initial_width is str; it must be a number", {"initial_width": "10"}),
    ],
)
def test_bad_constructor_arguments_are_named(error, message, options):
    with pytest.raises(error, match=f"^MonotonicGMMAttention: {message}"):
        MonotonicGMMAttention(**{"query_dim": QUERY} | options)


def test_bad_inputs_are_named():
    module, (queries, values) = make(), inputs()
    name = "^MonotonicGMMAttention: "
    with pytest.raises(ValueError, match=name + r"query has shape \(2, 7, 4\); it must be \(B, query_dim\) with que"):
        module.step(queries, values)
    with pytest.raises(ValueError, match=name + r"queries has shape \(2, 4\); it must be \(B, S, query_dim\)"):
        module(queries[:, 0], values)
    with pytest.raises(ValueError, match=name + r"values has shape \(1, 30, 6\); it must be \(B, T, E\) with B = 2"):
        module(queries, values[:1])
    with pytest.raises(TypeError, match=name + "values is NoneType; it must be a torch.Tensor"):
        module(queries, None)
    mask, length = torch.zeros(2, 9, dtype=torch.bool), values.shape[1]
    for attend, one in ((module.step, queries[:, 0]), (module, queries)):
        with pytest.raises(ValueError, match=name + r"state has shape \(2, 4\); it must be \(B, K\) = \(2, "):
            attend(one, values, torch.zeros(2, 4, dtype=torch.float64))
        with pytest.raises(ValueError, match=name + rf"key_padding_mask has shape \(2, 9\); .* = \(2, {length}\)"):
            attend(one, values, key_padding_mask=mask)
        with pytest.raises(TypeError, match=name + "key_padding_mask is float32; it must be bool"):
            attend(one, values, key_padding_mask=mask.float())
        with pytest.raises(TypeError, match=name + "key_padding_mask is list; it must be a torch.Tensor or None"):
            attend(one, values, key_padding_mask=[True])


def test_every_backend_gives_the_same():
    module, (queries, values) = make(), inputs()
    with trifuse.backend("reference"):
        wanted = module(queries, values)
    for got, want in zip(module(queries, values), wanted, strict=True):
        torch.testing.assert_close(got, want)

"""LRU, RGLRU, MinGRU and QLSTM: equal to their definitions step by step, and with the ways of torch.nn.GRU."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import trifuse
from trifuse.nn import LRU, QLSTM, RGLRU, MinGRU

MODULES = [LRU, RGLRU, MinGRU, QLSTM]
modules = pytest.mark.parametrize("module", MODULES, ids=lambda one: one.__name__)
IN, HIDDEN, BATCH, STEPS = 3, 5, 4, 9


def make(module, *args, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    made = module(*(args or (IN, HIDDEN)), dtype=dtype, **options)
    with torch.no_grad():
        for parameter in made.parameters():  # zeros would hide a bias that is never added
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def states(module, *shape, dtype=torch.float64):
    real = torch.randn(shape, dtype=dtype)
    return torch.complex(real, torch.randn(shape, dtype=dtype)) if module is LRU else real


def affine(linear, x):
    y = x @ linear.weight.T
    return y if linear.bias is None else y + linear.bias


def step(cell, x, h):
    """One step by the papers' equations: (output, state)."""
    match type(cell).__name__:
        case "MinGRUCell":
            z = affine(cell.linear_z, x).sigmoid()
            h = (1 - z) * h + z * affine(cell.linear_h, x)
            return h, h
        case "QLSTMCell":
            f, i, o = ((affine(gate, x)).sigmoid() for gate in (_shifted(cell.linear_f), cell.linear_i, cell.linear_o))
            h = f * h + i * affine(cell.linear_z, x).tanh()
            return o * h.tanh(), h
        case "RGLRUCell":
            u = affine(cell.linear_in, x)
            r, i = affine(cell.linear_r, u).sigmoid(), affine(cell.linear_i, u).sigmoid()
            a = cell.Lambda.sigmoid() ** (8 * r)
            h = a * h + (1 - a**2).sqrt() * i * u
            return h, h
        case "LRUCell":
            lam = torch.exp(torch.complex(-cell.nu_log.exp(), cell.theta_log.exp()))
            B = torch.complex(cell.linear_B.weight[::2], cell.linear_B.weight[1::2])
            C = torch.complex(cell.linear_C.weight[:, ::2], -cell.linear_C.weight[:, 1::2])
            h = lam * h + cell.gamma_log.exp() * (x.to(B.dtype) @ B.T)
            bias = 0 if cell.linear_C.bias is None else cell.linear_C.bias
            return (h @ C.T).real + bias + x @ cell.linear_D.weight.T, h


def _shifted(linear):
    shifted = copy.copy(linear)
    shifted._parameters = dict(linear._parameters)
    bias = 0 if linear.bias is None else linear.bias
    shifted._parameters["bias"] = bias + torch.ones(HIDDEN, dtype=linear.weight.dtype)
    return shifted


def run_steps(net, x, h_0):
    """(B, T, input) through all layers and directions, one step after another; inference only."""
    finals, directions = [], 2 if net.bidirectional else 1
    for layer in range(net.num_layers):
        outs = []
        for direction in range(directions):
            index = layer * directions + direction
            h, ys = h_0[index], []
            for t in reversed(range(x.shape[1])) if direction else range(x.shape[1]):
                y, h = step(net.cells[index], x[:, t], h)
                ys.append(y)
            outs.append(torch.stack(ys[::-1] if direction else ys, dim=1))
            finals.append(h)
        x = torch.cat(outs, dim=-1)
    return x, torch.stack(finals)


@modules
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_equals_its_equations_step_by_step(module, bidirectional, bias):
    net = make(module, num_layers=2, bias=bias, batch_first=True, bidirectional=bidirectional)
    x, h_0 = torch.randn(BATCH, STEPS, IN, dtype=torch.float64), states(module, len(net.cells), BATCH, HIDDEN)
    output, h_n = net(x, h_0)
    expected, expected_h = run_steps(net, x, h_0)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(h_n, expected_h, rtol=1e-11, atol=1e-12)
    found = torch.autograd.grad(output.square().sum(), list(net.parameters()))
    wanted = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@modules
@pytest.mark.parametrize("batch_first", [False, True])
def test_shapes_are_those_of_a_gru(module, batch_first):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    gru, net = nn.GRU(IN, HIDDEN, **options), module(IN, HIDDEN, **options)
    for shape in ((BATCH, STEPS, IN), (STEPS, IN), (1, 1, IN)):
        x = torch.randn(shape)
        for wanted, found in zip(gru(x), net(x), strict=True):
            assert wanted.shape == found.shape
    x = torch.randn(BATCH, STEPS, IN)
    one, batched = net(x[0])[0], net(x[:1] if batch_first else x[0].unsqueeze(1))[0]
    torch.testing.assert_close(one, batched.squeeze(0 if batch_first else 1))
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    assert all(getattr(net, name) == getattr(gru, name) for name in names)


@modules
def test_time_may_come_first(module):
    net = make(module, num_layers=2)
    first = copy.deepcopy(net)
    first.batch_first = True
    x, h_0 = torch.randn(STEPS, BATCH, IN, dtype=torch.float64), states(module, 2, BATCH, HIDDEN)
    (output, h_n), (wanted, wanted_h) = net(x, h_0), first(x.transpose(0, 1), h_0)
    torch.testing.assert_close(output, wanted.transpose(0, 1))
    torch.testing.assert_close(h_n, wanted_h)


@modules
def test_pieces_continue_through_h_n(module):
    net = make(module, num_layers=3, batch_first=True)
    x = torch.randn(BATCH, 30, IN, dtype=torch.float64)
    whole, last = net(x)
    h, outs = None, []
    for piece in x.split([1, 2, 17, 10], dim=1):
        out, h = net(piece, h)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole)
    torch.testing.assert_close(h, last)


@modules
def test_backward_direction_is_the_flipped_forward_one(module):
    both = make(module, batch_first=True, bidirectional=True)
    one = make(module, batch_first=True)
    one.cells[0].load_state_dict(both.cells[1].state_dict())
    x, h_0 = torch.randn(BATCH, STEPS, IN, dtype=torch.float64), states(module, 2, BATCH, HIDDEN)
    output, h_n = both(x, h_0)
    flipped, last = one(x.flip(1), h_0[1:])
    torch.testing.assert_close(output[..., HIDDEN:], flipped.flip(1))
    torch.testing.assert_close(h_n[1:], last)


@modules
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences_equal_each_sequence_alone(module, enforce_sorted):
    net = make(module, num_layers=2, bidirectional=True, batch_first=True)
    lengths = [9, 6, 6, 1] if enforce_sorted else [6, 1, 9, 6]
    x, h_0 = torch.randn(BATCH, STEPS, IN, dtype=torch.float64), states(module, 4, BATCH, HIDDEN)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce_sorted)
    output, h_n = net(packed, h_0)
    padded, found = pad_packed_sequence(output, batch_first=True)
    assert found.tolist() == lengths
    for i, length in enumerate(lengths):
        alone, last = net(x[i : i + 1, :length], h_0[:, i : i + 1])
        torch.testing.assert_close(padded[i : i + 1, :length], alone)
        torch.testing.assert_close(h_n[:, i : i + 1], last)


@modules
def test_gradcheck(module):
    net = make(module, 2, 3, num_layers=2, bidirectional=True)
    x, h_0 = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True), states(module, 4, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(net, (x, h_0), fast_mode=True)
    names, values = zip(*net.named_parameters(), strict=True)

    def call(*parameters):
        return torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), (x.detach(),))

    assert torch.autograd.gradcheck(call, values, fast_mode=True)


@modules
def test_state_dict_round_trip(module):
    net, other = make(module, num_layers=2, bidirectional=True), make(module, num_layers=2, bidirectional=True, seed=1)
    file, x = io.BytesIO(), torch.randn(STEPS, BATCH, IN, dtype=torch.float64)
    torch.save(net.state_dict(), file)
    file.seek(0)
    assert not torch.equal(other(x)[0], net(x)[0])
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x)[0], net(x)[0])
    assert not any(value.is_complex() for value in net.state_dict().values())  # survives .half() and .to(dtype)


@modules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_states_in_float32(module, dtype):
    exact = make(module, num_layers=2)
    net = copy.deepcopy(exact).to(dtype)
    x = torch.randn(STEPS, BATCH, IN).to(dtype)
    output, h_n = net(x)
    assert output.dtype == dtype and h_n.dtype == (torch.complex64 if module is LRU else torch.float32)
    exact.load_state_dict(net.state_dict())
    wanted, wanted_h = exact(x.double())
    eps = torch.finfo(dtype).eps
    assert (output.double() - wanted).abs().max() <= 20 * eps * wanted.abs().max()
    assert (h_n - wanted_h).abs().max() <= 20 * eps * wanted_h.abs().max()
    net(x, h_n)[0].sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in net.parameters())


@modules
def test_autocast(module):
    net = module(IN, HIDDEN)
    x = torch.randn(STEPS, BATCH, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, h_n = net(x)
    wanted, wanted_h = net(x)
    assert h_n.dtype == wanted_h.dtype
    assert (output.float() - wanted).abs().max() <= 0.1 * wanted.abs().max()


@modules
def test_compiles_into_one_graph(module):
    torch._dynamo.reset()
    net = make(module, bidirectional=True, dtype=torch.float32)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x, h_0 = torch.randn(STEPS, BATCH, IN), states(module, 2, BATCH, HIDDEN, dtype=torch.float32)
    results = []
    for call in (compiled, net):
        output, h_n = call(x, h_0)
        loss = output.square().sum() + h_n.abs().square().sum()
        results.append((output, h_n, *torch.autograd.grad(loss, list(net.parameters()))))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_dropout_acts_between_layers_in_training_only():
    net = make(MinGRU, num_layers=2, dropout=0.5)
    x = torch.randn(STEPS, BATCH, IN, dtype=torch.float64)
    assert not torch.equal(net(x)[0], net(x)[0])
    net.eval()
    assert torch.equal(net(x)[0], net(x)[0])
    with pytest.warns(UserWarning, match="dropout is 0.5 and num_layers 1; it acts between layers"):
        MinGRU(IN, HIDDEN, dropout=0.5)


def test_lru_starts_on_its_ring():
    cell = LRU(IN, 200, r_min=0.4, r_max=0.8, max_phase=1.0).cells[0]
    size, phase = torch.exp(-torch.exp(cell.nu_log)), torch.exp(cell.theta_log)
    assert 0.4 - 1e-5 <= size.min() < 0.5 and 0.75 < size.max() <= 0.8 + 1e-5
    assert 0 < phase.min() < 0.1 and 0.9 < phase.max() <= 1 + 1e-5
    torch.testing.assert_close(cell.gamma_log.exp(), (1 - size**2).sqrt())


def test_rglru_starts_in_its_range():
    cell = RGLRU(IN, 200).cells[0]
    a = torch.sigmoid(cell.Lambda) ** 8
    assert 0.9 - 1e-5 <= a.min() < 0.92 and 0.98 < a.max() <= 0.999 + 1e-5


def test_rglru_keeps_finite_gradients_where_a_gate_underflows():
    net = RGLRU(IN, HIDDEN)
    with torch.no_grad():
        net.cells[0].linear_r.bias.fill_(-200)
    net(torch.randn(STEPS, BATCH, IN))[0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


ERRORS = [
    ({"input_size": 0}, ValueError, "input_size is 0; it must be at least 1"),
    ({"hidden_size": 2.0}, TypeError, "hidden_size is 2.0; it must be an int"),
    ({"num_layers": True}, TypeError, "num_layers is True; it must be an int"),
    ({"dropout": 1.5}, ValueError, "dropout is 1.5; it must be a probability between 0 and 1"),
]


@modules
@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS)
def test_bad_constructor_arguments_are_named(module, arguments, error, message):
    with pytest.raises(error, match=f"{module.__name__}: {message}"):
        module(**{"input_size": IN, "hidden_size": HIDDEN} | arguments)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"LRU: r_min is 0\.9 and r_max 0.5; it must be 0 <= r_min <= r_max <= 1"):
        LRU(IN, HIDDEN, r_min=0.9, r_max=0.5)
    with pytest.raises(ValueError, match="LRU: max_phase is 0; it must be positive"):
        LRU(IN, HIDDEN, max_phase=0)
    with pytest.raises(ValueError, match="RGLRU: c is -1; it must be positive"):
        RGLRU(IN, HIDDEN, c=-1)
    with pytest.raises(ValueError, match=r"RGLRU: a_min is 0 and a_max 0\.999; it must be 0 < a_min <= a_max < 1"):
        RGLRU(IN, HIDDEN, a_min=0)


@modules
def test_bad_inputs_are_named(module):
    net, name = module(IN, HIDDEN), module.__name__
    with pytest.raises(TypeError, match=f"{name}: input is list; it must be a torch.Tensor"):
        net([1.0])
    with pytest.raises(ValueError, match=rf"{name}: input has shape \(3,\); it must be \(T, B, input_size\)"):
        net(torch.zeros(3))
    with pytest.raises(ValueError, match=rf"{name}: input has shape \(2, 4, 7\); its last size must be 3"):
        net(torch.zeros(2, 4, 7))
    with pytest.raises(ValueError, match=rf"{name}: h_0 has shape \(1, 2, 5\); it must be .* = \(1, 4, 5\)"):
        net(torch.zeros(9, 4, IN), torch.zeros(1, 2, HIDDEN))
    with pytest.raises(ValueError, match=rf"{name}: h_0 has shape \(1, 1, 5\); it must be .* = \(1, 5\)"):
        net(torch.zeros(9, IN), torch.zeros(1, 1, HIDDEN))
    if module is not LRU:
        with pytest.raises(TypeError, match=f"{name}: h_0 is complex64; it must be real"):
            net(torch.zeros(9, 4, IN), torch.zeros(1, 4, HIDDEN, dtype=torch.complex64))


def test_scans_are_those_of_the_chosen_backend():
    net, x = make(MinGRU), torch.randn(STEPS, BATCH, IN, dtype=torch.float64)
    with trifuse.backend("reference"):
        wanted = net(x)[0]
    torch.testing.assert_close(net(x)[0], wanted)

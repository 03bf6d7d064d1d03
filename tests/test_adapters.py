"""Adapters are never bypassed: LoRA on any projection or convolution of any block, in training and in decode."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trifuse.nn import BidirectionalMamba, InferenceParams, Mamba, Mamba2

RANK = 3
SIZES = {"dtype": torch.float64, "d_state": 4}
BLOCKS = {
    "Mamba": lambda: Mamba(16, layer_idx=0, **SIZES),
    "Mamba2": lambda: Mamba2(16, layer_idx=0, headdim=4, ngroups=2, **SIZES),
    "BidirectionalMamba": lambda: BidirectionalMamba(16, **SIZES),
}
WRAPPED = [
    *(("Mamba", name) for name in ("in_proj", "x_proj", "dt_proj", "out_proj", "conv1d")),
    *(("Mamba2", name) for name in ("in_proj", "out_proj", "conv1d")),
    *(("BidirectionalMamba", name) for name in ("in_proj", "out_proj")),
    *(("BidirectionalMamba", name + suffix) for suffix in ("", "_b") for name in ("x_proj", "dt_proj", "conv1d")),
]
DECODABLE = [(block, name) for block, name in WRAPPED if block != "BidirectionalMamba"]


class LoRALinear(nn.Module):
    """``y = W x + b + s B A x`` with a frozen W; B starts away from zero, so that every gradient can be seen."""

    def __init__(self, base, scale=0.5):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        self.A = nn.Parameter(torch.randn(RANK, base.in_features, dtype=base.weight.dtype))
        self.B = nn.Parameter(torch.randn(base.out_features, RANK, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + self.scale * F.linear(F.linear(x, self.A), self.B)

    def merged(self):
        plain = copy.deepcopy(self.base)
        plain.weight.data += self.scale * self.B.detach() @ self.A.detach()
        return plain


class LoRAConv1d(nn.Module):
    """A depthwise convolution whose taps (D, W) get a low-rank update."""

    def __init__(self, base, scale=0.5):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        channels, _, width = base.weight.shape
        self.A = nn.Parameter(torch.randn(RANK, width, dtype=base.weight.dtype))
        self.B = nn.Parameter(torch.randn(channels, RANK, dtype=base.weight.dtype))

    def update(self):
        return self.scale * (self.B @ self.A).unsqueeze(1)

    def forward(self, x):
        return self.base(x) + F.conv1d(x, self.update(), padding=self.base.padding, groups=self.base.groups)

    def merged(self):
        plain = copy.deepcopy(self.base)
        plain.weight.data += self.update().detach()
        return plain


def make(block):
    torch.manual_seed(0)
    layer = BLOCKS[block]()
    with torch.no_grad():  # the steps start so small that what changes them would hardly be seen
        for name, parameter in layer.named_parameters():
            if name.startswith("dt_"):
                parameter.add_(3)
            if name.startswith("x_proj"):
                parameter.mul_(4)
    return layer


def adapted(block, name):
    """A block, the same block with one of its layers wrapped, and the same with the adapter merged."""
    plain = make(block)
    wrapped, merged = copy.deepcopy(plain).requires_grad_(False), copy.deepcopy(plain)
    base = getattr(wrapped, name)
    adapter = LoRAConv1d(base) if isinstance(base, nn.Conv1d) else LoRALinear(base)
    setattr(wrapped, name, adapter)
    setattr(merged, name, adapter.merged().requires_grad_())
    return plain, wrapped, merged, adapter


def tokens(length=9, batch=2):
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def forward(layer, **options):
    return layer(tokens(), **options)


def padded(layer):
    mask = torch.ones(2, 9)
    mask[0, :4] = mask[1, 7:] = 0
    return layer(tokens(), attention_mask=mask)


def packed(layer):
    return layer(tokens(batch=1), cu_seqlens=torch.tensor([0, 2, 2, 9]))


def step(layer):
    states = [torch.ones_like(state) for state in layer.allocate_inference_cache(2)]
    return torch.cat([layer.step(token, *states)[0] for token in tokens(3).split(1, dim=1)], dim=1)


def pieces(layer):
    cache, outs = InferenceParams(), []
    for piece in tokens().split([5, 1, 3], dim=1):
        outs.append(layer(piece, inference_params=cache))
        cache.seqlen_offset += piece.shape[1]
    return torch.cat(outs, dim=1)


CASES = [(block, name, run) for block, name in WRAPPED for run in (forward, padded, packed)]
CASES += [(block, name, run) for block, name in DECODABLE for run in (step, pieces)]


@pytest.mark.parametrize(("block", "name", "run"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_an_adapter_counts_and_is_trained(block, name, run):
    plain, wrapped, merged, adapter = adapted(block, name)
    before = run(plain).detach()
    out = run(wrapped)
    assert (out - before).abs().max() > 1e-3 * before.abs().max()
    torch.testing.assert_close(out.detach(), run(merged).detach())
    with torch.no_grad():  # decode proper: without gradients the blocks go another way
        torch.testing.assert_close(run(wrapped), out.detach())
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), [adapter.A, adapter.B])
    (wanted,) = torch.autograd.grad((run(merged) * weight).sum(), getattr(merged, name).weight)
    wanted = adapter.scale * wanted.reshape(adapter.B.shape[0], adapter.A.shape[1])
    for one, want in zip(got, (adapter.B.T @ wanted, wanted @ adapter.A.T), strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, want.detach())


@pytest.mark.parametrize(("block", "name"), WRAPPED, ids=str)
def test_an_adapter_learns_what_it_is_shown(block, name):
    """A few steps of an optimizer, with everything but the adapter frozen, come closer to another block's output."""
    _, wrapped, _, adapter = adapted(block, name)
    target = forward(adapted(block, name)[0]).detach()
    optimizer = torch.optim.Adam([adapter.A, adapter.B], lr=0.03)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.mse_loss(forward(wrapped), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer")  # merging it is what PEFT cannot
@pytest.mark.parametrize(("block", "name"), WRAPPED, ids=str)
def test_an_adapter_from_peft_counts_and_is_trained(block, name):
    peft = pytest.importorskip("peft")
    plain = nn.Sequential(make(block))
    conv = name.startswith("conv1d")
    # PEFT gives a grouped convolution a rank that is a multiple of its groups.
    rank = getattr(plain[0], name).groups if conv else RANK
    config = peft.LoraConfig(r=rank, target_modules=[f"0.{name}"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(plain), config).double()
    before, out = forward(plain).detach(), forward(model)
    assert (out - before).abs().max() > 1e-3 * before.abs().max()
    out.square().sum().backward()
    grads = {key: one.grad for key, one in model.named_parameters() if one.requires_grad}
    assert len(grads) == 2 and all("lora_" in key and grad.abs().max() > 0 for key, grad in grads.items())
    runs = [forward] if block == "BidirectionalMamba" else [forward, step, pieces]
    with torch.no_grad():
        own = model.base_model.model[0]
        merged = copy.deepcopy(plain[0])
        setattr(merged, name, effective(getattr(own, name)))
        for run in runs:
            torch.testing.assert_close(run(own), run(merged))


def effective(module):
    """A plain layer that does what PEFT's wrapper does, found by what the wrapper answers to impulses. Its update of a
    depthwise convolution mixes channels, so that this gives a dense one."""
    base = module.base_layer
    if isinstance(base, nn.Linear):
        units = torch.eye(base.in_features, dtype=torch.float64)
        plain = copy.deepcopy(base)
        plain.weight.copy_((module(units) - module(torch.zeros_like(units))).T)
        return plain
    channels, (width,) = base.in_channels, base.kernel_size
    plain = nn.Conv1d(channels, channels, width, padding=base.padding, dtype=torch.float64)
    units = torch.zeros(channels, channels, width, dtype=torch.float64)
    silence = module(units)
    units[..., 0] = torch.eye(channels)
    plain.weight.copy_((module(units) - silence)[..., :width].flip(2).transpose(0, 1))
    plain.bias.copy_(base.bias)
    return plain


def test_hooks_and_replaced_forwards_run():
    for block, name in WRAPPED:
        layer, seen = BLOCKS[block](), []
        expected = forward(layer)
        module = getattr(layer, name)
        handle = module.register_forward_hook(lambda module, args, out, seen=seen: seen.append("hook"))
        torch.testing.assert_close(forward(layer), expected)
        handle.remove()
        original = module.forward
        module.forward = lambda value, seen=seen, original=original: (seen.append("forward"), original(value))[1]
        torch.testing.assert_close(forward(layer), expected)
        assert seen == ["hook", "forward"], (block, name)

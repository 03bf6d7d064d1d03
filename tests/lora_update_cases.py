"""Inputs of lora_update, and what every kernel of it is compared with."""

import torch
from tolerance import compare, error

from trifuse import reference
from trifuse.ops.lora_update import MERGE, prepare_merge
from trifuse.registration import lora_update as kernels

HALF = (torch.bfloat16, torch.float16)


def make(rows=37, columns=70, rank=5, dtype=torch.float32, adapter=None, vector=False, whole=False, seed=0):
    """weight, lora_A, lora_B and scale. `adapter`: the dtype of the factors, by default the accumulation dtype.
    `whole`: whole numbers, whose sums are exact in any order, so that only rounding is left to differ."""
    g = torch.Generator().manual_seed(seed)
    adapter = adapter or torch.promote_types(dtype, torch.float32)

    def draw(*size, of):
        if whole:
            return torch.randint(-8, 9, size, generator=g).to(of)
        return torch.randn(size, generator=g, dtype=torch.float64).to(of)

    weight = draw(rows, columns, of=dtype)
    factors = [draw(rank, columns, of=adapter), draw(rows, rank, of=adapter)]
    acc = torch.promote_types(dtype, torch.float32)
    scale = 0.25 if not vector else 2.0 ** torch.randint(-4, 2, (rank,), generator=g).to(acc)
    return weight, *factors, scale


def exact(weight, lora_A, lora_B, scale, active_rank=None):
    scale = scale.double() if isinstance(scale, torch.Tensor) else scale
    value, sums = reference.lora_update(
        weight.double(), lora_A.double(), lora_B.double(), scale, active_rank=active_rank
    )
    return value, sums[0]


def moved(args, device):
    return [one.to(device) if isinstance(one, torch.Tensor) else one for one in args]


def native(backend):
    """A kernel's update of ``out``, from ``weight`` where one is given; the sums."""

    def update(out, weight, lora_A, lora_B, scale, active_rank, seed):
        rounding = "nearest" if seed is None else "stochastic"
        call = prepare_merge(out, lora_A, lora_B, scale, active_rank=active_rank, rounding=rounding, seed=seed)
        call = call._replace(weight=weight)
        assert not MERGE.refusals[backend](call), MERGE.refusals[backend](call)
        return kernels.update(backend, call)

    return update


def check(update, args, *, active_rank=None, seed=None, device="cpu", apart=False):
    """Compare a kernel's result and sums with the reference; returns the result. `apart`: into a tensor beside the
    weight, which must be left as it was."""
    weight = args[0]
    wanted, square = exact(*args, active_rank=active_rank)
    eager, eager_sums = reference.lora_update(*args, active_rank=active_rank, seed=seed)
    weight, lora_A, lora_B, scale = moved(args, device)
    before = weight.clone()
    out = torch.full_like(weight, float("nan")) if apart else weight
    sums = update(out, before if apart else None, lora_A, lora_B, scale, active_rank, seed)
    assert not apart or torch.equal(weight, before)
    out, sums = out.cpu(), sums.cpu()
    assert out.dtype == args[0].dtype and sums.dtype == torch.float64
    compare({"out": out}, {"out": wanted}, {"out": error(eager, wanted)})
    torch.testing.assert_close(sums[0], square, rtol=1e-5, atol=0)
    if args[0].dtype in HALF and args[0].numel() > 100:
        torch.testing.assert_close(sums[1], eager_sums[1], rtol=0.05, atol=0)
    return out

"""Small calls of every GPU kernel, for compute-sanitizer: awkward lengths, every option, both layouts.

Each call is also compared with the reference, loosely; the tests hold kernels to the tolerance rule.
"""

from __future__ import annotations

import itertools

import torch

import trifuse
from trifuse import backends

SIZES = ((1, 5, 1, 1), (2, 24, 65, 16), (1, 40, 130, 8))  # batch, dim, seqlen, dstate


def scan_arguments(sizes: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[list[torch.Tensor], dict]:
    batch, dim, seqlen, dstate = sizes

    def normal(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(of).requires_grad_()

    sequence = (batch, seqlen, dim) if layout == "bld" else (batch, dim, seqlen)
    coefficient = (batch, seqlen, dstate) if layout == "bld" else (batch, dstate, seqlen)
    A = (-torch.rand(dim, dstate, device="cuda")).requires_grad_()
    tensors = [normal(*sequence, of=dtype), normal(*sequence, of=dtype), A, normal(*coefficient, of=dtype),
               normal(*coefficient, of=dtype), normal(dim), normal(*sequence, of=dtype), normal(dim)]  # fmt: skip
    return tensors, {"initial_state": normal(batch, dim, dstate)}


def check(name: str, backend: str, sizes: tuple[int, ...], dtype: torch.dtype, layout: str, reverse: bool) -> None:
    tensors, options = scan_arguments(sizes, dtype, layout)
    inputs = [*tensors, options["initial_state"]]
    answers = []
    for one in (backend, "reference"):
        with trifuse.backend(one):
            out, last = trifuse.selective_scan(*tensors, True, True, layout=layout, reverse=reverse, **options)
        grads = torch.autograd.grad(out.float().square().sum() + last.square().sum(), inputs)
        answers.append([out.detach(), last.detach(), *grads])
    tolerance = 2e-3 if dtype == torch.float32 else 5e-2
    for got, expected in zip(*answers, strict=True):
        error = (got.float() - expected.float()).abs().max().item()
        bound = tolerance * max(1.0, expected.float().abs().max().item())
        assert error <= bound, f"{name}: error {error} > {bound}"


def check_update(backend: str, dtype: torch.dtype) -> None:
    state = torch.randn(3, 40, 16, device="cuda")
    x, dt, z = (torch.randn(2, 40, device="cuda", dtype=dtype) for _ in range(3))
    B, C = (torch.randn(2, 16, device="cuda", dtype=dtype) for _ in range(2))
    A, D = -torch.rand(40, 16, device="cuda"), torch.randn(40, device="cuda")
    rows = torch.tensor([2, -1], device="cuda")
    answers = []
    for one in (backend, "reference"):
        kept = state.clone()
        with trifuse.backend(one):
            out = trifuse.selective_state_update(kept, x, dt, A, B, C, D, z, D, True, rows)
        answers.append((out, kept))
    for got, expected in zip(*answers, strict=True):
        torch.testing.assert_close(got.float(), expected.float(), atol=5e-2, rtol=5e-2)


SSD_SIZES = ((1, 5, 1, 1, 1), (2, 130, 3, 50, 17), (1, 65, 4, 64, 128))  # batch, length, heads, headdim, dstate


def ssd_arguments(sizes: tuple[int, ...], dtype: torch.dtype, packed: bool) -> tuple[dict, dict]:
    """The differentiable arguments of ssd, and its options: runs of `seq_idx` or packed sequences."""
    batch, seqlen, heads, headdim, dstate = sizes
    batch = 1 if packed else batch

    def normal(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(of).requires_grad_()

    tensors = {
        "x": normal(batch, seqlen, heads, headdim, of=dtype), "dt": normal(batch, seqlen, heads),
        "A": (-torch.rand(heads, device="cuda")).requires_grad_(),
        "B": normal(batch, seqlen, 1, dstate, of=dtype), "C": normal(batch, seqlen, 1, dstate, of=dtype),
        "D": normal(heads), "z": normal(batch, seqlen, heads, headdim, of=dtype), "dt_bias": normal(heads),
        "initial_states": normal(3 if packed else batch, heads, headdim, dstate),
    }  # fmt: skip
    if packed:
        return tensors, {"cu_seqlens": torch.tensor([0, 0, seqlen // 3, seqlen], device="cuda")}
    return tensors, {"seq_idx": torch.arange(seqlen, device="cuda").expand(batch, -1) // 40}


def check_ssd(sizes: tuple[int, ...], dtype: torch.dtype, packed: bool) -> None:
    tensors, options = ssd_arguments(sizes, dtype, packed)
    answers = []
    for one in ("triton", "reference"):
        with trifuse.backend(one):
            out, final = trifuse.ssd(**tensors, **options, dt_softplus=True, return_final_states=True)
        grads = torch.autograd.grad(out.float().square().sum() + final.square().sum(), list(tensors.values()))
        answers.append([out.detach(), final.detach(), *grads])
    tolerance = 2e-3 if dtype == torch.float32 else 5e-2
    for got, expected in zip(*answers, strict=True):
        error = (got.float() - expected.float()).abs().max().item()
        bound = tolerance * max(1.0, expected.float().abs().max().item())
        assert error <= bound, f"ssd {sizes} {dtype} packed={packed}: error {error} > {bound}"


CONV_SIZES = ((1, 5, 1, 2), (2, 24, 65, 4), (3, 70, 600, 4), (1, 130, 300, 8))  # batch, dim, seqlen, width


def conv_arguments(sizes: tuple[int, ...], dtype: torch.dtype, layout: str, packed: bool) -> tuple[dict, dict]:
    """The differentiable arguments of causal_conv1d, and its options: ids with padding, or packed sequences."""
    batch, dim, seqlen, width = sizes
    batch = 1 if packed else batch

    def normal(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(of).requires_grad_()

    tensors = {
        "x": normal(*((batch, seqlen, dim) if layout == "bld" else (batch, dim, seqlen)), of=dtype),
        "weight": normal(dim, width), "bias": normal(dim),
        "initial_states": normal(3 if packed else batch, dim, width - 1, of=dtype),
    }  # fmt: skip
    if packed:
        return tensors, {"cu_seqlens": torch.tensor([0, 0, seqlen // 3, seqlen], device="cuda")}
    return tensors, {"seq_idx": torch.arange(seqlen, device="cuda").expand(batch, -1) // 40 % 5 - 1}


def check_conv(backend: str, sizes: tuple[int, ...], dtype: torch.dtype, layout: str, packed: bool) -> None:
    tensors, options = conv_arguments(sizes, dtype, layout, packed)
    answers = []
    for one in (backend, "reference"):
        with trifuse.backend(one):
            y, final = trifuse.causal_conv1d(
                **tensors, **options, layout=layout, activation="silu", return_final_states=True
            )
        grads = torch.autograd.grad(y.float().square().sum() + final.float().square().sum(), list(tensors.values()))
        answers.append([y.detach(), final.detach(), *grads])
    tolerance = 2e-3 if dtype == torch.float32 else 5e-2
    for got, expected in zip(*answers, strict=True):
        error = (got.float() - expected.float()).abs().max().item()
        bound = tolerance * max(1.0, expected.float().abs().max().item())
        assert error <= bound, f"causal_conv1d {backend} {sizes} {dtype} {layout} packed={packed}: {error} > {bound}"


def check_conv_update(backend: str, dtype: torch.dtype, circular: bool) -> None:
    state, weight, bias = (torch.randn(shape, device="cuda") for shape in ((3, 140, 5), (140, 4), (140,)))
    x = torch.randn(2, 140, 3, device="cuda", dtype=dtype)
    counts, rows = torch.tensor([4, 9], device="cuda") if circular else None, torch.tensor([2, -1], device="cuda")
    answers = []
    for one in (backend, "reference"):
        kept = state.to(dtype, copy=True)
        with trifuse.backend(one):
            y = trifuse.causal_conv1d_update(x, kept, weight, bias, "silu", counts, rows)
        answers.append((y, kept))
    for got, expected in zip(*answers, strict=True):
        torch.testing.assert_close(got.float(), expected.float(), atol=5e-2, rtol=5e-2)


def examine_conv(backend: str) -> int:
    """How many calls of the convolution agree."""
    op = backends.Op.registry["causal_conv1d"]
    reasons = op.refusals[backend](op.prepare(**conv_arguments(CONV_SIZES[0], torch.float32, "bdl", False)[0]))
    if reasons:
        print(f"{backend}: causal_conv1d not examined: {'; '.join(reasons)}")
        return 0
    dtypes, both = (torch.float32, torch.bfloat16), (False, True)
    for case in itertools.product(CONV_SIZES, dtypes, ("bdl", "bld"), both):
        check_conv(backend, *case)
    for case in itertools.product(dtypes, both):
        check_conv_update(backend, *case)
    return len(CONV_SIZES) * 8 + 4


LORA_SIZES = ((1, 5, 7, 1), (3, 130, 33, 4), (70, 64, 300, 9), (200, 257, 65, 70))  # rows, in, out, rank


def lora_arguments(sizes: tuple[int, ...], dtype: torch.dtype, half_adapter: bool = False) -> dict:
    """The differentiable arguments of lora_linear."""
    rows, columns, out, rank = sizes
    adapter = dtype if half_adapter else torch.float32

    def normal(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(of).requires_grad_()

    return {
        "x": normal(rows, columns), "weight": normal(out, columns), "bias": normal(out),
        "lora_A": normal(rank, columns, of=adapter), "lora_B": normal(out, rank, of=adapter),
        "scale": normal(rank, of=torch.float32),
    }  # fmt: skip


def check_lora(backend: str, sizes: tuple[int, ...], dtype: torch.dtype, half_adapter: bool, options: dict) -> None:
    tensors = lora_arguments(sizes, dtype, half_adapter)
    active = max(sizes[3] - 1, 1) if options.get("frozen") else sizes[3]
    answers = []
    for one in (backend, "reference"):
        with trifuse.backend(one):
            y = trifuse.lora_linear(**tensors, active_rank=active, **options)
        answers.append([y.detach(), *torch.autograd.grad(y.float().square().mean(), list(tensors.values()))])
    tolerance = 2e-3 if dtype == torch.float32 else 5e-2
    for got, expected in zip(*answers, strict=True):
        error = (got.float() - expected.float()).abs().max().item()
        bound = tolerance * max(1.0, expected.float().abs().max().item())
        assert error <= bound, f"lora_linear {backend} {sizes} {dtype} {options}: error {error} > {bound}"


def check_lora_multi(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, columns, out, rank = sizes
    base = lora_arguments(sizes, dtype)
    ranks = (rank, 1, rank + 3)
    factors = [lora_arguments((rows, columns, out, one), dtype) for one in ranks]
    A, B = [one["lora_A"] for one in factors], [one["lora_B"] for one in factors]
    index = torch.arange(rows, device="cuda") % 5 - 1
    index[index == 3] = -1
    answers = []
    for one in ("triton", "reference"):
        with trifuse.backend(one):
            y = trifuse.lora_linear_multi(base["x"], base["weight"], base["bias"], A, B, [0.5, 1.0, 2.0], index)
        grads = torch.autograd.grad(y.float().square().mean(), [base["x"], *A, *B], allow_unused=True)
        answers.append([y.detach(), *grads])
    tolerance = 2e-3 if dtype == torch.float32 else 5e-2
    for got, expected in zip(*answers, strict=True):
        if got is not None and expected is not None:
            error = (got.float() - expected.float()).abs().max().item()
            assert error <= tolerance * max(1.0, expected.float().abs().max().item()), (
                f"lora_linear_multi {sizes}: {error}"
            )


def examine_lora(backend: str) -> int:
    """How many calls of the adapters agree."""
    op = backends.Op.registry["lora_linear"]
    reasons = op.refusals[backend](op.prepare(**lora_arguments(LORA_SIZES[0], torch.float32)))
    if reasons:
        print(f"{backend}: lora_linear not examined: {'; '.join(reasons)}")
        return 0
    done = 0
    for sizes, dtype in itertools.product(LORA_SIZES, (torch.float32, torch.bfloat16)):
        for options in ({}, {"frozen": True}, {"dropout": 0.3, "seed": 7}):
            for half_adapter in {False, dtype != torch.float32}:
                check_lora(backend, sizes, dtype, half_adapter, options)
                done += 1
        if backend == "triton":
            check_lora_multi(sizes, dtype)
            done += 1
    return done


def main() -> None:
    torch.manual_seed(0)
    done = 0
    for backend in ("cuda", "triton"):
        op = backends.Op.registry["selective_scan"]
        reasons = op.refusals[backend](op.prepare(*scan_arguments(SIZES[0], torch.float32, "bdl")[0]))
        if reasons:
            print(f"{backend}: not examined: {'; '.join(reasons)}")
            continue
        for sizes, dtype, layout in itertools.product(SIZES, (torch.float32, torch.bfloat16), ("bdl", "bld")):
            reverse = sizes[2] == 130
            check(f"{backend} {sizes} {dtype} {layout}", backend, sizes, dtype, layout, reverse)
            done += 1
        for dtype in (torch.float32, torch.bfloat16):
            check_update(backend, dtype)
            done += 1
    ssd = backends.Op.registry["ssd"]
    reasons = ssd.refusals["triton"](ssd.prepare(**ssd_arguments(SSD_SIZES[0], torch.float32, False)[0]))
    if reasons:
        print(f"triton: ssd not examined: {'; '.join(reasons)}")
    else:
        for sizes, dtype, packed in itertools.product(SSD_SIZES, (torch.float32, torch.bfloat16), (False, True)):
            check_ssd(sizes, dtype, packed)
            done += 1
    done += sum(examine_conv(backend) + examine_lora(backend) for backend in ("cuda", "triton"))
    torch.cuda.synchronize()
    assert done, "no GPU kernel could be examined"
    print(f"{done} small calls agree with the reference")


if __name__ == "__main__":
    main()

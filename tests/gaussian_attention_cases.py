"""Arguments for gaussian_attention, and the comparison every kernel has to pass (tests/tolerance.py)."""

from __future__ import annotations

import torch
from tolerance import compare, error, incoming

import trifuse

DIFFERENTIABLE = ("q", "k", "v", "gamma", "center", "sigma")
KINDS = {"distance": "g", "window": "s", "moved window": "cs", "distance in a window": "gcs"}


def make(batch=2, heads=2, kv_heads=None, queries=37, keys=None, dim=8, value_dim=None, kind="gcs", dtype=torch.float32,
         seed=0, origin=0.0, spread=1.0, per_query=True, sigma=None, cu_seqlens_q=None):  # fmt: skip
    """Arguments of one call, in their dtypes. `kind` names the parameters; `origin` is where q and k lie."""
    g = torch.Generator().manual_seed(seed)
    batch = 1 if cu_seqlens_q is not None else batch
    keys = queries if keys is None else keys
    kv_heads = heads if kv_heads is None else kv_heads
    acc = torch.promote_types(dtype, torch.float32)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(shape, generator=g, dtype=torch.float64)

    made = {
        "q": (origin + spread * normal(batch, heads, queries, dim)).to(dtype),
        "k": (origin + spread * normal(batch, kv_heads, keys, dim)).to(dtype),
        "v": normal(batch, kv_heads, keys, dim if value_dim is None else value_dim).to(dtype),
    }
    shape = (batch, heads, queries) if per_query else (heads,)
    if "g" in kind:
        made["gamma"] = ((0.5 + uniform(heads)) / (dim * spread**2)).to(acc)
    if "c" in kind:
        made["center"] = (max(keys, 1) * uniform(*shape)).to(acc)
    if "s" in kind:
        made["sigma"] = ((1 + 9 * uniform(*shape)) if sigma is None else sigma * (0.5 + uniform(*shape))).to(acc)
    return made


def masks(tensors, seed=0, boolean=True, dtype=None, keep=0.7):
    """An attn_mask with a row that keeps nothing, or numbers to add, some of them -inf; and a key_padding_mask."""
    g = torch.Generator().manual_seed(seed)
    (batch, heads, queries, _), keys = tensors["q"].shape, tensors["k"].shape[2]
    kept = torch.rand((batch, heads, queries, keys), generator=g) < keep
    kept[:, :, queries // 2 : queries // 2 + 1] = False
    padding = torch.arange(keys) >= torch.randint(keys // 2, keys + 1, (batch, 1), generator=g)
    if not boolean:
        added = torch.randn(kept.shape, generator=g).masked_fill(~kept, -torch.inf)
        kept = added.to(tensors["q"].dtype if dtype is None else dtype)
    return {"attn_mask": kept, "key_padding_mask": padding}


def run(backend, tensors, exact=False, grads=True, lse_grad=True, device="cpu", **options):
    """out, lse, which rows are dead, and all gradients, as named results; in double precision if `exact`."""

    def place(tensor):
        return (tensor.double() if exact and tensor.is_floating_point() else tensor).to(device).detach()

    options = {name: place(value) if torch.is_tensor(value) else value for name, value in options.items()}
    args = {name: place(value).requires_grad_(grads) for name, value in tensors.items() if value is not None}
    with trifuse.backend(backend):
        out, lse = trifuse.gaussian_attention(**args, return_lse=True, **options)
    dead = lse.detach() == -torch.inf
    results = {"out": out, "lse": lse.detach().masked_fill(dead, 0), "dead": dead.to(lse.dtype)}
    if grads:
        g = torch.Generator().manual_seed(99)
        outs = [out, lse][: 1 + lse_grad]
        comes = [incoming(one.shape, g).to(one.dtype).to(one.device) for one in outs]
        found = torch.autograd.grad(outs, list(args.values()), comes, allow_unused=True, materialize_grads=True)
        results |= {f"d{name}": grad for name, grad in zip(args, found, strict=True)}
    return {name: result.detach().cpu() for name, result in results.items()}


def eager_errors(tensors, **options):
    """The error of eager PyTorch: the largest of some draws of nearby inputs, since the error of one draw of a
    few numbers, as the gradient of gamma is, is a lottery."""
    g = torch.Generator().manual_seed(7)
    worst: dict[str, float] = {}
    pairs = tensors["q"].numel() * tensors["k"].shape[2]
    for move in (0.0, *(0.02,) * (31 if pairs < 1 << 11 else 7 if pairs < 1 << 20 else 2)):
        near = dict(tensors)
        for name in set(tensors) & set("qkv"):
            noise = move * torch.randn(tensors[name].shape, generator=g, dtype=torch.float64)
            near[name] = (tensors[name].double() + noise).to(tensors[name].dtype)
        exact, eager = run("reference", near, exact=True, **options), run("reference", near, **options)
        worst = {name: max(error(eager[name], exact[name]), worst.get(name, 0.0)) for name in eager}
    # Where the reference's weights underflow it is right by luck: a product of two roundings is allowed.
    return {name: max(value, torch.finfo(eager["lse"].dtype).eps ** 2) for name, value in worst.items()}


def check(backend, tensors, device="cpu", **options):
    """Assert the rule for everything that `backend` returns."""
    exact = run("reference", tensors, exact=True, **options)
    kernel = run(backend, tensors, device=device, **options)
    dtype = tensors["q"].dtype
    assert kernel["out"].dtype == dtype and kernel["lse"].dtype == torch.promote_types(dtype, torch.float32)
    if (
        dtype == torch.float64
    ):  # the reference errs as much, and is the kernel's equal: eager errors are float32's, scaled
        single = {name: value.float() for name, value in tensors.items()}
        finer = 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        least = {name: 5e-14 * value.abs().max().item() if value.numel() else 0.0 for name, value in exact.items()}
        eager = eager_errors(single, **{name: value.float() if torch.is_tensor(value) and value.is_floating_point()
                                        else value for name, value in options.items()})  # fmt: skip
        return compare(kernel, exact, {name: max(finer * value, least[name]) for name, value in eager.items()})
    compare(kernel, exact, eager_errors(tensors, **options))

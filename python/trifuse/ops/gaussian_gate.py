"""``gaussian_gate``: arguments, checks, and the choice of a kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trifuse import reference
from trifuse.backends import Op
from trifuse.ops import _checks as check
from trifuse.ops._slices import Slices, slices_along
from trifuse.reference.gaussian_gate import FEATURE_FLOOR
from trifuse.registration import gaussian_gate as kernels

__all__ = ["gaussian_gate"]

OP = "gaussian_gate"
DEFAULT_EPS = {"feature": 1e-8, "context": 1e-5, "density": 1e-8}
CONTEXT_WIDTH = 2.0


class Call(NamedTuple):
    """A checked call. The parameters are ``(F,)`` ("feature"), ``()`` ("context") or ``(H, K)``, alpha is ``(H,)``, in
    the dtypes they were given in; no axis is negative."""

    x: Tensor
    mean_offset: Tensor | None
    width: Tensor
    alpha: Tensor | None
    mask: Tensor | None
    kind: str
    dim: int
    feature_dim: int
    num_heads: int
    eps: float
    multiply: bool

    @property
    def device_type(self) -> str:
        return self.x.device.type

    def summary(self) -> str:
        heads = f", {self.num_heads} heads, K={self.width.shape[-1]}" if self.kind == "density" else ""
        masked = ", masked" if self.mask is not None else ""
        return (
            f"{self.kind}, x {tuple(self.x.shape)} along axis {self.dim}{heads}{masked}, "
            f"{check.dtype_name(self.x.dtype)}, {self.x.device}"
        )


def gaussian_gate(
    x: Tensor,
    mean_offset: Tensor | None = None,
    width: Tensor | float | None = None,
    *,
    kind: str = "feature",
    dim: int = -1,
    feature_dim: int = -1,
    num_heads: int = 1,
    alpha: Tensor | float | None = None,
    mask: Tensor | None = None,
    eps: float | None = None,
    multiply: bool = True,
) -> Tensor:
    """A gate for every entry of ``x``: a Gaussian of its distance from the mean of its slice along `dim`.

    With mu and v the mean and variance of a slice along `dim`, and v counting `eps`:

    - ``"feature"``: ``exp(-z^2 / (2 width_f))`` with ``z = (x - mu - mean_offset_f) / sqrt(v + 1e-5)``, the parameters
      per index f of `feature_dim`, v biased;
    - ``"context"``: ``exp(-z^2 / (2 width^2))`` with ``z = (x - mu) / sqrt(v)``, v biased. (The code published for it
      computes ``exp(-z^2 c / 2)``: give ``width = c ** -0.5`` for that.)
    - ``"density"``: ``1 + alpha_h * mean_k N(z_k)`` with N the standard normal density and
      ``z_k = (x - mu - mean_offset_hk) / (sqrt(v) width_hk)``, v unbiased.

    Args:
        x: of any shape and strides: float32, float16, bfloat16 or float64. Nothing dense is copied, whatever `dim`.
        mean_offset: ``(F,)`` for "feature", F the size of `feature_dim`; ``(H, K)``, or ``(K,)`` shared by the heads,
            for "density"; None: zero. "context" takes none.
        width: of the shape of `mean_offset`, above 0 for "feature", not 0 for "density"; a number or ``()`` for
            "context", not 0, 2 if None.
        kind: ``"feature"``, ``"context"`` or ``"density"``.
        dim: the axis that statistics are taken along.
        feature_dim: the axis of the parameters of "feature", another than `dim`.
        num_heads: for "density": H consecutive pieces of `dim`, each with its own statistics and parameters; the last
            takes the remainder.
        alpha: for "density": ``(H,)``, or a number or ``()`` for all heads; 1 if None.
        mask: bool, of a shape that broadcasts to that of ``x``; True keeps. An entry that is not kept takes no part in
            the statistics; its gate, output and gradient are 0.
        eps: added to the variance, above 0: 1e-8 for "feature" and "density", 1e-5 for "context", if None.
        multiply: return ``x * gate``; otherwise the gate.

    The parameters are of the dtype of ``x`` or float32 (beside float64: float64 or float32). Statistics and
    exponentials are computed in float32 (float64 for float64), also under autocast. Where fewer than 2 entries take
    part the variance is 0, so v is `eps`. All tensor arguments are differentiable once; for second derivatives use
    ``with trifuse.backend("reference")``. Kept for the backward pass are ``x`` and three numbers per slice. The values
    of widths are checked on CPU tensors only: a look at a device's would wait for it.

    Returns:
        A tensor of the shape, dtype and memory order of ``x``.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
        BackendUnavailable: a backend was forced that cannot serve the call.
        RuntimeError: a second or a forward-mode derivative was asked of a native kernel.

    Source: Ioannides et al., "Gaussian Adaptive Attention Is All You Need", 2024, arXiv 2401.11143 ("feature"); Ruan
    et al., "Gaussian Context Transformer", CVPR 2021 ("context"); Ioannides et al., "Density Adaptive Attention", 2024
    ("density").
    """
    call = prepare(
        x, mean_offset, width, kind=kind, dim=dim, feature_dim=feature_dim, num_heads=num_heads, alpha=alpha,
        mask=mask, eps=eps, multiply=multiply,
    )  # fmt: skip
    name = GATE.choose(call, call.device_type, x.numel())
    if name == "reference":
        return reference.gaussian_gate(**call._asdict())
    slices = slices_along(call.x, call.dim)
    return slices.put_back(kernels.gate(name, call, kernel_arguments(call, slices)))


def kernel_arguments(call: Call, slices: Slices) -> tuple:
    """The arguments of the registered op: ``x`` and the mask as (outer, axis, inner), and the parameters as every kind
    has them: per row an offset and a width for each Gaussian."""
    acc = torch.promote_types(call.x.dtype, torch.float32)
    outer, share, rows, floor = False, 1, call.num_heads, 0.0
    if call.kind == "feature":
        outer, share = slices.place_of(call.feature_dim)
        rows, floor = call.width.shape[0], FEATURE_FLOOR
    gaussians = call.width.shape[-1] if call.kind == "density" else 1
    width = call.width.to(acc).reshape(rows, gaussians).contiguous()
    offset = torch.zeros_like(width)
    if call.mean_offset is not None:
        offset = call.mean_offset.to(acc).reshape(rows, gaussians).contiguous()
    alpha = None
    if call.kind == "density":
        alpha = width.new_ones((rows,)) if call.alpha is None else call.alpha.to(acc).contiguous()
    return (
        slices.take(call.x), offset, width, alpha, None if call.mask is None else slices.take(call.mask),
        call.num_heads, share, outer, call.eps + floor, call.kind == "feature", call.multiply,
    )  # fmt: skip


def prepare(
    x: Tensor,
    mean_offset: Tensor | None = None,
    width: Tensor | float | None = None,
    *,
    kind: str = "feature",
    dim: int = -1,
    feature_dim: int = -1,
    num_heads: int = 1,
    alpha: Tensor | float | None = None,
    mask: Tensor | None = None,
    eps: float | None = None,
    multiply: bool = True,
) -> Call:
    """Check the arguments of ``gaussian_gate`` and bring them to one form, without copying ``x``."""
    if kind not in tuple(DEFAULT_EPS):
        raise ValueError(f'{OP}: kind is {kind!r}; it must be "feature", "context" or "density"')
    check.tensors(OP, x=x)
    check.tensors(OP, optional=True, mean_offset=mean_offset, mask=mask)
    check.dtype(OP, "x", x, check.SEQUENCE_DTYPES)
    dim = check.axis(OP, "dim", dim, x)
    _check_fits_kind(kind, mean_offset, num_heads, alpha)
    if kind == "feature":
        feature_dim = check.axis(OP, "feature_dim", feature_dim, x)
        if feature_dim == dim:
            raise ValueError(f"{OP}: feature_dim and dim are both axis {dim} of x; they must be two axes")
    else:
        feature_dim = dim
    _check_heads(num_heads, x.shape[dim])
    mean_offset, width = _parameters(kind, x, mean_offset, width, x.shape[feature_dim], num_heads)
    if alpha is not None:
        alpha = _tensor("alpha", alpha, x)
        if tuple(alpha.shape) not in ((), (num_heads,)):
            was = tuple(alpha.shape)
            raise ValueError(f"{OP}: alpha has shape {was}; it must be a number, () or (H,) = ({num_heads},)")
        alpha = alpha.expand(num_heads)
    eps = DEFAULT_EPS[kind] if eps is None else check.number(OP, "eps", eps)
    if mask is not None:
        check.mask(OP, mask, x)
    check.same_device(OP, x, mean_offset=mean_offset, width=width, alpha=alpha, mask=mask)
    return Call(x, mean_offset, width, alpha, mask, kind, dim, feature_dim, num_heads, eps, bool(multiply))


def _check_fits_kind(kind: str, mean_offset: Tensor | None, num_heads: int, alpha: Tensor | float | None) -> None:
    if kind == "context" and mean_offset is not None:
        raise ValueError(f'{OP}: mean_offset was given; kind "context" has none')
    if kind != "density" and alpha is not None:
        raise ValueError(f'{OP}: alpha was given; only kind "density" has one, and kind is {kind!r}')
    if kind != "density" and num_heads != 1:
        raise ValueError(f'{OP}: num_heads is {num_heads}; it must be 1, only kind "density" has heads')


def _check_heads(num_heads: int, length: int) -> None:
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"{OP}: num_heads is {type(num_heads).__name__}; it must be an int")
    if num_heads < 1 or (num_heads > length and length > 0):
        raise ValueError(f"{OP}: num_heads is {num_heads}; it must be from 1 to the size of dim, {length}")


def _tensor(name: str, value: Tensor | float, x: Tensor) -> Tensor:
    """A parameter that may also be a number."""
    if isinstance(value, Tensor):
        check.weight_dtype(OP, name, value, x)
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{OP}: {name} is {type(value).__name__}; it must be a torch.Tensor or a number")
    acc = torch.promote_types(x.dtype, torch.float32)
    return torch.full((), float(value), dtype=acc, device=x.device)


def _parameters(
    kind: str, x: Tensor, mean_offset: Tensor | None, width: Tensor | float | None, features: int, num_heads: int
) -> tuple[Tensor | None, Tensor]:
    if kind == "context":
        width = _tensor("width", CONTEXT_WIDTH if width is None else width, x)
        if width.numel() != 1:
            raise ValueError(
                f'{OP}: width has shape {tuple(width.shape)}; for kind "context" it must be a number or ()'
            )
        check.widths(OP, "width", width)
        return None, width.reshape(())
    check.tensors(OP, width=width)
    given = {"width": width} if mean_offset is None else {"mean_offset": mean_offset, "width": width}
    for name, value in given.items():
        check.weight_dtype(OP, name, value, x)
        if kind == "feature":
            check.shape(OP, name, value, (features,), "(F,)")
        elif value.dim() not in (1, 2) or (value.dim() == 2 and value.shape[0] != num_heads) or value.shape[-1] < 1:
            raise ValueError(
                f"{OP}: {name} has shape {tuple(value.shape)}; it must be (H, K) or (K,), with H = {num_heads} and "
                "at least one Gaussian"
            )
    if mean_offset is not None and kind == "density" and mean_offset.shape[-1] != width.shape[-1]:
        raise ValueError(
            f"{OP}: mean_offset has shape {tuple(mean_offset.shape)}; it must have as many Gaussians "
            f"as width, of shape {tuple(width.shape)}"
        )
    check.widths(OP, "width", width, positive=kind == "feature")
    if kind == "density":
        width = width.expand(num_heads, -1)
        mean_offset = None if mean_offset is None else mean_offset.expand(num_heads, -1)
    return mean_offset, width


GATE = Op(OP, prepare, {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")})
GATE.backend("reference", lambda call: [])
kernels.register_backends(GATE)

"""The CUDA kernels as the host compiler built them, on CPU tensors: loading, running, comparing."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

import trifuse
from trifuse import reference
from trifuse.ops.selective_scan import prepare, prepare_update
from trifuse.registration import selective_scan as registration

LIBRARY = Path(trifuse.__file__).parent / "lib" / "libtrifuse_emulated.so"
SEQUENCES = ("u", "delta", "B", "C", "z")
PACKED = [0, 5, 5, 18, 51, 64, 100, 100]

_keep = []


def load() -> ctypes.CDLL:
    """The library with the emulated kernels; its ops are torch.ops.trifuse_emulated."""
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} was not built with this installation", allow_module_level=True)
    if not _keep:
        schemas = torch.library.Library("trifuse_emulated", "DEF")
        schemas.define("selective_scan_fwd" + registration._FWD)
        schemas.define("selective_scan_bwd" + registration._BWD)
        schemas.define("selective_state_update" + registration._UPDATE)
        torch.ops.load_library(str(LIBRARY))
        library = ctypes.CDLL(str(LIBRARY))
        library.trifuse_emulator_set_multiprocessors.argtypes = [ctypes.c_int64]
        library.trifuse_emulator_message.restype = ctypes.c_char_p
        library.trifuse_shared_bytes.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        library.trifuse_shared_bytes.restype = ctypes.c_int64
        for offset, count in ((library.trifuse_sequence_offset, 6), (library.trifuse_coefficient_offset, 8)):
            offset.argtypes, offset.restype = [ctypes.c_int64] * count, ctypes.c_int64
        _keep.extend((schemas, library))
    return _keep[1]


def make(
    batch=2, dim=6, seqlen=37, dstate=16, groups=(1, 1), constant="", layout="bdl", dtype=torch.float32, seed=0,
    skip=True, gate=True, bias=True, initial=True, cu_seqlens=None,
):  # fmt: skip
    """Arguments of one call, in float64 holding values of `dtype`."""
    g = torch.Generator().manual_seed(seed)
    batch = 1 if cu_seqlens is not None else batch

    def rand(*shape, weight=False):
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        return x.to(torch.float32 if weight else dtype).double()

    def sequence(*channels):
        return rand(batch, seqlen, *channels) if layout == "bld" else rand(batch, *channels, seqlen)

    def coef(name, count):
        return rand(dim, dstate, weight=True) if name in constant else sequence(count, dstate)

    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    return {
        "u": sequence(dim),
        "delta": sequence(dim),
        "A": -(0.2 + rand(dim, dstate, weight=True).abs()),
        "B": coef("B", groups[0]),
        "C": coef("C", groups[1]),
        "D": rand(dim, weight=True) if skip else None,
        "z": sequence(dim) if gate else None,
        "delta_bias": rand(dim, weight=True) if bias else None,
        "initial_state": rand(rows, dim, dstate, weight=True) if initial else None,
    }


def cast(tensors, dtype):
    """Sequences in `dtype`, weights and states in at least float32; strides survive."""
    weights = torch.promote_types(dtype, torch.float32)

    def one(name, tensor):
        sequence = name in SEQUENCES and tensor.dim() > 2
        return tensor.to(dtype if sequence else weights)

    return {name: None if tensor is None else one(name, tensor) for name, tensor in tensors.items()}


def output_gradients(out, last):
    g = torch.Generator().manual_seed(99)
    return [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in (out, last)]


def run_reference(tensors, dtype, last_grad=True, **options):
    """out, last_state and all gradients, by the reference in `dtype`."""
    args = {k: None if v is None else v.detach().requires_grad_() for k, v in cast(tensors, dtype).items()}
    with trifuse.backend("reference"):
        out, last = trifuse.selective_scan(**args, return_last_state=True, **options)
    dout, dlast = output_gradients(out, last)
    wanted = {k: v for k, v in args.items() if v is not None}
    outs, grads = ([out, last], [dout, dlast]) if last_grad else ([out], [dout])
    found = torch.autograd.grad(outs, list(wanted.values()), grads, materialize_grads=True)
    return {
        k: v.detach() for k, v in ({"out": out, "last_state": last} | dict(zip(wanted, found, strict=True))).items()
    }


def run_emulated(tensors, dtype, last_grad=True, chunk_size=None, **options):
    """The same by the emulated kernels, in the arguments' own layout."""
    args = cast(tensors, dtype)
    call = prepare(**args, return_last_state=True, **options)
    chunk_size = registration.CHUNK_SIZE["cuda"] if chunk_size is None else chunk_size
    ops = torch.ops.trifuse_emulated
    out, last, chunk_states = ops.selective_scan_fwd(*call, chunk_size)
    public_out = out.transpose(1, 2) if call.bld else out
    dout, dlast = output_gradients(public_out, last)
    dout = dout.transpose(1, 2) if call.bld else dout
    grads = ops.selective_scan_bwd(dout, dlast if last_grad else None, *call[:10], chunk_states, *call[10:], chunk_size)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    found = {"out": public_out, "last_state": last}
    for name, grad in zip(names, grads, strict=True):
        if args[name] is not None:
            found[name] = public(name, grad, args[name], call.bld)
        else:
            assert grad.shape == (0,), name
    return found


def public(name, grad, argument, bld):
    """A gradient in the shape of its argument."""
    if name in ("B", "C") and argument.dim() > 2:
        grad = grad.permute(0, 3, 1, 2) if bld else grad
        return grad.squeeze(2 if bld else 1) if argument.dim() == 3 else grad
    return grad.transpose(1, 2) if bld and name in ("u", "delta", "z") else grad


def compare(kernel, eager, exact):
    """error(kernel) <= 2 error(eager PyTorch in the same dtype) + a few ulp, for everything returned."""
    for name, value in kernel.items():
        assert value.shape == exact[name].shape, name
        assert value.dtype == eager[name].dtype, name
        if value.numel():
            error = (value.double() - exact[name]).abs().max().item()
            allowed = 2 * (eager[name].double() - exact[name]).abs().max().item()
            allowed += 4 * torch.finfo(value.dtype).eps * exact[name].abs().max().item()
            assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check(tensors, dtype=torch.float32, chunk_size=None, **options):
    """Compare with the reference; then in the opposite thread order, whose bits must be the same."""
    library = load()
    exact = run_reference(tensors, torch.float64, **options)
    eager = run_reference(tensors, dtype, **options)
    kernel = run_emulated(tensors, dtype, chunk_size=chunk_size, **options)
    compare(kernel, eager, exact)
    library.trifuse_emulator_set_descending(1)
    try:
        again = run_emulated(tensors, dtype, chunk_size=chunk_size, **options)
    finally:
        library.trifuse_emulator_set_descending(0)
    for name, value in kernel.items():
        assert torch.equal(value, again[name]), f"{name} depends on the order of threads"


def check_update(dtype, state_dtype, batch=3, shape=(70,), dstate=16, groups=None, strided=False, indices=None, seed=0,
                 **options):  # fmt: skip
    """selective_state_update against the reference: output and the state in place."""
    g = torch.Generator().manual_seed(seed)

    def rand(*size, of=dtype):
        return torch.randn(size, generator=g, dtype=torch.float64).to(of)

    rows = batch if indices is None else batch + 3
    state = rand(rows, *shape, dstate, of=state_dtype)
    if strided:
        state = state.transpose(-1, -2).contiguous().transpose(-1, -2)
    coef = (batch, dstate) if groups is None else (batch, groups, dstate)
    args = {
        "x": rand(batch, *shape), "dt": rand(batch, *shape), "A": -rand(*shape, dstate, of=torch.float32).abs(),
        "B": rand(*coef), "C": rand(*coef), "D": rand(*shape, of=torch.float32), "z": rand(batch, *shape),
        "dt_bias": rand(*shape, of=torch.float32), "dt_softplus": True, "state_batch_indices": indices,
    } | options  # fmt: skip

    def doubled(x):
        return x.double() if torch.is_tensor(x) and x.is_floating_point() else x

    exact_state, eager_state, kernel_state = state.double(), state.clone(), state.clone()
    exact = reference.selective_state_update(*prepare_update(exact_state, **{k: doubled(v) for k, v in args.items()}))
    eager = reference.selective_state_update(*prepare_update(eager_state, **args))
    kernel = torch.ops.trifuse_emulated.selective_state_update(*prepare_update(kernel_state, **args))
    compare({"out": kernel, "state": kernel_state}, {"out": eager, "state": eager_state},
            {"out": exact, "state": exact_state})  # fmt: skip

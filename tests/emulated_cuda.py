"""The CUDA kernels as the host compiler built them, on CPU tensors: loading, running, comparing."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import pytest
import scan_cases
import torch
from scan_cases import cast, eager_errors, output_gradients, run
from tolerance import compare, error

import trifuse
from trifuse import reference
from trifuse.ops.selective_scan import prepare
from trifuse.ops.selective_state_update import prepare_update
from trifuse.registration import selective_scan as registration
from trifuse.registration.common import SCHEMAS

LIBRARY = Path(trifuse.__file__).parent / "lib" / "libtrifuse_emulated.so"
PACKED = [0, 5, 5, 18, 51, 64, 100, 100]

_keep = []


def load() -> ctypes.CDLL:
    """The library with the emulated kernels; its ops are torch.ops.trifuse_emulated."""
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} was not built with this installation", allow_module_level=True)
    if not _keep:
        schemas = torch.library.Library("trifuse_emulated", "DEF")
        for name, schema in SCHEMAS.items():
            schemas.define(name + schema)
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


make = functools.partial(scan_cases.make, dim=6)


def run_emulated(tensors, dtype, last_grad=True, chunk_size=None, **options):
    """The same by the emulated kernels, in the arguments' own layout."""
    args = {name: None if tensor is None else cast(name, tensor, dtype) for name, tensor in tensors.items()}
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
            found[f"d{name}"] = public(name, grad, args[name], call.bld)
        else:
            assert grad.shape == (0,), name
    return found


def public(name, grad, argument, bld):
    """A gradient in the shape of its argument."""
    if name in ("B", "C") and argument.dim() > 2:
        grad = grad.permute(0, 3, 1, 2) if bld else grad
        return grad.squeeze(2 if bld else 1) if argument.dim() == 3 else grad
    return grad.transpose(1, 2) if bld and name in ("u", "delta", "z") else grad


def check(tensors, dtype=torch.float32, chunk_size=None, **options):
    """Compare with the reference; then in the opposite thread order, whose bits must be the same."""
    library = load()
    exact = run("reference", tensors, torch.float64, **options)
    kernel = run_emulated(tensors, dtype, chunk_size=chunk_size, **options)
    for name, value in run("reference", tensors, dtype, **options).items():
        assert kernel[name].dtype == value.dtype, name
    compare(kernel, exact, eager_errors(tensors, dtype, **options))
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
    exact, eager = {"out": exact, "state": exact_state}, {"out": eager, "state": eager_state}
    assert (kernel.dtype, kernel_state.dtype) == (dtype, state_dtype)
    compare({"out": kernel, "state": kernel_state}, exact, {name: error(eager[name], exact[name]) for name in exact})

"""What is compiled of the causal convolution's Triton kernels, see triton_configurations.py."""

from functools import partial

import torch


def arguments(
    dtype, batch=8, dim=2048, seqlen=2048, width=4, bld=False, silu=True, bias=True, initial=False, ids=False,
    packed=False,
):  # fmt: skip
    """The tensors and flags of the registered forward op, less return_final."""
    empty = partial(torch.empty, device="meta")
    batch = 1 if packed else batch
    rows = 5 if packed else batch
    x = empty((batch, seqlen, dim), dtype=dtype).transpose(1, 2) if bld else empty((batch, dim, seqlen), dtype=dtype)
    return (
        x, empty((dim, width)), empty(dim) if bias else None,
        empty((rows, dim, width - 1), dtype=dtype) if initial else None,
        empty((batch, seqlen), dtype=torch.int32) if ids else None,
        empty(rows + 1, dtype=torch.int64) if packed else None, silu, bld, False,
    )  # fmt: skip


def forward(kernels, dtype, final=False, **options):
    kernels.causal_conv1d_fwd(*arguments(dtype, **options), final)


def backward(kernels, dtype, final=False, **options):
    args = arguments(dtype, **options)
    x, weight, cu_seqlens = args[0], args[1], args[5]
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dfinal = x.new_empty((rows, x.shape[1], weight.shape[1] - 1)) if final else None
    kernels.causal_conv1d_bwd(torch.empty_like(x), dfinal, *args)


def update(kernels, dtype, circular=False, indices=False, width=4):
    empty = partial(torch.empty, device="meta")
    x, state, weight = empty((8, 2048, 1), dtype=dtype), empty((8, 2048, width), dtype=dtype), empty((2048, width))
    cache = empty(8, dtype=torch.int64) if circular else None
    rows = empty(8, dtype=torch.int64) if indices else None
    kernels.causal_conv1d_update(x, state, weight, empty(2048), True, cache, rows)


class OneByOne:
    """The launchers, each of whose kernels is compiled under a name of its own."""

    def __init__(self, wanted):
        self.wanted = wanted

    def __getattr__(self, launcher):
        from trifuse.triton_kernels import causal_conv1d, causal_conv1d_update, common

        def call(*args):
            compile_one = common.launch

            def only(kernel, grid, *arguments, **meta):
                if kernel.__name__ == self.wanted:
                    compile_one(kernel, grid, *arguments, **meta)

            common.launch = only
            try:
                module = causal_conv1d_update if launcher == "causal_conv1d_update" else causal_conv1d
                return getattr(module, launcher)(*args)
            finally:
                common.launch = compile_one

        return call


def configurations(target):
    """(name, call) of everything compiled for a target: all of it for sm_90, the main ones elsewhere."""
    everything = target == "sm_90"
    fwd, bwd = partial(forward, OneByOne("_fwd_kernel")), partial(backward, OneByOne("_bwd_kernel"))
    step = partial(update, OneByOne("_update_kernel"))
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if everything:
        dtypes["float16"] = torch.float16
    for name, dtype in dtypes.items():
        for layout in ("bdl", "bld"):
            yield f"fwd {name} {layout}", partial(fwd, dtype, bld=layout == "bld")
            yield f"bwd {name} {layout}", partial(bwd, dtype, bld=layout == "bld")
        yield f"update {name}", partial(step, dtype)
    full = {"initial": True, "ids": True, "packed": True, "final": True}
    for layout in ("bdl", "bld"):
        for width in (4, 8) if layout == "bdl" or everything else (4,):
            options = full | {"width": width, "bld": layout == "bld"}
            yield f"fwd bfloat16 {layout} everything, width {width}", partial(fwd, torch.bfloat16, **options)
            yield f"bwd bfloat16 {layout} everything, width {width}", partial(bwd, torch.bfloat16, **options)
    options = full | {"width": 8}
    yield "final bfloat16", partial(forward, OneByOne("_final_kernel"), torch.bfloat16, **options)
    yield "dinitial bfloat16", partial(backward, OneByOne("_dinitial_kernel"), torch.bfloat16, **options)
    yield "runs", partial(forward, OneByOne("_runs_kernel"), torch.bfloat16, **options)
    if everything:
        for width in (2, 3, 5, 6, 7, 8):
            yield f"fwd float32 width {width}", partial(fwd, torch.float32, width=width)
            yield f"bwd float32 width {width}", partial(bwd, torch.float32, width=width)
        for name, variant in {
            "bare, odd length": {"silu": False, "bias": False, "seqlen": 1001, "dim": 1537},
            "ids": {"ids": True, "final": True},
            "states": {"initial": True, "final": True},
            "few": {"batch": 1, "dim": 5, "seqlen": 7},
        }.items():
            yield f"fwd float32 {name}", partial(fwd, torch.float32, **variant)
            yield f"bwd float32 {name}", partial(bwd, torch.float32, **variant)
        yield "update float32 circular, indices, width 8", partial(step, torch.float32, True, True, 8)

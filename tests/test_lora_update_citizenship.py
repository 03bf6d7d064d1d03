"""The torch op of lora_update behaves as torch's own ops do: opcheck, compile, fake tensors."""

import pytest
import torch
from lora_update_cases import make, moved
from torch._subclasses.fake_tensor import FakeTensorMode

from trifuse.ops.lora_update import MERGE, prepare_merge

NATIVE = [("cpu", "cpp"), ("cpu", "triton"), *(pytest.param("cuda", name, marks=pytest.mark.gpu)
                                               for name in ("cuda", "triton"))]  # fmt: skip
OPTIONS = {
    "float32": {},
    "a factor per rank": {"vector": True},
    "bfloat16, stochastic": {"dtype": torch.bfloat16, "seed": 1},
    "float16, transposed, apart": {"dtype": torch.float16, "adapter": torch.float16, "turned": True, "apart": True},
    "float64": {"dtype": torch.float64},
}
native = pytest.mark.parametrize(("device", "backend"), NATIVE)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def op(backend):
    return getattr(torch.ops.trifuse, "lora_update" + ("_triton" if backend == "triton" else "")).default


def served(device, backend, turned=False, apart=False, seed=None, **options):
    """The op's arguments; skips, with the reasons, where the backend cannot serve it on this machine."""
    weight, *adapter = moved(make(rows=7, columns=9, rank=3, **options), device)
    weight = weight.t().contiguous().t() if turned else weight
    call = prepare_merge(weight, *adapter, rounding="nearest" if seed is None else "stochastic", seed=seed)
    call = call._replace(weight=weight.clone()) if apart else call
    if reasons := MERGE.refusals[backend](call):
        pytest.skip(f"{backend} on {device}: " + "; ".join(reasons))
    return call


@every_option
@native
def test_opcheck(device, backend, options):
    call = served(device, backend, **options)
    torch.library.opcheck(op(backend), tuple(call))
    torch.library.opcheck(op(backend), tuple(call._replace(measure=False)))


@native
def test_a_fake_call_has_the_shapes_and_dtypes_of_the_real_one(device, backend):
    call = served(device, backend)
    for measure, size in ((True, 2), (False, 0)):
        real = op(backend)(*call._replace(measure=measure))
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake = [mode.from_tensor(one) if torch.is_tensor(one) else one for one in call._replace(measure=measure)]
            sums = op(backend)(*fake)
        assert sums.shape == real.shape == (size,) and sums.dtype == real.dtype == torch.float64


@native
def test_compile_gives_the_eager_result(device, backend):
    call = served(device, backend, dtype=torch.float16, seed=3)

    def update(out, A, B, p, seed):
        sums = op(backend)(out, None, A, B, call.scale, p, call.active_rank, seed, True)
        return out * 2, sums

    torch._dynamo.reset()
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    found = []
    for function in (compiled, update):
        out = call.out.clone()
        found.append((*function(out, call.lora_A, call.lora_B, call.p, call.seed), out))
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got, wanted)

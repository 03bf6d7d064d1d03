"""``trifuse.integrations``: the stand-ins for other packages, and how they come and go."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys
import textwrap
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import trifuse
from trifuse import integrations
from trifuse.integrations import transformers_hook

# What other people's code imports, with the arguments that it may pass by position.
NAMES = {
    "causal_conv1d.causal_conv1d_fn": "x weight bias seq_idx initial_states return_final_states final_states_out "
    "activation",
    "causal_conv1d.causal_conv1d_update": "x conv_state weight bias activation cache_seqlens conv_state_indices",
    "causal_conv1d.causal_conv1d_interface.causal_conv1d_fn": "x weight bias",
    "causal_conv1d.causal_conv1d_varlen.causal_conv1d_varlen_states": "x cu_seqlens state_len",
    "gaussian_adaptive_attention.GaussianAdaptiveAttention": "norm_axis num_heads num_gaussians padding_value "
    "mean_offset_init eps",
    "gaussian_adaptive_attention.MultiHeadGaussianAdaptiveAttention": "norm_axis num_heads num_gaussians padding_value "
    "eps",
    "gaussian_adaptive_attention.GaussianBlock": "norm_axes num_heads num_gaussians num_layers padding_value eps",
    "gaussian_adaptive_attention.GaussianBlock.GaussianBlock": "norm_axes num_heads",
    "mamba_ssm.Mamba": "d_model d_state d_conv expand dt_rank",
    "mamba_ssm.Mamba2": "d_model d_state d_conv conv_init expand headdim d_ssm ngroups",
    "mamba_ssm.MambaLMHeadModel": "config initializer_cfg device dtype",
    "mamba_ssm.selective_scan_fn": "u delta A B C D z delta_bias delta_softplus return_last_state",
    "mamba_ssm.mamba_inner_fn": "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight "
    "out_proj_bias A B C D delta_bias B_proj_bias C_proj_bias delta_softplus checkpoint_lvl b_rms_weight "
    "c_rms_weight dt_rms_weight b_c_dt_rms_eps",
    "mamba_ssm.ops.selective_scan_interface.selective_scan_ref": "u delta A B C D z delta_bias delta_softplus",
    "mamba_ssm.ops.selective_scan_interface.mamba_inner_ref": "xz conv1d_weight conv1d_bias x_proj_weight",
    "mamba_ssm.ops.triton.selective_state_update.selective_state_update": "state x dt A B C D z dt_bias dt_softplus "
    "state_batch_indices",
    "mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined": "x dt A B C chunk_size D z dt_bias initial_states "
    "seq_idx cu_seqlens dt_softplus dt_limit return_final_states return_varlen_states state_dtype",
    "mamba_ssm.ops.triton.ssd_combined.mamba_split_conv1d_scan_combined": "zxbcdt conv1d_weight conv1d_bias dt_bias A "
    "D chunk_size initial_states seq_idx dt_limit return_final_states activation rmsnorm_weight rmsnorm_eps "
    "outproj_weight outproj_bias headdim ngroups norm_before_gate state_dtype",
    "mamba_ssm.ops.triton.ssd_chunk_state.chunk_state": "B x dt dA_cumsum states_in_fp32",
    "mamba_ssm.ops.triton.ssd_state_passing.state_passing": "states dA_chunk_cumsum initial_states",
    "mamba_ssm.ops.triton.ssd_chunk_scan.chunk_scan": "B C x dt dA_cumsum prev_states D z",
    "mamba_ssm.ops.triton.layernorm_gated.rmsnorm_fn": "x weight bias z eps group_size norm_before_gate",
    "mamba_ssm.ops.triton.layernorm_gated.RMSNorm": "hidden_size eps group_size norm_before_gate device dtype",
    "mamba_ssm.ops.triton.layer_norm.rms_norm_fn": "x weight bias residual x1 weight1 bias1 eps dropout_p rowscale "
    "prenorm residual_in_fp32",
    "mamba_ssm.ops.triton.layer_norm.RMSNorm": "hidden_size eps dropout_p device dtype",
    "mamba_ssm.modules.mamba_simple.Mamba": "d_model d_state d_conv expand dt_rank",
    "mamba_ssm.modules.mamba2.Mamba2": "d_model d_state d_conv conv_init expand headdim",
    "mamba_ssm.modules.mamba2_simple.Mamba2Simple": "d_model d_state d_conv conv_init expand headdim ngroups",
    "mamba_ssm.modules.block.Block": "dim mixer_cls mlp_cls norm_cls fused_add_norm residual_in_fp32",
    "mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel": "config initializer_cfg device dtype",
    "mamba_ssm.models.mixer_seq_simple.MixerModel": "d_model n_layer d_intermediate vocab_size ssm_cfg",
    "mamba_ssm.models.config_mamba.MambaConfig": "d_model d_intermediate n_layer vocab_size ssm_cfg",
    "mamba_ssm.utils.generation.InferenceParams": "max_seqlen max_batch_size seqlen_offset batch_size_offset "
    "key_value_memory_dict lengths_per_sample",
    "mamba_ssm.utils.hf.load_config_hf": "model_name",
    "mamba_ssm.utils.hf.load_state_dict_hf": "model_name device dtype",
}


PACKAGES = {"mamba_ssm", "causal_conv1d", "gaussian_adaptive_attention"}


@pytest.fixture
def installed() -> Iterator[tuple[str, ...]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # other tests may have imported transformers' models
        yield integrations.install(force=True)
    integrations.uninstall()


def named(path: str):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def run(program: str) -> subprocess.CompletedProcess:
    """A program in a process of its own: what was imported here has no part in it."""
    return subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)


@pytest.mark.parametrize("path", NAMES)
def test_every_name_takes_the_usual_arguments(installed, path: str) -> None:
    expected = NAMES[path].split()
    assert list(inspect.signature(named(path)).parameters)[: len(expected)] == expected


def test_importing_trifuse_changes_nothing() -> None:
    program = """
        import sys
        before = list(sys.meta_path)
        import trifuse, trifuse.integrations
        assert sys.meta_path == before
        packages = {"mamba_ssm", "causal_conv1d", "gaussian_adaptive_attention", "matplotlib", "transformers"}
        assert not packages & {name.partition(".")[0] for name in sys.modules}
    """
    done = run(program)
    assert done.returncode == 0, done.stderr


def test_versions_are_known_to_the_packages_and_to_importlib_metadata(installed) -> None:
    for package in sorted(PACKAGES):
        version = importlib.import_module(package).__version__
        assert importlib.metadata.version(package) == version
        assert importlib.metadata.version(package.replace("_", "-")) == version
        # Forced, a stand-in is there beside an installed package of the same name.
        assert set(importlib.metadata.packages_distributions()[package]) == {package.replace("_", "-")}
    major, minor, _ = importlib.metadata.version("mamba_ssm").split(".", 2)
    assert (int(major), int(minor)) >= (2, 2)  # transformers asks for 2.0.4 and newer


def test_uninstall_leaves_no_trace() -> None:
    finders, modules = list(sys.meta_path), set(sys.modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert set(integrations.install(force=True)) == PACKAGES
        assert set(integrations.install()) == PACKAGES  # again: nothing more happens
    importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    integrations.uninstall()
    integrations.uninstall()
    assert sys.meta_path == finders
    assert not {name for name in sys.modules if name.startswith("mamba_ssm")} - modules
    if importlib.util.find_spec("mamba_ssm") is None:
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("mamba_ssm")


def test_an_installed_package_is_left_alone_unless_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("__version__ = 'theirs'\n")
    monkeypatch.syspath_prepend(tmp_path)
    theirs = importlib.import_module("mamba_ssm")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            assert "mamba_ssm" not in integrations.install()
            assert importlib.import_module("mamba_ssm") is theirs
            assert "mamba_ssm" in integrations.install(force=True)
            assert importlib.import_module("mamba_ssm").Mamba is trifuse.nn.Mamba
        integrations.uninstall()
        assert importlib.import_module("mamba_ssm") is theirs
    finally:
        integrations.uninstall()
        sys.modules.pop("mamba_ssm", None)


def test_transformers_is_left_alone_when_its_packages_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrations.stand_ins, "is_installed", lambda name: name in ("mamba_ssm", "causal_conv1d"))
    finders = len(sys.meta_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert integrations.install() == ("gaussian_adaptive_attention",)
    try:
        assert len(sys.meta_path) == finders + 1  # the finder of modules, and no hook of transformers
        block = importlib.import_module("gaussian_adaptive_attention").GaussianBlock
        assert issubclass(block, trifuse.nn.GaussianBlock)
    finally:
        integrations.uninstall()


def test_gaussian_modules_by_the_published_names_normalize_as_published(installed) -> None:
    package = importlib.import_module("gaussian_adaptive_attention")
    torch.manual_seed(0)
    block = package.GaussianBlock([-1, 1], [2, 1], [3, 3], 2, None, 1e-6)
    assert isinstance(block, trifuse.nn.GaussianBlock)
    for layer in block.layers:
        assert type(layer) is package.MultiHeadGaussianAdaptiveAttention
        assert all(type(head) is package.GaussianAdaptiveAttention for head in layer.attention_heads)
        assert (layer.normalization, layer.eps) == ("clamped", 1e-6)
    ours = trifuse.nn.GaussianBlock([-1, 1], [2, 1], [3, 3], 2, eps=1e-6, normalization="clamped")
    ours.load_state_dict(block.state_dict())
    x = torch.randn(2, 5, 8)
    assert torch.equal(block(x), ours(x))
    assert package.GaussianAdaptiveAttention(-1, 1, 1, None, normalization="stable").normalization == "stable"


def test_a_gaussian_model_gives_what_it_gave_with_the_package() -> None:
    theirs = pytest.importorskip(
        "gaussian_adaptive_attention", reason="the published package gaussian-adaptive-attention is not installed"
    )
    torch.manual_seed(0)
    model = theirs.GaussianBlock([-1], [2], [6], 1)
    x = torch.randn(4, 32, dtype=torch.float64)
    expected, state = model.double()(x), model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        integrations.install(force=True)
    try:
        package = importlib.import_module("gaussian_adaptive_attention")
        assert package is not theirs
        again = package.GaussianBlock([-1], [2], [6], 1, dtype=torch.float64)
        again.load_state_dict(state)
        torch.testing.assert_close(again(x), expected, rtol=1e-12, atol=1e-12)
    finally:
        integrations.uninstall()
    assert importlib.import_module("gaussian_adaptive_attention") is theirs


def test_transformers_runs_on_trifuse_when_install_comes_first() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    done = run(f"""
        import sys, warnings
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        warnings.simplefilter("error", RuntimeWarning)
        from trifuse import integrations
        integrations.install()
        import torch, transformers_cases as cases
        torch.set_num_threads(1)
        batch = cases.batch()
        for case in ("mamba", "mamba2", "jamba", "bamba"):
            model = cases.model(case)
            model.generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=3, do_sample=False)
            model.train()
            model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
            modeling = sys.modules[type(model).__module__]
            assert "transformers_hook" in type(cases.mixer_of(model)).forward.__code__.co_filename
            x = torch.randn(1, 4, 3)
            modeling.causal_conv1d_fn(x, torch.randn(4, 4), seq_idx=torch.zeros(1, 3, dtype=torch.int32))
        from transformers.models.lfm2 import modeling_lfm2
        modeling_lfm2.causal_conv1d_fn(x, torch.randn(4, 3), seq_idx=torch.zeros(1, 3, dtype=torch.int32))
    """)
    assert done.returncode == 0, done.stderr
    assert "falling back" not in done.stderr


def test_install_after_transformers_models_says_so_and_what_to_do() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.mamba import modeling_mamba

    own = modeling_mamba.MambaMixer.forward
    with pytest.warns(RuntimeWarning, match=r"install\(\) came after .*modeling_.* call .*install\(\) first"):
        integrations.install()
    try:
        assert modeling_mamba.MambaMixer.forward is not own
    finally:
        integrations.uninstall()
    assert modeling_mamba.MambaMixer.forward is own


def test_a_mixer_of_an_unknown_form_is_left_alone_and_named() -> None:
    class MambaMixer:
        def forward(self, hidden_states, cache_params=None, cache_position=None, attention_mask=None):
            return hidden_states

    module = types.ModuleType("transformers.models.mamba.modeling_mamba")
    module.MambaMixer = MambaMixer
    own = MambaMixer.forward
    with pytest.warns(RuntimeWarning, match="has no MambaMixer of the form that trifuse knows"):
        transformers_hook.Hook(mixers=True).patch(module)
    assert MambaMixer.forward is own


def test_a_causal_convolution_by_its_other_name(installed) -> None:
    conv = importlib.import_module("causal_conv1d")
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 6, 11), torch.randn(6, 4), torch.randn(6)
    state = torch.empty(2, 6, 3)
    y, final = conv.causal_conv1d_fn(
        x, weight, bias, return_final_states=True, final_states_out=state, activation="silu"
    )
    assert final is state
    torch.testing.assert_close(final, x[..., -3:])
    torch.testing.assert_close(y, F.silu(F.conv1d(x, weight.unsqueeze(1), bias, padding=3, groups=6)[..., :11]))
    carried = x[..., 7:10].contiguous()
    y_last = conv.causal_conv1d_update(x[..., 10], carried, weight, bias, "silu")
    torch.testing.assert_close(y_last, y[..., 10])
    torch.testing.assert_close(carried, x[..., 8:])


def test_the_states_that_packed_prompts_leave(installed) -> None:
    varlen = importlib.import_module("causal_conv1d.causal_conv1d_varlen")
    x = torch.arange(1.0, 13.0).reshape(6, 2)
    states = varlen.causal_conv1d_varlen_states(x, torch.tensor([0, 4, 5, 5, 6]), 3)
    expected = torch.zeros(4, 2, 3)
    expected[0] = x[1:4].T
    expected[1, :, 2] = x[4]
    expected[3, :, 2] = x[5]
    assert torch.equal(states, expected)


def block_inputs(heads: int = 4, headdim: int = 3, groups: int = 2, dstate: int = 5, length: int = 13):
    torch.manual_seed(0)
    conv_dim = heads * headdim + 2 * groups * dstate
    return {
        "zxbcdt": torch.randn(2, length, heads * headdim + conv_dim + heads),
        "conv1d_weight": torch.randn(conv_dim, 4),
        "conv1d_bias": torch.randn(conv_dim),
        "dt_bias": torch.randn(heads),
        "A": -torch.rand(heads) - 0.1,
        "D": torch.randn(heads),
        "chunk_size": 8,
        "headdim": headdim,
        "ngroups": groups,
    }


def test_mamba_inner_fn_is_the_block_of_nn_mamba(installed) -> None:
    torch.manual_seed(0)
    block = trifuse.nn.Mamba(16, d_state=4)
    tokens = torch.randn(2, 9, 16)
    out = named("mamba_ssm.mamba_inner_fn")(
        block.in_proj(tokens).transpose(1, 2), block.conv1d.weight, block.conv1d.bias, block.x_proj.weight,
        block.dt_proj.weight, block.out_proj.weight, block.out_proj.bias, -torch.exp(block.A_log), None, None, block.D,
        delta_bias=block.dt_proj.bias,
    )  # fmt: skip
    torch.testing.assert_close(out, block(tokens))


@pytest.mark.parametrize("complex_A", [False, True])
def test_mamba_inner_fn_takes_constant_and_varying_projections(installed, complex_A: bool) -> None:
    torch.manual_seed(0)
    dim, dstate, rank, length = 6, 4, 2, 7
    dtype = torch.complex64 if complex_A else torch.float32
    A = -torch.rand(dim, dstate).to(dtype)
    C = torch.randn(dim, dstate, dtype=dtype)
    wide = dstate * (2 if complex_A else 1)
    xz, weight, bias = torch.randn(2, 2 * dim, length), torch.randn(dim, 1, 3), torch.randn(dim)
    x_proj, dt_proj, out_proj = torch.randn(rank + wide, dim), torch.randn(dim, rank), torch.randn(5, dim)
    out = named("mamba_ssm.mamba_inner_fn")(
        xz, weight, bias, x_proj, dt_proj, out_proj, None, A, None, C, torch.ones(dim), delta_bias=bias
    )
    x, z = xz.chunk(2, dim=1)
    x = F.silu(F.conv1d(x, weight, bias, padding=2, groups=dim)[..., :length])
    projected = torch.einsum("bdl,rd->brl", x, x_proj)
    B = projected[:, rank:]
    if complex_A:
        B = torch.view_as_complex(B.unflatten(1, (-1, 2)).movedim(2, 3).contiguous())
    dt = torch.einsum("brl,dr->bdl", projected[:, :rank], dt_proj)
    y = trifuse.reference.selective_scan(x, dt, A, B.unsqueeze(1), C, torch.ones(dim), z, bias, True)[0]
    torch.testing.assert_close(out, torch.einsum("bdl,ed->ble", y, out_proj), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [None, True, False])
def test_the_combined_block_is_the_sum_of_its_parts(installed, norm: bool | None) -> None:
    given = block_inputs()
    dim, unit = 12, 4
    given["zxbcdt"] = torch.cat((torch.randn(2, 13, 2 * unit), given["zxbcdt"]), dim=-1)
    weight, projection = torch.rand(dim) + 0.5, torch.randn(7, unit + dim)
    extra = {} if norm is None else {"rmsnorm_weight": weight, "norm_before_gate": norm}
    combined = named("mamba_ssm.ops.triton.ssd_combined.mamba_split_conv1d_scan_combined")
    out, states = combined(**given, **extra, outproj_weight=projection, return_final_states=True)

    gated, z, xBC, dt = given["zxbcdt"].split([2 * unit, dim, 32, 4], dim=-1)
    padded = F.pad(xBC.transpose(1, 2), (3, 0))
    xBC = F.silu(F.conv1d(padded, given["conv1d_weight"].unsqueeze(1), given["conv1d_bias"], groups=32)).transpose(1, 2)
    x, B, C = xBC[..., :dim], xBC[..., dim : dim + 10], xBC[..., dim + 10 :]
    y, last = trifuse.reference.ssd(
        x.unflatten(-1, (4, 3)), dt, given["A"], B.unflatten(-1, (2, 5)), C.unflatten(-1, (2, 5)), D=given["D"],
        dt_bias=given["dt_bias"], dt_softplus=True,
    )  # fmt: skip
    y = y.flatten(2)
    if norm is False or norm is None:
        y = y * F.silu(z)
    if norm is not None:
        y = F.rms_norm(y.unflatten(-1, (2, 6)), (6,), eps=1e-6).flatten(2) * weight
    if norm:
        y = y * F.silu(z)
    left, right = gated.chunk(2, dim=-1)
    expected = torch.cat((F.silu(left) * right, y), dim=-1) @ projection.T
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states, last, rtol=1e-4, atol=1e-4)


def ssd_inputs(length: int = 21):
    torch.manual_seed(1)
    return {
        "x": torch.randn(1, length, 4, 3),
        "dt": torch.rand(1, length, 4),
        "A": -torch.rand(4) - 0.1,
        "B": torch.randn(1, length, 2, 5),
        "C": torch.randn(1, length, 2, 5),
    }


def test_states_of_packed_sequences_and_what_follows_them(installed) -> None:
    given = ssd_inputs()
    offsets = torch.tensor([0, 5, 5, 14])  # the last seven positions are padding
    seq_idx = torch.tensor([[0] * 5 + [2] * 9 + [-1] * 7], dtype=torch.int32)
    scan = named("mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined")
    out, last, states = scan(
        **given, chunk_size=8, seq_idx=seq_idx, cu_seqlens=offsets, return_final_states=True, return_varlen_states=True,
        state_dtype=torch.float64,
    )  # fmt: skip
    assert states.shape == (3, 4, 3, 5) and states.dtype == torch.float64 and last.shape == (1, 4, 3, 5)
    sequences = ("x", "dt", "B", "C")
    for row, (start, end) in enumerate(((0, 5), (5, 5), (5, 14))):
        piece = {name: value[:, start:end] if name in sequences else value for name, value in given.items()}
        if start < end:
            expected, state = trifuse.reference.ssd(**piece)
            torch.testing.assert_close(out[:, start:end], expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(states[row], state[0].double(), rtol=1e-4, atol=1e-4)
        else:
            assert not states[row].any()
    with pytest.raises(ValueError, match="cu_seqlens is None"):
        scan(**given, chunk_size=8, return_varlen_states=True)


def test_the_parts_of_ssd_put_together_are_ssd(installed) -> None:
    chunks = importlib.import_module("mamba_ssm.ops.triton.ssd_chunk_state")
    passing = named("mamba_ssm.ops.triton.ssd_state_passing.state_passing")
    scan = named("mamba_ssm.ops.triton.ssd_chunk_scan.chunk_scan")
    given = ssd_inputs()
    dA_cumsum, dt = chunks._chunk_cumsum_fwd(given["dt"], given["A"], 8)
    states = chunks.chunk_state(given["B"], given["x"], dt, dA_cumsum)
    begins, last = passing(states.flatten(3), dA_cumsum[..., -1])
    out = scan(given["B"], given["C"], given["x"], dt, dA_cumsum, begins.unflatten(-1, (3, 5)))
    expected, expected_last = trifuse.reference.ssd(**given)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last.unflatten(-1, (3, 5)), expected_last, rtol=1e-4, atol=1e-4)
    selective = named("mamba_ssm.ops.triton.ssd_combined.ssd_selective_scan")
    torch.testing.assert_close(selective(**given), expected, rtol=1e-4, atol=1e-4)


def test_norms_of_a_residual_sum(installed) -> None:
    norm = importlib.import_module("mamba_ssm.ops.triton.layer_norm")
    torch.manual_seed(0)
    x, x1, residual = torch.randn(3, 8).half(), torch.randn(3, 8).half(), torch.randn(3, 8)
    weight, bias, scale = torch.randn(8), torch.randn(8), torch.rand(3)
    total = x.float() + x1.float() + residual
    y, carried = norm.layer_norm_fn(x, weight, bias, residual, x1, prenorm=True)
    torch.testing.assert_close(y, F.layer_norm(total, (8,), weight, bias, 1e-6).half())
    torch.testing.assert_close(carried, total)
    y = norm.rms_norm_fn(x, weight, None, residual, rowscale=scale)
    torch.testing.assert_close(y, F.rms_norm(x.float() * scale[:, None] + residual, (8,), weight, 1e-6).half())
    _, kept, _ = norm.rms_norm_fn(x.float(), weight, None, dropout_p=0.5, return_dropout_mask=True)
    y, carried, kept, _ = norm.rms_norm_fn(
        x.float(), weight, None, dropout_p=0.5, prenorm=True, return_dropout_mask=True
    )
    torch.testing.assert_close(carried, x.float() * kept * 2)
    assert 0 < kept.sum() < kept.numel()


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_the_language_model_reads_writes_saves_and_loads(installed, layer: str, tmp_path: Path) -> None:
    models = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
    cfg = {"layer": layer, "d_state": 8} | ({"headdim": 8} if layer == "Mamba2" else {})
    config = named("mamba_ssm.models.config_mamba.MambaConfig")(
        d_model=32, n_layer=2, vocab_size=50, ssm_cfg=cfg, d_intermediate=24, pad_vocab_size_multiple=16
    )
    torch.manual_seed(0)
    model = models.MambaLMHeadModel(config)
    text = torch.randint(0, 50, (2, 12))
    with torch.no_grad():
        logits = model(text).logits
    assert logits.shape == (2, 12, 64)
    read = model.generate(
        text[:, :5], max_length=12, teacher_outputs=text, output_scores=True, return_dict_in_generate=True, cg=True
    )
    assert torch.equal(read.sequences, text)
    torch.testing.assert_close(torch.stack(read.scores, dim=1), logits[:, 4:-1], rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = models.MambaLMHeadModel.from_pretrained(str(tmp_path))
    assert again.lm_head.weight is again.backbone.embedding.weight
    with torch.no_grad():
        assert torch.equal(again(text).logits, logits)
    assert model.generate(text[:, :5], max_length=9, top_k=4, top_p=0.9, temperature=0.8).shape == (2, 9)


def test_sampling_keeps_to_its_limits(installed) -> None:
    sample = named("mamba_ssm.utils.generation.sample")
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(400, 4)
    torch.manual_seed(0)
    assert set(sample(logits, top_k=1).tolist()) == {0}
    assert set(sample(logits, top_k=2).tolist()) == {0, 1}
    assert set(sample(logits, top_k=0, top_p=0.6).tolist()) == {0, 1}
    assert set(sample(logits, top_k=0, min_p=0.25).tolist()) == {0, 1, 2}
    assert set(sample(logits, top_k=0).tolist()) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match=r"top_p is 1\.5"):
        sample(logits, top_k=0, top_p=1.5)


def test_attention_layers_are_refused(installed) -> None:
    create = named("mamba_ssm.models.mixer_seq_simple.create_block")
    with pytest.raises(NotImplementedError, match="layer 1 is in attn_layer_idx"):
        create(16, attn_layer_idx=[1], layer_idx=1)
    with pytest.raises(ValueError, match="'Mamba3'"):
        create(16, ssm_cfg={"layer": "Mamba3"}, layer_idx=0)

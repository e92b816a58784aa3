"""Stand-ins as people meet them: what can be imported, when, by whom; what they compute, trained and refused."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Capture, cli
from torch import Tensor, nn
from torch.nn import functional

import edifice_export as ee
from edifice_export.programs.module_program import ModuleProgram
from edifice_export.programs.source import load_source
from edifice_export.standing_in.registry import MODULES, VERSIONS

PACKAGES = tuple(VERSIONS)


def imported() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in PACKAGES]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_what_it_says_and_nothing_stays(name: str) -> None:
    finders = list(sys.meta_path)
    with ee.standins():
        module = importlib.import_module(name)
        assert {attribute for attribute in vars(module) if not attribute.startswith("__")} >= MODULES[name].keys()
        with pytest.raises(
            ImportError, match=f"no stand-in for {name}.nothing; of {name} there are {next(iter(MODULES[name]))}"
        ):
            module.nothing  # noqa: B018
        with pytest.raises(ModuleNotFoundError, match=f"no stand-in for {name}.nothing"):
            importlib.import_module(f"{name}.nothing")
    assert not imported()
    assert sys.meta_path == finders
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        importlib.import_module(name)


def test_people_ask_for_versions_and_specs() -> None:
    from importlib.util import find_spec

    with ee.standins():
        import causal_conv1d
        import mamba_ssm

        assert (mamba_ssm.__version__, causal_conv1d.__version__) == (VERSIONS["mamba_ssm"], VERSIONS["causal_conv1d"])
        assert find_spec("mamba_ssm") is not None
        assert not hasattr(mamba_ssm, "__file__")


def test_what_was_there_before_is_there_again() -> None:
    """Even where the block fails."""
    own = {name: type(sys)(name) for name in ("mamba_ssm", "mamba_ssm.theirs")}
    sys.modules.update(own)

    def fails() -> None:
        with ee.standins():
            import mamba_ssm

            assert mamba_ssm is not own["mamba_ssm"]
            assert "mamba_ssm.theirs" not in sys.modules
            raise ZeroDivisionError

    try:
        with pytest.raises(ZeroDivisionError):
            fails()
        assert {name: sys.modules[name] for name in imported()} == own
    finally:
        for name in own:
            sys.modules.pop(name, None)


def test_a_block_within_a_block_changes_nothing() -> None:
    with ee.standins():
        import mamba_ssm

        with ee.standins():
            assert sys.modules["mamba_ssm"] is mamba_ssm
        assert sys.modules["mamba_ssm"] is mamba_ssm
    assert not imported()


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package of that name that loads, but for one of its modules."""
    folder = tmp_path / "mamba_ssm"
    folder.mkdir()
    (folder / "__init__.py").write_text("from . import part\nREAL = True\n")
    (folder / "part.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in imported():
        del sys.modules[name]


@pytest.mark.usefixtures("real")
def test_a_real_package_with_a_gpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with ee.standins():
        import mamba_ssm
        from causal_conv1d import causal_conv1d_fn  # which is missing

        assert mamba_ssm.REAL
        assert causal_conv1d_fn.__module__.startswith("edifice_export.")
    assert sorted(imported()) == ["mamba_ssm", "mamba_ssm.part"]


@pytest.mark.parametrize("gpu", [False, True])
def test_one_without_a_gpu_or_that_fails_is_stood_for(gpu: bool, real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    if gpu:
        (real / "__init__.py").write_text("from . import part\nimport selective_scan_cuda_that_is_missing\n")
    with ee.standins():
        from mamba_ssm import Mamba

        assert Mamba.__module__.startswith("edifice_export.")
    assert not imported()


def test_another_thread_waits_and_finds_all_of_them() -> None:
    inside, leave = threading.Event(), threading.Event()
    seen: list[Any] = []

    def first() -> None:
        with ee.standins():
            inside.set()
            leave.wait(10)

    def second() -> None:
        with ee.standins():
            seen.append(importlib.import_module("mamba_ssm.modules.mamba_simple").Mamba)

    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert inside.wait(10)
    threads.append(threading.Thread(target=second))
    threads[1].start()
    assert {name for name in MODULES if name not in sys.modules} == set()  # whole at once, without an import
    threads[1].join(0.2)
    assert threads[1].is_alive()
    assert not seen
    leave.set()
    for thread in threads:
        thread.join(10)
    assert len(seen) == 1
    assert not imported()


def scanned(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    given: Tensor,
    read: Tensor,
    skip: Tensor,
    z: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mamba's formula, every channel with input weights and read-outs of its own at every frame."""
    channels, length = u.shape[1:]

    def full(weights: Tensor) -> Tensor:
        if weights.dim() == 2:
            return weights[None, :, :, None].expand(len(u), -1, -1, length)
        grouped = weights[:, None] if weights.dim() == 3 else weights
        return grouped.repeat_interleave(channels // grouped.shape[1], dim=1)

    b, c, step = full(given), full(read), functional.softplus(delta + bias[:, None])
    h, outputs = torch.zeros(len(u), channels, a.shape[1], dtype=u.dtype), []
    for t in range(length):
        h = torch.exp(step[:, :, t, None] * a) * h + step[:, :, t, None] * b[..., t] * u[:, :, t, None]
        outputs.append((c[..., t] * h).sum(-1) + skip * u[:, :, t])
    return torch.stack(outputs, dim=-1) * functional.silu(z), h


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


WEIGHTS = {"constant": (6, 5), "shared": (2, 5, 7), "grouped": (2, 3, 5, 7), "one group": (2, 1, 5, 7)}


@pytest.mark.parametrize("read", WEIGHTS)
@pytest.mark.parametrize("given", WEIGHTS)
def test_selective_scan_takes_what_the_original_takes(given: str, read: str) -> None:
    with ee.standins():
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    torch.manual_seed(0)
    u, delta, z = (drawn(2, 6, 7) for _ in range(3))
    arguments = (
        u,
        delta,
        -torch.exp(drawn(6, 5)),
        drawn(*WEIGHTS[given]),
        drawn(*WEIGHTS[read]),
        drawn(6),
        z,
        drawn(6),
    )
    wanted, state = scanned(*arguments)
    found, last = selective_scan_fn(*arguments, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, state, rtol=0, atol=1e-12)
    bare = selective_scan_fn(*arguments[:5])
    wanted, _ = scanned(*arguments[:2], *arguments[2:5], torch.zeros(6), 0 * z, torch.zeros(6))
    assert bare.shape == wanted.shape
    half = selective_scan_fn(*(value.bfloat16() for value in arguments), delta_softplus=True, return_last_state=True)
    assert [value.dtype for value in half] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("kernel", [2, 4])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_causal_conv1d_is_the_convolution(kernel: int, activation: str | None) -> None:
    with ee.standins():
        from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
    torch.manual_seed(0)
    x, weight, bias, before = drawn(2, 6, 7), drawn(6, kernel), drawn(6), drawn(2, 6, kernel - 1)
    seen = torch.cat([before, x], dim=-1)
    wanted = functional.conv1d(seen, weight[:, None], bias, groups=6)
    wanted = wanted if activation is None else functional.silu(wanted)
    kept = torch.empty_like(before)
    found, last = causal_conv1d_fn(
        x, weight, bias, initial_states=before, return_final_states=True, final_states_out=kept, activation=activation
    )
    torch.testing.assert_close(found, wanted)
    assert torch.equal(last, seen[..., 7:])
    assert torch.equal(kept, last)
    fresh = causal_conv1d_fn(x, weight)
    torch.testing.assert_close(fresh, functional.conv1d(functional.pad(x, (kernel - 1, 0)), weight[:, None], groups=6))
    # In pieces: a state of the last frames, one longer than need be, a ring, entries of a larger one.
    states = {"last": before.clone(), "longer": torch.cat([drawn(2, 6, 2), before], dim=-1)}
    ring = functional.pad(before, (0, 2))
    larger = drawn(3, 6, kernel - 1)
    larger[[2, 0]] = before
    untouched = larger[1].clone()
    pieces: dict[str, list[Tensor]] = {"last": [], "longer": [], "ring": [], "larger": []}
    taps = (weight, bias, activation)
    for first, count in ((0, 1), (1, 1), (2, 3), (5, 2)):
        frames = x[..., first : first + count]
        given = frames[..., 0] if count == 1 else frames
        counted = torch.full((2,), kernel - 1 + first, dtype=torch.int32)
        ways = {name: causal_conv1d_update(given, state, *taps) for name, state in states.items()}
        ways["ring"] = causal_conv1d_update(given, ring, *taps, cache_seqlens=counted)
        entries = torch.tensor([2, 0], dtype=torch.int32)
        ways["larger"] = causal_conv1d_update(given, larger, *taps, conv_state_indices=entries)
        for name, out in ways.items():
            pieces[name].append(out[..., None] if count == 1 else out)
    for name, parts in pieces.items():
        torch.testing.assert_close(torch.cat(parts, dim=-1), wanted, msg=name)
    assert torch.equal(states["longer"], seen[..., -kernel - 1 :])
    assert torch.equal(larger[1], untouched)


@pytest.mark.parametrize("form", ["channels", "heads", "groups", "entries"])
def test_selective_state_update_is_a_frame_of_the_scan(form: str) -> None:
    with ee.standins():
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    torch.manual_seed(0)
    u, delta, z, a, d, bias = (
        drawn(2, 6, 7),
        drawn(2, 6, 7),
        drawn(2, 6, 7),
        -torch.exp(drawn(6, 5)),
        drawn(6),
        drawn(6),
    )
    b, c = (drawn(2, 2, 5, 7) if form == "groups" else drawn(2, 5, 7) for _ in range(2))
    wanted, last = selective_scan_fn(u, delta, a, b, c, d, z, bias, True, return_last_state=True)
    headed: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
    if form in ("heads", "groups"):  # two of three
        headed = lambda x: x.unflatten(-1, (2, 3))  # noqa: E731
        a, d, bias = a.unflatten(0, (2, 3)), headed(d), headed(bias)
    states = torch.zeros(3 if form == "entries" else 2, *a.shape, dtype=u.dtype)
    entries = torch.tensor([2, 0]) if form == "entries" else None
    for t in range(7):
        x, dt, gate = (headed(value[..., t]) for value in (u, delta, z))
        y = selective_state_update(states, x, dt, a, b[..., t], c[..., t], d, gate, bias, True, entries)
        torch.testing.assert_close(y, headed(wanted[..., t]))
    mine = states if entries is None else states[entries]
    torch.testing.assert_close(mine.reshape(last.shape), last)


def test_norms_are_the_papers() -> None:
    with ee.standins():
        from mamba_ssm.ops.triton import layernorm_gated
        from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
    torch.manual_seed(0)
    x, before, weight, bias, z = drawn(2, 3, 8), drawn(2, 3, 8), drawn(8), drawn(8), drawn(2, 3, 8)
    total = x + before
    for call, norm in ((layer_norm_fn, functional.layer_norm), (rms_norm_fn, functional.rms_norm)):
        shift = 0 if norm is functional.rms_norm else bias
        normed, given_on = call(
            x, weight, None if norm is functional.rms_norm else bias, before, prenorm=True, eps=1e-5
        )
        torch.testing.assert_close(normed, norm(total, (8,), weight, eps=1e-5) + shift)
        assert torch.equal(given_on, total)
        first, second = call(x, weight, None, x1=before, weight1=bias, rowscale=None)
        torch.testing.assert_close(first / weight, second / bias)
    module = RMSNorm(8, dtype=torch.bfloat16)
    assert list(module.state_dict()) == ["weight"]
    assert [value.dtype for value in module(x.bfloat16(), prenorm=True)] == [torch.bfloat16] * 2
    assert module(x.bfloat16(), prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32
    torch.testing.assert_close(
        layernorm_gated.rmsnorm_fn(x, weight, bias, group_size=4),
        functional.rms_norm(x.unflatten(-1, (2, 4)), (4,), eps=1e-6).flatten(-2) * weight + bias,
    )
    gate = functional.silu(z)
    for before_gate in (True, False):
        wanted = functional.layer_norm(x if before_gate else x * gate, (8,), weight, bias, 1e-6)
        found = layernorm_gated.layernorm_fn(x, weight, bias, z, norm_before_gate=before_gate)
        torch.testing.assert_close(found, wanted * gate if before_gate else wanted)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_scan_of_heads_is_that_of_their_channels(groups: int) -> None:
    """In two pieces, with steps held between limits."""
    with ee.standins():
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    torch.manual_seed(0)
    x, z, dt, bias = drawn(2, 7, 4, 3), drawn(2, 7, 4, 3), drawn(2, 7, 4), drawn(4)
    a, b, c, d = -torch.exp(drawn(4)), drawn(2, 7, groups, 5), drawn(2, 7, groups, 5), drawn(4, 3)
    step = functional.softplus(dt + bias).clamp(0.3, 1.5)
    spread = [step.repeat_interleave(3, -1).mT, a.repeat_interleave(3)[:, None].expand(12, 5)]
    read = (b.permute(0, 2, 3, 1), c.permute(0, 2, 3, 1))
    gate = z.flatten(2).mT
    wanted, last = selective_scan_fn(x.flatten(2).mT, *spread, *read, d.flatten(), gate, return_last_state=True)
    state, outputs = None, []
    for piece in (slice(0, 3), slice(3, 7)):
        y, state = mamba_chunk_scan_combined(
            *(x[:, piece], dt[:, piece], a, b[:, piece], c[:, piece], 2, d, z[:, piece], bias),
            initial_states=state,
            dt_softplus=True,
            dt_limit=(0.3, 1.5),
            return_final_states=True,
        )
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1).flatten(2).mT, wanted)
    torch.testing.assert_close(state.flatten(1, 2), last)


@pytest.mark.parametrize(
    "options",
    [{}, {"ngroups": 2, "norm_before_gate": True}, {"d_ssm": 8, "rmsnorm": False, "D_has_hdim": True, "bias": True}],
    ids=str,
)
def test_a_mamba2_is_the_same_by_every_way(options: dict[str, Any]) -> None:
    with ee.standins():
        from mamba_ssm import Mamba2
        from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined
    torch.manual_seed(0)
    mamba = Mamba2(8, d_state=4, headdim=4, **options).double()
    x = drawn(2, 5, 8)
    y = mamba(x)
    torch.testing.assert_close(mamba(x.flatten(0, 1), seqlen=5), y.flatten(0, 1))
    split = mamba_split_conv1d_scan_combined(
        mamba.in_proj(x),
        mamba.conv1d.weight.squeeze(1),
        mamba.conv1d.bias,
        mamba.dt_bias,
        -torch.exp(mamba.A_log),
        mamba.D.unflatten(0, (-1, 4)) if mamba.D_has_hdim else mamba.D,
        chunk_size=256,
        rmsnorm_weight=mamba.norm.weight if mamba.rmsnorm else None,
        rmsnorm_eps=1e-5,
        outproj_weight=mamba.out_proj.weight,
        outproj_bias=mamba.out_proj.bias,
        headdim=None if mamba.D_has_hdim else 4,
        ngroups=mamba.ngroups,
        norm_before_gate=mamba.norm_before_gate,
    )
    torch.testing.assert_close(split, y)
    y.square().mean().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in mamba.parameters())
    states = mamba.allocate_inference_cache(2, 5)
    with torch.no_grad():
        steps = [mamba.step(x[:, t : t + 1], *states)[0] for t in range(5)]
    torch.testing.assert_close(torch.cat(steps, dim=1), y)


def test_a_mamba_trains_and_is_the_same_by_every_way() -> None:
    with ee.standins():
        from mamba_ssm import Mamba, mamba_inner_fn
    torch.manual_seed(0)
    mamba = Mamba(8, d_state=4, layer_idx=0).double()
    x = drawn(2, 5, 8)
    y = mamba(x)
    y.square().mean().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in mamba.parameters())
    weights = (mamba.conv1d.weight, mamba.conv1d.bias, mamba.x_proj.weight, mamba.dt_proj.weight, mamba.out_proj.weight)
    rates, bias = -torch.exp(mamba.A_log), mamba.dt_proj.bias
    inner = mamba_inner_fn(mamba.in_proj(x).mT, *weights, mamba.out_proj.bias, rates, D=mamba.D, delta_bias=bias)
    torch.testing.assert_close(inner, y)
    conv, ssm = mamba.allocate_inference_cache(2, 5)
    assert (conv.shape, ssm.shape) == ((2, 16, 4), (2, 16, 4))
    with torch.no_grad():
        steps = [mamba.step(x[:, t : t + 1], conv, ssm)[0] for t in range(5)]
    torch.testing.assert_close(torch.cat(steps, dim=1), y)
    assert conv.abs().min() > 0


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_one_alone_goes_frame_by_frame(name: str) -> None:
    with ee.standins():
        mamba_ssm = importlib.import_module("mamba_ssm")
    torch.manual_seed(0)
    mamba = getattr(mamba_ssm, name)(64, d_state=4)
    x = torch.randn(2, 5, 64)
    program = ModuleProgram(ee.Source(mamba, (x,), ({0: "batch", 1: "frames"},)))
    assert program.graphs == ("window", "stream", "prefill")
    state = mamba.initial_state(2)
    with torch.no_grad():
        first, state = mamba.extend(x[:, :3], state)
        frames = [first]
        for t in (3, 4):
            y, state = mamba.step(x[:, t], state)
            frames.append(y[:, None])
        torch.testing.assert_close(torch.cat(frames, dim=1), mamba(x))


THEIRS = """
import torch
from causal_conv1d import causal_conv1d_fn
from mamba_ssm.modules.mamba_simple import Mamba
{more}

class Mine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mamba = Mamba(8, d_state=4)
        self.taps = torch.nn.Parameter(torch.randn(8, 3))

    def forward(self, x):
        import causal_conv1d  # only now

        return self.mamba(causal_conv1d.causal_conv1d_fn(x.transpose(1, 2), self.taps).transpose(1, 2))


def source():
    import edifice_export as ee

    torch.manual_seed(0)
    return ee.Source(Mine(), (torch.randn(2, 5, 8),), {{"x": {{0: "batch", 1: "time"}}}})
"""


def test_code_that_imports_them_is_exported_and_verified(tmp_path: Path, capfd: Capture) -> None:
    code = tmp_path / "mine.py"
    code.write_text(THEIRS.format(more=""))
    output = tmp_path / "mine"
    exported = cli(capfd, "export", f"{code}:source", "--output", output)
    assert exported.status == 0, exported
    verified = cli(capfd, "verify", output, "--source", f"{code}:source")
    assert verified.status == 0, verified
    assert not imported()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            "from mamba_ssm.modules.mamba3 import Mamba3",
            "no stand-in for mamba_ssm.modules.mamba3; of mamba_ssm.modules",
        ),
        ("from mamba_ssm.ops.selective_scan_interface import x", "no stand-in for .*interface.x; .* selective_scan_fn"),
        ("from fla.ops.kda import chunk_kda", "No module named 'fla'"),
    ],
)
def test_what_is_not_stood_for_is_refused_by_name(more: str, told: str, tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text(THEIRS.format(more=more))
    with pytest.raises(ee.RequestError, match=rf"{told}.*mine.py:5"):
        load_source(f"{code}:source")
    assert not imported()


def test_arguments_that_are_not_covered_are_refused_by_name() -> None:
    with ee.standins():
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm import Mamba2
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        from mamba_ssm.ops.triton.layer_norm import layer_norm_fn
    x = torch.randn(2, 3, 4)
    with pytest.raises(ee.RequestError, match="causal_conv1d_fn: its stand-in takes no seq_idx"):
        causal_conv1d_fn(x, torch.randn(3, 2), seq_idx=torch.zeros(2, 4))
    with pytest.raises(ee.RequestError, match="activation must be None, silu or swish, got 'gelu'"):
        causal_conv1d_fn(x, torch.randn(3, 2), activation="gelu")
    with pytest.raises(ee.RequestError, match="takes real A, B and C; these are complex"):
        selective_scan_fn(x, x, torch.randn(3, 2, dtype=torch.complex64), x[:, :2], x[:, :2])
    with pytest.raises(ee.RequestError, match="takes no return_dropout_mask"):
        layer_norm_fn(x, torch.ones(4), None, return_dropout_mask=True)
    with pytest.raises(ee.RequestError, match="takes no seq_idx"):
        Mamba2(8, headdim=4)(torch.randn(2, 3, 8), seq_idx=torch.zeros(2, 3))
    with pytest.raises(ee.RequestError, match=r"16 channels .* must be whole heads of 3"):
        Mamba2(8, headdim=3)
    small: dict[str, Any] = {"d_model": 8, "n_layer": 2, "vocab_size": 5}
    with pytest.raises(ee.RequestError, match="layer 1 is of attention"):
        MambaLMHeadModel(MambaConfig(**small, attn_layer_idx=[1]))
    with pytest.raises(
        ee.RequestError, match="layer of ssm_cfg is 'Mamba3', and there are stand-ins for Mamba1, Mamba2"
    ):
        MambaLMHeadModel(MambaConfig(**small, ssm_cfg={"layer": "Mamba3"}))
    with pytest.raises(ee.RequestError, match=r"has no config\.json"):
        MambaLMHeadModel.from_pretrained("state-spaces/mamba-130m")


def test_a_language_model_is_saved_and_found_again(tmp_path: Path) -> None:
    with ee.standins():
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    model = MambaLMHeadModel(MambaConfig(d_model=8, n_layer=1, vocab_size=5, d_intermediate=16, rms_norm=False))
    assert isinstance(model.backbone.norm_f, nn.LayerNorm)
    assert model.lm_head.weight.shape == (8, 8)
    model.save_pretrained(str(tmp_path / "model"))
    again = MambaLMHeadModel.from_pretrained(str(tmp_path / "model"))
    ids = torch.randint(5, (2, 4))
    assert torch.equal(again(ids).logits, model(ids).logits)

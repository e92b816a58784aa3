"""The reference models against Edifice, against themselves, and their options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from golden_cases import CASES, GOLDEN, architecture_of, load_case, metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_cases import each_architecture, each_numerics, make, sequence
from safetensors import safe_open
from torch import Tensor, nn

from edifice_export.weights.sources.edifice import to_edifice_name
from edifice_reference.models.config import OptionError
from edifice_reference.models.layers import initialize
from edifice_reference.models.registry import ARCHITECTURES, Architecture, get_architecture

EXACT = {architecture_of(path) for path in CASES if metadata(path)["param_count"] is None}
"""Architectures for which Edifice has no formula of its own."""


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_float64_is_edifice(path: Path) -> None:
    model, example = load_case(path)
    error = (model.double()(example["state_sequence"].double()) - example["output_f64"]).abs().max()
    assert error < (1e-6 if "tinyvar" in path.stem else 1e-9)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_float32_is_edifice(path: Path) -> None:
    model, example = load_case(path)
    assert (model(example["state_sequence"]) - example["output"]).abs().max() < 1e-5


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_facts_are_those_of_edifice(path: Path) -> None:
    model, _ = load_case(path)
    said = metadata(path)
    assert model.config.output_size == said["output_size"]
    assert model.config.recommended_defaults() == said["recommended_defaults"]
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == said["actual_param_count"]
    assert model.config.param_count == (said["param_count"] or count)


def test_there_are_real_cases_of_edifices_architectures() -> None:
    assert {"h3", "hyena", "hymba", "ss_transformer"} <= {architecture_of(path) for path in CASES} <= set(ARCHITECTURES)


@pytest.mark.parametrize("path", [path for path in CASES if "tinyvar" in path.stem], ids=lambda path: path.stem)
def test_tiny_variances_need_edifice_numerics(path: Path) -> None:
    model, example = load_case(path, "standard")
    assert (model(example["state_sequence"]) - example["output"]).abs().max() > 5e-4


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*_taps.safetensors")), ids=lambda path: path.stem)
def test_every_layer_is_edifice(path: Path) -> None:
    model, example = load_case(GOLDEN / f"{path.stem.removesuffix('_taps')}.safetensors")
    with safe_open(path, framework="pt") as file:
        taps = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    known = get_architecture(architecture_of(GOLDEN / f"{path.stem.removesuffix('_taps')}.safetensors"))
    layers = {to_edifice_name(name, known).partition("/")[0] for name, _ in model.named_parameters()}
    seen: list[str] = []

    def check(tap: str, found: Tensor) -> None:
        expected = taps[tap]
        if found.ndim < expected.ndim:
            # A filter has no batch here; of the last norm there is the last frame only.
            found = found[None] if "filter" in tap else found[:, None]
        difference = (found - expected[:, -found.shape[1] :]).abs().max()
        assert difference < 1e-5, f"the first layer that departs is {tap}, by {difference:.1e}"
        seen.append(tap)

    for name, module in model.named_modules():
        own = [f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
        tap = to_edifice_name(own[0], known).partition("/")[0] if own else ""
        if not own or tap.endswith("attn_compute"):
            continue
        if tap.endswith("_ssm"):
            # Edifice's layer is the whole recurrence; here the block computes two of them at once.
            _, index, which, _ = name.split(".")
            _observe_scan(model.blocks[int(index)], ("shift", "diag").index(which), tap, check)
            continue

        def hook(_module: nn.Module, _inputs: object, output: Any, tap: str = tap) -> None:
            check(tap, output[0] if isinstance(output, tuple) else output)

        module.register_forward_hook(hook)
    model(example["state_sequence"])
    assert set(seen) == {layer for layer in layers if not layer.endswith("attn_compute")}


def _observe_scan(block: Any, which: int, tap: str, check: Callable[[str, Tensor], None]) -> None:
    """Shows one of an H3 block's two recurrences to `check`."""
    scan = block.scan

    def observed(*inputs: Any) -> Any:
        found = scan(*inputs)
        check(tap, found[0][:, :, which])
        return found

    block.scan = observed


@each_architecture
@each_numerics
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_every_prefix_is_the_window_that_ends_there(architecture: Architecture, numerics: str, batch: int) -> None:
    model = make(architecture, numerics, window_size=11)
    x = sequence(batch, 11)
    together = model.forward_prefixes(x)
    for length in range(1, 12):
        torch.testing.assert_close(model(x[:, :length]), together[:, length - 1], rtol=1e-12, atol=1e-12)


@each_architecture
def test_batch_entries_are_independent(architecture: Architecture) -> None:
    model = make(architecture)
    x = sequence(4, 7)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(x[order]), model(x)[order], rtol=1e-12, atol=1e-12)


@each_architecture
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_parameters_are_counted_for_any_options(architecture: Architecture, data: st.DataObject) -> None:
    options: dict[str, Any] = {}
    for field in dataclasses.fields(architecture.config_class):
        if type(field.default) is bool:
            options[field.name] = data.draw(st.booleans(), field.name)
        elif type(field.default) is int:
            options[field.name] = data.draw(st.integers(field.metadata["minimum"], 9), field.name)
    if "num_heads" in options:
        options["hidden_size"] *= options["num_heads"]
    config = architecture.config_class(**options)
    model = architecture.model_class(config)
    initialize(model, 0)
    if architecture.name in EXACT:
        assert config.param_count == sum(parameter.numel() for parameter in model.parameters())
    output = model.eval()(torch.zeros(2, min(3, config.window_size), config.embed_dim))
    assert output.shape == (2, config.output_size)
    assert output.isfinite().all()


@each_architecture
def test_options_out_of_range_are_refused(architecture: Architecture) -> None:
    for field in dataclasses.fields(architecture.config_class):
        wrong: list[Any] = ["7", None]
        if type(field.default) is int:
            wrong += [field.metadata["minimum"] - 1, field.metadata["maximum"] + 1, 1.5, True]
        if type(field.default) is float:
            wrong += [-0.1, 1, float("nan")]
        for value in wrong:
            with pytest.raises(OptionError, match=field.name):
                architecture.config_class(**{field.name: value})


@each_architecture
def test_unknown_numerics_are_refused(architecture: Architecture) -> None:
    with pytest.raises(OptionError, match="standard or edifice"):
        architecture.model_class(architecture.config_class(**TINY), "fast")


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean hymba"):
        get_architecture("Hymbra")


@each_architecture
def test_it_can_be_trained(architecture: Architecture) -> None:
    model = make(architecture).train()
    x, target = sequence(2, 5), torch.zeros(2, TINY["hidden_size"], dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@each_architecture
def test_dropout_acts_in_training_only(architecture: Architecture) -> None:
    model, x = make(architecture, dropout=0.5), sequence(2, 5)
    assert torch.equal(model(x), make(architecture)(x))
    torch.manual_seed(0)
    assert not torch.equal(model.train()(x), model.eval()(x))


@each_architecture
def test_initial_values_are_edifices(architecture: Architecture) -> None:
    model = make(architecture, hidden_size=64)
    again = make(architecture, hidden_size=64)
    other = make(architecture, hidden_size=64, seed=1)
    for (name, value), same, different in zip(
        model.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(value, same)
        if name.endswith("bias"):
            assert not value.any()
            continue
        if name.endswith("a_log"):
            torch.testing.assert_close(value.exp(), torch.arange(1.0, len(value) + 1, dtype=torch.float64))
            continue
        if name.endswith("dt_log"):
            step = {"shift": 0.01, "diag": 0.001}[name.split(".")[2]]
            assert nn.functional.softplus(value).item() == pytest.approx(step, rel=1e-6)
            continue
        assert not torch.equal(value, different)
        bound = 3**0.5 if value.ndim == 1 else (6 / fans(value)) ** 0.5
        assert value.abs().max() <= bound
        # Uniform on +-bound: the largest of n values is above 0.8 bound but for a chance of 0.8^n.
        assert value.abs().max() > 0.8 * bound


def fans(value: Tensor) -> int:
    if value.ndim == 3:
        channels, _, kernel = value.shape
        return kernel + kernel * channels
    return sum(value.shape)


@each_architecture
@pytest.mark.parametrize("length", [1, 7, 40])
def test_only_a_window_that_binds_limits_the_length(architecture: Architecture, length: int) -> None:
    model, x = make(architecture), sequence(2, length)
    if architecture.config_class.window_binds and length > TINY["window_size"]:
        with pytest.raises(ValueError, match="40 frames is longer than the kernel, which ends at 7"):
            model(x)
    else:
        assert model(x).isfinite().all()


@each_architecture
def test_shapes_tell_the_options(architecture: Architecture) -> None:
    """All but those that are marked as untold and those that change no output."""
    fields = dataclasses.fields(architecture.config_class)
    odd = {field.name: 3 for field in fields if type(field.default) is int and not field.metadata["untold"]}
    odd |= {"hidden_size": 12, "embed_dim": 5}
    config = architecture.config_class(**odd)
    shapes = {name: tuple(value.shape) for name, value in architecture.model_class(config).named_parameters()}
    given = {field.name: getattr(config, field.name) for field in fields if field.metadata["untold"]}
    told = architecture.config_class.told_by(shapes, given)
    free = {"dropout", "window_size", *given}
    assert told == {name: value for name, value in config.options().items() if name not in free}
    # Of tensors that are no model's, nothing is told and nothing raised.
    assert not any(architecture.config_class.told_by({"final_norm.weight": (), "x": (3,)}, {}).values())


class TestH3:
    """What is particular to H3."""

    architecture = ARCHITECTURES["h3"]

    def test_the_exact_recurrence_is_told_apart(self) -> None:
        model, x = make(self.architecture, "edifice", window_size=60), sequence(1, 60)
        exact = model.with_exact_recurrence()
        gap = (model.forward_prefixes(x) - exact.forward_prefixes(x)).abs().amax(dim=(0, 2))
        # Nothing has decayed in the first frames, much in the last.
        assert gap[:3].max() < 1e-6 < 1e-5 < gap[50:].max()
        assert model(x).isfinite().all()
        standard = make(self.architecture, "standard", window_size=60)
        assert standard.with_exact_recurrence() is None
        # What is left between them is the layer norm, which differs for tiny variances only.
        torch.testing.assert_close(exact(x), standard(x), rtol=1e-9, atol=1e-9)


class TestHyena:
    """What is particular to Hyena."""

    architecture = ARCHITECTURES["hyena"]

    @pytest.mark.parametrize("window", [1, 2, 9])
    def test_positions_are_from_zero_to_one(self, window: int) -> None:
        model = make(self.architecture, window_size=window)
        positions = model.blocks[0].filters[0].positions[:, 0]
        expected = torch.linspace(0, 1, window, dtype=torch.float32) if window > 1 else torch.zeros(1)
        torch.testing.assert_close(positions.float(), expected)

    def test_it_is_the_sum_over_the_past(self) -> None:
        """A block by its definition, frame by frame."""
        model, x = make(self.architecture, embed_dim=8, order=3, num_layers=1), sequence(1, 7, 8)
        (block,) = model.blocks
        past = block.conv.initial_state(1)
        y, *gates = block.proj(block.conv(block.norm(x), past)[0]).chunk(4, dim=-1)
        for make_filter, gate in zip(block.filters, gates, strict=True):
            f = make_filter()
            y = torch.stack([sum(f[t - s] * y[:, s] for s in range(t + 1)) for t in range(7)], dim=1) * gate
        expected = x + block.out_proj(y)
        expected = expected + block.ffn(block.ffn_norm(expected))
        torch.testing.assert_close(block(x, past)[0], expected)


class TestHymba:
    """What is particular to Hymba."""

    architecture = ARCHITECTURES["hymba"]

    def test_no_meta_tokens_simply_work(self) -> None:
        for propagation in (False, True):
            model = make(self.architecture, num_meta_tokens=0, meta_propagation=propagation)
            assert not any("meta" in name for name, _ in model.named_parameters())
            assert model(sequence(2, 5)).isfinite().all()

    def test_propagated_meta_tokens_are_positions_of_the_sequence(self) -> None:
        """With the projection the identity, meta tokens are what feeding them as frames would give."""
        options = {"embed_dim": 8, "num_meta_tokens": 3}
        model = make(self.architecture, meta_propagation=True, **options)
        plain = make(self.architecture, meta_propagation=True, embed_dim=8, num_meta_tokens=0)
        plain.load_state_dict({name: value for name, value in model.state_dict().items() if name != "meta_tokens"})
        x = sequence(2, 5, 8)
        fed = torch.cat([model.meta_tokens.expand(2, -1, -1), x], dim=1)
        torch.testing.assert_close(model(x), plain(fed), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            model.forward_prefixes(x), plain.forward_prefixes(fed)[:, 3:], rtol=1e-12, atol=1e-12
        )

    def test_propagated_meta_tokens_prime_the_scan_and_are_seen_by_every_query(self) -> None:
        model = make(self.architecture, meta_propagation=True)
        x = sequence(1, 6)
        before = model.forward_prefixes(x)
        with torch.no_grad():
            model.meta_tokens.neg_()
        changed = (model.forward_prefixes(x) - before).abs().amax(dim=(0, 2))
        assert (changed > 1e-6).all()

    def test_heads_must_divide_the_hidden_size(self) -> None:
        with pytest.raises(OptionError, match="hidden_size 10 and num_heads 4"):
            self.architecture.config_class(hidden_size=10, num_heads=4)

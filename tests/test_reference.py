"""The reference models against Edifice, against themselves, and their options."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from golden_cases import CASES, GOLDEN, load_case, metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from edifice_export.checkpoints.edifice import to_edifice_names
from edifice_reference.config import NUMERICS, OptionError
from edifice_reference.layers import initialize
from edifice_reference.registry import ARCHITECTURES, Architecture, get_architecture

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=str)
each_numerics = pytest.mark.parametrize("numerics", NUMERICS)


def make(architecture: Architecture, numerics: str = "standard", seed: int = 0, **options: Any) -> Any:
    model = architecture.model_class(architecture.config_class(**{**TINY, **options}), numerics).double().eval()
    initialize(model, seed)
    return model


def sequence(batch: int, length: int, width: int = TINY["embed_dim"], seed: int = 0) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    assert sum(parameter.numel() for parameter in model.parameters()) == said["actual_param_count"]


def test_tiny_variances_need_edifice_numerics() -> None:
    path = GOLDEN / "hymba_tinyvar.safetensors"
    model, example = load_case(path, "standard")
    assert (model(example["state_sequence"]) - example["output"]).abs().max() > 0.1


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*_taps.safetensors")), ids=lambda path: path.stem)
def test_every_layer_is_edifice(path: Path) -> None:
    model, example = load_case(GOLDEN / f"{path.stem.removesuffix('_taps')}.safetensors")
    with safe_open(path, framework="pt") as file:
        taps = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    layers = {name.partition("/")[0] for name in to_edifice_names(model, get_architecture(model_name(model))).values()}
    seen: list[str] = []
    for name, module in model.named_modules():
        parameters = [f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
        if not parameters:
            continue
        tap = to_edifice_names(model, get_architecture(model_name(model)))[parameters[0]].partition("/")[0]
        if tap.endswith("attn_compute"):
            continue

        def check(_module: nn.Module, _inputs: object, output: Tensor, tap: str = tap) -> None:
            expected = taps[tap]
            found = output if output.ndim == expected.ndim else output[:, None]
            difference = (found - expected[:, -found.shape[1] :]).abs().max()
            assert difference < 1e-5, f"the first layer that departs is {tap}, by {difference:.1e}"
            seen.append(tap)

        module.register_forward_hook(check)
    model(example["state_sequence"])
    assert set(seen) == {layer for layer in layers if not layer.endswith("attn_compute")}


def model_name(model: nn.Module) -> str:
    return next(known.name for known in ARCHITECTURES.values() if known.class_name == type(model).__name__)


@each_architecture
@each_numerics
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_every_prefix_is_the_window_that_ends_there(architecture: Architecture, numerics: str, batch: int) -> None:
    model = make(architecture, numerics)
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
    assert config.param_count == sum(parameter.numel() for parameter in model.parameters())
    output = model.eval()(torch.zeros(2, 3, config.embed_dim))
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

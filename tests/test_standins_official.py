"""Stand-ins against numbers of the official code: in float64, and as graphs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from module_cases import largest_error
from official import load_official
from torch import Tensor

import edifice_export as ee
from edifice_export.programs.source import load_source

MODELS = ["mamba1_small", "mamba2_small", "mamba2_g2_nbg", "mamba2_dssm"]
VISION = {
    "mambavision": ("mambavision_mixer", "mixer.input", "mixer.output_f64"),
    "vim": ("vim_mixer", "mixer0.input", "mixer0.output_f64"),
    "vmamba": ("vmamba_ss2d", "ss2d.input", "ss2d.output_f64"),
}
STRANGERS = Path(__file__).parent / "strangers"


def model_of(name: str) -> tuple[Any, dict[str, Tensor]]:
    """An official language model of stand-ins, with its weights."""
    config, weights, numbers = load_official(name)
    with ee.standins():
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    model = MambaLMHeadModel(MambaConfig(**config))
    assert model.state_dict().keys() == weights.keys()
    model.load_state_dict(weights)
    return model.eval(), numbers


@pytest.mark.parametrize("name", MODELS)
def test_a_language_model_is_the_official_one(name: str) -> None:
    model, numbers = model_of(name)
    model.double()
    cases = [key.removesuffix(".input_ids") for key in numbers if key.endswith(".input_ids")]
    for case in cases:
        ids, logits = numbers[f"{case}.input_ids"], numbers[f"{case}.logits_f64"]
        with torch.no_grad():
            assert (model(ids).logits - logits).abs().max() < 1e-9
            assert (model.extend(ids, model.initial_state(len(ids)))[0] - logits).abs().max() < 1e-9
            assert (model(ids, num_last_tokens=2).logits - logits[:, -2:]).abs().max() < 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_it_decodes_as_the_official_one(name: str) -> None:
    """A prompt at once, then token by token, with the states that the official code has then.

    The official step leaves dt_limit out, and so gives other logits than the whole does; ours gives those of the whole.
    """
    model, numbers = model_of(name)
    model.double()
    with ee.standins():
        from mamba_ssm.utils.generation import InferenceParams
    ids, logits, prompt = numbers["c0.input_ids"], numbers["c0.logits_f64"], int(numbers.get("c0.prompt_len", 6))
    carried = InferenceParams(max_seqlen=ids.shape[1], max_batch_size=len(ids))
    with torch.no_grad():
        assert (model(ids[:, :prompt], inference_params=carried).logits - logits[:, :prompt]).abs().max() < 1e-9
        for t in range(prompt, ids.shape[1]):
            carried.seqlen_offset = t
            found = model(ids[:, t : t + 1], inference_params=carried).logits
            assert (found - logits[:, t : t + 1]).abs().max() < 1e-9
    for index, state in enumerate(carried.key_value_memory_dict[1]):
        official = numbers.get(f"c0.after_decode.layer1.state{index}_f64")
        assert official is None or (state - official).abs().max() < 1e-9


@pytest.mark.parametrize("name", [MODELS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS[1:])])
def test_it_is_exported_with_its_stream(name: str, tmp_path: Path) -> None:
    model, numbers = model_of(name)
    ids, logits = numbers["c0.input_ids"], numbers["c0.logits_f64"]
    free = {"input_ids": {0: "batch", 1: "sequence"}}
    bundle = ee.export(model, (ids[:, :6],), dynamic_shapes=free, output_names=["logits"], output=tmp_path / "lm")
    assert list(bundle.manifest.graphs) == ["window", "stream", "prefill"]
    loaded = ee.load(bundle)
    assert largest_error(loaded(ids.numpy()), logits.numpy()) < 1e-5
    stream = loaded.stream(batch=len(ids))
    assert largest_error(stream.prefill(ids[:, :7].numpy()), logits[:, 6].numpy()) < 1e-5
    for t in range(7, ids.shape[1]):
        assert largest_error(stream.step(ids[:, t].numpy()), logits[:, t].numpy()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", list(VISION))
def test_a_mixer_of_images_is_the_official_one(name: str, tmp_path: Path) -> None:
    file, given, expected = VISION[name]
    _, weights, numbers = load_official(file)
    source = load_source(f"{STRANGERS / 'vision.py'}:{name}")
    assert not any(module.partition(".")[0] == "mamba_ssm" for module in sys.modules)
    mixer = getattr(source.module, "mixer", source.module)
    assert mixer.state_dict().keys() == weights.keys()
    mixer.load_state_dict(weights)
    bundle = ee.export(source.module, source.args, dynamic_shapes=source.dynamic_shapes, output=tmp_path / name)
    assert set(bundle.manifest.sizes) == {"batch", "height", "width"}
    assert bundle.manifest.parity["sizes"] > 8
    x, official = numbers[given], numbers[expected]
    if mixer is source.module:
        found = ee.load(bundle)(x.numpy())
    else:  # a sequence is an image of one row
        found = ee.load(bundle)(x.transpose(1, 2)[:, :, None].numpy())[:, :, 0].swapaxes(1, 2)
    assert largest_error(found, official.numpy()) < 1e-5
    with torch.no_grad():
        assert (in_float64(mixer)(x.double()) - official).abs().max() < 1e-9


def in_float64(module: torch.nn.Module) -> Any:
    """The module where what it asks for in float32 is float64, as in the runs that made the numbers."""
    from edifice_export.programs.private_copy import Float64

    def run(x: Tensor) -> Any:
        with Float64():
            return module.double()(x)

    return run

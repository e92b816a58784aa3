"""The reference models of builds and bundles: float32, in inference mode, with their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edifice_reference.models.config import Config, OptionError
from edifice_reference.models.layers import initialize
from edifice_reference.models.registry import Architecture, get_architecture

from ..bundle.bundle import Bundle
from ..errors import CheckError, RequestError
from ..machine import physical_memory
from ..weights import Checkpoint, check_against, load_into, read_checkpoint

if TYPE_CHECKING:
    from edifice_reference.models.contract import ReferenceModel

__all__ = ["make_empty", "make_reference", "reference_of"]

_SCORES = 3
"""Copies of one window's attention scores that the runtime holds at once."""

_COPIES = 6
"""Copies of the weights that a build holds at the least, in its worst moment: traces, float64, bytes of files."""


def make_reference(
    architecture: Architecture, config: Config, numerics: str, seed: int, checkpoint: Checkpoint | None
) -> ReferenceModel:
    """A reference model with the weights of a checkpoint, or fresh ones from a seed.

    Raises:
        RequestError: it would not fit this machine, or the checkpoint is not of this model.
    """
    _check_size(config)
    if checkpoint is None:
        model = architecture.model_class(config, numerics)
        initialize(model, seed)
    else:
        # Before anything is allocated: what a file claims of its model costs nothing.
        names = check_against(make_empty(architecture, config), architecture, checkpoint)
        model = architecture.model_class(config, numerics)
        load_into(model, checkpoint, names)
    return model.eval()


def make_empty(architecture: Architecture, config: Config) -> ReferenceModel:
    """A model that has names and shapes and takes no memory, on torch's meta device."""
    import torch

    with torch.device("meta"):
        return architecture.model_class(config)


def reference_of(bundle: Bundle) -> ReferenceModel:
    """The reference model that a bundle was made from, with the weights that it carries.

    Raises:
        CheckError: the manifest's architecture or options are none that there are, or the weights not of that model.
    """
    manifest = bundle.manifest
    try:
        architecture = get_architecture(manifest.program.name)
        config = architecture.config_class(**manifest.program.options)
    except (OptionError, TypeError) as error:
        raise CheckError(
            f"bundle {bundle.path}: its manifest names no model: {error}; build the bundle again"
        ) from error
    assert manifest.reference is not None, "an architecture has one, see manifest_reader"
    assert manifest.program.numerics is not None
    try:
        bundle.check(manifest.reference)
        checkpoint = read_checkpoint(bundle.file(manifest.reference))
        return make_reference(architecture, config, manifest.program.numerics, manifest.seed, checkpoint)
    except RequestError as error:
        raise CheckError(f"bundle {bundle.path}: its reference can't be made: {error}") from error


def _check_size(config: Config) -> None:
    heads, meta = getattr(config, "num_heads", 1), getattr(config, "num_meta_tokens", 0)
    scores = heads * config.window_size * (config.window_size + meta)
    needed = 4 * (config.param_count * _COPIES + scores * _SCORES)
    memory = physical_memory()
    if memory is not None and needed > memory:
        raise RequestError(
            f"a model with these options has {config.param_count:,} parameters and {scores:,} attention scores: "
            f"building it takes at least {needed / 2**30:,.0f} GiB of memory and this machine has "
            f"{memory / 2**30:,.0f}; choose smaller options"
        )

"""From a checkpoint to the parameters of a model: all of them and none besides, finite, in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edifice_reference.models.registry import Architecture

from ..errors import RequestError
from .checkpoint import CONVERTED, Checkpoint, dtype_of

if TYPE_CHECKING:
    from torch import Tensor

    from edifice_reference.models.contract import ReferenceModel

__all__ = ["check_against", "load_into", "parameter"]


def check_against(model: ReferenceModel, architecture: Architecture, checkpoint: Checkpoint) -> dict[str, str]:
    """Checks that a checkpoint's tensors are the parameters of a model: all of them, none left over.

    Args:
        model: may be without memory, on torch's meta device.
        architecture: of the model.
        checkpoint: the tensors.

    Returns:
        The parameter's name for each of the checkpoint's.

    Raises:
        RequestError: a tensor is missing, unexpected, or has another shape, a type that does not become the model's,
            or a number that is not finite there; the message names it as its source does, and says what was expected
            and what was found.
    """
    parameters, source = dict(model.named_parameters()), checkpoint.source
    try:
        named = {source.theirs(name, architecture): name for name in parameters}
    except RequestError as error:
        raise RequestError(f"weights {checkpoint.place}: {error}") from error
    _check_names(checkpoint, architecture, set(named))
    for theirs, name in named.items():
        _check_tensor(checkpoint, theirs, source.lay_out(parameters[name], name))
    return named


def load_into(model: ReferenceModel, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    """Copies a checkpoint's tensors into a model's parameters, as `check_against` found that they belong."""
    import torch

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for theirs, name in names.items():
            parameters[name].copy_(parameter(checkpoint, theirs, name))


def parameter(checkpoint: Checkpoint, theirs: str, own: str) -> Tensor:
    """A checkpoint's tensor in the reference model's layout and type, which is float32 whatever it had: see CONVERTED.

    Args:
        checkpoint: that was checked, see check_against.
        theirs: its name there.
        own: the parameter's.
    """
    return checkpoint.source.lay_out(checkpoint.tensors[theirs], own).float().contiguous()


def _check_names(checkpoint: Checkpoint, architecture: Architecture, expected: set[str]) -> None:
    missing = sorted(expected - set(checkpoint.tensors))
    unexpected = sorted(
        name
        for name, tensor in checkpoint.tensors.items()
        # Edifice writes parameters of size zero, such as the keys of no meta tokens.
        if name not in expected and (tensor.numel() > 0 or not checkpoint.source.knows(name, architecture))
    )
    problems = [
        f"{len(names)} {kind} ({', '.join(f'{name:.100}' for name in names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise RequestError(
            f"weights {checkpoint.place}: its tensors are not those of the {architecture.name} that was asked for: "
            f"{' and '.join(problems)}; check the architecture and its options"
        )


def _check_tensor(checkpoint: Checkpoint, name: str, expected: Tensor) -> None:
    place, tensor = f"weights {checkpoint.place}: {name}", checkpoint.tensors[name]
    if tensor.shape != expected.shape:
        raise RequestError(f"{place} should be {list(expected.shape)} and is {list(tensor.shape)}; check the options")
    if tensor.dtype != expected.dtype and dtype_of(tensor) not in CONVERTED:
        raise RequestError(
            f"{place} should be {dtype_of(expected)}, or one of {', '.join(CONVERTED)}, and is {dtype_of(tensor)}; "
            "convert it before"
        )
    finite = tensor.to(expected.dtype).isfinite()
    if not finite.all():
        index = (~finite).nonzero()[0]
        raise RequestError(
            f"{place} holds {tensor[tuple(index)].item()} at {index.tolist()}; give weights that are finite in float32"
        )

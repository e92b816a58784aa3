"""What somebody's module takes: by its example and its free sizes, and at which of them it computes."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..arguments import several
from ..errors import RequestError, brief
from ..specification import InputSpec, Size, Sizes, Values
from ..values import draw
from .source import Source

__all__ = ["Free", "input_specs", "output_names", "why_not", "workable_sizes"]

_TYPES = {torch.float32, torch.float16, torch.int64, torch.int32, torch.bool}


@dataclasses.dataclass(frozen=True)
class Free:
    """A free size of an example: its name, the number that it has there, and between what it may be."""

    name: str
    example: int
    least: int = 1
    most: int | None = None


def input_specs(source: Source) -> tuple[tuple[InputSpec, ...], dict[str, Free]]:
    """The inputs of a source, and their free sizes by name.

    Raises:
        RequestError: an argument that is no tensor or of another type, sizes that contradict each other or the example.
    """
    parameters = _parameters(source)
    names = list(source.input_names) if source.input_names is not None else parameters
    if len(names) != len(source.args):
        raise RequestError(
            f"{len(names)} input names ({', '.join(names)}) for {len(source.args)} args; give one for each"
        )
    odd = [name for name in (*source.values,) if name not in names]
    if odd:
        raise RequestError(f"values: {odd[0]} is no input; there are {', '.join(names)}")
    free: dict[str, Free] = {}
    specs = []
    half = any(value.dtype in (torch.float16, torch.bfloat16) for value in source.module.parameters())
    for name, given, dims in zip(names, source.args, _dims(source, parameters), strict=True):
        if not isinstance(given, torch.Tensor):
            raise RequestError(f"args: {name} is a {type(given).__name__}; every argument must be a tensor")
        if given.is_meta:
            raise RequestError(f"args: {name} is on torch's meta device, without numbers; give an example of some")
        dtype = torch.float32 if half and given.is_floating_point() else given.dtype
        if dtype not in _TYPES:
            raise RequestError(
                f"args: {name} is {str(dtype).removeprefix('torch.')}; a graph takes float32, float16, int64, int32 or "
                "bool"
            )
        shape = tuple(_size(name, axis, size, dims.get(axis), free) for axis, size in enumerate(given.shape))
        if not given.dim():
            raise RequestError(f"args: {name} is a number; give it as a tensor with an axis, or make it a constant")
        values = source.values.get(name) or _values(given)
        specs.append(InputSpec(name, str(dtype).removeprefix("torch."), shape, values))
    return tuple(specs), free


def output_names(source: Source, count: int) -> tuple[str, ...]:
    """Names for so many outputs.

    Raises:
        RequestError: another number of names was given.
    """
    if source.output_names is None:
        return ("output",) if count == 1 else tuple(f"output_{index}" for index in range(count))
    if len(source.output_names) != count:
        raise RequestError(f"output_names: got {len(source.output_names)} for {count} outputs; give one for each")
    return tuple(source.output_names)


def _parameters(source: Source) -> list[str]:
    """Names of forward's parameters that the args are for; of *args, with a number."""
    names: list[str] = []
    for parameter in inspect.signature(source.module.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{index}" for index in range(len(source.args) - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    if len(names) < len(source.args):
        raise RequestError(f"args: got {len(source.args)}, and forward takes {len(names)} ({', '.join(names)})")
    return names[: len(source.args)]


def _dims(source: Source, parameters: Sequence[str]) -> list[Mapping[int, Any]]:
    """Of every argument, what is said of its axes."""
    said = source.dynamic_shapes
    if said is None:
        return [{} for _ in parameters]
    if isinstance(said, Mapping):
        odd = [name for name in said if name not in parameters]
        if odd:
            raise RequestError(f"dynamic_shapes: {odd[0]!r} is no argument; there are {', '.join(parameters)}")
        entries = [said.get(name) for name in parameters]
    else:
        entries = list(said)
        if len(entries) != len(parameters):
            raise RequestError(
                f"dynamic_shapes: got {len(entries)} entries for {len(parameters)} arguments; give each one"
            )
    return [_axes(name, entry, given) for name, entry, given in zip(parameters, entries, source.args, strict=True)]


def _axes(name: str, entry: Any, given: Any) -> Mapping[int, Any]:
    rank = given.dim() if isinstance(given, torch.Tensor) else 0
    if not isinstance(entry, Mapping) and entry is not None:
        several(f"dynamic_shapes of {name}", entry, "names, or a dict of axis to name")
    axes = dict(entry) if isinstance(entry, Mapping) else dict(enumerate(entry or ()))
    for axis in axes:
        if type(axis) is not int or not -rank <= axis < rank:
            raise RequestError(f"dynamic_shapes: {name} has {rank} axes, and {axis!r} is none of them")
    return {axis % rank: said for axis, said in axes.items()}


def _size(name: str, axis: int, example: int, said: Any, free: dict[str, Free]) -> int | Size:
    """A size as it was declared; free ones are noted."""
    hint = getattr(getattr(said, "type", None), "name", None)  # torch.export.Dim.AUTO and its like
    if said is None or hint == "STATIC" or said == example:
        return example
    if isinstance(said, str) and said.isidentifier():
        declared = Free(said, example)
    elif hint in ("AUTO", "DYNAMIC"):
        declared = Free(f"{name}_{axis}", example, said.min or 1, said.max)
    elif isinstance(said, torch.export.Dim) and said.__name__.isidentifier():
        # torch's own least is 0 or 2 where nobody said any.
        declared = Free(said.__name__, example, max(1, said.min) if said.min > 2 else 1, _most(said.max))
    else:
        raise RequestError(
            f"dynamic_shapes: axis {axis} of {name} is {said!r}; name a free size by a word or a torch.export.Dim, "
            "and leave fixed ones out"
        )
    known = free.setdefault(declared.name, declared)
    if known.example != example:
        raise RequestError(
            f"dynamic_shapes: {declared.name} is {known.example} in one example and {example} in axis {axis} of "
            f"{name}; sizes of one name must be equal"
        )
    return Size((declared.name,))


def _most(most: Any) -> int | None:
    return int(most) if isinstance(most, int) and most < 2**31 else None


def _values(example: torch.Tensor) -> Values:
    """What an example tells: integers go from 0 to its largest; ones, and zeros after them if any, are a mask."""
    if example.is_floating_point():
        return Values("normal")
    flags = example.long()
    if bool((flags[..., 0] == 1).all()) and int(flags.min()) >= 0 and bool((flags.diff(dim=-1) <= 0).all()):
        return Values("mask")
    return Values("integers", max(0, int(flags.max())) + 1)


def workable_sizes(
    module: nn.Module, inputs: Sequence[InputSpec], free: Mapping[str, Free], count: int = 3
) -> tuple[Sizes, ...]:
    """Sizes that a module bears: first those to trace at, above 1 and none equal to another, then others to compare.

    Raises:
        RequestError: it bears no such sizes but its example's.
    """
    if not free:
        return ({},)
    found: list[Sizes] = []
    refused: str | None = None
    for sizes in _candidates(free):
        # What is frozen may be the most or the least of something, of any size: the others differ in all of them.
        new = all(sizes[name] != known[name] for known in found for name in free)
        sound = len(set(sizes.values())) == len(sizes) and min(sizes.values()) > 1
        if not (new and (found or sound)):
            continue
        problem = why_not(module, inputs, sizes)
        if problem is None:
            found.append(sizes)
        else:
            refused = refused or f"at {', '.join(f'{name} {size}' for name, size in sizes.items())} it fails: {problem}"
        if len(found) == count:
            break
    if len(found) < 2:
        tried = ", ".join(f"{name} {each.example}" for name, each in free.items())
        raise RequestError(
            f"dynamic_shapes: {', '.join(free)} should be free, and the module takes no other sizes than {tried}, or "
            f"none that differ from each other ({refused or 'limits leave none'}); declare what it can't change as "
            "fixed"
        )
    return tuple(found)


def why_not(module: nn.Module, inputs: Sequence[InputSpec], sizes: Sizes) -> str | None:
    """What a module raises at inputs of these sizes; None where it takes them."""
    generator = np.random.default_rng(0)
    try:
        with torch.no_grad():
            module(*(torch.from_numpy(draw(spec, sizes, generator)) for spec in inputs))
    except Exception as error:  # whatever somebody's code raises
        return f"{type(error).__name__}: {brief(error)}"
    return None


_PRIMES = (11, 3, 17, 5, 7, 13, 2, 19, 23)


def _candidates(free: Mapping[str, Free]) -> Iterator[Sizes]:
    """Sizes from the likeliest on: the example's, with multiples where two are equal, primes, and multiples."""

    def within(numbers: Sequence[int]) -> Iterator[Sizes]:
        sizes = dict(zip(free, numbers, strict=True))
        if all(each.least <= sizes[name] <= (each.most or sizes[name]) for name, each in free.items()):
            yield sizes

    examples = [each.example for each in free.values()]
    yield from within(examples)
    for step in itertools.permutations(range(1, len(free) + 2), len(free)):
        yield from within([size * factor for size, factor in zip(examples, step, strict=True)])
    for offset in range(len(_PRIMES) // 2):
        yield from within([_PRIMES[(offset + index) % len(_PRIMES)] for index in range(len(free))])
    for factor in (2, 3):
        yield from within([size * factor for size in examples])

"""Source: somebody's module with what it is called with, and how one is found where the user names code."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..arguments import mapping, several, text, whole_number
from ..errors import ExportError, RequestError
from ..specification import KINDS, Values
from ..standing_in.context import standins

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Source", "load_source"]

_ROOM = Path(__file__).resolve().parent.parent / "standing_in"
"""An error of a stand-in is told at the line that asked for it."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A torch module and what it is called with, as torch.onnx.export takes them.

    Attributes:
        module: its forward computes what is exported; it is not changed.
        args: example inputs in forward's order, tensors.
        dynamic_shapes: which sizes are free, by input in forward's order or by its parameters' names: for each a dict
            of axis to name (or torch.export.Dim), a sequence with one entry an axis, or None where all are fixed. Equal
            names are equal sizes.
        input_names: of the graph's inputs; forward's parameters if None.
        output_names: `output`, or `output_0` and on, if None.
        values: what inputs may hold, by name, where their example does not tell: see specification.Values.

    Raises:
        RequestError: one of them is of another type.
    """

    module: nn.Module
    args: Sequence[Any]
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    values: Mapping[str, Values] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _is_module(self.module):
            raise RequestError(f"module must be a torch.nn.Module, got {self.module!r:.80}")
        object.__setattr__(self, "args", tuple(several("args", self.args, "tensors, such as (x,)")))
        if self.dynamic_shapes is not None and not isinstance(self.dynamic_shapes, Mapping):
            several("dynamic_shapes", self.dynamic_shapes, "what is free, or a dict of it")
        for what, names in (("input_names", self.input_names), ("output_names", self.output_names)):
            if names is not None:
                object.__setattr__(
                    self, what, [text(f"each of {what}", name) for name in several(what, names, "texts")]
                )
        for name, values in mapping("values", self.values, "edifice_export.Values by name").items():
            if not isinstance(values, Values):
                raise RequestError(f"values: {name} must be an edifice_export.Values, got {values!r:.80}")
            text(f"values: kind of {name}", values.kind, KINDS)
            if values.below is not None:
                whole_number(f"values: below of {name}", values.below, 1)


def load_source(name: str) -> Source:
    """Runs code that the user named, within standins, and gives what it makes.

    Args:
        name: `FILE.py:NAME` or `package.module:NAME`, where NAME is a Source, or a module with its `args` in it (and
            what else a Source has, by those names); or a callable without arguments that returns either.

    Raises:
        RequestError: there is no such file, module or name, it is something else, or it fails.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute.isidentifier():
        raise RequestError(
            f"{name!r}: name code as FILE.py:NAME or package.module:NAME, where NAME() returns an edifice_export.Source"
        )
    try:
        with standins():
            found = getattr(_import(place), attribute, None)
            if found is None:
                raise RequestError(f"{place}: has no {attribute}; define it, or name another")
            made = found() if callable(found) and not _is_module(found) else found
    except ExportError:
        raise
    except Exception as error:  # whatever the user's code raises
        frames = traceback.extract_tb(error.__traceback__)
        where = next((frame for frame in reversed(frames) if _ROOM not in Path(frame.filename).parents), frames[-1])
        raise RequestError(
            f"{name}: failed with {type(error).__name__}: {error} at {where.filename}:{where.lineno}; --debug shows "
            "more"
        ) from error
    if _is_module(made) and hasattr(made, "args"):
        fields = [field.name for field in dataclasses.fields(Source) if field.name != "module"]
        made = Source(made, **{name: getattr(made, name) for name in fields if hasattr(made, name)})
    if not isinstance(made, Source):
        raise RequestError(
            f"{name}: gave {_article(type(made).__name__)}, and should give an edifice_export.Source(module, args, "
            "dynamic_shapes=...), or a module with its args in it"
        )
    return made


def _is_module(found: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(found, torch.nn.Module)


def _article(word: str) -> str:
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"


def _import(place: str) -> ModuleType:
    if not place.endswith(".py"):
        if not all(part.isidentifier() for part in place.split(".")):
            raise RequestError(f"{place!r} is neither a .py file nor the dotted name of a module; name one")
        sys.path.insert(0, "")  # modules beside the working folder, as `python -m` finds them
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise RequestError(f"module {place}: can't be imported: {error}; check its name") from error
        finally:
            sys.path.remove("")
    path = Path(place)
    if not path.is_file():
        raise RequestError(f"{place}: there is no such file; check the path")
    # Under a name that is no other module's; as when it is run, it finds the modules beside it.
    name, folder = f"source_{path.stem}", str(path.resolve().parent)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module

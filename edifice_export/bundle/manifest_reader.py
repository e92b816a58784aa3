"""Reads manifest.json with suspicion: every field and path in it, and then what it means, is checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckError, RequestError
from ..specification import DTYPES, POSITIONS, InputSpec, OutputSpec, Size, StateSpec, TensorSpec, Values, shape_of
from .manifest import (
    ARCHITECTURE,
    MANIFEST,
    SCHEMA_VERSION,
    FileEntry,
    GraphEntry,
    Manifest,
    ProgramEntry,
    SequenceEntry,
)
from .manifest_meaning import check_meaning

__all__ = ["listed_files", "read_manifest"]

_MAX_BYTES = 16 * 2**20
_MAX_FILES = 2**15
"""Of a bundle."""

_ALWAYS = {"schema_version": int, "opset": int, "weights": dict, "parity": dict}
"""What the manifests of all schemas have, beside versions, graphs and files."""

_MAX_SIZE = 2**20
"""Of what a graph is made for."""

_WHOLE = ("int64", "int32", "bool")
_VALUES = {"normal": ("float32", "float16"), "ids": _WHOLE, "integers": _WHOLE, "mask": _WHOLE}
"""Of each kind of values, the types that hold them."""

_MAX_BELOW = 2**31
"""Of ids and integers: what all types hold that hold them."""

_INITIAL = {"float32": (-(2.0**127), 2.0**127), "int64": (0, 2**62), "int32": (0, 2**31 - 1)}
"""Of each type that a state may have, the least and the largest value that it may start from."""


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks the manifest of a bundle.

    Raises:
        RequestError: the folder is not a bundle, or of another schema than this version knows.
        CheckError: the manifest is damaged: not JSON, a field missing or of the wrong kind, a path outside the bundle.
    """
    return _parse(_open(folder))


def listed_files(folder: Path) -> dict[str, FileEntry]:
    """The files that the manifest of a bundle vouches for, whatever its schema.

    Raises:
        RequestError: the folder is not a bundle.
        CheckError: the manifest is damaged, or lacks what every manifest that this tool ever wrote has.
    """
    reader = _open(folder)
    for name, kind in _ALWAYS.items():
        reader.take(name, kind)
    if "edifice-export" not in reader.text_map("versions"):
        raise reader.error("'versions' don't name edifice-export, which makes bundles")
    files = _parse_files(reader)
    models = [reader.inside(graph.take("model", str)) for graph in reader.each("graphs").values()]
    if not models:
        raise reader.error("there are no graphs")
    reference = reader.optional("reference", str)
    for path in (*([reader.inside(reference)] if reference is not None else []), *models):
        if path not in files:
            raise reader.error(f"{path!r} is used and not listed under files")
    return files


def _open(folder: Path) -> _Reader:
    path = folder / MANIFEST
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"bundle {folder}: is a file, and a bundle is a folder; name that")
    if not folder.is_dir():
        raise RequestError(f"bundle {folder}: there is no such folder; make one with `edifice-export build`")
    if not path.is_file():
        raise RequestError(
            f"bundle {folder}: has no {MANIFEST}, so it is not a bundle; make one with `edifice-export build`"
        )
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckError(f"bundle {folder}: {MANIFEST} is larger than {_MAX_BYTES} bytes; build the bundle again")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckError(f"bundle {folder}: {MANIFEST} is not JSON ({error}); build the bundle again") from error
    return _Reader(folder, content, "the manifest")


class _Reader:
    """Takes typed fields out of JSON; says which field of which bundle is wrong."""

    def __init__(self, folder: Path, content: Any, place: str, root: Path | None = None) -> None:
        self.folder, self.content, self.place = folder, content, place
        self.root = folder.resolve() if root is None else root
        if not isinstance(content, dict):
            raise self.error(f"{place} is not a JSON object")

    def error(self, problem: str) -> CheckError:
        return CheckError(f"bundle {self.folder}: {MANIFEST}: {problem}; build the bundle again")

    def take(self, name: str, kind: type) -> Any:
        if name not in self.content:
            raise self.error(f"{self.place} lacks the field {name!r}")
        value = self.content[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"{name!r} of {self.place} should be {kind.__name__} and is {value!r:.60}")
        return value

    def optional(self, name: str, kind: type) -> Any:
        """A field that may be null, which is None; it must be there all the same."""
        return None if name in self.content and self.content[name] is None else self.take(name, kind)

    def text_map(self, name: str) -> dict[str, str]:
        found: dict[str, str] = self.take(name, dict)
        if not all(isinstance(value, str) for value in found.values()):
            raise self.error(f"{name!r} of {self.place} should hold texts only")
        return found

    def inside(self, path: Any) -> str:
        """A path that stays in the bundle whatever links there are."""
        if not isinstance(path, str) or not path or not path.isprintable() or "\\" in path or ":" in path:
            raise self.error(f"{path!r} is not the path of a file of the bundle")
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts:
            raise self.error(f"the path {path!r} leaves the bundle")
        if not (self.folder / pure).resolve().is_relative_to(self.root):
            raise self.error(f"the path {path!r} leaves the bundle through a link")
        return path

    def each(self, name: str) -> dict[str, _Reader]:
        found: dict[str, Any] = self.take(name, dict)
        return {key: self.part(value, f"{name} {key!r}") for key, value in found.items()}

    def part(self, content: Any, place: str) -> _Reader:
        return _Reader(self.folder, content, place, self.root)


def _parse(reader: _Reader) -> Manifest:
    schema = reader.take("schema_version", int)
    if schema < 1:
        raise reader.error(f"schema_version {schema} is none that there was")
    if schema > SCHEMA_VERSION:
        raise RequestError(
            f"bundle {reader.folder}: has schema {schema}, newer than {SCHEMA_VERSION}, the newest read here; "
            "upgrade edifice-export"
        )
    if schema < SCHEMA_VERSION:
        raise RequestError(f"bundle {reader.folder}: has schema {schema}, older than {SCHEMA_VERSION}; build it again")
    files = _parse_files(reader)
    graphs = {name: _parse_graph(entry) for name, entry in reader.each("graphs").items()}
    reference = reader.optional("reference", str)
    manifest = Manifest(
        schema_version=schema,
        program=_parse_program(reader.part(reader.take("program", dict), "program")),
        precision=reader.take("precision", str),
        target=reader.take("target", str),
        optimized=reader.take("optimized", bool),
        inlined=reader.take("inlined", bool),
        opset=reader.take("opset", int),
        seed=reader.take("seed", int),
        param_count=reader.take("param_count", int),
        weights=reader.take("weights", dict),
        versions=reader.text_map("versions"),
        sizes=_parse_sizes(reader),
        frames=reader.optional("frames", str),
        graphs=graphs,
        states=tuple(_parse_state(reader, content) for content in reader.take("states", list)),
        reference=reader.inside(reference) if reference is not None else None,
        files=files,
        parity=_parse_parity(reader),
    )
    check_meaning(manifest, reader.error)
    return manifest


def _parse_program(reader: _Reader) -> ProgramEntry:
    program = ProgramEntry(
        kind=reader.take("kind", str),
        name=reader.take("name", str),
        options=reader.take("options", dict),
        numerics=reader.optional("numerics", str),
    )
    if program.kind == ARCHITECTURE:
        reader.part(program.options, "options").take("window_size", int)
    return program


def _parse_parity(reader: _Reader) -> dict[str, Any]:
    parity: dict[str, Any] = reader.take("parity", dict)
    reader.part(parity, "parity").take("tolerance", float)
    return parity


def _parse_sizes(reader: _Reader) -> dict[str, int]:
    sizes = reader.part(reader.take("sizes", dict), "sizes")
    found = {name: sizes.take(name, int) for name in sizes.content}
    for name, size in found.items():
        if Size.parse(name).symbol is None or not 1 <= size <= _MAX_SIZE:
            raise reader.error(f"the size {name!r:.60} is {size}, and should be a word, of 1 to {_MAX_SIZE}")
    return found


def _parse_files(reader: _Reader) -> dict[str, FileEntry]:
    listed = reader.take("files", dict)
    if len(listed) > _MAX_FILES:
        raise reader.error(f"{len(listed)} files are listed, more than {_MAX_FILES}, which no bundle has")
    files = {
        reader.inside(path): FileEntry(entry.take("size", int), entry.take("sha256", str))
        for path, entry in reader.each("files").items()
    }
    for path, entry in files.items():
        if entry.size < 0:
            raise reader.error(f"the size of {path!r} is {entry.size}")
    return files


def _parse_graph(reader: _Reader) -> GraphEntry:
    return GraphEntry(
        model=reader.inside(reader.take("model", str)),
        inputs=tuple(_parse_input(reader, entry) for entry in reader.take("inputs", list)),
        outputs=tuple(_parse_output(reader, entry) for entry in reader.take("outputs", list)),
        test_data=tuple(reader.inside(path) for path in reader.take("test_data", list)),
        limits=_parse_limits(reader),
        test_sequence=_parse_test_sequence(reader),
        weights=_parse_weights(reader),
    )


def _parse_weights(reader: _Reader) -> str | None:
    weights = reader.optional("weights", str)
    if weights is None:
        return None
    model, weights = (reader.inside(path) for path in (reader.take("model", str), weights))
    if PurePosixPath(weights).parent != PurePosixPath(model).parent or weights == model:
        raise reader.error(f"the weights {weights!r:.80} of {reader.place} are not a file beside {model!r:.80}")
    return weights


def _parse_test_sequence(reader: _Reader) -> SequenceEntry | None:
    if reader.content.get("test_sequence") is None:
        return None
    entry = reader.part(reader.content["test_sequence"], f"the test sequence of {reader.place}")
    return SequenceEntry(
        entry.inside(entry.take("folder", str)),
        tuple(_parse_input(entry, tensor) for tensor in entry.take("inputs", list)),
        tuple(_parse_output(entry, tensor) for tensor in entry.take("outputs", list)),
    )


def _parse_state(reader: _Reader, content: Any) -> StateSpec:
    tensor = _parse_tensor(reader, content)
    initial = content.get("initial")
    if tensor.dtype not in _INITIAL:
        raise reader.error(f"the state {tensor.name} should be {' or '.join(_INITIAL)}, and is {tensor.dtype!r:.60}")
    if isinstance(initial, str):
        return StateSpec(tensor.name, tensor.dtype, tensor.shape, reader.inside(initial))
    low, high = _INITIAL[tensor.dtype]
    if type(initial) not in {int, type(low)} or not low <= initial <= high:
        raise reader.error(f"the initial value of {tensor.name} should be a number or a file, and is {initial!r:.60}")
    return StateSpec(tensor.name, tensor.dtype, tensor.shape, initial)


def _parse_limits(reader: _Reader) -> dict[str, tuple[int, int | None]]:
    limits: dict[str, tuple[int, int | None]] = {}
    for symbol, bounds in reader.take("limits", dict).items():
        match bounds:
            case [int(least), None] if type(least) is int and least >= 1:
                limits[symbol] = least, None
            case [int(least), int(most)] if type(least) is type(most) is int and 1 <= least <= most:
                limits[symbol] = least, most
            case _:
                raise reader.error(
                    f"the limits of {symbol!r:.60} in {reader.place} should be [least, most], from 1 on, and are "
                    f"{bounds!r:.60}"
                )
    return limits


def _parse_input(reader: _Reader, content: Mapping[str, Any]) -> InputSpec:
    tensor = _parse_tensor(reader, content)
    entry = reader.part(content, f"a tensor of {reader.place}")
    said = entry.part(entry.take("values", dict), f"the values of {tensor.name}")
    kind, below = said.take("kind", str), said.optional("below", int)
    bounded = kind in ("ids", "integers")
    fits = below is not None and 1 <= below <= _MAX_BELOW if bounded else below is None
    if tensor.dtype not in _VALUES.get(kind, ()) or not fits:
        raise entry.error(f"{tensor.name} is {tensor.dtype}, and its values should not be {said.content!r:.80}")
    return InputSpec(tensor.name, tensor.dtype, tensor.shape, Values(kind, below))


def _parse_output(reader: _Reader, content: Mapping[str, Any]) -> OutputSpec:
    tensor = _parse_tensor(reader, content)
    entry = reader.part(content, f"a tensor of {reader.place}")
    position = entry.take("position", str)
    if position not in POSITIONS:
        raise entry.error(f"the position of {tensor.name} should be {', '.join(POSITIONS)}, and is {position!r:.60}")
    return OutputSpec(tensor.name, tensor.dtype, tensor.shape, position)


def _parse_tensor(reader: _Reader, content: Mapping[str, Any]) -> TensorSpec:
    entry = reader.part(content, f"a tensor of {reader.place}")
    shape = entry.take("shape", list)
    if not all((isinstance(dim, str) and dim) or (type(dim) is int and dim > 0) for dim in shape):
        raise entry.error(f"the shape {shape!r:.60} should hold positive sizes and symbols only")
    name, dtype = entry.take("name", str), entry.take("dtype", str)
    if dtype not in DTYPES:
        raise entry.error(f"the type {dtype!r:.60} of {name!r:.60} is not {', '.join(DTYPES)}")
    return TensorSpec(name, dtype, shape_of(*shape))

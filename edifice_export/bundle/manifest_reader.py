"""Reads manifest.json with suspicion: every field, path and promise in it is checked."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from edifice_reference.models.config import MAX_WINDOW, NUMERICS

from ..errors import CheckError, RequestError
from ..machine import physical_memory
from ..specification import BATCH, SEQUENCE, StateSpec, TensorSpec
from .file_limits import file_limits
from .manifest import GRAPHS, MANIFEST, SCHEMA_VERSION, FileEntry, GraphEntry, Manifest, SequenceEntry

__all__ = ["listed_files", "read_manifest"]

_MAX_BYTES = 16 * 2**20
_MAX_FILES, _MAX_SETS = 2**15, 16
"""Of a bundle, and test data sets of a graph."""

_ALWAYS = {
    "schema_version": int,
    "architecture": str,
    "options": dict,
    "numerics": str,
    "opset": int,
    "weights": dict,
    "reference": str,
    "parity": dict,
}
"""What the manifests of all schemas have, beside versions, graphs and files."""

_INITIAL = {"float32": (-(2.0**127), 2.0**127), "int64": (0, 2**62)}
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
    for path in (reader.inside(reader.content["reference"]), *models):
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
    manifest = Manifest(
        schema_version=schema,
        architecture=reader.take("architecture", str),
        options=reader.take("options", dict),
        numerics=reader.take("numerics", str),
        precision=reader.take("precision", str),
        target=reader.take("target", str),
        optimized=reader.take("optimized", bool),
        opset=reader.take("opset", int),
        seed=reader.take("seed", int),
        param_count=reader.take("param_count", int),
        weights=reader.take("weights", dict),
        versions=reader.text_map("versions"),
        graphs=graphs,
        states=tuple(_parse_state(reader, content) for content in reader.take("states", list)),
        reference=reader.inside(reader.take("reference", str)),
        files=files,
        parity=reader.take("parity", dict),
    )
    _check_meaning(manifest, reader)
    return manifest


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


def _check_meaning(manifest: Manifest, reader: _Reader) -> None:
    """Refuses what has the right type and can't be."""
    if manifest.numerics not in NUMERICS:
        raise reader.error(f"numerics {manifest.numerics!r:.60} is not {' or '.join(NUMERICS)}")
    window = reader.part(manifest.options, "options").take("window_size", int)
    if not 1 <= window <= MAX_WINDOW:
        raise reader.error(f"window_size {window} is not 1 to {MAX_WINDOW}")
    tolerance = reader.part(manifest.parity, "parity").take("tolerance", float)
    if not 0 < tolerance < math.inf:
        raise reader.error(f"the tolerance {tolerance} is not positive")
    _check_graphs(manifest, reader)
    _check_files(manifest, reader)


def _check_files(manifest: Manifest, reader: _Reader) -> None:
    """Refuses a file that is needed and not listed, and files that are larger than they can be."""
    limits = file_limits(manifest)
    optional = {f"{graph.model}.data" for graph in manifest.graphs.values()}
    for path in limits:
        if path not in manifest.files and path not in optional:
            raise reader.error(f"{path!r} is used and not listed under files")
    for path in limits.keys() & manifest.files.keys():
        if manifest.files[path].size > limits[path]:
            raise reader.error(
                f"{path!r} should have {manifest.files[path].size} bytes, and for this model, on this machine, it can "
                f"have {limits[path]} at most"
            )
    others = sum(entry.size for path, entry in manifest.files.items() if path not in limits)
    if others > sum(limits.values()):
        raise reader.error(f"files that the bundle doesn't need should have {others} bytes, more than those it needs")
    states = 8 * sum(math.prod(int(size) for size in state.shape[1:]) for state in manifest.states)
    if states > (physical_memory() or math.inf):
        raise reader.error(f"the states of a stream take {states} bytes, more than this machine has")


def _check_graphs(manifest: Manifest, reader: _Reader) -> None:
    """Refuses graphs that take or give something else than graphs of their names do."""
    found = tuple(name for name in GRAPHS if name in manifest.graphs)
    if set(manifest.graphs) != set(found) or found not in (GRAPHS[:1], GRAPHS[1:], GRAPHS):
        raise reader.error(f"the graphs should be {', '.join(GRAPHS)}, or a part, and are {', '.join(manifest.graphs)}")
    names = [state.name for state in manifest.states]
    if len(set(names)) != len(names) or bool(names) != ("stream" in manifest.graphs):
        raise reader.error("the states should be those of a stream graph, each once")
    for state in manifest.states:
        if state.shape[0] != BATCH or not all(isinstance(size, int) for size in state.shape[1:]):
            raise reader.error(f"the state {state.past} should be [{BATCH}, sizes]")
    for name, graph in manifest.graphs.items():
        if not graph.test_data:
            raise reader.error(f"the {name} graph has no test_data")
        if len(graph.test_data) > _MAX_SETS:
            raise reader.error(f"the {name} graph has {len(graph.test_data)} sets of test_data, more than {_MAX_SETS}")
        _check_signature(manifest, reader, name, graph)
        _check_test_sequence(reader, name, graph)


def _check_signature(manifest: Manifest, reader: _Reader, name: str, graph: GraphEntry) -> None:
    states = () if name == "window" else manifest.states
    free = (BATCH,) if name == "stream" else (BATCH, SEQUENCE)
    first = "frame" if name == "stream" else "state_sequence"
    for kind, tensors, expected, carried in (
        ("input", graph.inputs, TensorSpec(first, "float32", free), [state.past for state in states]),
        ("output", graph.outputs, TensorSpec("output", "float32", (BATCH,)), [state.present for state in states]),
    ):
        width = tensors[0].shape[-1] if tensors else None
        wanted = (dataclasses.replace(expected, shape=(*expected.shape, width or "size")), *carried)
        if not isinstance(width, int) or tensors != wanted:
            raise reader.error(
                f"the {name} graph's {kind}s should be {', '.join(map(str, wanted))}, found "
                f"{', '.join(map(str, tensors)) or 'nothing'}"
            )


def _check_test_sequence(reader: _Reader, name: str, graph: GraphEntry) -> None:
    """Refuses a longer test that is not one of frames and the output at each."""
    entry = graph.test_sequence
    if entry is None:
        return
    first = (graph.inputs[0], graph.outputs[0])
    wanted = [dataclasses.replace(spec, shape=(BATCH, SEQUENCE, spec.shape[-1])) for spec in first]
    found = [*entry.inputs, *entry.outputs]
    if name != "stream" or found != wanted:
        raise reader.error(
            f"the test_sequence of the {name} graph should be {', '.join(map(str, wanted))} of a stream, and is "
            f"{', '.join(map(str, found))}"
        )


def _parse_graph(reader: _Reader) -> GraphEntry:
    return GraphEntry(
        model=reader.inside(reader.take("model", str)),
        inputs=tuple(_parse_tensor(reader, entry) for entry in reader.take("inputs", list)),
        outputs=tuple(_parse_tensor(reader, entry) for entry in reader.take("outputs", list)),
        test_data=tuple(reader.inside(path) for path in reader.take("test_data", list)),
        max_sequence=_parse_limit(reader),
        test_sequence=_parse_test_sequence(reader),
    )


def _parse_test_sequence(reader: _Reader) -> SequenceEntry | None:
    if reader.content.get("test_sequence") is None:
        return None
    entry = reader.part(reader.content["test_sequence"], f"the test sequence of {reader.place}")
    inputs, outputs = (
        tuple(_parse_tensor(entry, tensor) for tensor in entry.take(kind, list)) for kind in ("inputs", "outputs")
    )
    if [len(inputs), len(outputs)] != [1, 1]:
        raise entry.error(f"{entry.place} should have one input and one output")
    return SequenceEntry(entry.inside(entry.take("folder", str)), inputs, outputs)


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


def _parse_limit(reader: _Reader) -> int | None:
    if "max_sequence" in reader.content and reader.content["max_sequence"] is None:
        return None
    limit: int = reader.take("max_sequence", int)
    if not 1 <= limit <= MAX_WINDOW:
        raise reader.error(f"max_sequence {limit} of {reader.place} is not 1 to {MAX_WINDOW}")
    return limit


def _parse_tensor(reader: _Reader, content: Mapping[str, Any]) -> TensorSpec:
    entry = reader.part(content, f"a tensor of {reader.place}")
    shape = entry.take("shape", list)
    if not shape or not all(isinstance(dim, str) or (type(dim) is int and dim > 0) for dim in shape):
        raise entry.error(f"the shape {shape!r:.60} should hold positive sizes and symbols only")
    return TensorSpec(entry.take("name", str), entry.take("dtype", str), tuple(shape))

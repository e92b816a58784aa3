"""manifest.json: what a bundle holds and how it was made, read with suspicion."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from edifice_reference.config import MAX_WINDOW, NUMERICS

from .errors import CheckError, RequestError
from .specification import BATCH, SEQUENCE, TensorSpec

__all__ = ["MANIFEST", "SCHEMA_VERSION", "FileEntry", "GraphEntry", "Manifest", "read_manifest"]

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_MAX_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file of the bundle."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class GraphEntry:
    """One graph of the bundle: where it is, what goes in, what comes out, and its test data (folders).

    Attributes:
        max_sequence: the most frames that it can compute, or None where there is no limit.
    """

    model: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    test_data: tuple[str, ...]
    max_sequence: int | None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json. Paths are relative to the bundle, with forward slashes.

    Attributes:
        architecture, options, numerics, precision, target, opset, seed: what was asked for.
        param_count: parameters of the reference model, of which a graph may hold fewer numbers or more.
        weights: where the weights came from: `{"source": "fresh"}`, or the file's name and sha256.
        versions: of the packages that made the bundle.
        graphs: by name (`window`).
        reference: the weights of the reference model, which verify computes with.
        files: every file but the manifest itself.
        parity: what was measured when the bundle was made.
    """

    architecture: str
    options: dict[str, Any]
    numerics: str
    precision: str
    target: str
    opset: int
    seed: int
    param_count: int
    weights: dict[str, Any]
    versions: dict[str, str]
    graphs: dict[str, GraphEntry]
    reference: str
    files: dict[str, FileEntry]
    parity: dict[str, Any]
    schema_version: int = SCHEMA_VERSION

    @property
    def window_size(self) -> int:
        """Frames in one window."""
        return int(self.options["window_size"])

    def to_json(self) -> str:
        """The text of manifest.json."""
        fields = dataclasses.asdict(self)
        return json.dumps({"schema_version": fields.pop("schema_version"), **fields}, indent=2) + "\n"

    def essentials(self) -> dict[str, str]:
        """What a model file on its own must still say of itself, for its metadata_props."""
        return {
            "edifice.schema_version": str(self.schema_version),
            "edifice.architecture": self.architecture,
            "edifice.options": json.dumps(self.options, sort_keys=True),
            "edifice.numerics": self.numerics,
            "edifice.precision": self.precision,
            "edifice.target": self.target,
            "edifice.param_count": str(self.param_count),
            "edifice.window_size": str(self.window_size),
            "edifice.max_sequence": str(self.graphs["window"].max_sequence or ""),
        }


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks the manifest of a bundle.

    Raises:
        RequestError: the folder is not a bundle, or a newer schema than this version knows.
        CheckError: the manifest is damaged: not JSON, a field missing or of the wrong kind, a path outside the bundle.
    """
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
    return _parse(_Reader(folder, content, "the manifest"))


class _Reader:
    """Takes typed fields out of JSON; says which field of which bundle is wrong."""

    def __init__(self, folder: Path, content: Any, place: str) -> None:
        self.folder, self.content, self.place = folder, content, place
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
        if not (self.folder / pure).resolve().is_relative_to(self.folder.resolve()):
            raise self.error(f"the path {path!r} leaves the bundle through a link")
        return path

    def each(self, name: str) -> dict[str, _Reader]:
        found: dict[str, Any] = self.take(name, dict)
        return {key: _Reader(self.folder, value, f"{name} {key!r}") for key, value in found.items()}


def _parse(reader: _Reader) -> Manifest:
    schema = reader.take("schema_version", int)
    if schema < 1:
        raise reader.error(f"schema_version {schema} is none that there was")
    if schema > SCHEMA_VERSION:
        raise RequestError(
            f"bundle {reader.folder}: has schema {schema}, newer than {SCHEMA_VERSION}, the newest read here; "
            "upgrade edifice-export"
        )
    files = {
        reader.inside(path): FileEntry(entry.take("size", int), entry.take("sha256", str))
        for path, entry in reader.each("files").items()
    }
    graphs = {name: _parse_graph(entry) for name, entry in reader.each("graphs").items()}
    if "window" not in graphs:
        raise reader.error("graphs holds no 'window'")
    manifest = Manifest(
        schema_version=schema,
        architecture=reader.take("architecture", str),
        options=reader.take("options", dict),
        numerics=reader.take("numerics", str),
        precision=reader.take("precision", str),
        target=reader.take("target", str),
        opset=reader.take("opset", int),
        seed=reader.take("seed", int),
        param_count=reader.take("param_count", int),
        weights=reader.take("weights", dict),
        versions=reader.text_map("versions"),
        graphs=graphs,
        reference=reader.inside(reader.take("reference", str)),
        files=files,
        parity=reader.take("parity", dict),
    )
    _check_meaning(manifest, reader)
    return manifest


def _check_meaning(manifest: Manifest, reader: _Reader) -> None:
    """Refuses what has the right type and can't be."""
    used = [manifest.reference]
    for graph in manifest.graphs.values():
        data = [f"input_{i}.pb" for i in range(len(graph.inputs))] + [
            f"output_{i}.pb" for i in range(len(graph.outputs))
        ]
        used += [graph.model, *(f"{folder}/{name}" for folder in graph.test_data for name in data)]
    for path in used:
        if path not in manifest.files:
            raise reader.error(f"{path!r} is used and not listed under files")
    if manifest.numerics not in NUMERICS:
        raise reader.error(f"numerics {manifest.numerics!r:.60} is not {' or '.join(NUMERICS)}")
    window = _Reader(reader.folder, manifest.options, "options").take("window_size", int)
    if not 1 <= window <= MAX_WINDOW:
        raise reader.error(f"window_size {window} is not 1 to {MAX_WINDOW}")
    tolerance = _Reader(reader.folder, manifest.parity, "parity").take("tolerance", float)
    if not 0 < tolerance < math.inf:
        raise reader.error(f"the tolerance {tolerance} is not positive")
    graph = manifest.graphs["window"]
    if not graph.test_data:
        raise reader.error("the window graph has no test_data")
    for kind, tensors, name, free in (
        ("input", graph.inputs, "state_sequence", (BATCH, SEQUENCE)),
        ("output", graph.outputs, "output", (BATCH,)),
    ):
        sound = len(tensors) == 1 and isinstance(tensors[0].shape[-1], int)
        if not sound or tensors[0] != TensorSpec(name, "float32", (*free, tensors[0].shape[-1])):
            found = ", ".join(map(str, tensors)) or "nothing"
            raise reader.error(
                f"the window graph's {kind} should be {name} float32 [{', '.join(free)}, size], found {found}"
            )


def _parse_graph(reader: _Reader) -> GraphEntry:
    return GraphEntry(
        model=reader.inside(reader.take("model", str)),
        inputs=tuple(_parse_tensor(reader, entry) for entry in reader.take("inputs", list)),
        outputs=tuple(_parse_tensor(reader, entry) for entry in reader.take("outputs", list)),
        test_data=tuple(reader.inside(path) for path in reader.take("test_data", list)),
        max_sequence=_parse_limit(reader),
    )


def _parse_limit(reader: _Reader) -> int | None:
    if "max_sequence" in reader.content and reader.content["max_sequence"] is None:
        return None
    limit: int = reader.take("max_sequence", int)
    if not 1 <= limit <= MAX_WINDOW:
        raise reader.error(f"max_sequence {limit} of {reader.place} is not 1 to {MAX_WINDOW}")
    return limit


def _parse_tensor(reader: _Reader, content: Mapping[str, Any]) -> TensorSpec:
    entry = _Reader(reader.folder, content, f"a tensor of {reader.place}")
    shape = entry.take("shape", list)
    if not shape or not all(isinstance(dim, str) or (type(dim) is int and dim > 0) for dim in shape):
        raise entry.error(f"the shape {shape!r:.60} should hold positive sizes and symbols only")
    return TensorSpec(entry.take("name", str), entry.take("dtype", str), tuple(shape))

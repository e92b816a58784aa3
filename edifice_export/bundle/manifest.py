"""manifest.json: what a bundle holds and how it was made."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ..specification import InputSpec, OutputSpec, Size, StateSpec

__all__ = [
    "ARCHITECTURE",
    "BODY",
    "CALL",
    "GRAPHS",
    "LOWERING",
    "MANIFEST",
    "MODULE",
    "REASON",
    "SCHEMA_VERSION",
    "FileEntry",
    "GraphEntry",
    "Manifest",
    "ProgramEntry",
    "SequenceEntry",
    "plain",
]

MANIFEST = "manifest.json"
SCHEMA_VERSION = 6
"""1 had no states; 2 did not say whether passes were applied, and had one body for each op; 3 had many of one name; 4
had architectures alone, of one input and one output; 5 did not say whether functions were inlined."""
GRAPHS = ("window", "stream", "prefill")
"""A whole window, or whatever else a module takes at once; one frame from a state to the next; a piece of any length
from a state to the next."""

ARCHITECTURE, MODULE = "architecture", "module"
"""The kinds of programs: one that is known here, and somebody's own torch module."""

LOWERING, REASON = "edifice.lowering", "edifice.why"
"""Metadata of a node of a graph: which body its op got, and why."""

CALL, BODY = "edifice.node", "edifice.body"
"""Metadata of the nodes of an inlined body, beside those: the node whose place they take, and the body's name."""


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file of the bundle."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class ProgramEntry:
    """What the graphs compute.

    Attributes:
        kind: ARCHITECTURE or MODULE.
        name: of the architecture, or of the module's class.
        options, numerics: of an architecture; none of a module.
    """

    kind: str
    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    numerics: str | None = None


@dataclasses.dataclass(frozen=True)
class SequenceEntry:
    """Test data for a stream: a folder with the frames of every input in input_0.pb and on, and what the outputs are at
    each of them in output_0.pb and on.

    The stream starts from the initial state.
    """

    folder: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]


@dataclasses.dataclass(frozen=True)
class GraphEntry:
    """One graph of the bundle: where it is, what goes in, what comes out, and its test data (folders).

    Attributes:
        limits: of free sizes that can't be any number, by symbol: the least, and the most or None.
        test_sequence: of the stream graph, a longer test.
    """

    model: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    test_data: tuple[str, ...]
    limits: dict[str, tuple[int, int | None]] = dataclasses.field(default_factory=dict)
    test_sequence: SequenceEntry | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json. Paths are relative to the bundle, with forward slashes.

    Attributes:
        program: what the graphs compute.
        precision, target, optimized, inlined, opset, seed: what was asked for.
        param_count: numbers in the weights of the reference, of which a graph may hold fewer or more.
        weights: where the weights came from: `{"source": "fresh"}`, or the file's name and sha256 (and of each of
            `shards`), or "state_dict" or "module" and what its tensors hash to; and what was done to them, see
            weights.Checkpoint.changes.
        versions: of the packages that made the bundle.
        sizes: of each free size by its symbol, the number that graphs are made for; they are right for all.
        frames: the symbol of frames, which a stream goes through one by one; None where there is no such size.
        graphs: by name, see GRAPHS; the last two are there together, or the last is missing, or both.
        states: what those two carry from frame to frame; none without them.
        reference: the weights of an architecture's reference model, which verify computes with; None of a module.
        files: every file but the manifest itself.
        parity: what was measured when the bundle was made.
    """

    program: ProgramEntry
    precision: str
    target: str
    optimized: bool
    inlined: bool
    opset: int
    seed: int
    param_count: int
    weights: dict[str, Any]
    versions: dict[str, str]
    sizes: dict[str, int]
    frames: str | None
    graphs: dict[str, GraphEntry]
    states: tuple[StateSpec, ...]
    reference: str | None
    files: dict[str, FileEntry]
    parity: dict[str, Any]
    schema_version: int = SCHEMA_VERSION

    @property
    def window_size(self) -> int:
        """Frames in one window; 1 where there are no frames."""
        return self.sizes[self.frames] if self.frames is not None else 1

    def own_tensors(self, graph: str) -> tuple[tuple[InputSpec, ...], tuple[OutputSpec, ...]]:
        """What a graph takes and gives beside states."""
        entry, carried = self.graphs[graph], 0 if graph == "window" else len(self.states)
        return entry.inputs[: len(entry.inputs) - carried], entry.outputs[: len(entry.outputs) - carried]

    def max_frames(self, graph: str) -> int | None:
        """The most frames that a graph can compute, or None where there is no limit."""
        return self.graphs[graph].limits.get(self.frames or "", (1, None))[1]

    def to_json(self) -> str:
        """The text of manifest.json."""
        fields = plain(self)
        return json.dumps({"schema_version": fields.pop("schema_version"), **fields}, indent=2) + "\n"

    def essentials(self, graph: str) -> dict[str, str]:
        """What a model file on its own must still say of itself, for its metadata_props."""
        inputs, outputs = self.own_tensors(graph)
        carried = [] if graph == "window" else [plain(state) for state in self.states]
        return {
            "edifice.graph": graph,
            "edifice.schema_version": str(self.schema_version),
            "edifice.program": json.dumps(plain(self.program), sort_keys=True),
            "edifice.precision": self.precision,
            "edifice.target": self.target,
            "edifice.optimized": str(self.optimized).lower(),
            "edifice.inlined": str(self.inlined).lower(),
            "edifice.param_count": str(self.param_count),
            "edifice.sizes": json.dumps(self.sizes, sort_keys=True),
            "edifice.frames": self.frames or "",
            "edifice.limits": json.dumps(plain(self.graphs[graph].limits), sort_keys=True),
            "edifice.values": json.dumps({spec.name: plain(spec.values) for spec in inputs}),
            "edifice.positions": json.dumps({spec.name: spec.position for spec in outputs}),
            "edifice.states": json.dumps(carried),
        }


def plain(value: Any) -> Any:
    """A dataclass, or what it holds, as JSON has it; a free size as its text."""
    if isinstance(value, Size):
        return str(value)
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value

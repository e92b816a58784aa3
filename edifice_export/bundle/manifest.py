"""manifest.json: what a bundle holds and how it was made."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ..specification import StateSpec, TensorSpec

__all__ = [
    "GRAPHS",
    "LOWERING",
    "MANIFEST",
    "REASON",
    "SCHEMA_VERSION",
    "FileEntry",
    "GraphEntry",
    "Manifest",
    "SequenceEntry",
]

MANIFEST = "manifest.json"
SCHEMA_VERSION = 4
"""1 had no states; 2 did not say whether passes were applied, and had one body for each op; 3 had many of one name."""
GRAPHS = ("window", "stream", "prefill")
"""A whole window; one frame from a state to the next; a piece of any length from a state to the next."""

LOWERING, REASON = "edifice.lowering", "edifice.why"
"""Metadata of a node of a graph: which body its op got, and why."""


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file of the bundle."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class SequenceEntry:
    """Test data for a stream: a folder with frames in input_0.pb and the output at each of them in output_0.pb.

    The stream starts from the initial state.
    """

    folder: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclasses.dataclass(frozen=True)
class GraphEntry:
    """One graph of the bundle: where it is, what goes in, what comes out, and its test data (folders).

    Attributes:
        max_sequence: the most frames that it can compute, or None where there is no limit.
        test_sequence: of the stream graph, a longer test.
    """

    model: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    test_data: tuple[str, ...]
    max_sequence: int | None = None
    test_sequence: SequenceEntry | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json. Paths are relative to the bundle, with forward slashes.

    Attributes:
        architecture, options, numerics, precision, target, optimized, opset, seed: what was asked for.
        param_count: parameters of the reference model, of which a graph may hold fewer numbers or more.
        weights: where the weights came from: `{"source": "fresh"}`, or the file's name and sha256.
        versions: of the packages that made the bundle.
        graphs: by name, see GRAPHS; the last two are there together or not at all.
        states: what those two carry from frame to frame; none without them.
        reference: the weights of the reference model, which verify computes with.
        files: every file but the manifest itself.
        parity: what was measured when the bundle was made.
    """

    architecture: str
    options: dict[str, Any]
    numerics: str
    precision: str
    target: str
    optimized: bool
    opset: int
    seed: int
    param_count: int
    weights: dict[str, Any]
    versions: dict[str, str]
    graphs: dict[str, GraphEntry]
    states: tuple[StateSpec, ...]
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

    def essentials(self, graph: str) -> dict[str, str]:
        """What a model file on its own must still say of itself, for its metadata_props."""
        limit = self.graphs[graph].max_sequence
        carried = [] if graph == "window" else [dataclasses.asdict(state) for state in self.states]
        return {
            "edifice.graph": graph,
            "edifice.schema_version": str(self.schema_version),
            "edifice.architecture": self.architecture,
            "edifice.options": json.dumps(self.options, sort_keys=True),
            "edifice.numerics": self.numerics,
            "edifice.precision": self.precision,
            "edifice.target": self.target,
            "edifice.optimized": str(self.optimized).lower(),
            "edifice.param_count": str(self.param_count),
            "edifice.window_size": str(self.window_size),
            "edifice.max_sequence": str(limit or ""),
            "edifice.states": json.dumps(carried),
        }

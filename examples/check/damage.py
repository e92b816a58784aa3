"""Damaged bundles, and what every program must say of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

__all__ = ["DAMAGES", "OF_BROWSERS", "SHARED_DAMAGES", "Damage", "overflow", "rename_architecture"]

ESCAPES = "\x1b[2J\u202e\x9b\x7f"
"""Clears a terminal, reverses what follows, and starts and deletes."""


OF_BROWSERS = ("Thumbs.db", "desktop.ini", ".DS_Store")
"""Files that browsers of files leave in folders that they show."""


@dataclasses.dataclass(frozen=True)
class Damage:
    """A way to damage a bundle.

    Attributes:
        name: what is wrong.
        do: damages a bundle in place.
        status: exit status of a program that is given it.
        says: part of its message.
    """

    name: str
    do: Callable[[Path], None]
    status: int
    says: str


def _edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def _missing(bundle: Path) -> None:
    (bundle / "window/model.onnx").unlink()


def _changed(bundle: Path) -> None:
    path = bundle / "stream/model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _newer(bundle: Path) -> None:
    _edit(bundle, lambda manifest: manifest.update(schema_version=7))


def _leaving(bundle: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        path = manifest["graphs"]["window"]["model"]
        manifest["graphs"]["window"]["model"] = "../model.onnx"
        manifest["files"]["../model.onnx"] = manifest["files"].pop(path)

    (bundle / "window/model.onnx").rename(bundle.parent / "model.onnx")
    _edit(bundle, change)


def _escaping(bundle: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        path = manifest["graphs"]["window"]["model"]
        manifest["graphs"]["window"]["model"] = f"window/{ESCAPES}model.onnx"
        manifest["files"][f"window/{ESCAPES}model.onnx"] = manifest["files"].pop(path)

    _edit(bundle, change)


def rename_architecture(bundle: Path) -> None:
    """Gives a sound bundle a name that no terminal should be told."""
    _edit(bundle, lambda manifest: manifest["program"].update(name=f"hy{ESCAPES}mba"))


def overflow(bundle: Path) -> None:
    """Makes all outputs of a bundle overflow, and its manifest vouch for it."""

    def change(manifest: dict[str, Any]) -> None:
        for graph in manifest["graphs"].values():
            path = bundle / graph["model"]
            model = onnx.load(path)
            (weight,) = (each for each in model.graph.initializer if each.name == "final_norm.weight")
            weight.CopyFrom(numpy_helper.from_array(np.full(list(weight.dims), 3.4e38, np.float32), weight.name))
            onnx.save(model, path)
            entry = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            manifest["files"][graph["model"]] |= entry

    _edit(bundle, change)


def _no_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


def _no_json(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{", encoding="utf-8")


DAMAGES = (
    Damage("a missing file", _missing, 1, "'window/model.onnx' is missing"),
    Damage("a changed file", _changed, 1, "'stream/model.onnx' was changed"),
    Damage("a newer schema", _newer, 2, "schema 7, newer than 6"),
    Damage("a path that leaves the bundle", _leaving, 1, "../model.onnx"),
    Damage("escape codes in a name", _escaping, 1, "model.onnx"),
    Damage("a bundle without a manifest", _no_manifest, 2, "manifest.json"),
    Damage("a damaged manifest", _no_json, 1, "manifest.json"),
)

_WEIGHTS = "weights.safetensors"


def _flipped(bundle: Path) -> None:
    path = bundle / _WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _truncated(bundle: Path) -> None:
    path = bundle / _WEIGHTS
    path.write_bytes(path.read_bytes()[:-4])


def _weights_are(place: str) -> Callable[[Path], None]:
    def change(manifest: dict[str, Any]) -> None:
        for graph in manifest["graphs"].values():
            graph["weights"] = place
        manifest["files"][place] = manifest["files"][_WEIGHTS]

    return lambda bundle: _edit(bundle, change)


SHARED_DAMAGES = (
    Damage("weights with another bit", _flipped, 1, f"'{_WEIGHTS}' was changed"),
    Damage("truncated weights", _truncated, 1, f"'{_WEIGHTS}' was changed"),
    Damage("missing weights", lambda bundle: (bundle / _WEIGHTS).unlink(), 1, f"'{_WEIGHTS}' is missing"),
    Damage("weights outside the bundle", _weights_are("../weights"), 1, "../weights"),
    Damage("weights that are not beside the model", _weights_are("a/weights"), 1, "are not a file beside"),
    Damage(
        "weights that are not listed",
        lambda bundle: _edit(bundle, lambda manifest: manifest["files"].pop(_WEIGHTS)),
        1,
        "not listed",
    ),
)
"""Of a bundle whose graphs share a file of weights."""

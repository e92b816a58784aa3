"""Bundles of a module that are damaged, and what the C# sample says of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

__all__ = ["MODULE_DAMAGES"]

Change = Callable[[dict[str, Any]], object]


def _manifest(change: Change) -> Callable[[Path], None]:
    def do(bundle: Path) -> None:
        path = bundle / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        change(manifest)
        path.write_text(json.dumps(manifest), encoding="utf-8")

    return do


def _tensor(graph: str, kind: str, index: int, **fields: Any) -> Callable[[Path], None]:
    return _manifest(lambda manifest: manifest["graphs"][graph][kind][index].update(fields))


def _wrong(name: str) -> Callable[[Path], None]:
    """Makes the last number of a file of test data another one, and the manifest vouch for it."""

    def do(bundle: Path) -> None:
        path = bundle / name
        array = numpy_helper.to_array(onnx.load_tensor(path)).copy()
        last = array.reshape(-1)[-1:]
        last[:] = ~last if array.dtype == np.bool_ else last + 5
        onnx.save_tensor(numpy_helper.from_array(array), path)
        entry = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        _manifest(lambda manifest: manifest["files"].update({name: entry}))(bundle)

    return do


MODULE_DAMAGES: tuple[tuple[str, Callable[[Path], None]], ...] = (
    *(
        ("the window graph differs from its test data", _wrong(f"window/test_data_set_0/output_{index}.pb"))
        for index in range(7)
    ),
    *(
        ("the stream graph differs from its test data", _wrong(f"stream/test_sequence/output_{index}.pb"))
        for index in range(2)
    ),
    ("test data of the window graph is refused: kinds holds", _wrong("window/test_data_set_0/input_1.pb")),
    ("starts from 1E+300", _manifest(lambda m: m["states"][2].update(initial=1e300))),
    (
        "the input signal float32 [height, time, 3] has the size height, which is none of the sizes",
        _tensor("window", "inputs", 0, shape=["height", "time", 3]),
    ),
    ("a size is 0", _tensor("window", "inputs", 0, shape=["entries", "time", 0])),
    ("a tensor has the type float64, and not float32, float16", _tensor("window", "outputs", 0, dtype="float64")),
    ("kinds has values of the kind 'words'", _tensor("window", "inputs", 1, values={"kind": "words", "below": 5})),
    ("can't hold ids below 0", _tensor("window", "inputs", 1, values={"kind": "ids", "below": 0})),
    ("can't hold mask", _tensor("window", "inputs", 0, values={"kind": "mask", "below": None})),
    ("the stream graph's inputs and outputs are not", _tensor("stream", "inputs", 3, name="past.other")),
    ("the stream graph's inputs and outputs are not", _tensor("stream", "outputs", 2, name="present.other")),
    ("should have a batch and then fixed sizes", _tensor("stream", "inputs", 0, shape=["entries", "time"])),
    ("graph's inputs and outputs are not those of the stream", _tensor("prefill", "outputs", 1, dtype="int32")),
    ("should be float32, int64 or int32", _manifest(lambda m: m["states"][1].update(dtype="bool"))),
    ("frames is 'height', which is none of the sizes", _manifest(lambda m: m.update(frames="height"))),
    ("the size 'two words' should be a word", _manifest(lambda m: m["sizes"].update({"two words": 2}))),
    ("time is 1048577, and not 1 to 1048576", _manifest(lambda m: m["sizes"].update(time=2**20 + 1))),
    ("a limit is 0", _manifest(lambda m: m["graphs"]["window"].update(limits={"time": [0, None]}))),
    ("it lacks 'sha256'", _manifest(lambda m: m["weights"].pop("sha256"))),
    ("it lacks 'program'", _manifest(lambda m: m.pop("program"))),
    ("a stream without states, or a prefill", _manifest(lambda m: m["graphs"].pop("stream"))),
    (
        "'stream/initial/0.sum.pb' is used and not listed",
        _manifest(lambda m: m["files"].pop("stream/initial/0.sum.pb")),
    ),
)
"""Part of the one line that is said, with exit status 1, and what damages a bundle of handmade.py in place."""

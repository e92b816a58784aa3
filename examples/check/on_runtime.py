"""Runs graphs on the ONNX Runtime that this process has, whichever it is: one line of JSON for each.

    python -m examples.check.on_runtime GRAPHS.json PROVIDER

GRAPHS.json lists what runtimes.Graph says. What is printed is [name, outcome, error or message], the outcome being
"right", "wrong" or "refused". A runtime may end the process: whoever started it knows by what is missing. A name that
is a bundle's stands for Python's own reader, which must refuse what may be wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edifice_export import load
from edifice_export.bundle.bundle import Bundle, open_bundle
from edifice_export.errors import ExportError
from edifice_export.runtime.providers import ORT_ERRORS, short_name

LIMIT = 1e-5
"""The largest error that is right: by the larger of 1 and the largest expected number of the tensor."""

Pairs = list[tuple[np.ndarray, np.ndarray]]
"""What was found, and what is right."""


def of_graph(bundle: Bundle, graph: str, model: Path, provider: str) -> Pairs:
    """The outputs of a model on the test data of a bundle's graph, and on its test sequence."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model), options, providers=[provider])
    pairs: Pairs = []
    for _, inputs, outputs in bundle.test_data(graph):
        pairs += zip(session.run(list(outputs), inputs), outputs.values(), strict=True)
    sequence = bundle.test_sequence() if graph == "stream" else None
    if sequence is not None:
        (frames,), (expected,) = sequence[1].values(), sequence[2].values()
        state = {f"past.{name}": value for name, value in bundle.initial_state(frames.shape[0]).items()}
        for t in range(frames.shape[1]):
            output, *present = session.run(None, {bundle.manifest.graphs[graph].inputs[0].name: frames[:, t], **state})
            state = dict(zip(state, present, strict=True))
            pairs.append((output, expected[:, t]))
    return pairs


def of_reader(bundle: Bundle, provider: str) -> Pairs:
    """What Python's reader makes of a bundle: its windows, and its test sequence frame by frame."""
    model = load(bundle, [short_name(provider)], threads=1)
    pairs: Pairs = []
    if model.has_window:
        for _, inputs, outputs in bundle.test_data("window"):
            pairs += [(found, outputs[name]) for name, found in model.run(inputs).items()]
    sequence = bundle.test_sequence() if model.has_stream else None
    if sequence is not None:
        (frames,), (expected,) = sequence[1].values(), sequence[2].values()
        stream = model.stream(batch=frames.shape[0])
        pairs += [(stream.step(frames[:, t]), expected[:, t]) for t in range(frames.shape[1])]
    return pairs


def outcome(graph: dict[str, Any], provider: str) -> tuple[str, Any]:
    """What came of a graph: right or wrong with its error, or the first line of what was said."""
    bundle, model = open_bundle(graph["bundle"]), graph["model"]
    try:
        pairs = of_graph(bundle, graph["graph"], Path(model), provider) if model else of_reader(bundle, provider)
    except _REFUSALS as refusal:
        return "refused", str(refusal).strip().splitlines()[0]
    error = max(_error(found, wanted) for found, wanted in pairs)
    return "right" if error <= LIMIT else "wrong", error


_REFUSALS: tuple[type[Exception], ...] = (ExportError, *ORT_ERRORS)


def _error(found: np.ndarray, wanted: np.ndarray) -> float:
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - wanted).max()) / max(1.0, float(np.abs(wanted).max()))


def main(graphs: str, provider: str) -> None:
    """Runs all that the file lists."""
    ort.set_default_logger_severity(4)
    print(json.dumps(ort.__version__), flush=True)
    for each in json.loads(Path(graphs).read_text(encoding="utf-8")):
        print(json.dumps([each["name"], *outcome(each, provider)]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

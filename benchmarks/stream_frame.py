"""What one frame of a stream costs, beside the bare products of the model's dense layers, in one interleaved run.

    python benchmarks/stream_frame.py                     all architectures, default sizes, one thread
    python benchmarks/stream_frame.py hymba --numerics edifice --json results.json

Columns, milliseconds for batch 1 (median of all rounds):
    products   every dense layer of the reference model on one frame, torch.nn.functional.linear with its bias
    gemv       the same products as torch.addmv, the fastest form of them found here
    graph      stream/model.onnx, driven by a loop with IO binding and two sets of states
    step       Stream.step, the same from Python with its checks; and the slowest of a hundred
    prefill 8  Stream.prefill of eight frames: what rolling back by eight frames costs
    window     window/model.onnx on a whole window: what each frame costs without a stream
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

import edifice_export as ee
from edifice_export.reference_model import reference_of
from edifice_reference.registry import ARCHITECTURES

ROUNDS, WARM_UP = 1000, 100
COLUMNS = ("products", "gemv", "graph", "step", "step p99", "prefill 8", "window")


def products_of(model: torch.nn.Module) -> tuple[Callable[[], None], Callable[[], None]]:
    """The dense layers that a frame passes, as linear layers and as matrix-vector products."""
    used: list[tuple[torch.nn.Linear, torch.Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, _: used.append((layer, inputs[0])))
        for layer in model.modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    # Not those that make what no frame changes, such as Hyena's filters.
    with torch.inference_mode():
        model.step(torch.zeros(1, model.config.embed_dim), model.initial_state(1))  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    layers = [(layer.weight, layer.bias, x) for layer, x in used if x.shape[0] == 1]
    vectors = [(weight, bias, x[0]) for weight, bias, x in layers]

    @torch.inference_mode()
    def linear() -> None:
        for weight, bias, x in layers:
            torch.nn.functional.linear(x, weight, bias)

    @torch.inference_mode()
    def gemv() -> None:
        for weight, bias, x in vectors:
            torch.addmv(bias, weight, x)

    return linear, gemv


def graph_of(bundle: ee.Bundle, model: ee.Model) -> Callable[[], None]:
    """One run of the stream graph, its states in two sets of buffers in turn."""
    session, manifest = model.session_of("stream"), bundle.manifest
    graph = manifest.graphs["stream"]
    frame = np.random.default_rng(0).standard_normal((1, graph.inputs[0].shape[1])).astype(np.float32)
    fixed = [
        ort.OrtValue.ortvalue_from_numpy(frame),
        ort.OrtValue.ortvalue_from_numpy(np.zeros((1, graph.outputs[0].shape[1]), np.float32)),
    ]
    sets = [
        {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in bundle.initial_state(1).items()}
        for _ in range(2)
    ]
    bindings = []
    for past, present in (sets, sets[::-1]):
        binding = session.io_binding()
        binding.bind_ortvalue_input("frame", fixed[0])
        binding.bind_ortvalue_output("output", fixed[1])
        for name in past:
            binding.bind_ortvalue_input(f"past.{name}", past[name])
            binding.bind_ortvalue_output(f"present.{name}", present[name])
        bindings.append(binding)
    turn = 0

    def run() -> None:
        nonlocal turn
        session.run_with_iobinding(bindings[turn])
        turn = 1 - turn

    return run


def measure(name: str, numerics: str, folder: Path) -> dict[str, Any]:
    """All columns of one architecture."""
    bundle = ee.build(name, numerics=numerics, output=folder / name)
    model = ee.load(bundle, threads=1)
    reference = reference_of(bundle)
    manifest = bundle.manifest
    linear, gemv = products_of(reference)
    stream = model.stream(history=0)
    generator = np.random.default_rng(0)
    frame = generator.standard_normal(manifest.options["embed_dim"]).astype(np.float32)
    eight = generator.standard_normal((8, len(frame))).astype(np.float32)
    window = generator.standard_normal((1, manifest.window_size, len(frame))).astype(np.float32)
    columns: dict[str, Callable[[], Any]] = {
        "products": linear,
        "gemv": gemv,
        "graph": graph_of(bundle, model),
        "step": lambda: stream.step(frame),
        "prefill 8": lambda: stream.prefill(eight),
        "window": lambda: model(window),
    }
    times: dict[str, list[float]] = {column: [] for column in columns}
    for _ in range(WARM_UP + ROUNDS):
        for column, call in columns.items():
            start = time.perf_counter()
            call()
            times[column].append(time.perf_counter() - start)
    milliseconds = {column: 1e3 * statistics.median(values[WARM_UP:]) for column, values in times.items()}
    milliseconds["step p99"] = 1e3 * statistics.quantiles(times["step"][WARM_UP:], n=100)[98]
    return {
        "architecture": name,
        "numerics": numerics,
        "nodes": sum(stream.placement.values()),
        "milliseconds": {column: milliseconds[column] for column in COLUMNS},
    }


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"cpu": cpu, **{package: version(package) for package in ("torch", "onnxruntime", "numpy")}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", metavar="NAME", help=", ".join(ARCHITECTURES))
    parser.add_argument("--numerics", default="standard", choices=("standard", "edifice"))
    parser.add_argument("--json", type=Path, help="write the results here too")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    described = machine()
    print(f"one thread, batch 1, default sizes, milliseconds; {', '.join(described.values())}")
    print(f"{'':14}" + "".join(f"{head:>12}" for head in ("nodes", *COLUMNS, "/ products", "/ gemv")))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.architectures or ARCHITECTURES:
            rows.append(measure(name, given.numerics, Path(folder)))
            milliseconds = rows[-1]["milliseconds"]
            ratios = [milliseconds["graph"] / milliseconds[column] for column in ("products", "gemv")]
            figures = [*milliseconds.values(), *ratios]
            print(f"{name:14}{rows[-1]['nodes']:12}" + "".join(f"{figure:12.2f}" for figure in figures), flush=True)
    if given.json is not None:
        results = {"machine": described, "threads": 1, "batch": 1, "rounds": ROUNDS, "results": rows}
        given.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Footprint: what a model costs beside time, found out in a process of its own, where nothing else has used memory."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..errors import CheckError
from ..runtime.providers import open_session, why_not_usable

__all__ = ["Footprint", "footprint"]

_INPUTS = "inputs.npz"


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a model costs beside time.

    Attributes:
        nodes: of the graph that ONNX Runtime makes of it, those in the bodies of loops among them; None where a
            provider compiles them to something else.
        load_ms: milliseconds that opening a session takes.
        peak_bytes: by how much the process grows at most in its first run; None where the system doesn't say.
    """

    nodes: int | None
    load_ms: float
    peak_bytes: int | None


def footprint(
    model: Path, inputs: Mapping[str, np.ndarray], providers: Sequence[str], threads: int | None
) -> Footprint:
    """Opens a model in a new process and runs it once.

    Args:
        model: the .onnx file.
        inputs: what it is run on.
        providers: short names in order of preference.
        threads: threads within an operator; ONNX Runtime's choice if None.

    Raises:
        CheckError: the process failed.
    """
    with tempfile.TemporaryDirectory(prefix="edifice-export-") as folder:
        named: dict[str, Any] = dict(inputs)
        np.savez(Path(folder, _INPUTS), **named)
        # -P: the working folder is no place to import from.
        command = [sys.executable, "-P", "-m", __name__, str(model.absolute()), folder, str(threads or 0), *providers]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise CheckError(
            f"the process that runs {model} once, to see what it costs, failed: {reason[-1]:.400}; see what "
            "`edifice-export verify` says"
        )
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def _measure(model: Path, folder: Path, providers: Sequence[str], threads: int | None) -> Footprint:
    with np.load(folder / _INPUTS) as file:
        inputs = {name: file[name] for name in file.files}
    for provider in providers:
        why_not_usable(provider)  # it runs a graph to find out, once in a process
    start = time.perf_counter()
    session = open_session(model, providers, threads)
    load_ms = 1e3 * (time.perf_counter() - start)
    before = _forget_peak()
    session.run(None, inputs)
    after = _status("VmHWM")
    peak = None if before is None or after is None else max(0, after - before)
    return Footprint(_count_nodes(model, folder / "optimized.onnx", providers, threads), load_ms, peak)


def _forget_peak() -> int | None:
    """Has Linux measure the process's peak anew, and says from where; None where that can't be done.

    getrusage would not do: a new process starts with the peak of the one that started it.
    """
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        return None
    # What opening the session took and gave back would be used again by the run, unseen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        peak.write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def _count_nodes(model: Path, optimized: Path, providers: Sequence[str], threads: int | None) -> int | None:
    try:
        open_session(model, providers, threads, optimized=optimized)
    except CheckError:
        return None
    return _nodes(onnx.load(optimized, load_external_data=False).graph)


def _nodes(graph: onnx.GraphProto) -> int:
    return sum(1 + sum(_nodes(attribute.g) for attribute in node.attribute) for node in graph.node)


if __name__ == "__main__":
    _model, _folder, _threads, *_providers = sys.argv[1:]
    print(json.dumps(dataclasses.asdict(_measure(Path(_model), Path(_folder), _providers, int(_threads) or None))))

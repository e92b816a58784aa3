"""Where the time of a window goes, as ONNX Runtime's profiler has it."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from edifice_export.bundle.body_names import op_of
from edifice_export.lowerings.domain import EDIFICE

__all__ = ["KINDS", "shares"]

KINDS = ("dense products", "recurrences", "attention", "convolutions", "the rest")
"""What time goes to: products of the model's dense layers; bodies of edifice ops; other nodes, and what is between."""

_PRODUCTS = {"MatMul", "FusedMatMul", "Gemm"}

_INLINED = "_inlfunc_"
"""What ONNX Runtime puts before the name of a node that comes from a function, and the function's name after it."""


def shares(path: Path, length: int, runs: int) -> dict[str, float]:
    """Milliseconds of a window graph that go to each of KINDS, with one thread, batch 1.

    The profiler takes longer than many nodes do. What it adds to a run is known from runs without it, taken in turn;
    each node that a loop holds is taken to have added as much. What it adds to a node's own time is what nodes that
    compute nothing (`Shape`) seem to take. Small shares are rough, then, and what is missing is in the rest; of a tiny
    model, most of whose time is the profiler's, they say nothing, and may be below zero.

    Args:
        path: the window graph.
        length: frames of the window.
        runs: how many with the profiler, and as many without.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain, profiled = _session(path, None), _session(path, Path(folder, "profile"))
        (given,) = plain.get_inputs()
        feed = {given.name: np.random.default_rng(0).standard_normal((1, length, given.shape[-1])).astype(np.float32)}
        times: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(runs + 1):
            for session in (plain, profiled):
                start = time.perf_counter()
                session.run(None, feed)
                if turn > 0:
                    times[session is profiled].append(time.perf_counter() - start)
        events = json.loads(Path(profiled.end_profiling()).read_text(encoding="utf-8"))
    _, second, *_ = sorted(event["ts"] for event in events if event["name"] == "model_run")
    nodes = [event for event in events if event["ts"] >= second and event["name"].endswith("_kernel_time")]
    whole, slowed = (1e6 * statistics.mean(times[with_profiler]) for with_profiler in (False, True))
    added = (slowed - whole) * runs / len(nodes)
    added_inside = statistics.mean(node["dur"] for node in nodes if node["args"]["op_name"] == "Shape")
    ops = _ops_of_functions(onnx.load(path, load_external_data=False).functions)
    found = dict.fromkeys(KINDS, 0.0)
    for node, held in _outermost(nodes):
        found[_kind(node, ops)] += (node["dur"] - added_inside - held * added) / runs
    found[KINDS[-1]] = whole - sum(found[kind] for kind in KINDS[:-1])
    return {kind: microseconds / 1e3 for kind, microseconds in found.items()}


def _session(path: Path, profile: Path | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _outermost(nodes: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], int]]:
    """The nodes that no loop or branch holds, each with the number of those that it holds."""
    outer, *others = sorted(nodes, key=lambda node: (node["ts"], -node["dur"]))
    held = 0
    for node in others:
        if node["ts"] + node["dur"] <= outer["ts"] + outer["dur"]:
            held += 1
        else:
            yield outer, held
            outer, held = node, 0
    yield outer, held


def _ops_of_functions(functions: Iterable[onnx.FunctionProto]) -> dict[str, str]:
    """The edifice op that each function is a body of, or is called by bodies of."""
    called: dict[str, set[str]] = {}
    for function in functions:
        called.setdefault(op_of(function.name), set()).update(_calls(function.node))
    ops: dict[str, str] = {}

    def note(name: str, op: str) -> None:
        ops[name] = op
        for inner in called[name]:
            note(inner, op)

    for op in called.keys() - set().union(*called.values()):
        note(op, op)
    return ops


def _calls(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    for node in nodes:
        if node.domain == EDIFICE.domain:
            yield op_of(node.op_type)
        for attribute in node.attribute:
            yield from _calls(attribute.g.node)


def _kind(node: dict[str, Any], ops: dict[str, str]) -> str:
    name: str = node["name"]
    if not name.startswith(_INLINED):
        return "dense products" if node["args"]["op_name"] in _PRODUCTS else "the rest"
    op = ops[op_of(name.removeprefix(_INLINED))]
    kinds = {"Scan": "recurrences", "Attention": "attention", "Conv": "convolutions"}
    return next((kind for part, kind in kinds.items() if part in op), "the rest")

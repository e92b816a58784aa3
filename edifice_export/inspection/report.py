"""Inspect, for people: a bundle or a lone model, and its figures as rows of a table."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from ..bundle.body_names import op_of
from ..bundle.bundle import open_bundle
from ..bundle.manifest import BODY, CALL, GRAPHS, LOWERING, REASON
from ..errors import RequestError, brief
from ..specification import BATCH, SEQUENCE
from .inspect import Inspection, inspect_model

__all__ = ["explain", "inspect_path", "rows_of"]


def inspect_path(
    path: Path, batch: int | None, sequence: int | None, graph: str | None = None
) -> tuple[str, Inspection]:
    """Inspects a graph of a bundle, or a .onnx file.

    Args:
        path: a bundle's folder or a model.
        batch: what to count costs for; 1 if None.
        sequence: frames to count costs for; if None, a bundle's window, and 1 for a model.
        graph: which graph of a bundle, see manifest.GRAPHS; the first that there is if None.

    Returns:
        The model's path and its inspection.

    Raises:
        RequestError: not a bundle or a model, a graph that it does not have, a size that is not positive or that the
            graph does not have.
        CheckError: the bundle is damaged.
    """
    sizes = {symbol: size for symbol, size in ((str(BATCH), batch), (str(SEQUENCE), sequence)) if size is not None}
    if path.is_file():
        if graph is not None:
            raise RequestError(f"--graph {graph}: {path} is a model, which is one graph; leave --graph out")
        return str(path), inspect_model(path, sizes)
    bundle = open_bundle(path)
    graphs = bundle.manifest.graphs
    name = graph or next(known for known in GRAPHS if known in graphs)
    if name not in graphs:
        raise RequestError(f"--graph {name}: bundle {path} has {', '.join(graphs)}; name one of these")
    entry = graphs[name]
    most, frames = bundle.manifest.max_frames(name), bundle.manifest.frames
    if sequence is not None and most is not None and sequence > most:
        raise RequestError(f"--sequence {sequence}: this graph computes at most {most} frames; ask for less")
    model = bundle.file(entry.model)
    window = {symbol: size for symbol, size in bundle.manifest.sizes.items() if name != "stream" or symbol != frames}
    return str(model), inspect_model(model, window | sizes)


def explain(model: str | Path) -> list[dict[str, str]]:
    """Which lowering each edifice op of a model got, and why; nothing for models that this package did not make.

    Returns:
        Of each node its `node`, `op`, `lowering`, `body` (the function that it calls, or that was inlined there) and
        `why`, in the graph's order.
    """
    try:
        graph = onnx.load(model, load_external_data=False).graph
    except (DecodeError, OSError) as error:
        raise RequestError(f"can't read {model}: {brief(error)}; give the path of a sound ONNX model") from error
    found: dict[str, dict[str, str]] = {}
    for node in graph.node:
        said = {entry.key: entry.value for entry in node.metadata_props}
        if LOWERING in said:
            call, body = said.get(CALL, node.name), said.get(BODY, node.op_type)
            called = {"op": op_of(body), "lowering": said[LOWERING], "body": body}
            found[call] = {"node": call, **called, "why": said.get(REASON, "")}
    return list(found.values())


def rows_of(inspection: Inspection) -> list[tuple[str, str]]:
    """The figures as (name, text)."""
    largest = inspection.largest_activation
    rows = [
        *(("input", f"{tensor.name} {tensor.dtype} {_shape(tensor.shape)}") for tensor in inspection.inputs),
        *(("output", f"{tensor.name} {tensor.dtype} {_shape(tensor.shape)}") for tensor in inspection.outputs),
        ("initializers", f"{inspection.parameters:,} ({_bytes(inspection.parameter_bytes)})"),
        ("on disk", _bytes(inspection.disk_bytes)),
        ("opsets", ", ".join(f"{domain} {version}" for domain, version in inspection.opsets.items())),
        ("IR version", str(inspection.ir_version)),
        ("functions", ", ".join(inspection.functions) or "none"),
        ("nodes", _counts(inspection.nodes)),
        ("nodes inlined", _counts(inspection.nodes_inlined)),
        ("counted for", ", ".join(f"{symbol} {size}" for symbol, size in inspection.sizes.items()) or "fixed shapes"),
        ("FLOPs", f"{inspection.flops:,}"),
        ("bytes moved", f"{inspection.bytes_moved:,}"),
    ]
    if largest is not None:
        rows.append(("largest activation", f"{_bytes(largest.bytes)}: {largest.name} {_shape(largest.shape)}"))
    if inspection.unknown:
        rows.append(("not counted", f"{', '.join(inspection.unknown)}: FLOPs and bytes leave these out"))
    rows += sorted(inspection.metadata.items())
    return rows


def _shape(shape: list[int] | list[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _counts(counts: dict[str, int]) -> str:
    return f"{sum(counts.values())}: {', '.join(f'{count} {name}' for name, count in counts.items())}"


def _bytes(size: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size} B"
        size /= 1024  # type: ignore[assignment]
    return f"{size:.1f} GiB"

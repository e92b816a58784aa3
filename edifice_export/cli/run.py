"""The command `run`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from .console import print_json, progress_bar, say
from .options import BundlePath, Json, Providers

__all__ = ["run"]


def run(
    bundle: BundlePath,
    source: Annotated[
        Path,
        typer.Option(
            "--input",
            help="Recording: .npy, .npz or .csv, [T, E] or [B, T, E]; of an exported module .npz of its inputs.",
        ),
    ],
    target: Annotated[Path, typer.Option("--output", help="Where the outputs go: .npy; of a module .npz.")],
    stride: Annotated[int, typer.Option(help="Frames between the windows of a recording longer than one.")] = 1,
    stream: Annotated[bool, typer.Option("--stream", help="Frame by frame, writing the output at every one.")] = False,
    provider: Providers = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads within an operator [default: ONNX Runtime's choice].")
    ] = None,
    optimization: Annotated[str, typer.Option(help="Graph optimisation: all, extended, basic or none.")] = "all",
    as_json: Json = False,
) -> None:
    """Run a recording, or whatever an exported module takes, through a bundle."""
    from ..bundle.manifest import MODULE
    from ..errors import RequestError
    from ..runtime.model import load
    from ..runtime.run import RunReport, StreamReport, run_recording, run_tensors, stream_recording

    model = load(bundle, provider or ("cpu",), threads, optimization)
    if model.bundle.manifest.program.kind == MODULE:
        if stride != 1:
            raise RequestError(f"--stride {stride}: is for the windows of an architecture; leave it out")
        with progress_bar("running") as progress:
            called = run_tensors(model, source, target, stream, progress)
        if as_json:
            print_json(dataclasses.asdict(called))
            return
        shapes = ", ".join(f"{name} {shape}" for name, shape in called.shapes.items())
        how = f"streamed {called.frames} frames" if called.frames is not None else "ran"
        say(f"{how} on {_placement(called.providers)}: {called.output}: {shapes}")
        for name, reason in called.passed_over.items():
            say(f"passed over {name}: {reason}")
        return
    with progress_bar("running") as progress:
        run_all: Callable[..., RunReport | StreamReport] = stream_recording if stream else run_recording
        done = run_all(model, source, target, stride, progress)
    if as_json:
        print_json(dataclasses.asdict(done))
        return
    written = f"on {_placement(done.providers)}: {done.output} float32 {done.shape}"
    if isinstance(done, StreamReport):
        say(f"streamed {done.batch} recording{'s' * (done.batch != 1)} of {done.frames} frames {written}")
    else:
        say(f"ran {done.windows} window{'s' * (done.windows != 1)} of {done.window} frames {written}")
    if done.lines is not None:
        say(f"{source}: {done.lines}")
    for name, reason in model.passed_over.items():
        say(f"passed over {name}: {reason}")
    if isinstance(done, RunReport) and done.unused_frames:
        say(f"the last {done.unused_frames} frames fill no window at stride {done.stride}")


def _placement(nodes: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count} nodes)" for name, count in nodes.items())

"""Alternatives: what a program could run in place of a bundle, made of the same reference model.

    eager        the torch model as it is: a window, or frame by frame with its state
    compile      torch.compile of it, for one batch and length
    plain-onnx   what torch's own exporter makes of it for one batch and length, every loop over time unrolled, run by
                 ONNX Runtime

torch's compiler does not see into custom ops, and its exporter has no graph for them. Both are given a trace of the
model in which every op is its plain definition, as if there were no custom ops: the loops over time are the
model's own code, and what can be made of them is for the compiler or the exporter to find.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch._inductor.config

from edifice_reference.models.contract import ReferenceModel
from edifice_reference.ops.op import plain_definitions

from ..errors import RequestError
from ..graph.capture import export_program
from ..graph.trace import translate
from ..runtime.providers import open_session
from ..specification import InputSpec
from .contestants import Contestant, Subject, forward
from .plan import Point

__all__ = ["alternatives"]


def alternatives(
    subject: Subject, reference: ReferenceModel, point: Point, frames: np.ndarray, against: Sequence[str], folder: Path
) -> list[Contestant]:
    """The alternatives that there are at a point, of those that were asked for.

    Args:
        subject: what is measured.
        reference: its reference model.
        point: where.
        frames: the input.
        against: see plan.AGAINST.
        folder: an empty one, for models.

    Raises:
        RequestError: torch's compiler does not work here.
        CheckError: torch can't trace or export the model.
    """
    found = []
    if "eager" in against:
        run = forward(reference, point, torch.tensor(frames))
        found.append(Contestant("eager", torch.inference_mode()(run)))
    if point.graph == "window" and {"compile", "plain-onnx"} & set(against):
        spec = InputSpec("state_sequence", "float32", frames.shape)
        with plain_definitions():
            program = export_program(next(reference.modules()), [spec])
        if "compile" in against:
            found.append(_compiled(program, frames))
        if "plain-onnx" in against:
            found.append(_plain_onnx(subject, program, spec, point, frames, folder / "plain.onnx"))
    return found


def _compiled(program: torch.export.ExportedProgram, frames: np.ndarray) -> Contestant:
    given = torch.tensor(frames)
    compiled = torch.inference_mode()(torch.compile(program.module(), dynamic=False))
    try:
        # In this process: others that wait for work would be measured along.
        with torch._inductor.config.patch(compile_threads=1), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled(given)
    except Exception as error:  # of torch's, its compiler's, its code generator's and the system's, many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(
            f"against compile: torch.compile failed: {reason}; it needs a C++ compiler, such as g++ with its headers; "
            "install one, or leave compile out"
        ) from error
    return Contestant("compile", lambda: compiled(given))


def _plain_onnx(
    subject: Subject,
    program: torch.export.ExportedProgram,
    spec: InputSpec,
    point: Point,
    frames: np.ndarray,
    model: Path,
) -> Contestant:
    translate(program, [spec], subject.bundle.manifest.opset).save(model)
    session = open_session(model, subject.providers, point.threads)
    inputs = {spec.name: frames}
    return Contestant("plain-onnx", lambda: session.run(None, inputs)[0], model, inputs)

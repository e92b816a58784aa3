"""Kernels: a library that registers some under the names of bodies has them run; without it the bodies do."""

from __future__ import annotations

import ctypes
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from edifice_export.building.link import link
from edifice_export.graph.trace import trace
from edifice_export.specification import InputSpec, TensorSpec, shape_of
from edifice_reference import ops

KERNELS = Path(__file__).parent / "kernels"
STATE = 5


class Scans(nn.Module):
    """Selective scans with three bodies: of which y is read, y and the state, and y of the last frame."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.Parameter(torch.randn(2, 4, STATE, generator=generator))
        self.rates = nn.Parameter(-torch.rand(4, STATE, generator=generator))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, c = (x @ weight for weight in self.weights)
        delta = nn.functional.softplus(x)
        first, _ = ops.selective_scan(x, delta, self.rates, b, c)
        second, state = ops.selective_scan(first, delta, self.rates, b, c)
        third, _ = ops.selective_scan(second, delta, self.rates, b, c[:, -1:])
        return second, state, third


BODIES = ["SelectiveScan_plain_6to1", "SelectiveScan_plain_6to2", "SelectiveScan_last_6to1"]


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    """The scans, linked for 60 frames."""
    outputs = [
        TensorSpec("second", "float32", shape_of("batch", "sequence", 4)),
        TensorSpec("state", "float32", shape_of("batch", STATE, 4)),
        TensorSpec("third", "float32", shape_of("batch", 1, 4)),
    ]
    x = InputSpec("x", "float32", shape_of("batch", "sequence", 4))
    linked = link(trace(Scans(), [x], outputs, 20), {"sequence": 60})
    assert [node.op_type for node in linked.graph.node if node.domain] == BODIES
    return linked


def built(folder: Path, include: Path) -> Path:
    """The library, made by the system's C compiler."""
    library = folder / "kernels.so"
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    source = KERNELS / "selective_scan.c"
    options = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC", f"-I{include}"]
    subprocess.run([compiler, *options, source, "-o", library, "-lm"], check=True)
    return library


def session_of(model: onnx.ModelProto, library: Path | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def assert_runs_in_place_of_bodies(model: onnx.ModelProto, library: Path) -> None:
    module, loaded = Scans(), ctypes.CDLL(str(library))
    calls, marker = (ctypes.c_long * 2).in_dll(loaded, "calls"), ctypes.c_float.in_dll(loaded, "marker")
    with_kernels, without = session_of(model, library), session_of(model, None)
    for number, (batch, length) in enumerate(((1, 1), (2, 7), (3, 300)), 1):
        x = torch.randn(batch, length, 4, generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected = [value.numpy() for value in module.double()(x.double())]
        for session in (with_kernels, without):
            for found, wanted in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
                np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))
        # A body of its own for the last read-out, of which the library knows nothing.
        assert list(calls) == [number, number]
    marker.value = 100
    y, marked = (session.run(["second"], {"x": x.numpy()})[0] for session in (without, with_kernels))
    assert np.abs(marked - y).max() > 50
    # Names of another lowering: the bodies run, whatever is registered.
    before = list(calls)
    other = onnx.ModelProto.FromString(model.SerializeToString())
    for function in (*other.functions, *other.graph.node):
        for field in ("name", "op_type"):
            value = getattr(function, field, "")
            if value.startswith("SelectiveScan_plain"):
                setattr(function, field, value.replace("plain", "other"))
    (found,) = session_of(other, library).run(["second"], {"x": x.numpy()})
    np.testing.assert_array_equal(found, y)
    assert list(calls) == before


def test_a_kernel_runs_in_place_of_a_body(model: onnx.ModelProto, tmp_path: Path) -> None:
    """Of each name by itself, where an op has several bodies in a graph; without the library all bodies run."""
    assert_runs_in_place_of_bodies(model, built(tmp_path, KERNELS))


@pytest.mark.slow
def test_the_same_with_onnx_runtimes_own_header(model: onnx.ModelProto, tmp_path: Path) -> None:
    """As a kernel's author has it; the tests' own header agrees with it."""
    from edifice_examples.check.cpp import Cpp

    Cpp().install(tmp_path)
    assert_runs_in_place_of_bodies(model, built(tmp_path, tmp_path / "onnxruntime" / "include"))

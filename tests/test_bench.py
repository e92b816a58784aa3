"""Bench: what it measures and in which order, that it times nothing that is wrong, and what it refuses. No times."""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from cli_helpers import Capture, cli, done, error_of, raising, refused
from conftest import any_architecture

import edifice_export as ee
from edifice_export.benchmark import alternatives, contestants
from edifice_export.benchmark.bench import take_turns
from edifice_export.benchmark.contestants import Subject
from edifice_export.benchmark.footprint import footprint
from edifice_export.benchmark.plan import Point, plan
from edifice_export.benchmark.products import products
from edifice_export.bundle.body_names import op_of
from edifice_export.graph.capture import export_program
from edifice_export.lowerings import LOWERINGS
from edifice_export.programs import reference_model
from edifice_export.programs.reference_model import reference_of
from edifice_export.specification import InputSpec, shape_of
from edifice_reference.models.registry import ARCHITECTURES
from edifice_reference.ops.op import plain_definitions

ONE: dict[str, Any] = {"threads": [1], "batch": [1], "length": [3], "rounds": 1}
"""The least that can be measured."""

BARE = ("products", "ort-products", "gemv")
"""Contestants that have no output."""


@any_architecture
def test_what_is_measured(bundle: ee.Bundle) -> None:
    steps: list[tuple[int, int]] = []
    report = ee.bench(
        bundle,
        threads=[1, 2],
        batch=[1, 2, 1],
        length=[7, 3],
        against=["eager"],
        rounds=2,
        progress=lambda *at: steps.append(at),
    )
    found = Counter((r.graph, r.threads, r.batch, r.length) for r in report.results)
    assert list(found) == [
        *[("window", 1, 1, 7), ("window", 2, 1, 7), ("window", 1, 2, 7), ("window", 1, 1, 3)],
        *[("stream", 1, 1, 1), ("stream", 2, 1, 1), ("stream", 1, 2, 1), ("prefill", 1, 1, 8)],
    ]
    assert steps == [(step, 8) for step in range(8)]
    by_graph = {graph: [r.contestant for r in report.results if r.graph == graph] for graph in bundle.manifest.graphs}
    assert by_graph["window"] == ["bundle", "products", "ort-products", "eager"] * 4
    assert by_graph["stream"][:6] == ["bundle", "step", "products", "ort-products", "gemv", "eager"]
    assert by_graph["prefill"] == ["bundle", "products", "ort-products", "eager"]
    for result in report.results:
        assert len(result.times) == 2
        assert 0 < min(result.times) <= result.median_ms <= result.percentile(99) <= max(result.times)
        assert result.per_second == pytest.approx(1000 * result.batch / result.median_ms)
        assert (result.nodes is not None) == (result.load_ms is not None) == (result.contestant == "bundle")
        assert (result.error is None) == (result.contestant in BARE)
        assert result.error is None or result.error < 1e-5
        base = report.find(result.graph, "products", threads=result.threads, batch=result.batch, length=result.length)
        assert base is not None
        assert result.ratio == result.median_ms / base.median_ms
    assert (report.program, report.window, list(report.providers)) == ("hymba", 7, ["cpu"])
    assert report.machine["torch"] == torch.__version__ or str(report.machine["torch"]) in torch.__version__
    assert report.notes == []


def test_the_default_is_varied_around_the_window(bundle: ee.Bundle) -> None:
    points = plan(bundle, "both", None, None, None, [])
    lengths = {point.length for point in points if point.graph == "window"}
    limited = bundle.manifest.max_frames("window") is not None
    assert lengths == ({7, 2} if limited else {7, 2, 28})
    assert {point.batch for point in points if point.graph == "stream"} == {1, 8}
    alone = plan(bundle, "both", None, None, None, ["compile"])
    assert alone == [Point("window", 1, 1, 7), Point("stream", 1, 1, 1), Point("prefill", 1, 1, 8)]


def test_a_stream_without_a_window(primed: ee.Bundle) -> None:
    report = ee.bench(primed, threads=[1], batch=[2], against=["eager"], rounds=1)
    assert {result.graph for result in report.results} == {"stream", "prefill"}
    assert all(result.error < 1e-5 for result in report.results if result.error is not None)
    with pytest.raises(ee.RequestError, match="length: is for windows"):
        ee.bench(primed, length=[7])


def test_contestants_take_turns() -> None:
    played: list[str] = []
    times = take_turns([lambda: played.append("a"), lambda: played.append("b"), lambda: played.append("c")], 20)
    assert "".join(played) == "abc" * (1 + 2 + 20)
    assert [len(taken) for taken in times] == [20] * 3
    assert [len(taken) for taken in take_turns([lambda: None])] == [1000]


def test_products_are_the_dense_layers_that_the_input_passes(
    bundle: ee.Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    subject = Subject(bundle, ["cpu"])
    assert subject.reference is not None
    dense = {
        layer.weight.data_ptr(): layer.weight
        for name, layer in subject.reference.named_modules()
        if isinstance(layer, torch.nn.Linear) and ".filters." not in name
    }
    passed: list[tuple[int, int]] = []

    def multiply(x: torch.Tensor, weight: torch.Tensor, _: torch.Tensor) -> None:
        passed.append((weight.data_ptr(), x.numel() // x.shape[-1]))

    for point, rows in ((Point("window", 1, 2, 5), 10), (Point("stream", 1, 3, 1), 3), (Point("stream", 1, 1, 1), 1)):
        found = products(subject, point, *subject.inputs(point).values(), tmp_path)
        assert [contestant.name for contestant in found] == list(BARE[: 3 if rows == 1 else 2])
        with monkeypatch.context() as patched:
            patched.setattr(torch.nn.functional, "linear", multiply)
            patched.setattr(torch, "addmv", lambda bias, weight, x: multiply(x, weight, bias))
            for contestant in (each for each in found if each.name != "ort-products"):
                passed.clear()
                contestant.run()
                assert {pointer for pointer, _ in passed} == dense.keys()
                assert {count for _, count in passed} == {rows}
        # ONNX Runtime leaves none out, though nobody wants its result.
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        ort.InferenceSession(tmp_path / "products.onnx", options, providers=["CPUExecutionProvider"])
        kept = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
        assert kept["MatMul"] + kept["Gemm"] == len(passed)
        given = onnx.load(tmp_path / "products.onnx").graph.initializer
        weights = {onnx.numpy_helper.to_array(value).T.tobytes() for value in given if value.name.startswith("matrix")}
        assert weights == {weight.detach().numpy().tobytes() for weight in dense.values()}


def test_a_stream_goes_on(bundle: ee.Bundle) -> None:
    """The same frame again and again, in the bare loop, as steps and in torch: outputs differ, for states do."""
    subject, point = Subject(bundle, ["cpu"]), Point("stream", 1, 2, 1)
    inputs = subject.inputs(point)
    (frames,) = inputs.values()
    given: Any = torch.tensor(frames).double()[:, None].expand(-1, 6, -1)
    with torch.inference_mode():
        expected = subject.exact.forward_stream(given).numpy()
    eager = alternatives.alternatives(subject, subject.reference, point, frames, ["eager"], Path())
    for contestant in [*contestants.bundle_contestants(subject, point, inputs), *eager]:
        outputs = np.stack([np.asarray(contestant.run()).copy() for _ in range(6)], axis=1)
        np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-5)
    assert np.abs(expected[:, 5] - expected[:, 0]).max() > 1e-4


def test_the_graph_of_torchs_own_exporter(bundle: ee.Bundle) -> None:
    report = ee.bench(bundle, graph="window", against=["plain-onnx", "eager"], **ONE)
    ours, plain = report.find("window", "bundle"), report.find("window", "plain-onnx")
    assert ours is not None
    assert plain is not None
    assert plain.nodes
    assert plain.load_ms
    assert plain.error is not None
    assert plain.error < 1e-5


def test_compile_gets_a_trace_without_custom_ops(bundle: ee.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: given.append(module) or module)
    report = ee.bench(bundle, graph="window", against=["compile"], **ONE)
    found = report.find("window", "compile")
    assert found is not None
    assert found.error is not None
    assert not [node for node in given[0].graph.nodes if "edifice" in str(node.target)]


@pytest.mark.slow
def test_compile(bundle: ee.Bundle) -> None:
    found = ee.bench(bundle, graph="window", against=["compile"], **ONE).find("window", "compile")
    assert found is not None
    assert found.error is not None
    assert found.error < 1e-5


def scaled(model: torch.nn.Module) -> torch.nn.Module:
    """A model with one parameter a little larger."""
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    return model


@pytest.mark.parametrize("name", ["bundle", "eager", "compile", "plain-onnx"])
@any_architecture
def test_what_is_wrong_is_not_timed(bundle: ee.Bundle, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    match name:
        case "bundle":  # it is the reference that is another
            monkeypatch.setattr(reference_model, "reference_of", lambda bundle: scaled(reference_of(bundle)))
        case "eager":
            monkeypatch.setattr(alternatives, "forward", lambda model, _, x: lambda: model(x) + 1e-3)
        case "compile":
            monkeypatch.setattr(torch, "compile", lambda module, **_: lambda x: -module(x))
        case "plain-onnx":
            monkeypatch.setattr(
                alternatives, "export_program", lambda model, specs: export_program(scaled(deepcopy(model)), specs)
            )
    with pytest.raises(
        ee.CheckError, match=rf"^{name} was not timed: the output of window, batch 1, length 3, departs"
    ):
        ee.bench(bundle, graph="window", against=["eager"] if name == "bundle" else [name], **ONE)


@any_architecture
def test_no_compiler(capfd: Capture, bundle: ee.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: raising(RuntimeError("no g++\nat all")))
    message = error_of(cli(capfd, "bench", bundle.path, "--against=compile", "--length=3"))
    assert "torch.compile failed: no g++; it needs a C++ compiler" in message


def test_memory_is_that_of_the_run(any_bundle: ee.Bundle) -> None:
    held = np.ones(2**25)  # 256 MiB, which a new process would inherit as its peak
    peaks = []
    for length in (7, 2000):
        frames = held[: length * 6].reshape(1, length, 6).astype(np.float32)
        found = footprint(any_bundle.path / "window/model.onnx", {"state_sequence": frames}, ["cpu"], 1)
        assert found.peak_bytes is not None
        peaks.append(found.peak_bytes)
    assert peaks[0] < 2**25
    # Not that of all attention scores at once, float32 [2000, 2000].
    assert peaks[0] + 2**22 < peaks[1] < 4 * 2000**2


def test_a_process_that_fails(any_bundle: ee.Bundle) -> None:
    with pytest.raises(ee.CheckError, match=r"failed: .*no_such"):
        footprint(any_bundle.path / "window/model.onnx", {"no_such": np.zeros(1, np.float32)}, ["cpu"], 1)


@any_architecture
def test_the_command(capfd: Capture, bundle: ee.Bundle, tmp_path: Path) -> None:
    sizes = ["--threads=1", "--batch=1", "--length=3", "--rounds=1"]
    figures = json.loads(done(capfd, "bench", bundle.path, *sizes, "--against=eager,eager", "--json").out)
    assert {result["contestant"] for result in figures["results"]} == {"bundle", "step", "eager", *BARE}
    assert set(figures["results"][0]) == {
        *("graph", "contestant", "threads", "batch", "length", "rounds", "median_ms", "p95_ms", "p99_ms", "per_second"),
        *("ratio", "error", "nodes", "load_ms", "peak_bytes"),
    }
    picture = tmp_path / "times.png"
    text = done(capfd, "bench", bundle.path, *sizes, "--provider=cuda", "--provider=cpu", "--plot", picture).out
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    lines = text.splitlines()
    assert lines[3].split()[:5] == ["graph", "contestant", "threads", "batch", "length"]
    assert lines[-1].startswith("passed over cuda: ")
    assert sum(line.startswith(("window ", "stream ", "prefill ")) for line in lines) == 3 + 5 + 3


def test_the_table_fits(any_bundle: ee.Bundle) -> None:
    report = ee.bench(any_bundle, graph="window", **ONE)
    widest = ee.BenchResult(
        "prefill", "plain-onnx", 1024, 4096, 8192, (123456.0,), 123.45, 1e-12, 123456, 12345.0, 2**34
    )
    rows = [report.rows()[0], ee.BenchReport(**vars(report) | {"results": [widest]}).rows()[1]]
    assert sum(max(map(len, column)) for column in zip(*rows, strict=True)) + 2 * len(rows[0]) <= 120


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--against=fastest", "'fastest': there is no such alternative; there are eager, compile, plain-onnx"),
        ("--threads=0", "threads must be an integer from 1 to 1024, got 0"),
        ("--threads=2000", "threads must be an integer from 1 to 1024, got 2000"),
        ("--batch=-1", "batch must be an integer from 1 upward, got -1"),
        ("--batch=1000000000", "GiB of memory and this machine has"),
        ("--length=0", "length must be an integer from 1 upward, got 0"),
        ("--length=1000000", "GiB of memory and this machine has"),
        ("--rounds=0", "rounds must be an integer from 1 to 1000000, got 0"),
        ("--graph=prefill", "graph must be window, stream, both, got 'prefill'"),
        ("--graph=stream --length=3", "length: is for windows, and only the stream is measured"),
        ("--graph=stream --against=compile", "against compile: is for windows, and only the stream is measured"),
        ("--provider=no_such", "provider 'no_such' is unknown"),
        ("--plot=times.jpg", "has the extension '.jpg'"),
        ("--plot=no_such/times.png", "is no place for a file"),
        ("--threads=few", "few"),
    ],
)
@any_architecture
def test_refusals(
    capfd: Capture,
    bundle: ee.Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refused(capfd, "bench", bundle.path, *arguments.split())


@pytest.mark.parametrize("bundle", ["hyena"], indirect=True)
def test_no_more_frames_than_the_graph_takes(bundle: ee.Bundle) -> None:
    with pytest.raises(ee.RequestError, match="length 8: this graph computes at most 7 frames"):
        ee.bench(bundle, length=[3, 8])


@any_architecture
def test_what_is_not_there(capfd: Capture, bundle: ee.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capfd, "bench", "no_such")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refused(capfd, "bench", bundle.path, "--plot=times.png")


def test_plain_definitions_are_put_back(any_bundle: ee.Bundle) -> None:
    subject = Subject(any_bundle, ["cpu"])
    spec = any_bundle.manifest.graphs["window"].inputs[0]
    spec = InputSpec(spec.name, spec.dtype, shape_of(1, any_bundle.manifest.window_size, spec.shape[-1]))

    def has_ops() -> bool:
        return any("edifice" in str(node.target) for node in export_program(subject.reference, [spec]).graph.nodes)

    with plain_definitions():
        assert not has_ops()
    assert has_ops()


def test_shares_of_a_window(any_bundle: ee.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import shares

    path = any_bundle.path / any_bundle.manifest.graphs["window"].model
    assert tuple(shares.shares(path, 3, 2)) == shares.KINDS
    functions = onnx.load(path, load_external_data=False).functions
    ops = shares._ops_of_functions(functions)
    assert ops.keys() == {op_of(function.name) for function in functions}
    assert set(ops.values()) <= {op.op_type for op in LOWERINGS.values()}
    outer, inner, after = ({"ts": start, "dur": length} for start, length in ((0, 10), (3, 7), (10, 5)))
    assert list(shares._outermost([inner, after, outer])) == [(outer, 1), (after, 0)]


@pytest.mark.slow
def test_the_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", f"--output={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(folder), run_name="__main__")
    assert ended.value.code == 0
    kinds = (".json", ".md", ".png")
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}{kind}" for name in ("models", "ops") for kind in kinds
    }
    written = json.loads((tmp_path / "models.json").read_text())
    assert list(written["models"]) == list(ARCHITECTURES)
    assert str(Path.home()) not in (tmp_path / "models.json").read_text()
    for model in written["models"].values():
        assert list(model["shares_ms"]) == ["7", "28"]
        assert all(sum(shares.values()) > 0 for shares in model["shares_ms"].values())

    monkeypatch.syspath_prepend(folder)
    import ops as benchmark

    measured = json.loads((tmp_path / "ops.json").read_text())["results"]
    for case in benchmark.CASES:
        # Of each length one body is taken, and torch is there too, and the rivals that there are.
        found = [result for result in measured if result["case"] == case.title]
        assert sum(result["is_chosen"] for result in found) == len(benchmark.QUICK)
        assert sum(result["kind"] == "torch" for result in found) >= len(benchmark.QUICK)
        for result in found:
            assert result["error"] <= benchmark.ALLOWED or result["kind"] == "torch"
        assert {result["contestant"] for result in found if result["kind"] == "rival"} == set(case.rivals)

"""Bundles of somebody's modules, run: by name, frame by frame, measured; other inputs are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import Capture, done, edit_manifest, error_of, refused
from cli_helpers import cli as run_cli
from module_cases import exported, frames_of, largest_error, program
from torch import Tensor, nn
from torch.nn import functional

import edifice_export as ee
from edifice_export.values import draw


def test_run_takes_and_gives_tensors_by_name(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = exported("two_and_two", tmp_path_factory)
    signal = np.random.default_rng(0).standard_normal((3, 9, 5)).astype(np.float32)
    kinds = np.random.default_rng(0).integers(0, 7, (3, 9)).astype(np.int32)
    np.savez("in.npz", signal=signal, kinds=kinds, more=np.zeros(3))
    outcome = done(capfd, "run", bundle.path, "--input=in.npz", "--output=out.npz")
    assert "output_0 [3, 9], output_1 [3, 8]" in outcome.words
    with np.load("out.npz") as found:
        for name, wanted in ee.load(bundle).run({"signal": signal, "kinds": kinds}).items():
            assert np.array_equal(found[name], wanted)
    for arguments, message in (
        (("--input=in.npz", "--output=out.npy"), "this bundle gives output_0, output_1; name a .npz file"),
        (("--input=in.npy", "--output=new.npz"), "in.npy: there is no such file"),
        (("--input=in.npz", "--output=in.npz"), "is the input"),
        (("--input=in.npz", "--output=new.npz", "--stride=2"), "is for the windows of an architecture"),
        (("--input=in.npz", "--output=new.npz", "--stream"), "has no step"),
    ):
        assert message in refused(capfd, "run", bundle.path, *arguments)
    np.savez("part.npz", signal=signal)
    assert "holds signal, and no kinds" in refused(capfd, "run", bundle.path, "--input=part.npz", "--output=new.npz")


def test_run_streams_tensors(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = exported("live", tmp_path_factory)
    model = ee.load(bundle)
    frames = {spec.name: draw(spec, {}, np.random.default_rng(0)) for spec in frames_of(model, 2, 12)}
    np.savez("in.npz", **frames)
    assert "streamed 12 frames" in done(capfd, "run", bundle.path, "--input=in.npz", "--output=o.npz", "--stream").out
    with np.load("o.npz") as found:
        for name, wanted in program("live").run_stream(frames).items():
            assert largest_error(found[name], wanted) <= 1e-5
    frames["kind"][0, 7] = 3
    np.savez("in.npz", **frames)
    outcome = run_cli(capfd, "run", bundle.path, "--input=in.npz", "--output=new.npz", "--stream")
    assert "in.npz, frame 7: kind: holds 3 at [0]; there are 0 to 2, give those" in error_of(outcome)


@pytest.mark.parametrize("name", ["both_ways", "live", "recurrent", "recall"])
def test_it_is_measured(name: str, tmp_path_factory: pytest.TempPathFactory, capfd: Capture) -> None:
    bundle = exported(name, tmp_path_factory)
    outcome = done(capfd, "bench", bundle.path, "--rounds=2", "--threads=1")
    assert outcome.out.startswith(f"{bundle.manifest.program.name}, window of")
    assert "outputs not compared: this is somebody's module" in outcome.out
    report = ee.bench(bundle, rounds=2, threads=[1], batch=[1, 3])
    measured = {(result.graph, result.batch) for result in report.results}
    assert measured >= {(graph, batch) for graph in bundle.manifest.graphs for batch in (1, 3) if graph != "prefill"}
    with pytest.raises(ee.RequestError, match="against eager: is for architectures"):
        ee.bench(bundle, against=["eager"])
    if name == "both_ways":
        with pytest.raises(ee.RequestError, match="length: this bundle has no frames"):
            ee.bench(bundle, length=[7])


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"signal": (2, 4, 5)}, "takes signal float32 .*; got signal"),
        ({"signal": (2, 4, 5), "kinds": (2, 5)}, "kinds: time is 5, and 4 in what was given before"),
        (
            {"signal": (2, 4, 6), "kinds": (2, 4)},
            r"signal: expected signal float32 \[batch, time, 5\] or \[time, 5\], got shape \[2, 4, 6",
        ),
        ({"signal": (2, 4, 5), "kinds": (2, 4), "more": (1,)}, "got signal, kinds, more"),
        ({"signal": (2, 0, 5), "kinds": (2, 0)}, "which holds nothing"),
    ],
)
def test_other_inputs_are_refused(
    given_: dict[str, tuple[int, ...]], message: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = ee.load(exported("two_and_two", tmp_path_factory))
    dtypes = {"kinds": np.int32}
    with pytest.raises(ee.RequestError, match=message):
        model.run({name: np.zeros(shape, dtypes.get(name, np.float32)) for name, shape in given_.items()})


def test_a_single_entry_goes_without_its_axis(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = ee.load(exported("two_and_two", tmp_path_factory))
    signal, kinds = np.ones((3, 5), np.float32), np.ones(3, np.int32)
    single, batch = model(signal, kinds), model(signal[None], kinds=kinds[None])
    assert isinstance(single, tuple)
    assert all(np.array_equal(one, several[0]) for one, several in zip(single, batch, strict=True))
    with pytest.raises(ee.RequestError, match="some inputs have a batch and others not"):
        model(signal, kinds[None])
    with pytest.raises(ee.RequestError, match="each once"):
        model(signal, kinds, kinds=kinds)


class Places(nn.Module):
    """A table of positions that ends."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Embedding(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(x + self.place(torch.arange(x.shape[1])))


def test_a_size_has_the_limit_that_was_declared(tmp_path: Path) -> None:
    free = ({0: "batch", 1: torch.export.Dim("time", max=16)},)
    bundle = ee.export(Places(), (torch.randn(2, 5, 4),), dynamic_shapes=free, output=tmp_path / "bot")
    assert bundle.manifest.graphs["window"].limits == {"time": (1, 16)}
    model = ee.load(bundle)
    assert model(np.zeros((1, 16, 4), np.float32)).shape == (1, 16, 4)
    with pytest.raises(ee.RequestError, match="x: time is 17, and this model takes at most 16"):
        model(np.zeros((1, 17, 4), np.float32))
    edit_manifest(bundle.path, ("graphs", "window", "limits"), {"time": [1, 99]})
    with pytest.raises(ee.CheckError, match=r"of edifice.limits the manifest says"):
        ee.load(bundle.path)

"""The bundle that every sample language must take, read by Python: all types and ranks, and all kinds of states."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_helpers import edit_manifest, forge
from edifice_examples.check.handmade import write_handmade
from onnx import numpy_helper

import edifice_export as ee
from edifice_export.bundle.bundle import open_bundle
from edifice_export.bundle.manifest_reader import read_manifest
from edifice_export.errors import CheckError

LAST = ("states", 3, "initial")
"""What an int32 state starts from."""


@pytest.fixture(scope="module")
def handmade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_handmade(tmp_path_factory.mktemp("handmade") / "bundle", prefill=True)


@pytest.fixture
def copied(handmade: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(handmade, tmp_path / "bundle"))


def test_it_gives_what_onnx_evaluates(handmade: Path) -> None:
    report = ee.verify(handmade, ["cpu"])
    assert report.passed
    assert {case.source for case in report.cases} == {
        *(f"{graph}/test_data_set_0" for graph in ("window", "stream", "prefill")),
        "stream/test_sequence",
    }


@pytest.mark.parametrize(
    "name",
    [
        *(f"window/test_data_set_0/output_{index}.pb" for index in range(7)),
        *(f"stream/test_data_set_0/output_{index}.pb" for index in range(6)),
        *(f"stream/test_sequence/output_{index}.pb" for index in range(2)),
    ],
)
def test_a_wrong_number_of_any_type_is_found(name: str, copied: Path) -> None:
    array = numpy_helper.to_array(onnx.load_tensor(copied / name)).copy()
    last = array.reshape(-1)[-1:]
    last[:] = ~last if array.dtype == np.bool_ else last + 1
    forge(copied, name, numpy_helper.from_array(array).SerializeToString())
    assert not ee.verify(copied, ["cpu"]).passed


@pytest.mark.parametrize("prefill", [True, False])
def test_its_stream_goes_on(prefill: bool, tmp_path: Path) -> None:
    """Frame by frame, many at once where there is a graph for that, again after a rewind."""
    bundle = open_bundle(write_handmade(tmp_path / "bundle", prefill))
    found = bundle.test_sequence()
    assert found is not None
    frames, outputs = (list(tensors.values()) for tensors in found[1:])
    stream = ee.load(bundle, ["cpu"]).stream(batch=2)
    for _ in range(2):
        for t in range(frames[0].shape[1]):
            for given, expected in zip(stream.step(*(each[:, t] for each in frames)), outputs, strict=True):
                np.testing.assert_allclose(given, expected[:, t], atol=1e-5)
        stream.rewind(frames[0].shape[1])
    if prefill:
        for given, expected in zip(stream.prefill(*frames), outputs, strict=True):
            np.testing.assert_allclose(given, expected[:, -1], atol=1e-5)


@pytest.mark.parametrize("value", [-1, 2**31, 0.5, True, None])
def test_what_an_int32_state_cant_start_from_is_refused(value: object, copied: Path) -> None:
    edit_manifest(copied, LAST, value)
    with pytest.raises(CheckError, match=r"the initial value of 1\.steps should be a number or a file, and is"):
        read_manifest(copied)


def test_what_it_can_start_from_is_read(copied: Path) -> None:
    edit_manifest(copied, LAST, 2**31 - 1)
    assert read_manifest(copied).states[3].initial == 2**31 - 1

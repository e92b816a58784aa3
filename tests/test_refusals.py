"""What ends in one clear error, not in a library's: terminals, names, numbers, copies, files that claim too much."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import COMMAND, Capture, Outcome, cli, error_of, refused
from conftest import ANY, TINY

import edifice_export as ee
from edifice_export.arguments import whole_number
from edifice_export.benchmark.plan import plan
from edifice_export.errors import brief
from edifice_export.runtime import recording, tensor_file
from edifice_export.runtime.recording import open_recording

NOT_UTF8 = os.fsdecode(b"b\xff")
WIDTH = TINY["embed_dim"]


def run(folder: Path, *arguments: object, **environment: str) -> Outcome:
    """Runs the installed command in a folder and an environment of its own."""
    done = subprocess.run(
        [COMMAND, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    )
    return Outcome(done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.ones((9, WIDTH), np.float32))
    return tmp_path


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C"},
    ],
)
def test_a_terminal_without_the_letters_of_a_path(
    folder: Path, any_bundle: ee.Bundle, environment: dict[str, str]
) -> None:
    missing = run(folder, "inspect", "日本", **environment)
    assert "there is no such folder" in error_of(missing)
    written = run(folder, "scaffold", "cpp", any_bundle.path, "--output=日本", **environment)
    assert (written.status, written.err) == (0, "")
    assert (folder / "日本/bundle/manifest.json").is_file()
    made = run(folder, "run", any_bundle.path, "--input=x.npy", "--output=日.npy", **environment)
    assert (made.status, made.err) == (0, "")


def test_a_locale_without_the_letters_of_a_path(folder: Path, any_bundle: ee.Bundle) -> None:
    """Python can't read the name then, and what only Python opens is taken all the same."""
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for arguments in (("inspect", "日本"), ("scaffold", "cpp", any_bundle.path, "--output=日本")):
        assert "set a UTF-8 locale" in error_of(run(folder, *arguments, **plain))
    made = run(folder, "run", any_bundle.path, "--input=x.npy", "--output=日.npy", **plain)
    assert (made.status, made.err) == (0, "")
    assert (folder / "日.npy").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        f"inspect {NOT_UTF8}",
        f"run {NOT_UTF8} --input=x.npy --output=y.npy",
        f"verify {NOT_UTF8}",
        f"bench {NOT_UTF8}",
        f"scaffold cpp {NOT_UTF8} --output=new",
        f"scaffold cpp {{bundle}} --output={NOT_UTF8}new",
        f"build {ANY} --output={NOT_UTF8}new",
        f"build {ANY} --weights={NOT_UTF8}.safetensors",
        f"convert {NOT_UTF8}.safetensors out.nx",
    ],
)
def test_a_name_that_is_not_utf8_is_refused(
    capfd: Capture, folder: Path, any_bundle: ee.Bundle, arguments: str
) -> None:
    os.symlink(any_bundle.path, NOT_UTF8)
    os.symlink(any_bundle.path / "weights.safetensors", f"{NOT_UTF8}.safetensors")
    message = refused(capfd, *arguments.format(bundle=any_bundle.path).split())
    assert r"b\udcff" in message
    assert "is not UTF-8" in message
    assert (folder / "x.npy").is_file()


def test_a_name_that_is_not_utf8_is_taken_where_it_can_be(folder: Path, any_bundle: ee.Bundle) -> None:
    os.rename("x.npy", f"{NOT_UTF8}.npy")
    for stream in ([], ["--stream"]):
        done = run(folder, "run", any_bundle.path, f"--input={NOT_UTF8}.npy", f"--output={NOT_UTF8}y.npy", *stream)
        assert (done.status, done.err) == (0, "")
        assert np.load(f"{NOT_UTF8}y.npy").dtype == np.float32
    weights = any_bundle.path / "weights.safetensors"
    done = run(folder, "convert", weights, f"{NOT_UTF8}.safetensors")
    assert (done.status, done.err) == (0, "")
    assert Path(f"{NOT_UTF8}.safetensors").read_bytes() == weights.read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        "run {bundle} --input=x.npy --output=y.npy",
        f"build {ANY}",
        "scaffold cpp {bundle} --output=new",
        "convert {bundle}/weights.safetensors out.nx",
    ],
)
def test_a_working_folder_that_is_gone(folder: Path, any_bundle: ee.Bundle, arguments: str) -> None:
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", COMMAND, *arguments.format(bundle=any_bundle.path).split()],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "the working folder: was removed" in error_of(Outcome(done.returncode, done.stdout, done.stderr))


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ("list --no-such", 2),
        (f"build {ANY} --opset=3", 2),
        ("build no_such", 2),
        ("verify no_such", 2),
        ("run no_such --input=x.npy --output=y.npy", 2),
        ("inspect no_such", 2),
        ("bench no_such", 2),
        ("convert no_such out.nx", 2),
        ("scaffold cobol no_such --output=new", 2),
        ("doctor more", 2),
        ("verify {bundle} --tolerance=1e-12", 1),
    ],
)
def test_a_failure_is_json_too(
    capfd: Capture, folder: Path, any_bundle: ee.Bundle, arguments: str, status: int
) -> None:
    outcome = cli(capfd, *arguments.format(bundle=any_bundle.path).split(), "--json")
    message = error_of(outcome, status)
    found = json.loads(outcome.out)
    assert found["exit_status"] == status
    assert found["error"] in message
    assert (folder / "x.npy").is_file()


def test_a_model_and_a_stream_say_that_they_cannot_be_copied(any_bundle: ee.Bundle) -> None:
    model = ee.load(any_bundle)
    for made in (model, model.stream(), model.stream().snapshot()):
        for act in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(ee.RequestError, match="can't be copied or pickled"):
                act(made)


def test_more_streams_than_memory_holds_are_refused_by_what_they_take(any_bundle: ee.Bundle) -> None:
    with pytest.raises(ee.RequestError, match=r"batch 1000000000000: .* take [0-9,]+ GiB of memory .* open fewer"):
        ee.load(any_bundle).stream(batch=10**12)


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, np.int32])
def test_integers_of_numpy_are_integers(any_bundle: ee.Bundle, kind: Any) -> None:
    model = ee.load(any_bundle, threads=kind(1))
    stream = model.stream(batch=kind(2), history=kind(3))
    assert (type(stream.batch), stream.batch) == (int, 2)
    stream.step(np.ones((2, WIDTH), np.float32))
    stream.rewind(kind(1))
    assert ee.inspect_model(any_bundle.path / "window/model.onnx", {"batch": kind(2), "sequence": kind(3)}).flops
    assert plan(any_bundle, "window", [kind(1)], [kind(2)], [kind(3)], [])[0].batch == 2


@pytest.mark.parametrize("value", [True, np.True_, 1.0, np.float64(1), "1", None, [1]])
def test_what_is_no_integer_is_none(value: Any) -> None:
    with pytest.raises(ee.RequestError, match="batch must be an integer from 1 upward, got "):
        whole_number("batch", value, 1)


@pytest.mark.parametrize("option", ["seed", "opset"])
def test_a_build_takes_numpys_integers(folder: Path, option: str) -> None:
    """It is refused for something else, after its numbers were looked at."""
    with pytest.raises(ee.RequestError, match="tolerance must be"):
        ee.build(ANY, output=folder / "b", tolerance=-1, **{option: np.int64(20)})


@pytest.mark.parametrize("header", [b"(" * 6000, b"{'descr': '<f4', 'shape': (" + b"9, " * 2000, b"\xff" * 9000])
def test_a_malformed_header_makes_a_short_error(
    capfd: Capture, folder: Path, any_bundle: ee.Bundle, header: Any
) -> None:
    Path("bad.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(640))
    assert len(refused(capfd, "run", any_bundle.path, "--input=bad.npy", "--output=y.npy")) < 600
    assert folder


def test_another_librarys_error_is_one_line_of_bounded_length() -> None:
    assert brief(ValueError("a\n b")) == "a b"
    assert len(brief("x" * 10**6)) < 320


def test_an_archive_that_unpacks_to_too_much_is_refused_before_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed("bomb.npz", np.zeros((100_000, WIDTH), np.float32))
    with open_recording(folder / "bomb.npz", WIDTH) as found:
        assert found.frames.shape == (1, 100_000, WIDTH)
    monkeypatch.setattr(tensor_file, "_EXPANDED", 2**20)
    monkeypatch.setattr(recording.shutil, "copyfileobj", lambda *_: pytest.fail("it was unpacked"))
    with (
        pytest.raises(ee.RequestError, match=r"unpacks to 2400128 bytes from [0-9]+, more than 100 times"),
        open_recording(folder / "bomb.npz", WIDTH),
    ):
        pass


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_an_archive_is_refused_by_what_its_run_would_take_before_it_is_unpacked(
    capfd: Capture, folder: Path, any_bundle: ee.Bundle, monkeypatch: pytest.MonkeyPatch, stream: list[str]
) -> None:
    np.savez("x.npz", np.zeros((9999, WIDTH), np.float32))
    free = recording.shutil.disk_usage(folder)._replace(free=300_000)
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda _: free)
    monkeypatch.setattr(recording.shutil, "copyfileobj", lambda *_: pytest.fail("it was unpacked"))
    message = refused(capfd, "run", any_bundle.path, "--input=x.npz", "--output=y.npy", *stream)
    assert "y.npy takes" in message


@pytest.mark.slow
def test_building_in_a_loop_does_not_grow(tmp_path: Path) -> None:
    """After a warm-up; torch's own caches of sizes that are bounded fill up to their bounds."""
    code = f"""
import gc, torch
import edifice_export as ee
from torch.fx.experimental.symbolic_shapes import ShapeEnv
for _ in range(6):
    ee.build({ANY!r}, output={str(tmp_path / "b")!r}, **{TINY!r})
    gc.collect()
    print(len(gc.get_objects()), sum(type(each) is ShapeEnv for each in gc.get_objects()))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    objects, traces = zip(*(map(int, line.split()) for line in done.stdout.splitlines()), strict=True)
    assert max(traces[2:]) <= traces[1]
    assert (objects[-1] - objects[1]) / 4 < 500

"""Outputs of commands: never the input by another name, never a link's target, never what is not a whole bundle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import Capture, cli, edit_manifest, error_of, refused, tiny_build, unchanged
from conftest import ANY, GOLDEN

import edifice_export as ee


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def symbolic(source: Path) -> str:
    Path("link.npy").symlink_to(source)
    return "link.npy"


def chained(source: Path) -> str:
    Path("first").symlink_to(source)
    Path("second.npy").symlink_to("first")
    return "second.npy"


def hard(source: Path) -> str:
    Path("hard.npy").hardlink_to(source)
    return "hard.npy"


def through_a_folder(source: Path) -> str:
    Path("here").symlink_to(".")
    return f"here/{source}"


def roundabout(source: Path) -> str:
    Path("d").mkdir()
    return f"d/../{source}"


NAMES: dict[str, Callable[[Path], str]] = {
    "itself": str,
    "absolute": lambda source: str(source.absolute()),
    "roundabout": roundabout,
    "folder": through_a_folder,
    "symbolic": symbolic,
    "chained": chained,
    "hard": hard,
}
"""Ways to name a file that is there already."""


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("suffix", "name"),
    [
        *((".npy", name) for name in NAMES),
        *((suffix, name) for suffix in (".npz", ".csv") for name in ("symbolic", "chained", "hard")),
    ],
)
def test_a_recording_is_never_its_own_output(
    any_bundle: ee.Bundle, capfd: Capture, suffix: str, name: str, stream: bool
) -> None:
    source, frames = Path(f"x{suffix}"), np.ones((9, 6), np.float32)
    {".npy": np.save, ".npz": np.savez, ".csv": lambda path, x: np.savetxt(path, x, delimiter=",")}[suffix](
        source, frames
    )
    output = NAMES[name](source)
    arguments = ["run", any_bundle.path, f"--input={source}", f"--output={output}", *["--stream"] * stream]
    assert f"--output {output}: is the input, {source}; name another file" in refused(capfd, *arguments)


def test_the_input_by_another_name_is_never_the_output(any_bundle: ee.Bundle, capfd: Capture) -> None:
    np.save("x.npy", np.ones((9, 6), np.float32))
    source = symbolic(Path("x.npy"))
    arguments = ["run", any_bundle.path, f"--input={source}", "--output=x.npy"]
    assert "--output x.npy: is the input, link.npy; name another file" in refused(capfd, *arguments)


@pytest.mark.parametrize("name", ["symbolic", "chained"])
def test_an_output_is_no_link(any_bundle: ee.Bundle, capfd: Capture, name: str) -> None:
    np.save("x.npy", np.ones((9, 6), np.float32))
    Path("old.npy").write_text("mine")
    output = NAMES[name](Path("old.npy"))
    for stream in (True, False):
        arguments = ["run", any_bundle.path, "--input=x.npy", f"--output={output}", *["--stream"] * stream]
        assert f"{output}: is a symbolic link; name the file that it leads to" in refused(capfd, *arguments)


@pytest.mark.parametrize("name", ["bot/y.npy", "here/bot/y.npy", "link/y.npy"])
def test_no_output_into_a_bundle_by_any_name(any_bundle: ee.Bundle, capfd: Capture, name: str) -> None:
    np.save("x.npy", np.ones((9, 6), np.float32))
    shutil.copytree(any_bundle.path, "bot")
    Path("here").symlink_to(".")
    Path("link").symlink_to("bot/window")
    assert "is inside the bundle" in refused(capfd, "run", "bot", "--input=x.npy", f"--output={name}")


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_never_converted_into_themselves(capfd: Capture, name: str) -> None:
    suffix = ".safetensors"
    source = Path(shutil.copy(GOLDEN / "h3_small.safetensors", f"x{suffix}"))
    output = NAMES[name](source)
    if not output.endswith(suffix):
        Path(output).rename(output := output.replace(".npy", suffix))
    message = refused(capfd, "convert", source, output, "--names=edifice")
    assert f"{output}: is the input, {source}; name another file" in message


def test_weights_are_not_converted_through_a_link(capfd: Capture) -> None:
    Path("old.nx").write_text("mine")
    Path("bot.nx").symlink_to("old.nx")
    message = refused(capfd, "convert", GOLDEN / "containers/hymba_small.axon", "bot.nx", "--option=num_heads=4")
    assert "bot.nx: is a symbolic link; name the file that it leads to" in message


def photo(_: Path) -> None:
    Path("bot").mkdir()
    Path("bot/photo.jpg").write_bytes(b"mine")
    entry = {"size": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}
    Path("bot/manifest.json").write_text(json.dumps({"files": {"photo.jpg": entry}}))


def edited(bundle: Path) -> None:
    shutil.copytree(bundle, "bot")
    with open("bot/window/model.onnx", "ab") as file:
        file.write(b"\0")


def without_files(bundle: Path) -> None:
    shutil.copytree(bundle, "bot")
    edit_manifest(Path("bot"), ("files",), {})


def linked(bundle: Path) -> None:
    shutil.copytree(bundle, "bot")
    Path("bot/weights.safetensors").rename("weights")
    Path("bot/weights.safetensors").symlink_to(Path("weights").absolute())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (photo, "holds a damaged bundle, or none of this tool; move it away or choose another --output"),
        (edited, "window/model.onnx of the bundle there is missing or was changed since it was built; move"),
        (without_files, "holds a damaged bundle, or none of this tool; move it away or choose another --output"),
        (linked, "holds a damaged bundle, or none of this tool; move it away or choose another --output"),
    ],
)
def test_a_build_replaces_a_whole_bundle_alone(
    any_bundle: ee.Bundle, capfd: Capture, change: Callable[[Path], Any], says: str
) -> None:
    change(any_bundle.path)
    assert f"--output bot: {says}" in refused(capfd, *tiny_build(ANY))


def test_no_sample_where_something_comes(any_bundle: ee.Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.copyfile

    def copyfile(source: Path, place: Path) -> None:
        (folder / "sample").mkdir(exist_ok=True)
        (folder / "sample/todo.txt").write_text("mine")
        real(source, place)

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    with pytest.raises(ee.RequestError, match="--output sample: holds files and no bundle"):
        ee.scaffold("cpp", any_bundle.path, "sample")
    assert [str(path) for path in Path().rglob("*")] == ["sample", "sample/todo.txt"]


def test_no_sample_into_its_bundle_by_another_name(any_bundle: ee.Bundle, capfd: Capture) -> None:
    shutil.copytree(any_bundle.path, "bot")
    Path("here").symlink_to("bot/window")
    with unchanged(Path.cwd()):
        found = cli(capfd, "scaffold", "cpp", "bot", "--output=here/sample")
    assert "is in the bundle bot" in error_of(found)


def test_a_plot_is_not_drawn_through_a_link(any_bundle: ee.Bundle, capfd: Capture) -> None:
    Path("old.png").write_text("mine")
    os.symlink("old.png", "times.png")
    message = refused(capfd, "bench", any_bundle.path, "--plot=times.png")
    assert "times.png: is a symbolic link; name the file that it leads to" in message

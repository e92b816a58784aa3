"""Scaffold: what is written beside a bundle's copy, and what is refused. examples/check shows that the samples work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_helpers import Capture, cli, done, error_of, snapshot, unchanged

import edifice_export as ee
from edifice_export.bundle.bundle import open_bundle
from edifice_export.scaffolding.scaffold import SAMPLES

EXAMPLES = Path(__file__).parents[1] / "examples"
each_language = pytest.mark.parametrize("language", list(SAMPLES))


@each_language
def test_a_sample_is_that_of_examples(language: str, any_bundle: ee.Bundle, tmp_path: Path) -> None:
    """File by file, and nothing that building left; the bundle is whole."""
    made = ee.scaffold(language, any_bundle.path, tmp_path / "new" / "bot")
    output = tmp_path / "new" / "bot"
    assert {path.name for path in output.iterdir()} == {*(folder.split("/")[0] for folder in SAMPLES[language]), "bundle"}
    assert {path.name for path in output.parent.iterdir()} == {"bot"}
    for folder in SAMPLES[language]:
        expected = {path.name: path.read_bytes() for path in (EXAMPLES / folder).iterdir() if path.is_file()}
        found = {path.name: path.read_bytes() for path in (output / folder).iterdir() if path.is_file()}
        assert found == expected
        assert {f"{folder}/{name}" for name in expected} <= set(made.files)
    assert snapshot(output / "bundle") == snapshot(any_bundle.path)
    assert open_bundle(output / "bundle").manifest == any_bundle.manifest
    assert (made.language, made.architecture) == (language, any_bundle.manifest.program.name)
    assert Path(made.readme).is_file()


@each_language
def test_a_sample_names_no_place_but_its_own(language: str) -> None:
    """Its bundle is beside it, and so is all that its readme and its sources refer to, but for a C++ user's library."""
    beside = {*SAMPLES[language], "bundle", "onnxruntime"}
    for folder in SAMPLES[language]:
        for path in (each for each in (EXAMPLES / folder).iterdir() if each.suffix in {".md", ".mjs", ".html", ".txt"}):
            for found in re.findall(r"(?<![\w.])\.\./([\w-]+)", path.read_text(encoding="utf-8")):
                assert found in beside, f"{path} refers to ../{found}"


def test_the_command_says_where_to_go_on(any_bundle: ee.Bundle, tmp_path: Path, capfd: Capture) -> None:
    bot = tmp_path / "bot"
    out = done(capfd, "scaffold", "cpp", any_bundle.path, "--output", bot).words
    assert out == f"wrote {bot}: cpp/ and bundle/ (hymba); {bot / 'cpp' / 'README.md'} says how to run it"


def test_an_empty_folder_is_filled(any_bundle: ee.Bundle, tmp_path: Path) -> None:
    (tmp_path / "bot").mkdir()
    ee.scaffold("node", any_bundle.path, tmp_path / "bot")
    assert (tmp_path / "bot/node/main.mjs").is_file()


@pytest.mark.parametrize(
    ("language", "output", "says"),
    [
        ("rust", "bot", "there is no sample in 'rust'; there are cpp, csharp, node, web"),
        ("cpp", "full", "holds files already; name a new folder"),
        ("cpp", "bundle", "holds files already; name a new folder"),
        ("cpp", "bundle/window/bot", "is in the bundle"),
        ("cpp", "file", "is a file"),
    ],
)
def test_refusals_write_nothing(
    language: str, output: str, says: str, any_bundle: ee.Bundle, tmp_path: Path, capfd: Capture
) -> None:
    ee.scaffold("cpp", any_bundle.path, tmp_path / "made")
    (tmp_path / "made/bundle").rename(tmp_path / "bundle")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept").write_text("kept")
    (tmp_path / "file").write_text("kept")
    with unchanged(tmp_path):
        found = cli(capfd, "scaffold", language, tmp_path / "bundle", "--output", tmp_path / output)
    assert says in error_of(found, 2)


def test_a_damaged_bundle_is_not_copied(any_bundle: ee.Bundle, tmp_path: Path, capfd: Capture) -> None:
    ee.scaffold("cpp", any_bundle.path, tmp_path / "made")
    (tmp_path / "made/bundle/window/model.onnx").write_bytes(b"")
    with unchanged(tmp_path):
        found = cli(capfd, "scaffold", "cpp", tmp_path / "made/bundle", "--output", tmp_path / "bot")
    assert "window/model.onnx was changed" in error_of(found, 1)

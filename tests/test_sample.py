"""The bundle committed under exported/: what a reader opens first must be what this version builds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import edifice_export as ee

SAMPLE = Path(__file__).parents[1] / "exported/hymba_tiny"


def test_the_committed_sample_is_what_is_built_today(tmp_path: Path) -> None:
    committed = ee.load(SAMPLE).bundle
    options = {
        name: committed.manifest.program.options[name]
        for name in ("embed_dim", "hidden_size", "num_layers", "window_size")
    }
    assert options == {"embed_dim": 8, "hidden_size": 16, "num_layers": 2, "window_size": 12}
    built = ee.build("hymba", output=tmp_path / "hymba_tiny", seed=7, **options)
    for name in built.manifest.files:
        assert built.file(name).read_bytes() == committed.file(name).read_bytes(), (
            f"{name} differs: build the sample again"
        )

    def without_measurements(bundle: ee.Bundle) -> ee.Bundle:
        return dataclasses.replace(bundle.manifest, versions={}, parity={})

    assert without_measurements(built) == without_measurements(committed)


def test_the_committed_sample_is_small_and_verified() -> None:
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) < 600_000
    assert ee.verify(SAMPLE).passed

"""Verification refuses no sound build, and every graph that is wrong by more than it allows: drawn at random."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wrong(rows: list[dict[str, Any]]) -> list[bool]:
    """Of each graph made wrong, whether it was refused."""
    return [row["sabotage"]["refused"] for row in rows if "refused" in row.get("sabotage", {})]


def test_the_committed_results_hold_no_refused_build_and_no_wrong_one_that_passed() -> None:
    (path,) = ROOT.glob("benchmarks/results/*/soundness.jsonl")
    rows = read(path)
    assert sorted(row["row"] for row in rows) == list(range(1000))
    assert all(row["passed"] for row in rows)
    assert sum(row["beyond"] > 0 for row in rows) > 50
    assert len(wrong(rows)) > 100
    assert all(wrong(rows))


@pytest.mark.slow
def test_random_builds(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks.soundness", "--count=60", "--seed=11", f"--output={output}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(output)
    assert len(rows) == 60
    assert len(wrong(rows)) >= 6
    # What was broken off goes on: nothing is built twice.
    output.write_text("".join(output.read_text().splitlines(keepends=True)[:59]))
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert [row["row"] for row in read(output)].count(rows[-1]["row"]) == 1
    assert len(read(output)) == 60

"""The table of what other tools make of our graphs: complete, of the pinned versions, and compared as it says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import edifice_export as ee
from edifice_export.bundle.manifest import GRAPHS
from edifice_reference.models.registry import ARCHITECTURES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.onnx_tools import FORMS, RESULTS, differences, kind, table  # noqa: E402
from benchmarks.tool_calls import TOOLS  # noqa: E402

WRITTEN = json.loads((RESULTS / "onnx_tools.json").read_text())


def test_the_table_has_every_tool_and_graph_at_the_versions_that_are_pinned() -> None:
    graphs = {f"{form}: {name} {graph}" for form in FORMS for name in ARCHITECTURES for graph in GRAPHS}
    assert list(WRITTEN["found"]) == list(TOOLS)
    assert all(set(verdicts) == graphs for verdicts in WRITTEN["found"].values())
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert WRITTEN["versions"] == {tool.package: pinned[tool.package] for tool in TOOLS.values()}
    assert (RESULTS / "onnx_tools.md").read_text() == table(WRITTEN["found"], WRITTEN["versions"])


@pytest.mark.parametrize(
    ("written", "now", "differs"),
    [
        ("right", "right", False),
        ("wrong by 4e-02", "wrong by 5e-02", False),
        ("refuses: of one machine", "refuses: of another", False),
        ("right", "wrong by 4e-02", True),
        ("refuses: it", "right", True),
        ("refuses: it", "fails to load: it", True),
    ],
)
def test_the_check_sees_a_verdict_that_changes(written: str, now: str, differs: bool) -> None:
    assert (kind(written) != kind(now)) == differs
    assert bool(differences({"tool": {"graph": written}}, {"tool": {"graph": now}})) == differs
    assert differences({}, {"tool": {"graph": now}}) == [f"tool, graph: {now}; written: nothing"]


def test_the_pages_head_behind_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/onnx_tools.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exported").symlink_to(ROOT / "exported")
    exec(compile(code, "docs/onnx_tools.md", "exec"), {})
    x = np.random.default_rng(1).standard_normal((2, 9, 8)).astype(np.float32)
    (policy,) = ort.InferenceSession("policy.onnx").run(["head/policy"], {"state_sequence": x})
    logits = ee.load(ROOT / "exported/hymba_tiny")(x) @ np.random.default_rng(0).standard_normal((16, 5), np.float32)
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(policy, expected, rtol=1e-4)

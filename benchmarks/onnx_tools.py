"""What other tools make of our graphs: whether each takes them, and whether the numbers are right afterwards.

    python -m benchmarks.onnx_tools             all tools, printed and written to results/onnx_tools.md and .json
    python -m benchmarks.onnx_tools --check     the same, compared with what is written there: status 1 if it differs
    python -m benchmarks.onnx_tools onnxslim    some tools, printed alone

The window, stream and prefill graphs of every architecture, tiny ones, go through each tool: as they are (with
functions), inlined, and those for `--target web`, which have no Scan, inlined. ONNX Runtime runs what comes out on the
bundle's test data, which is float64's. Each tool has a process of its own, so that one that crashes or hangs is a
result too. docs/onnx_tools.md installs them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import onnx

import edifice_export as ee
from edifice_export.building.inline import inline
from edifice_export.bundle.manifest import GRAPHS
from edifice_reference.models.registry import ARCHITECTURES

from .tool_calls import TOOLS

RESULTS = Path(__file__).parent / "results"
FORMS = ("with functions", "inlined", "inlined for web")
TINY = {"embed_dim": 6, "hidden_size": 8, "num_layers": 2, "window_size": 7}
SECONDS = 300
"""That a tool may take for all graphs."""

Found = dict[str, str]
"""By graph: `right`, `wrong by 1e-2`, or `refuses: `, `fails to load: `, `crashes: ` and a message."""


def write_graphs(folder: Path) -> list[str]:
    """Builds all graphs, in both forms, each with its test data beside it; gives their names."""
    names = []
    for architecture in ARCHITECTURES:
        portable, web = (
            ee.build(architecture, output=folder / target / architecture, target=target, seed=1, **TINY)
            for target in ("portable", "web")
        )
        for graph in GRAPHS:
            _, inputs, outputs = next(portable.test_data(graph))  # the same for every target
            model = onnx.load(portable.file(portable.manifest.graphs[graph].model))
            without_scan = onnx.load(web.file(web.manifest.graphs[graph].model))
            for form, made in zip(FORMS, (model, inline(model), inline(without_scan)), strict=True):
                names.append(f"{form}: {architecture} {graph}")
                place = folder / names[-1]
                place.mkdir()
                onnx.save(made, place / "model.onnx")
                np.savez(place / "inputs.npz", **inputs)
                np.savez(place / "outputs.npz", **outputs)
    return names


def work(tool: str, folder: Path, graphs: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Puts graphs through a tool, in this process."""
    call = TOOLS[tool]
    for graph in graphs:
        place = folder / graph
        inputs, outputs = (dict(np.load(place / f"{name}.npz")) for name in ("inputs", "outputs"))
        with tempfile.TemporaryDirectory() as scratch:
            yield graph, call.verdict(place / "model.onnx", Path(scratch), inputs, outputs)


def run_tool(tool: str, folder: Path, graphs: Sequence[str]) -> Found:
    """Puts graphs through a tool, in processes of their own: a new one for those after a graph that ends one."""
    found: Found = {}
    while waiting := [graph for graph in graphs if graph not in found]:
        command = [sys.executable, "-m", "benchmarks.onnx_tools", "--worker", str(folder), tool, *waiting]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RESULTS.parents[1])}
        results = folder / f"found by {tool}"
        results.write_text("")
        try:
            with tempfile.TemporaryDirectory() as here:  # some write beside themselves
                ended = subprocess.run(
                    command, cwd=here, env=environment, capture_output=True, timeout=SECONDS
                ).returncode
            why = f"crashes: exit status {ended}"
        except subprocess.TimeoutExpired:
            why = f"crashes: not done in {SECONDS} s"
        found |= dict(json.loads(line) for line in results.read_text().splitlines())
        if left := [graph for graph in waiting if graph not in found]:
            found[left[0]] = why
    return found


def versions(tools: Sequence[str]) -> dict[str, str]:
    """Of the packages whose tools these are.

    Raises:
        RequestError: one is not installed.
    """
    packages = dict.fromkeys(TOOLS[tool].package for tool in tools)
    try:
        return {package: version(package) for package in packages}
    except PackageNotFoundError as error:
        raise ee.RequestError(f"{error.name} is not installed; see docs/onnx_tools.md") from error


def kind(verdict: str) -> str:
    """What of a verdict is the same on every machine."""
    return verdict.partition(":")[0].partition(" by ")[0]


def differences(known: dict[str, Found], found: dict[str, Found]) -> list[str]:
    """Where what was found is not what is written."""
    return [
        f"{tool}, {graph}: {now}; written: {known.get(tool, {}).get(graph, 'nothing')}"
        for tool, verdicts in found.items()
        for graph, now in verdicts.items()
        if kind(now) != kind(known.get(tool, {}).get(graph, "nothing"))
    ]


def table(found: dict[str, Found], installed: dict[str, str]) -> str:
    """Markdown: a row for each tool and form, and what the tools say below."""
    notes: list[str] = []
    lines = ["| tool | version | form | right | not |", "| --- | --- | --- | ---: | --- |"]
    for tool, verdicts in found.items():
        for form in FORMS:
            begins = f"{form}: "
            own = {graph.removeprefix(begins): said for graph, said in verdicts.items() if graph.startswith(begins)}
            others: dict[str, list[str]] = {}
            for graph, verdict in own.items():
                if verdict != "right":
                    others.setdefault(_noted(verdict, notes), []).append(graph)
            cells = [
                tool,
                installed[TOOLS[tool].package],
                form,
                f"{sum(v == 'right' for v in own.values())} of {len(own)}",
            ]
            cells.append("; ".join(f"{what}: {', '.join(graphs)}" for what, graphs in others.items()))
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"{number}. `{note}`" for number, note in enumerate(notes, 1)), ""]
    return "\n".join(lines)


def _noted(verdict: str, notes: list[str]) -> str:
    """One word, with the number of what the tool says."""
    word, _, message = verdict.partition(": ")
    if not message:
        return verdict
    if message not in notes:
        notes.append(message)
    return f"{word} ({notes.index(message) + 1})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if what was found is not what is written; 2 if a tool is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"of {', '.join(TOOLS)} [default: all]")
    parser.add_argument("--check", action="store_true", help="compare with what is written, and write nothing")
    parser.add_argument("--worker", nargs="+", metavar=("FOLDER", "TOOL"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        folder, tool, *graphs = given.worker
        for graph, verdict in work(tool, Path(folder), graphs):
            with (Path(folder) / f"found by {tool}").open("a") as file:
                file.write(json.dumps([graph, verdict]) + "\n")
        return 0
    if unknown := [tool for tool in given.tools if tool not in TOOLS]:
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(TOOLS)}")
    tools = given.tools or list(TOOLS)
    try:
        installed = versions(tools)
    except ee.RequestError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as name:
        graphs = write_graphs(Path(name))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = pool.map(lambda tool: run_tool(tool, Path(name), graphs), tools)
            found = dict(zip(tools, done, strict=True))
    text = table(found, installed)
    print(text)
    place = RESULTS / "onnx_tools.json"
    if given.check:
        known = json.loads(place.read_text())
        wrong = differences(known["found"], found)
        wrong += [
            f"{p}: {v}; written: {known['versions'].get(p)}"
            for p, v in installed.items()
            if known["versions"].get(p) != v
        ]
        print("\n".join(wrong) or f"as it is in {place.name}")
        return int(bool(wrong))
    if not given.tools:
        place.write_text(json.dumps({"versions": installed, "found": found}, indent=1) + "\n")
        place.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

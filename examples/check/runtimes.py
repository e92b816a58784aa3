"""Which versions of ONNX Runtime compute bundles right: each is installed in a folder of its own and runs every graph.

    python -m examples.check.runtimes                         all; some three minutes
    python -m examples.check.runtimes onnxruntime==1.24.4     one

The graphs are those of a bundle of each architecture, and window graphs with all other bodies that linking can choose
for these models. A graph is right, wrong, refused with an error, or ends the process. Then Python's reader, or the
sample for Node, is given the bundles: on a runtime that is not right on all of them it must refuse. It prints a table
and writes runtimes.md and runtimes.json. The exit status is 1 if a version that the readers take is not right, a reader
takes one that is too old, or a version could not be had.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx

import edifice_export as ee
from edifice_export.benchmark.results import folder_of, machine
from edifice_export.bundle.body_names import op_of
from edifice_export.bundle.bundle import save_model
from edifice_export.defaults import TARGETS
from edifice_export.lowerings import LOWERINGS
from edifice_export.runtime.version import OLDEST
from edifice_reference.models.registry import ARCHITECTURES

from .language import CheckError, run
from .npm import link_packages
from .on_runtime import LIMIT

ROOT = Path(__file__).parents[2]

PACKAGES: dict[str, list[str]] = {
    "onnxruntime": [
        *("1.21.1", "1.22.1", "1.23.2", "1.24.1", "1.24.4", "1.25.1", "1.26.0", "1.27.0", "1.28.0", "1.29.0"),
        *("1.30.0", "1.31.1", "1.32.0"),
    ],
    "onnxruntime-openvino": ["1.24.1"],
    "onnxruntime-node": ["1.23.2", "1.24.1", "1.24.3", "1.25.1", "1.26.0", "1.27.0", "1.29.0", "1.30.0"],
}
"""A patch release of every minor version from 1.21 to the newest, of PyPI and, the last, of npm; of 1.24 the last
besides, which is onnxruntime-directml's newest too, a package for Windows alone."""

OPENVINO = "OpenVINOExecutionProvider"
CPU = "CPUExecutionProvider"

SIZES: dict[str, Any] = {"embed_dim": 8, "hidden_size": 16, "num_layers": 2, "window_size": 70}
"""Small, with a window of more than one block of attention."""

OTHERS: dict[str, dict[str, Any]] = {
    "h3, edifice": {"numerics": "edifice", "window_size": 12},
    "hyena, 200": {"window_size": 200},
    "hyena, 300": {"window_size": 300},
}
"""Window graphs with bodies of their own: of other numerics, and of longer filters."""

LENGTHS = (70, 600, 2000, None)
"""What window graphs are linked for besides."""


@dataclasses.dataclass(frozen=True)
class Graph:
    """What a runtime is given.

    Attributes:
        name: in the table, or of the reader.
        bundle: folder of the bundle that has its test data.
        graph: which of its graphs.
        model: the file to run, which may be linked otherwise than the bundle's; None for all of it, by the reader.
    """

    name: str
    bundle: str
    graph: str
    model: str | None


@dataclasses.dataclass(frozen=True)
class Result:
    """What a version made of the graphs: by name the outcome ("right", "wrong", "refused", "crashed") and its error, or
    what was said.
    """

    package: str
    version: str
    provider: str
    found: dict[str, tuple[str, float | str]]

    @property
    def label(self) -> str:
        """The package and its version, and the provider if not the CPU's."""
        return f"{self.package} {self.version}" + ("" if self.provider == CPU else ", OpenVINO")

    @property
    def is_taken(self) -> bool:
        """Whether readers are to take it."""
        return tuple(map(int, self.version.split(".")[:2])) >= OLDEST and self.provider == CPU

    @property
    def problems(self) -> list[str]:
        """What should not be."""
        if self.is_taken:
            bad = {name: told for name, told in self.found.items() if told[0] != "right"}
        else:
            bad = {name: told for name, told in self.found.items() if _is_reader(name) and told[0] != "refused"}
        return [f"{self.label}: {name} is {told}" for name, told in bad.items()]


def _is_reader(name: str) -> bool:
    return name.startswith("reader, ")


def build(folder: Path) -> list[Graph]:
    """Bundles, and window graphs that are linked otherwise, in a folder."""
    graphs: list[Graph] = []
    for name in ARCHITECTURES:
        graphs += _of_bundle(name, ee.build(name, output=folder / name, **SIZES))
    seen = _bodies(Path(each.model) for each in graphs if each.model is not None)
    for name, options in {**{name: {} for name in ARCHITECTURES}, **OTHERS}.items():
        bundle = folder / name
        if name in OTHERS:
            ee.build(name.split(",")[0], output=bundle, graph="window", **SIZES | options)
        for index, model in enumerate(_linked(ee.load(bundle).bundle, seen)):
            path = folder / "others" / f"{name}-{index}.onnx"
            path.parent.mkdir(exist_ok=True)
            save_model(model, path)
            graphs.append(Graph(f"other, {name}, {index}", str(bundle), "window", str(path)))
    return graphs


def _of_bundle(name: str, bundle: ee.Bundle) -> Iterator[Graph]:
    for graph, entry in bundle.manifest.graphs.items():
        yield Graph(f"{name} {graph}", str(bundle.path), graph, str(bundle.file(entry.model)))
    yield Graph(f"reader, {name}", str(bundle.path), "", None)


def _linked(bundle: ee.Bundle, seen: set[str]) -> Iterator[onnx.ModelProto]:
    """A bundle's window graph, linked for other lengths and targets: each that brings a body that was not seen."""
    from edifice_export.building.link import link
    from edifice_export.graph.trace import trace
    from edifice_export.passes import optimize
    from edifice_export.programs.graphs import entry
    from edifice_export.programs.reference_model import reference_of

    described = bundle.manifest.graphs["window"]
    traced = trace(entry(reference_of(bundle), "window"), described.inputs, described.outputs, bundle.manifest.opset)
    optimize(traced)
    for length, target in itertools.product(LENGTHS, TARGETS):
        model = link(traced, {"sequence": length} if length is not None else {}, target)
        if not (bodies := _names(model)) <= seen:
            seen |= bodies
            yield model


def _bodies(models: Iterable[Path]) -> set[str]:
    return set().union(*(_names(onnx.load(path)) for path in models))


def _names(model: onnx.ModelProto) -> set[str]:
    return {function.name for function in model.functions if op_of(function.name) in LOWERINGS}


def run_python(package: str, version: str, provider: str, graphs: Sequence[Graph]) -> Result:
    """Installs a package of PyPI by itself and runs the graphs, in as many processes as it takes.

    Raises:
        CheckError: it could not be had.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = run([*pip, "--target", folder, f"{package}=={version}"])
        if done.returncode != 0:
            raise CheckError(f"{package} {version} could not be had: {done.stderr.strip()[-300:]}")
        found: dict[str, tuple[str, float | str]] = {}
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        while waiting := [each for each in graphs if each.name not in found]:
            listed = Path(folder, "graphs.json")
            listed.write_text(json.dumps([dataclasses.asdict(each) for each in waiting]), encoding="utf-8")
            program: list[str | Path] = [sys.executable, "-m", "examples.check.on_runtime", listed, provider]
            done = run(program, ROOT, environment)
            first, *lines = map(json.loads, done.stdout.splitlines() or ["null"])
            if first != version:
                raise CheckError(f"{package} {version} can't be imported: {done.stderr.strip()[-300:]}")
            found |= {name: (told, error) for name, told, error in lines}
            if done.returncode != 0:
                found[waiting[len(lines)].name] = ("crashed", f"exit status {done.returncode}")
    return Result(package, version, provider, found)


def run_node(package: str, version: str, graphs: Sequence[Graph], sample: Path) -> Result:
    """Installs a version of npm's package and has the sample for Node check the bundles.

    Raises:
        CheckError: it could not be had, or the sample said neither a result nor one line.
    """
    found: dict[str, tuple[str, float | str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        npm = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        done = run([*npm, f"{package}@{version}"], Path(folder))
        if done.returncode != 0:
            raise CheckError(f"{package} {version} could not be had: {done.stderr.strip()[-300:]}")
        program = Path(shutil.copytree(sample, Path(folder, "sample")))
        link_packages(Path(folder, "node_modules"), program / "node")
        for each in (each for each in graphs if _is_reader(each.name)):
            name = each.name.removeprefix("reader, ")
            done = run(["node", "main.mjs", each.bundle, "--json", "--frames", "1"], program / "node")
            if done.returncode == 2 and done.stderr.count("\n") == 1:
                found[each.name] = ("refused", done.stderr.strip())
                continue
            try:
                report = json.loads(done.stdout)
            except ValueError:
                raise CheckError(f"{package} {version}, {name}: {done.stderr.strip()[-300:]}") from None
            if report["runtime"] != version:
                raise CheckError(f"{package} {version}: it was run with {report['runtime']}")
            errors = {f"{name} {graph['graph']}": float(graph["error"]) for graph in report["graphs"]}
            found |= {graph: ("right" if error <= LIMIT else "wrong", error) for graph, error in errors.items()}
            found[each.name] = ("right" if done.returncode == 0 else "wrong", max(errors.values()))
    return Result(package, version, CPU, found)


def table(results: Sequence[Result]) -> str:
    """Versions by graphs, in Markdown: the error where it is right."""
    columns = [f"{name} {graph}" for name in ARCHITECTURES for graph in ("window", "stream", "prefill")]
    lines = [["runtime", *columns, "other bodies", "reader"], ["---"] * (len(columns) + 3)]
    for result in results:
        others = [told for name, told in result.found.items() if name.startswith("other, ")]
        reader = [told for name, told in result.found.items() if _is_reader(name)]
        cells = [_cell([result.found[name]] if name in result.found else []) for name in columns]
        taken = "refuses" if all(told[0] == "refused" for told in reader) else _cell(reader)
        lines.append([result.label, *cells, _cell(others), taken])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(told: Sequence[tuple[str, float | str]]) -> str:
    """The largest error if all are right, or how many are not."""
    if not told:
        return ""
    outcomes = [each[0] for each in told]
    if set(outcomes) == {"right"}:
        return f"{max(float(each[1]) for each in told):.0e}"
    if len(told) == 1:
        return f"wrong by {float(told[0][1]):.1g}" if outcomes == ["wrong"] else outcomes[0]
    return ", ".join(f"{outcomes.count(kind)} {kind}" for kind in sorted(set(outcomes)))


def notes(results: Sequence[Result]) -> str:
    """What was said, once each, by which versions and of which graphs."""
    said: dict[str, list[tuple[str, str]]] = {}
    for result in results:
        for name, (kind, text) in result.found.items():
            if kind in ("refused", "crashed") and not _is_reader(name):
                said.setdefault(f"{kind}: {str(text)[:240]}", []).append((result.label, name))
    lines = []
    for text, places in said.items():
        versions, graphs = (", ".join(dict.fromkeys(each)) for each in zip(*places, strict=True))
        lines.append(f"- {versions}: {graphs}: {text}\n")
    return "".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, prints and writes."""
    parser = argparse.ArgumentParser(
        "python -m examples.check.runtimes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", nargs="*", metavar="PACKAGE==VERSION", help="[default: all]")
    parser.add_argument("--output", type=Path, default=ROOT / "build/runtimes", help="folder for the results")
    given = parser.parse_args(arguments)
    asked = [tuple(each.split("==")) for each in given.packages] or [
        (package, version) for package, versions in PACKAGES.items() for version in versions
    ]
    if wrong := [each for each in asked if len(each) != 2 or each[0] not in PACKAGES]:
        parser.error(f"{'=='.join(wrong[0])}: give a package of {', '.join(PACKAGES)} and a version, NAME==VERSION")
    results: list[Result] = []
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        graphs = build(Path(folder))
        print(f"{len(graphs)} graphs and bundles were made", flush=True)
        ee.scaffold("node", graphs[0].bundle, Path(folder, "sample"))
        jobs = []
        for package, version in asked:
            if package == "onnxruntime-node":
                jobs.append(pool.submit(run_node, package, version, graphs, Path(folder, "sample")))
                continue
            for provider in (CPU, OPENVINO) if package == "onnxruntime-openvino" else (CPU,):
                jobs.append(pool.submit(run_python, package, version, provider, graphs))
        for job in jobs:
            try:
                results.append(job.result())
                problems += results[-1].problems
                print(table(results[-1:]).splitlines()[-1], flush=True)
            except CheckError as error:
                problems.append(str(error))
    described = machine()
    text = f"On {described['cpu']}; an error is by the larger of 1 and the largest number of its tensor.\n\n"
    text += f"{table(results)}\n{notes(results)}"
    print(text)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    output = given.output / folder_of(str(described["cpu"]))
    output.mkdir(parents=True, exist_ok=True)
    (output / "runtimes.md").write_text(text, encoding="utf-8")
    written = {"machine": described, "results": [dataclasses.asdict(each) for each in results], "problems": problems}
    (output / "runtimes.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())

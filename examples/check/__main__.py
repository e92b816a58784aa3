"""Checks every sample on every model: largest error and latency by language, model and graph.

    python -m examples.check                     everything: default models, all languages; about sixteen minutes
    python -m examples.check cpp node --quick      some languages, tiny models, few frames

It builds a bundle of each model, scaffolds each sample with it, builds the samples as their readers would, and runs
them: every program checks itself on the bundle's test data, plays a game's rollbacks, and times itself. Then it hands
them damaged bundles, which they must refuse. It prints one table and writes embedding.md and embedding.json. The exit
status is 1 if an error is above the limit, something was not refused, or a tool could not be had: nothing is skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import edifice_export as ee
from edifice_export.benchmark.results import folder_of, machine
from edifice_export.building.export import export_source
from edifice_export.building.settings import Settings
from edifice_export.bundle.bundle import open_bundle
from edifice_export.programs.source import load_source
from edifice_reference.models.registry import ARCHITECTURES

from .cpp import Cpp
from .csharp import CSharp
from .damage import DAMAGES, OF_BROWSERS, SHARED_DAMAGES, Damage, rename_architecture
from .handmade import write_handmade
from .language import CheckError, Language
from .node import Node
from .web import Web
from .windows import Windows

ROOT = Path(__file__).parents[2]
LANGUAGES: dict[str, Language] = {each.name: each for each in (Cpp(), CSharp(), Node(), Web(), Windows())}

PROVIDERS = {"cpp": ("cpu",), "csharp": ("cpu",), "node": ("cpu",), "web": ("wasm", "webgpu"), "windows": ("cpu",)}
LIMITS = {"webgpu": 1e-3}
LIMIT = 1e-5

FRAMES = {"webgpu": 100, "wasm": 2000}
"""Frames to time where a runtime is slow; 10,000 elsewhere."""
QUICK_FRAMES = 100
SOFTWARE = ("webgpu",)
"""Computed by a GPU that is a program here, a hundred times slower than one: these get tiny models."""
EMULATED = ("windows",)
"""Whose latencies mean nothing: tiny models and few frames."""
TINY_MARK = "tiny_"
TINY: dict[str, Any] = {"embed_dim": 8, "hidden_size": 16, "num_layers": 2, "window_size": 12}

PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny_window_only": ("h3", {"graph": "window"}),
    "tiny_from_a_file": ("hymba", {"graph": "stream", "meta_propagation": True}),
}
"""Bundles without a stream, and without a window, whose states start from files; and below one whose graphs share a
file of weights."""

SHARED = "small_shared"
PARTS[SHARED] = ("hymba", {"hidden_size": 96})


MODULES = ("token_model", "both_ways", "two_and_two", "live", "recurrent", "recall")
"""A stranger's modules of tests/strangers/models.py: other types, several inputs and outputs, other free sizes, states
that grow."""

HANDMADE = "handmade"
"""Graphs of nodes that no module here is exported to, such as those of float16 and int32."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One graph of one model, run by one program.

    Attributes:
        language: what the program is written in.
        runtime: version of its ONNX Runtime.
        provider: what computed it.
        model: architecture, and whether it is a tiny one; or a module.
        graph: window, stream or prefill.
        error: largest, by the larger of 1 and the largest expected number of its tensor.
        p50_ms, p99_ms: of a window, a frame, or a window's frames in one prefill.
    """

    language: str
    runtime: str
    provider: str
    model: str
    graph: str
    error: float
    p50_ms: float
    p99_ms: float

    @property
    def limit(self) -> float:
        """What the error may be."""
        return LIMITS.get(self.provider, LIMIT)


def check_model(language: Language, sample: Path, bundle: Path, provider: str, quick: bool, model: str) -> list[Row]:
    """Runs a sample on the bundle of a model.

    Raises:
        CheckError: it failed, or printed something else than its result.
    """
    frames = QUICK_FRAMES if quick else FRAMES.get(provider, 10_000)
    arguments = ("--json", "--provider", provider, "--frames", str(frames))
    done = language.run(sample, bundle, *arguments)
    what = f"{language.name} on {provider}, {model}"
    try:
        found = json.loads(done.stdout)
    except ValueError:
        found = {}
    if done.returncode != 0 or not found.get("ok"):
        raise CheckError(f"{what}: exit status {done.returncode}: {_tail(done.stderr or done.stdout)}")
    if provider == "webgpu" and found["states"] != "gpu-buffer":
        raise CheckError(f"{what}: the states are not on the GPU but {found['states']}")
    opened = open_bundle(bundle)
    graphs = {graph["graph"]: graph for graph in found["graphs"]}
    if list(graphs) != list(opened.manifest.graphs):
        raise CheckError(f"{what}: it ran the graphs {', '.join(graphs)}")
    if "numbers, and the model takes" not in found["refused"] or found["rollbacks"] < ("stream" in graphs):
        raise CheckError(f"{what}: no refusal of a wrong frame, or no rollback: {found}")
    numbers = ("error", "p50_ms", "p99_ms")
    rows = [
        Row(language.name, found["runtime"], provider, model, name, *(graph[key] for key in numbers))
        for name, graph in graphs.items()
    ]
    for row in rows:
        entry, compared = opened.manifest.graphs[row.graph], graphs[row.graph]["tensors"]
        least = len(entry.test_data) * len(entry.outputs)
        if compared < least:
            raise CheckError(f"{what}: {row.graph} compared {compared} tensors, and there are {least}")
        if not row.error <= row.limit:
            raise CheckError(f"{what}: the error of {row.graph} is {row.error:.1e}, above {row.limit:g}")
    return rows


def check_refusals(
    language: Language, sample: Path, bundle: Path, folder: Path, damages: Sequence[Damage] = DAMAGES
) -> list[str]:
    """Hands a sample damaged copies of a bundle; every one must be refused in one clear line.

    Raises:
        CheckError: one was not.
    """
    said = []
    for damage in damages:
        copy = folder / "damaged" / language.name / damage.name / "bundle"
        shutil.rmtree(copy.parent, ignore_errors=True)
        shutil.copytree(bundle, copy)
        damage.do(copy)
        done = language.run(sample, copy, "--frames", "1")
        lines = done.stderr.strip().splitlines()
        right = len(lines) == 1 and damage.says in lines[0] and lines[0].isprintable()
        if done.returncode != damage.status or not right:
            raise CheckError(
                f"{language.name}, {damage.name}: expected exit status {damage.status} and one printable line with "
                f"{damage.says!r}, got {done.returncode}: {_tail(done.stderr or done.stdout)}"
            )
        said.append(f"{language.name} refuses {damage.name}")
    return said


def check_browsers(language: Language, sample: Path, bundle: Path, folder: Path) -> str:
    """Runs a sample on a sound bundle in whose folders browsers of files left theirs.

    Raises:
        CheckError: it was refused.
    """
    copy = folder / "damaged" / language.name / "browsed" / "bundle"
    shutil.rmtree(copy.parent, ignore_errors=True)
    shutil.copytree(bundle, copy)
    for model in list(copy.rglob("*.onnx")):
        for name in OF_BROWSERS:
            model.with_name(name).touch()
    done = language.run(sample, copy, "--frames", "1")
    if done.returncode != 0:
        raise CheckError(f"{language.name}, {', '.join(OF_BROWSERS)} beside models: {_tail(done.stderr)}")
    return f"{language.name} takes {', '.join(OF_BROWSERS)} beside models for no part of a bundle"


def check_printable(language: Language, sample: Path, bundle: Path, folder: Path) -> str:
    """Runs a sample on a sound bundle whose name has escape codes, of which the terminal must see none.

    Raises:
        CheckError: it did, or the sample failed.
    """
    copy = folder / "damaged" / language.name / "named" / "bundle"
    shutil.rmtree(copy.parent, ignore_errors=True)
    shutil.copytree(bundle, copy)
    rename_architecture(copy)
    for arguments in (("--frames", "1"), ("--frames", "1", "--json")):
        done = language.run(sample, copy, *arguments)
        raw = [line for line in (done.stdout + done.stderr).splitlines() if not line.isprintable()]
        if done.returncode != 0 or raw:
            raise CheckError(f"{language.name}, a name with escape codes: {_tail(done.stderr)} {raw!r}")
    return f"{language.name} shows a name with escape codes escaped"


def table(rows: Sequence[Row]) -> str:
    """Rows in Markdown."""
    names = ["language", "ONNX Runtime", "provider", "model", "graph", "largest error", "p50, ms", "p99, ms"]
    lines = [names, ["---"] * 5 + ["---:"] * 3]
    for row in rows:
        numbers = [f"{row.error:.1e}", f"{row.p50_ms:.3f}", f"{row.p99_ms:.3f}"]
        lines.append([row.language, row.runtime, row.provider, row.model, row.graph, *numbers])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def check_language(language: Language, bundles: dict[str, Path], folder: Path, quick: bool) -> list[Row]:
    """All checks of one language; prints what they showed.

    Raises:
        CheckError: one failed.
    """
    language.install(folder / "tools")
    quick = quick or language.name in EMULATED
    samples = {}
    for model, bundle in bundles.items():
        samples[model] = folder / "samples" / f"{language.name}-{model}"
        # Building leaves folders in a sample, which would make it another one.
        shutil.rmtree(samples[model], ignore_errors=True)
        ee.scaffold(language.sample, bundle, samples[model])
    first, small = next(iter(samples.values())), ROOT / "exported/hymba_tiny"
    language.build(first)
    print(f"{language.name}: built", flush=True)
    rows = []
    for provider in PROVIDERS[language.name]:
        for model, sample in samples.items():
            if model in PARTS or model in MODULES or model == HANDMADE:
                wanted = provider == PROVIDERS[language.name][0]
            else:
                wanted = model.startswith(TINY_MARK) == (quick or provider in SOFTWARE)
            if wanted:
                rows += check_model(language, first, sample / "bundle", provider, quick, model)
                print(f"{language.name} on {provider}: {model} is right", flush=True)
    said = check_refusals(language, first, small, folder)
    said += check_refusals(language, first, bundles[SHARED], folder, SHARED_DAMAGES)
    said += [check_browsers(language, first, bundle, folder) for bundle in (small, bundles[SHARED])]
    said.append(check_printable(language, first, small, folder))
    for line in (*said, *language.extra(first, small)):
        print(line, flush=True)
    return rows


def build_bundles(folder: Path, quick: bool) -> dict[str, Path]:
    """A bundle of every architecture, of its default size and tiny, and some that hold a part."""
    bundles = {}
    for prefix, options in ((TINY_MARK, TINY),) if quick else (("", {}), (TINY_MARK, TINY)):
        for name in ARCHITECTURES:
            bundles[prefix + name] = folder / "bundles" / (prefix + name)
            ee.build(name, output=bundles[prefix + name], **options)
            print(f"{prefix}{name}: bundle built", flush=True)
    for model, (name, options) in PARTS.items():
        bundles[model] = folder / "bundles" / model
        ee.build(name, output=bundles[model], **TINY | options)
        print(f"{model}: bundle built", flush=True)
    for model in MODULES:
        bundles[model] = folder / "bundles" / model
        export_source(load_source(f"{ROOT}/tests/strangers/models.py:{model}"), bundles[model], Settings())
        print(f"{model}: bundle built", flush=True)
    bundles[HANDMADE] = folder / "bundles" / HANDMADE
    shutil.rmtree(bundles[HANDMADE], ignore_errors=True)
    write_handmade(bundles[HANDMADE], prefill=True)
    print(f"{HANDMADE}: bundle built", flush=True)
    return bundles


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks, prints and writes."""
    parser = argparse.ArgumentParser(
        "python -m examples.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("languages", nargs="*", metavar="LANGUAGE", help=", ".join(LANGUAGES))
    parser.add_argument("--quick", action="store_true", help="tiny models and few frames")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/embedding", help="for tools and samples")
    parser.add_argument("--output", type=Path, help="folder for the results [default: in --folder]")
    given = parser.parse_args(arguments)
    if unknown := set(given.languages) - set(LANGUAGES):
        parser.error(f"no sample in {', '.join(sorted(unknown))}; there are {', '.join(LANGUAGES)}")
    folder: Path = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    bundles = build_bundles(folder, given.quick)
    rows: list[Row] = []
    failures = []
    for name in given.languages or LANGUAGES:
        try:
            rows += check_language(LANGUAGES[name], bundles, folder, given.quick)
        except CheckError as error:
            failures.append(str(error))
            print(f"error: {error}", file=sys.stderr, flush=True)
    described = machine()
    on = ", ".join(f"{key} {value}" for key, value in described.items() if key != "cpu")
    text = f"One thread, batch 1, on {described['cpu']}: {on}.\n\n{table(rows)}"
    print(text)
    output = given.output / folder_of(str(described["cpu"])) if given.output else folder
    output.mkdir(parents=True, exist_ok=True)
    (output / "embedding.md").write_text(text, encoding="utf-8")
    written = {"machine": described, "rows": [dataclasses.asdict(row) for row in rows], "failures": failures}
    (output / "embedding.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    print(f"{len(rows)} passed, {len(failures)} failed")
    return 1 if failures else 0


def _tail(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-3:])


if __name__ == "__main__":
    raise SystemExit(main())

"""Soundness of verification: that no sound build is refused, and that every graph wrong beyond its bound is.

    python -m benchmarks.soundness                          a thousand random configurations, printed and written
    python -m benchmarks.soundness --count 20 --seed 7      some, written nowhere without --output

A row is a random build: an architecture, its options, numerics, graphs, target, opset, passes, and weights, fresh ones
or such whose tensors are scaled at random. All of a build runs: test data, passes, linking, ONNX's checks, verification
in ONNX Runtime against float64; but several rows share a trace, into which the weights of each are put. The bundle of
every tenth row, and of all that amplify rounding, is verified again with a graph made wrong on purpose, see
sabotage.py. Where a verification fails, the node that departs is not looked for, which takes longer than all else. Rows
are appended to a file as they are done; a run that was broken off goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import edifice_export as ee
from edifice_export.benchmark.results import folder_of, machine
from edifice_export.defaults import OPSETS, TARGETS
from edifice_export.verification import verify as parity
from edifice_export.verification.report import ROUNDING_FACTOR, Report
from edifice_export.verification.verify import Verification
from edifice_export.weights import encode_safetensors, own_metadata
from edifice_reference.models.layers import initialize
from edifice_reference.models.registry import ARCHITECTURES, get_architecture

from .sabotage import sabotaged
from .shared_traces import SharedTraces

COUNT, SEED = 1000, 1
SHARED = 20
"""Rows that share a trace."""

MEMORY = 6 * 2**30
"""Bytes that a process may ask for."""

WRONG = 10
"""Of so many rows one is made wrong, and all of those that amplify rounding."""

NOTE = (
    "Verification draws samples of float32's own error until what they allow suffices, so that a share near 1 is not "
    "near a refusal. What is wrong on purpose is measured with samples of its own."
)

Row = dict[str, Any]


def configuration(seed: int, number: int) -> Row:
    """What a row builds; narrow models more often than others, as rounding is amplified there."""
    r = random.Random(f"{seed}, trace {number // SHARED}")
    name = r.choice(list(ARCHITECTURES))
    hidden = r.choice([1, 2, 2, 2, 3, 3, 4, 6, 8, 16])
    drawn = {
        "embed_dim": r.choice([1, 2, 3, 6, hidden]),
        "hidden_size": hidden,
        "num_layers": r.choice([1, 1, 1, 2]),
        "window_size": r.choice([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 24]),
        "state_size": r.choice([1, 2, 3, 4, 8, 16]),
        "conv_size": r.choice([1, 2, 3, 4, 7]),
        "num_heads": r.choice([heads for heads in (1, 2, 3, 4) if hidden % heads == 0]),
        "head_dim": r.choice([1, 2, 3, 4, 8]),
        "order": r.choice([1, 2, 3, 4]),
        "filter_size": r.choice([1, 2, 4, 8]),
        "expand_factor": r.choice([1, 2, 3]),
        "num_meta_tokens": r.choice([0, 1, 4]),
        "meta_propagation": r.choice([False, True]),
    }
    known = {field.name for field in dataclasses.fields(get_architecture(name).config_class)}
    numerics = r.choice(["standard", "standard", "edifice"])
    graph = "window" if (name, numerics) == ("h3", "edifice") else r.choice(["window", "stream", "both", "both"])
    opset = r.randint(OPSETS[0], OPSETS[-1])
    r = random.Random(f"{seed}, row {number}")
    return {
        "row": number,
        "architecture": name,
        "options": {key: value for key, value in drawn.items() if key in known},
        "numerics": numerics,
        "graph": graph,
        "opset": opset,
        "target": r.choice(list(TARGETS)),
        "optimize": r.random() < 0.85,
        "seed": r.randrange(2**31),
        "weights": r.choice(["fresh", "fresh", "scaled"]),
    }


def run(row: Row, traces: SharedTraces, folder: Path) -> Row:
    """Builds a row's bundle and sometimes one that is wrong; gives the row with what was found."""
    start, reports = time.perf_counter(), []
    real = Verification.report

    def noted(*given: Any) -> Report:
        reports.append(real(*given))
        return reports[-1]

    names = ("numerics", "graph", "opset", "target", "optimize", "seed")
    options = {**{name: row[name] for name in names}, **row["options"]}
    if row["weights"] == "scaled":
        options["weights"] = _scaled(row, folder / "weights.safetensors")
    result = dict(row)
    patched = mock.patch.object(Verification, "report", noted)
    with patched, mock.patch.object(parity, "_diagnose", lambda report, *_: report), traces.used():
        try:
            bundle = ee.build(row["architecture"], output=folder / "b", **options)
            result["passed"] = True
        except (ee.CheckError, ee.RequestError) as error:
            bundle = None
            result |= {"passed": False, "error": str(error).replace(str(folder), "")}
        if reports:
            result |= _measured(reports[0])
        if bundle is not None and (row["row"] % WRONG == 1 or result.get("beyond")):
            result["sabotage"] = sabotaged(bundle, random.Random(row["seed"]), folder)
    return result | {"seconds": round(time.perf_counter() - start, 2)}


def _scaled(row: Row, path: Path) -> Path:
    """Weights whose tensors are each smaller or larger than fresh ones, by up to several times."""
    known = get_architecture(row["architecture"])
    config = known.config_class(**row["options"])
    model = known.model_class(config, row["numerics"])
    initialize(model, row["seed"])
    r = random.Random(row["seed"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(r.lognormvariate(0, 0.7))
    metadata = own_metadata(known.name, config.options(), row["numerics"])
    path.write_bytes(encode_safetensors(dict(model.named_parameters()), metadata))
    return path


def _measured(report: Report) -> Row:
    beyond = [case for case in report.cases if case.max_abs > case.limit]
    told = [case for case in beyond if case.rounding]
    return {
        "cases": len(report.cases),
        "beyond": len(beyond),
        "sources": dict(Counter("test data" if "/" in case.source else case.source for case in beyond)),
        "largest": max((case.max_abs / (case.rounding or 1) for case in told), default=None),
        "refused": sum(not case.passed for case in report.cases),
    }


def run_all(seed: int, rows: Sequence[int]) -> list[Row]:
    """Rows that share a trace."""
    torch.set_num_threads(1)
    # A constant that is changed may be a size, of more memory than there is.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    traces, found = SharedTraces(), []
    for number in rows:
        with tempfile.TemporaryDirectory() as folder:
            found.append(run(configuration(seed, number), traces, Path(folder)))
    return found


def run_groups(seed: int, count: int, done: set[int], processes: int) -> Iterator[list[Row]]:
    """All rows that are not done, as many at once as there are processes."""
    numbers = [number for number in range(count) if number not in done]
    groups = [[number for number in numbers if number // SHARED == group] for group in range(-(-count // SHARED))]
    groups = [group for group in groups if group]
    if processes == 1:
        yield from (run_all(seed, group) for group in groups)
        return
    with ProcessPoolExecutor(processes) as pool:
        for job in as_completed([pool.submit(run_all, seed, group) for group in groups]):
            yield job.result()


def summary(rows: Sequence[Row]) -> str:
    """The tables in Markdown."""
    lines = [f"{len(rows):,} random builds, of {len({row['row'] // SHARED for row in rows})} traces. {NOTE}", ""]
    lines += ["| builds | | cases | beyond the limit | of builds | most of twice float32's own error | refused |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    kinds = [(name, [row for row in rows if row["architecture"] == name]) for name in ARCHITECTURES]
    kinds += [(kind, [row for row in rows if row["weights"] == kind]) for kind in ("fresh", "scaled")]
    for name, part in [*kinds, ("all", list(rows))]:
        beyond, largest = (
            sum(row.get("beyond", 0) for row in part),
            [row["largest"] for row in part if row.get("largest")],
        )
        cells = [name, len(part), f"{sum(row.get('cases', 0) for row in part):,}", beyond]
        cells += [sum(row.get("beyond", 0) > 0 for row in part), f"{max(largest, default=0) / ROUNDING_FACTOR:.2f}"]
        lines.append(f"| {' | '.join(map(str, [*cells, sum(not row['passed'] for row in part)]))} |")
    lines += [
        "",
        "| wrong on purpose | graphs | size, in units of what is allowed | refused |",
        "| --- | ---: | ---: | ---: |",
    ]
    wrong = [row["sabotage"] for row in rows if row.get("sabotage", {}).get("size")]
    for kind in [*sorted({each["kind"] for each in wrong}), "all", "amplified"]:
        part = [each for each in wrong if kind in (each["kind"], "all") or (kind == "amplified" and each["amplified"])]
        sizes = [each["size"] for each in part]
        span = f"{min(sizes):.2f} to {max(sizes):.2f}" if sizes else ""
        lines.append(f"| {kind} | {len(part)} | {span} | {sum(each['refused'] for each in part)} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if a sound build was refused, or a wrong one was not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT, help="rows")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, help="file to append rows to [default, for all: in results/PROCESSOR]")
    given = parser.parse_args(arguments)
    output = given.output
    if output is None and given.count == COUNT:
        output = Path(__file__).parent / "results" / folder_of(str(machine()["cpu"])) / "soundness.jsonl"
    rows = [json.loads(line) for line in output.read_text().splitlines()] if output and output.exists() else []
    rows = [row for row in rows if row["drawn_with"] == given.seed and row["row"] < given.count]
    done = {row["row"] for row in rows}
    for found in run_groups(given.seed, given.count, done, given.processes):
        found = [{"drawn_with": given.seed, **row} for row in found]
        rows += found
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
        print(f"{len(rows)} of {given.count}", file=sys.stderr)
    rows.sort(key=lambda row: row["row"])
    text = summary(rows)
    print(text)
    if output is not None:
        output.with_suffix(".md").write_text(text)
    missed = [row for row in rows if row.get("sabotage", {}).get("refused") is False]
    return int(bool(missed) or not all(row["passed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())

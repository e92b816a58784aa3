"""What each body of an edifice op costs here, beside torch, for sequences of growing length; batch 1, one thread.

    python benchmarks/ops.py                    all ops that have several bodies: about three minutes
    python benchmarks/ops.py fft_conv           one of them; printed and not written, unless --output says where
    python benchmarks/ops.py --quick            short sequences, to see that it works; likewise

Every body that computes a case is run in turn with the others, with torch, and with rivals that were not taken (see
rivals.py), one run of each in a round. Before that its output is compared with the op's definition in float64. It
prints a table for each case and writes ops.md (the tables), ops.json (all results, and the machine) and ops.png. A star
marks the body that linking takes for this length: the crossovers in the functions' sources come from here. The exit
status is 1 if the error of one that is taken is above 1e-5 of the largest output.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from cases import CASES, Calls, Case
from request import heading, read_request
from rivals import Arguments
from torch import Tensor

from edifice_export.benchmark.bench import take_turns
from edifice_export.benchmark.plot import new_figure, save
from edifice_export.benchmark.results import machine
from edifice_export.building.link import link
from edifice_export.bundle.manifest import LOWERING
from edifice_export.errors import CheckError
from edifice_export.lowerings import LOWERINGS
from edifice_reference.ops.op import NAMESPACE

ALLOWED = 1e-5
QUICK = (7, 20)
QUICK_ROUNDS = 3


def abstract_of(case: Case, given: Arguments) -> ir.Model:
    """A graph of one node, of a free batch and length."""
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    attributes = {name: value for name, value in given.items() if name not in tensors}
    first = next(iter(tensors.values()))

    def info(name: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    def free(value: Tensor) -> list[int | str]:
        if value.ndim == 2:
            return ["window", value.shape[1]]
        return ["batch", "sequence" if value.shape[1] == first.shape[1] else value.shape[1], *value.shape[2:]]

    inputs = [info(name, free(value)) for name, value in tensors.items() if name not in case.constants]
    constants = [onnx.numpy_helper.from_array(given[name].numpy(), name) for name in case.constants]
    reads = free(tensors.get("c", first))[:2]
    y = info("y", [*reads, *case.define(given).shape[2:]])
    left = [] if case.state is None else [info("state", ["batch", *case.state])]
    names = ["y", *(value.name for value in left)]
    node = onnx.helper.make_node(case.node, list(tensors), names, "call", domain="edifice", **attributes)
    graph = onnx.helper.make_graph([node], case.op, inputs, [y], constants, value_info=left)
    versions = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("edifice", 1)]
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=versions, ir_version=10))


def only(case: Case, body: str) -> Any:
    """Has linking know but one body of an op."""
    known = LOWERINGS[f"edifice::{case.node}"]
    kept = tuple(each for each in known.lowerings if each.name == body)
    return mock.patch.dict(LOWERINGS, {f"edifice::{case.node}": dataclasses.replace(known, lowerings=kept)})


def run_of(linked: onnx.ModelProto, given: Arguments) -> Callable[[], Tensor]:
    """One run on the CPU with one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(linked.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {value.name: given[value.name].numpy() for value in session.get_inputs()}
    return lambda: torch.from_numpy(session.run(["y"], feeds)[0])


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one contestant at one length: milliseconds of every round; error is relative to the largest output.

    A contestant's kind is `body`, `rival` or `torch`.
    """

    case: str
    length: int
    contestant: str
    kind: str
    is_chosen: bool
    error: float
    times: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Of all rounds."""
        return statistics.median(self.times)

    @property
    def minimum_ms(self) -> float:
        """Of all rounds."""
        return min(self.times)


def measure(case: Case, length: int, rounds: int | None) -> list[Result]:
    """All contestants at one length."""
    given = case.make(length)
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}
    exact = case.define(wide)
    abstract = abstract_of(case, given)
    (node, *_) = link(abstract, {"sequence": length}).graph.node
    (chosen,) = (entry.value for entry in node.metadata_props if entry.key == LOWERING)
    calls: Calls = {}
    for body in case.bodies:
        if length > case.longest.get(body, length):
            continue
        with only(case, body):
            try:
                linked = link(abstract, {"sequence": length})
            except CheckError:
                # It computes other calls of the op.
                continue
        calls[body] = run_of(linked, given)
    kinds = dict.fromkeys(calls, "body")
    rivals = {name: run_of(make(given), given) for name, make in case.rivals.items()}
    by_torch = case.torch_calls(given)
    calls = calls | rivals | by_torch
    kinds = kinds | dict.fromkeys(rivals, "rival") | dict.fromkeys(by_torch, "torch")
    outputs = (call().double().reshape(exact.shape) for call in calls.values())
    errors = [float((output - exact).abs().max() / exact.abs().max()) for output in outputs]
    times = take_turns(list(calls.values()), rounds)
    return [
        Result(case.title, length, name, kinds[name], name == chosen, error, taken)
        for name, error, taken in zip(calls, errors, times, strict=True)
    ]


def table(case: Case, results: Sequence[Result]) -> str:
    """A case in Markdown: medians in milliseconds, and the least time of the chosen body by the least of torch."""
    mine = [result for result in results if result.case == case.title]
    contestants = list(dict.fromkeys(result.contestant for result in mine))
    rows = [["frames", *contestants, "/ torch", "error"], ["---:"] * (len(contestants) + 3)]
    for length in dict.fromkeys(result.length for result in mine):
        here = {result.contestant: result for result in mine if result.length == length}
        cells = [_cell(here[name]) if name in here else "-" for name in contestants]
        chosen = next(result for result in here.values() if result.is_chosen)
        best = min(result.minimum_ms for result in here.values() if result.kind == "torch")
        rows.append([f"{length}", *cells, f"{chosen.minimum_ms / best:.2f}", f"{chosen.error:.1e}"])
    return "\n".join([f"{case.title}:", "", *(f"| {' | '.join(cells)} |" for cells in rows), ""])


def _cell(result: Result) -> str:
    return f"{result.median_ms:.3g}{'*' * result.is_chosen}"


STYLES = {"body": "o-", "rival": "o:", "torch": "k--"}


def draw_plot(cases: Sequence[Case], results: Sequence[Result], path: Path) -> None:
    """Each case's times against the length, on logarithmic scales."""
    columns = min(len(cases), 2)
    rows = -(-len(cases) // columns)
    figure = new_figure(columns, rows)
    for index, case in enumerate(cases):
        axes = figure.add_subplot(rows, columns, index + 1)
        mine = [result for result in results if result.case == case.title]
        for name in dict.fromkeys(result.contestant for result in mine):
            line = [result for result in mine if result.contestant == name]
            lengths, times = [result.length for result in line], [result.median_ms for result in line]
            axes.loglog(lengths, times, STYLES[line[0].kind], label=name)
        axes.set(title=case.title, xlabel="frames", ylabel="milliseconds, median")
        axes.grid(visible=True, which="both", alpha=0.2)
        axes.legend()
    save(figure, path)


def write(text: str, cases: Sequence[Case], results: Sequence[Result], output: Path) -> None:
    """Writes the tables, all results and the plot."""
    (output / "ops.md").write_text(text, encoding="utf-8")
    figures = [
        {
            **{name: value for name, value in dataclasses.asdict(result).items() if name != "times"},
            "median_ms": result.median_ms,
            "minimum_ms": result.minimum_ms,
            "rounds": len(result.times),
        }
        for result in results
    ]
    written = {"machine": machine(), "threads": 1, "batch": 1, "results": figures}
    (output / "ops.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    draw_plot(cases, results, output / "ops.png")


def check_cases() -> None:
    """Refuses to leave out an op of ours that has several bodies."""
    covered = {case.node for case in CASES}
    for op in LOWERINGS.values():
        if (
            op.domain == NAMESPACE
            and len({each.name for each in op.lowerings if not each.is_frame}) > 1
            and op.op_type not in covered
        ):
            raise SystemExit(f"{op.op_type} has several bodies and no case here; add one to CASES")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes."""
    check_cases()
    asked = read_request(__doc__, list(dict.fromkeys(case.op for case in CASES)), arguments)
    cases = [case for case in CASES if case.op in asked.names]
    torch.set_num_threads(1)
    text = heading()
    text += "Medians in milliseconds. A star: the body that linking takes for this length. / torch: the least time of\n"
    text += "that one by the least of torch. Error: of that one, by the largest output.\n"
    print(text, flush=True)
    results: list[Result] = []
    for case in cases:
        for length in QUICK if asked.quick else case.lengths:
            results += measure(case, length, QUICK_ROUNDS if asked.quick else None)
        print(table(case, results), flush=True)
    text += "".join(f"\n{table(case, results)}" for case in cases)
    if asked.output is not None:
        write(text, cases, results, asked.output)
    wrong = [result for result in results if result.is_chosen and not result.error <= ALLOWED]
    for result in wrong:
        print(f"{result.case}, {result.length} frames: the error of {result.contestant} is {result.error:.1e}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

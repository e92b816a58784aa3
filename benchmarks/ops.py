"""What each body of an edifice op costs here, beside torch, for sequences of growing length; batch 1, one thread.

    python benchmarks/ops.py                    all ops that have several bodies: about three minutes
    python benchmarks/ops.py fft_conv           one of them
    python benchmarks/ops.py --quick            short sequences, to see that it works

Every body that computes a case is run in turn with the others, with torch, and with the kernel that ONNX Runtime has
for the case beyond the standard operators, one run of each in a round. Before that its output is compared with the op's
definition in float64. It prints a table for each case and writes ops.md (the tables), ops.json (all results, and the
machine) and ops.png. A star marks the body that linking takes for this length: the crossovers in the functions' sources
come from here. The exit status is 1 if the error of one that is taken is above 1e-5 of the largest output.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from edifice_export.benchmark.bench import take_turns
from edifice_export.benchmark.plot import new_figure, save
from edifice_export.benchmark.results import folder_of, machine
from edifice_export.errors import CheckError
from edifice_export.functions import LOWERINGS
from edifice_export.link import link
from edifice_export.manifest import LOWERING
from edifice_reference import ops

ALLOWED = 1e-5
QUICK = (7, 20)
QUICK_ROUNDS = 3

Arguments = dict[str, Any]
Calls = dict[str, Callable[[], Tensor]]


def draw(*shape: int, seed: int) -> Tensor:
    """Of values that float32 has."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def causal_attention(length: int) -> Arguments:
    """Of Hymba's default sizes, without meta tokens."""
    frames = {name: draw(1, length, 256, seed=seed) for seed, name in enumerate(("query", "key", "value"))}
    return {**frames, "num_heads": 4, "epsilon": 1e-8}


def fft_conv(length: int) -> Arguments:
    """Of Hyena's default width; a window as long as the sequence."""
    return {"x": draw(1, length, 256, seed=0), "kernel": draw(length, 256, seed=1)}


def selective_scan(length: int, reads: int | None = None) -> Arguments:
    """Of Hymba's default sizes, with the rates that it starts from and steps of all sizes."""
    return {
        "x": draw(1, length, 512, seed=0),
        "delta": torch.exp(draw(1, length, 512, seed=1) - 3).clamp(1e-3, 1e-1),
        "a": -torch.arange(1.0, 17).expand(512, -1).contiguous(),
        "b": draw(1, length, 16, seed=2),
        "c": draw(1, reads or length, 16, seed=3),
    }


def linear_scan(length: int, decays: int = 1) -> Arguments:
    """Of SSTransformer's default width."""
    return {"x": draw(1, length, 256, seed=0), "log_decay": -torch.exp(draw(1, length, decays, seed=1) - 3)}


def diagonal_scan(length: int, reads: int | None = None) -> Arguments:
    """Of H3's default sizes."""
    return {
        "x": draw(1, length, 256, seed=0),
        "log_decay": -torch.exp(draw(2, 64, seed=1) - 3),
        "b": draw(1, length, 2, 64, seed=2),
        "c": draw(1, reads or length, 2, 64, seed=3),
    }


def linear_attention(inputs: Mapping[str, Sequence[int | str]], nodes: Sequence[str], heads: int) -> onnx.ModelProto:
    """A graph with the kernel com.microsoft::LinearAttention, which is at hand on the CPU, CUDA and WebGPU.

    Args:
        inputs: of the graph, by name.
        nodes: in ONNX's text form, what makes its query, key, value and decay of them.
        heads: of queries and of keys.
    """
    declared = ", ".join(f"float[{', '.join(map(str, shape))}] {name}" for name, shape in inputs.items())
    lines = "\n".join(nodes)
    return onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        kernel ({declared}) => (float[batch, sequence, width] y) {{
            {lines}
            y, state = com.microsoft.LinearAttention <
                q_num_heads = {heads}, kv_num_heads = {heads}, update_rule = "gated", scale = 1.0
            > (query, key, value, , decay)
        }}""")


def linear_scan_kernel(given: Arguments) -> onnx.ModelProto:
    """One head with one key, always 1."""
    inputs: dict[str, Sequence[int | str]] = {
        "x": ["batch", "sequence", given["x"].shape[2]],
        "log_decay": ["batch", "sequence", 1],
    }
    nodes = [
        "size = Shape(log_decay)",
        "query = ConstantOfShape <value = float[1] {1}> (size)",
        "key = Identity(query)",
        "value = Identity(x)",
        "decay = Identity(log_decay)",
    ]
    return linear_attention(inputs, nodes, 1)


def diagonal_scan_kernel(given: Arguments) -> onnx.ModelProto:
    """A head for each group, with as many keys as it has states."""
    groups, state = given["log_decay"].shape
    inputs: dict[str, Sequence[int | str]] = {
        "x": ["batch", "sequence", given["x"].shape[2]],
        "b": ["batch", "sequence", groups, state],
        "c": ["batch", "sequence", groups, state],
    }
    rates = ", ".join(map(str, given["log_decay"].flatten().tolist()))
    nodes = [
        "flat = Constant <value_ints = [0, 0, -1]> ()",
        "key = Reshape(b, flat)",
        "query = Reshape(c, flat)",
        f"value = Concat <axis = 2> ({', '.join(['x'] * groups)})",
        f"rates = Constant <value_floats = [{rates}]> ()",
        "size = Shape(key)",
        "decay = Expand(rates, size)",
    ]
    return linear_attention(inputs, nodes, groups)


def transformed(given: Arguments) -> Calls:
    """A convolution by torch.fft, the kernel's spectrum made beforehand: along time as the frames lie, and with each
    channel's frames put beside each other before and taken apart after.
    """
    x, kernel = given["x"], given["kernel"]
    length = x.shape[1]
    spectrum = torch.fft.rfft(kernel, 2 * length, dim=0)
    turned = spectrum.T.contiguous()

    @torch.inference_mode()
    def as_it_lies() -> Tensor:
        y = torch.fft.irfft(torch.fft.rfft(x, 2 * length, dim=1) * spectrum, 2 * length, dim=1)
        return y[:, :length].contiguous()

    @torch.inference_mode()
    def turned_first() -> Tensor:
        channels = x.transpose(1, 2).contiguous()
        y = torch.fft.irfft(torch.fft.rfft(channels, 2 * length) * turned, 2 * length)
        return y[:, :, :length].transpose(1, 2).contiguous()

    return {"torch.fft": as_it_lies, "torch.fft, turned": turned_first}


@dataclasses.dataclass(frozen=True)
class Case:
    """An op with sizes, a way to call it, and the lengths to measure.

    Attributes:
        title: what it is.
        op: its name in edifice_reference.ops.
        make: arguments of a length in the op's order, float32 tensors and attributes; it starts from zeros.
        lengths: of the sequences.
        constants: the arguments that no input of the graph changes.
        state: the shape of what the op leaves besides y, without the batch; none if None.
        longest: of bodies whose memory grows with the square of the length, the longest that they are given.
        alternatives: what else computes the op in torch; the definition itself if None.
        kernel: a graph with LinearAttention in the body's place, if it computes the op.
    """

    title: str
    op: str
    make: Callable[[int], Arguments]
    lengths: Sequence[int]
    constants: Sequence[str] = ()
    state: Sequence[int] | None = None
    longest: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alternatives: Callable[[Arguments], Calls] | None = None
    kernel: Callable[[Arguments], onnx.ModelProto] | None = None

    @property
    def node(self) -> str:
        """The op's name in a graph."""
        return "".join(part.capitalize() for part in self.op.split("_"))

    @property
    def bodies(self) -> list[str]:
        """Names of all bodies of the op for sequences."""
        return list(dict.fromkeys(each.name for each in LOWERINGS[self.node].lowerings if not each.is_frame))

    def define(self, given: Arguments) -> Tensor:
        """What the definition gives."""
        found = getattr(ops, self.op)(*given.values())
        return found[0] if isinstance(found, tuple) else found

    def torch_calls(self, given: Arguments) -> Calls:
        """What torch is asked for."""
        if self.alternatives is not None:
            return self.alternatives(given)

        @torch.inference_mode()
        def eager() -> Tensor:
            return self.define(given)

        return {"torch": eager}


SHORT = (16, 60, 128, 256, 512, 1024)
LONG = (2048, 4096, 8192, 16384)

CASES = (
    Case("causal_attention", "causal_attention", causal_attention, (*SHORT, 2048), longest={"masked": 2048}),
    Case(
        "fft_conv", "fft_conv", fft_conv, (*SHORT, *LONG), ["kernel"], longest={"taps": 512}, alternatives=transformed
    ),
    Case("fft_conv, a kernel that is no constant", "fft_conv", fft_conv, (*SHORT, *LONG[:2]), longest={"taps": 256}),
    Case("selective_scan", "selective_scan", selective_scan, (*SHORT, 2048), ["a"], (16, 512)),
    Case(
        "selective_scan, the last frame's read-out",
        "selective_scan",
        lambda length: selective_scan(length, 1),
        (*SHORT, 2048),
        ["a"],
        (16, 512),
    ),
    Case(
        "linear_scan",
        "linear_scan",
        linear_scan,
        (*SHORT, 2048),
        (),
        (256,),
        {"masked": 1024},
        kernel=linear_scan_kernel,
    ),
    Case(
        "linear_scan, decays of each channel's own",
        "linear_scan",
        lambda length: linear_scan(length, 256),
        (*SHORT, 2048),
        (),
        (256,),
    ),
    Case(
        "diagonal_scan",
        "diagonal_scan",
        diagonal_scan,
        (*SHORT, 2048),
        ["log_decay"],
        (2, 64, 256),
        {"direct": 256, "masked": 1024},
        kernel=diagonal_scan_kernel,
    ),
    Case(
        "diagonal_scan, the last frame's read-out",
        "diagonal_scan",
        lambda length: diagonal_scan(length, 1),
        (*SHORT, 2048),
        ["log_decay"],
        (2, 64, 256),
    ),
)


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
    known = LOWERINGS[case.node]
    kept = tuple(each for each in known.lowerings if each.name == body)
    return mock.patch.dict(LOWERINGS, {case.node: dataclasses.replace(known, lowerings=kept)})


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

    A contestant's kind is `body`, `kernel` or `torch`.
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
    (chosen,) = (entry.value for entry in link(abstract, length).graph.node[0].metadata_props if entry.key == LOWERING)
    calls: Calls = {}
    for body in case.bodies:
        if length > case.longest.get(body, length):
            continue
        with only(case, body):
            try:
                linked = link(abstract, length)
            except CheckError:
                # It computes other calls of the op.
                continue
        calls[body] = run_of(linked, given)
    kinds = dict.fromkeys(calls, "body")
    if case.kernel is not None:
        calls["LinearAttention"] = run_of(case.kernel(given), given)
        kinds["LinearAttention"] = "kernel"
    by_torch = case.torch_calls(given)
    calls, kinds = calls | by_torch, kinds | dict.fromkeys(by_torch, "torch")
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


STYLES = {"body": "o-", "kernel": "o:", "torch": "k--"}


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


def check_cases() -> None:
    """Refuses to leave out an op that has several bodies."""
    covered = {case.node for case in CASES}
    for name, op in LOWERINGS.items():
        if len({each.name for each in op.lowerings if not each.is_frame}) > 1 and name not in covered:
            raise SystemExit(f"{name} has several bodies and no case here; add one to CASES")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes."""
    check_cases()
    known = list(dict.fromkeys(case.op for case in CASES))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=", ".join(known))
    parser.add_argument("--quick", action="store_true", help="two short sequences and few rounds")
    parser.add_argument("--output", type=Path, help="folder to write to [default: results/PROCESSOR beside this file]")
    given = parser.parse_args(arguments)
    if unknown := set(given.ops) - set(known):
        parser.error(f"no op with several bodies: {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    cases = [case for case in CASES if case.op in (given.ops or known)]
    torch.set_num_threads(1)
    described = machine()
    on = ", ".join(f"{key} {value}" for key, value in described.items() if key != "cpu")
    text = f"One thread, batch 1, on {described['cpu']}: {on}.\n\n"
    text += "Medians in milliseconds. A star: the body that linking takes for this length. / torch: the least time of\n"
    text += "that one by the least of torch. Error: of that one, by the largest output.\n"
    print(text, flush=True)
    results: list[Result] = []
    for case in cases:
        for length in QUICK if given.quick else case.lengths:
            results += measure(case, length, QUICK_ROUNDS if given.quick else None)
        print(table(case, results), flush=True)
    text += "".join(f"\n{table(case, results)}" for case in cases)
    output = given.output or Path(__file__).parent / "results" / folder_of(str(described["cpu"]))
    output.mkdir(parents=True, exist_ok=True)
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
    written = {"machine": described, "threads": 1, "batch": 1, "results": figures}
    (output / "ops.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    draw_plot(cases, results, output / "ops.png")
    wrong = [result for result in results if result.is_chosen and not result.error <= ALLOWED]
    for result in wrong:
        print(f"{result.case}, {result.length} frames: the error of {result.contestant} is {result.error:.1e}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

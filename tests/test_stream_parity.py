"""Verification of streams: it covers what it says, and it finds what goes wrong only later, or only beside others."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cli_helpers as helpers
import numpy as np
import onnx
import pytest
from cli_helpers import REMOVED, edit_manifest, forge, set_initial
from conftest import TINY, any_architecture, others_slow
from onnx import TensorProto, helper, numpy_helper
from stream_helpers import WINDOW

import edifice_export as ee
from edifice_export.bundle.body_names import op_of
from edifice_export.verification import streams as stream_parity
from edifice_export.verification import verify as parity
from edifice_export.verification.report import Case, Report
from edifice_export.verification.streams import AFTER, BATCH, LONG_WINDOW, MAGNITUDES, _Plan

ATTENTIVE = pytest.mark.parametrize("bundle", ["hymba", "ss_transformer"], indirect=True)
RECURRENT = pytest.mark.parametrize("bundle", ["h3", "hymba", "ss_transformer"], indirect=True)

Change = Callable[[onnx.ModelProto], None]


def altered(bundle: ee.Bundle, folder: Path, graph: str, *changes: Change) -> Path:
    """A copy of a bundle with another model, whose manifest vouches for it."""
    bot = folder / "bot"
    shutil.copytree(bundle.path, bot)
    model = onnx.load(bot / f"{graph}/model.onnx")
    for change in changes:
        change(model)
    forge(bot, f"{graph}/model.onnx", model.SerializeToString())
    return bot


def insert(graph: Any, index: int, nodes: Sequence[onnx.NodeProto]) -> None:
    """Puts nodes into a graph or a function."""
    whole = [*graph.node[:index], *nodes, *graph.node[index:]]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in whole]
    del graph.node[:]
    graph.node.extend(copies)


def number(name: str, value: float) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value_float=value)


def body_of(model: onnx.ModelProto, name: str) -> onnx.FunctionProto:
    (body,) = (body for body in model.functions if op_of(body.name) == name)
    return body


def use_instead(graph: Any, old: str, new: str) -> None:
    """Has every node read another value."""
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


def replace_output(model: onnx.ModelProto, name: str, nodes: Sequence[onnx.NodeProto]) -> None:
    """Has these nodes, which read `right`, give an output of a model."""
    for node in model.graph.node:
        node.output[:] = ["right" if output == name else output for output in node.output]
    use_instead(model.graph, name, "right")
    insert(model.graph, len(model.graph.node), nodes)


def verified_wrong(bot: Path) -> tuple[Report, list[Case]]:
    """A report that has not passed, and the cases that failed."""
    report = ee.verify(bot, ["cpu"])
    assert not report.passed
    return report, [case for case in report.cases if not case.passed]


def node_of(bundle: ee.Bundle, graph: str, op: str) -> str:
    """The first node of an op."""
    model = onnx.load(bundle.file(f"{graph}/model.onnx"))
    return next(node.name for node in model.graph.node if op_of(node.op_type) == op)


# What is covered


@pytest.fixture(scope="module")
def report(bundle: ee.Bundle) -> Report:
    return ee.verify(bundle)


def test_a_stream_is_followed_for_ten_windows_and_from_everywhere(report: Report) -> None:
    cases = [case for case in report.cases if case.graph != "window"]
    assert report.passed
    assert report.frames == 10 * WINDOW
    lengths: dict[tuple[str, str, int, float], set[int]] = {}
    for case in cases:
        lengths.setdefault((case.graph, case.source, case.batch, case.magnitude), set()).add(case.length)
    every = set(range(1, 10 * WINDOW + 1))
    assert lengths["stream", "reference", 1, 1.0] == every
    assert lengths["stream", "window graph", 1, 1.0] == set(range(1, WINDOW + 1))
    assert lengths["stream", "snapshot", 1, 1.0] <= every
    starts = lengths["prefill", "reference", 1, 1.0]
    assert {1, WINDOW, WINDOW + 1} < starts <= every
    assert lengths["stream", "after prefill", 1, 1.0] == {start + t for start in starts for t in range(1, AFTER + 1)}
    for source in ("reference", "permuted batch"):
        assert lengths["stream", source, BATCH, 1.0] == set(range(1, 2 * WINDOW + 1))
    assert lengths["stream", "reset entry", BATCH, 1.0] == set(range(WINDOW + 1, 2 * WINDOW + 1))
    for magnitude in MAGNITUDES:
        assert lengths["stream", "reference", 1, magnitude] == set(range(1, AFTER + 1))
    data = {case.source for case in cases if "/" in case.source}
    assert data == {
        *(f"stream/test_data_set_{index}" for index in range(3)),
        *(f"prefill/test_data_set_{index}" for index in range(2)),
        "stream/test_sequence",
    }
    assert all(case.limit == 0 == case.max_abs for case in cases if case.source == "snapshot")


def parts(bundle: ee.Bundle, folder: Path) -> dict[str, Path]:
    """Copies of a bundle that have all graphs, or as if only a part of them had been asked for."""
    places = {name: folder / name for name in ("both", "window", "stream")}
    for path in places.values():
        shutil.copytree(bundle.path, path)
    edit_manifest(places["stream"], ("graphs", "window"), REMOVED)
    for graph in ("stream", "prefill"):
        edit_manifest(places["window"], ("graphs", graph), REMOVED)
    edit_manifest(places["window"], ("states",), [])
    return places


@pytest.mark.parametrize("providers", [["cpu"], ["cpu", "pretended"]])
@pytest.mark.parametrize("torch", [True, False])
def test_progress_reaches_exactly_the_total_that_it_announces(
    bundle: ee.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, providers: list[str], torch: bool
) -> None:
    real = parity.load
    monkeypatch.setattr(parity, "load", lambda opened, *_: real(opened, ["cpu"], threads=1))
    if not torch:
        monkeypatch.setattr(parity, "_load_reference", lambda *_: None)
    counts = {}
    for graph, path in parts(bundle, tmp_path).items():
        calls: list[tuple[int, int]] = []
        report = ee.verify(path, providers, progress=lambda done, total, calls=calls: calls.append((done, total)))
        assert report.passed
        assert calls == [(done, len(report.cases)) for done in range(1, len(report.cases) + 1)]
        assert report.providers == providers
        for provider in providers:
            assert sum(case.provider == provider for case in report.cases) * len(providers) == len(report.cases)
        counts[graph] = len(report.cases)
    # Only the comparison of both graphs takes both.
    assert counts["both"] == counts["window"] + counts["stream"] + (WINDOW * len(providers) if torch else 0)


def test_an_interrupt_ends_what_runs(any_bundle: ee.Bundle) -> None:
    def interrupt(done: int, _: int) -> None:
        assert done == 1
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt) as kept:  # with its traceback, which holds on to what was under way
        ee.verify(any_bundle, ["cpu"], every_prefix=True, progress=interrupt)
    assert threading.active_count() == before, kept


@pytest.mark.parametrize("every_frame", [True, False])
@pytest.mark.parametrize("window", [1, 2, 60, LONG_WINDOW, LONG_WINDOW + 1, 1000, 8192])
def test_a_plan_is_of_ten_windows_or_of_a_sample(window: int, every_frame: bool) -> None:
    plan = _Plan.of(window, every_frame)
    whole = every_frame or window <= 256
    assert plan.steps == (10 * window if whole else 256)
    assert plan.batch_frames == 2 * min(window, 256)
    places = plan.handovers
    assert list(places) == sorted(set(places))
    assert {1, window, window + 1} <= set(places) <= set(range(1, max(10 if whole else 3, 2) * window + 1))
    assert len(places) <= 3 + 5
    assert plan.frames == max(plan.steps, places[-1] + AFTER)
    if window >= 60:
        assert places[-1] > window + 1
    assert plan == _Plan.of(window, every_frame)


@pytest.mark.parametrize("every_frame", [True, False])
@pytest.mark.parametrize("has_window", [True, False])
@any_architecture
def test_what_is_counted_of_a_long_window_is_what_is_run(
    bundle: ee.Bundle, monkeypatch: pytest.MonkeyPatch, every_frame: bool, has_window: bool
) -> None:
    """A window of 7 taken for a long one, with numbers that fit."""
    monkeypatch.setattr(stream_parity, "LONG_WINDOW", 5)
    if not has_window:
        graphs = {name: entry for name, entry in bundle.manifest.graphs.items() if name != "window"}
        bundle = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, graphs=graphs))
    report = ee.verify(bundle, ["cpu"], every_prefix=every_frame)
    assert report.passed
    steps = 10 * WINDOW if every_frame else 5
    streams = [case for case in report.cases if case.graph != "window"]
    assert report.frames == steps
    assert len(streams) == stream_parity.count_stream(bundle, SimpleNamespace(bears=lambda _: True), every_frame)
    followed = [case for case in streams if case.source == "window graph"]
    assert len(followed) == (min(steps, WINDOW) if has_window else 0)
    assert max(case.length for case in streams if case.graph == "prefill") > 2 * WINDOW
    # Of each graph what it ran, and not what another did.
    assert report.prefixes == (WINDOW if has_window else 0)
    assert report.histories == len(
        {case.length for case in streams if case.graph == "prefill" and "/" not in case.source}
    )


# What is found


@ATTENTIVE
def test_a_ring_that_is_wrong_only_after_it_wraps_is_found(bundle: ee.Bundle, tmp_path: Path) -> None:
    def late_slots_are_off_by_one(model: onnx.ModelProto) -> None:
        body = body_of(model, "IntoSlot")
        index, slot = next((index, node) for index, node in enumerate(body.node) if node.op_type == "Mod")
        position, window = slot.input
        slot.input[0] = "moved"
        insert(
            body,
            index,
            [
                helper.make_node("GreaterOrEqual", [position, window], ["late"]),
                helper.make_node("Cast", ["late"], ["by"], to=TensorProto.INT64),
                helper.make_node("Add", [position, "by"], ["moved"]),
            ],
        )

    report, failed = verified_wrong(altered(bundle, tmp_path, "stream", late_slots_are_off_by_one))
    assert min(case.length for case in failed) == WINDOW + 1
    assert report.departure is not None
    assert report.departure.node == "blocks.0.attention/sliding_attention"
    assert re.fullmatch(r"edifice::SlidingAttention_frame_[68]to3", report.departure.op_type)
    assert "the first node that departs is blocks.0.attention/sliding_attention" in report.summary()


@RECURRENT
def test_a_state_that_drifts_is_found(bundle: ee.Bundle, tmp_path: Path) -> None:
    """The decay is off by a ten-thousandth; where little is remembered for ten frames, by a thousandth."""
    op, off = {
        "h3": ("DiagonalScan", 1e-4),
        "hymba": ("SelectiveScan", 1e-3),
        "ss_transformer": ("LinearScan", 1e-3),
    }[bundle.manifest.program.name]

    def decay_is_off(model: onnx.ModelProto) -> None:
        body = body_of(model, op)
        use_instead(body, "initial", "drifting")
        insert(
            body,
            0,
            [number("off", 1 + off), helper.make_node("Mul", ["initial", "off"], ["drifting"])],
        )

    _, failed = verified_wrong(altered(bundle, tmp_path, "stream", decay_is_off))
    assert {case.graph for case in failed} == {"stream"}
    assert min(case.length for case in failed if "/" not in case.source) > 1


@pytest.mark.parametrize("leak", [0.01, 1.0])
def test_an_entry_that_sees_others_is_found(bundle: ee.Bundle, tmp_path: Path, leak: float) -> None:
    def frames_are_mixed(model: onnx.ModelProto) -> None:
        use_instead(model.graph, "frame", "mixed")
        axis = helper.make_node("Constant", [], ["entries"], value_ints=[0])
        insert(
            model.graph,
            0,
            [
                axis,
                number("leak", leak),
                helper.make_node("ReduceMean", ["frame", "entries"], ["mean"], keepdims=1),
                helper.make_node("Sub", ["mean", "frame"], ["others"]),
                helper.make_node("Mul", ["others", "leak"], ["leaked"]),
                helper.make_node("Add", ["frame", "leaked"], ["mixed"]),
            ],
        )

    report, failed = verified_wrong(altered(bundle, tmp_path, "stream", frames_are_mixed))
    # A batch of one is its own mean.
    assert {case.batch for case in failed} == {2, BATCH}
    assert report.departure is not None
    assert report.departure.node.startswith("input_projection")


@others_slow
def test_a_history_that_hands_over_wrong_frames_is_found(bundle: ee.Bundle, tmp_path: Path) -> None:
    def state_is_a_frame_late(model: onnx.ModelProto) -> None:
        body = body_of(model, "CausalConv1d")
        index, last = next((index, node) for index, node in enumerate(body.node) if body.output[1] in node.output)
        assert last.op_type == "Slice"
        begin, end, axis = last.input[1], last.input[2], last.input[3]
        last.input[1:3] = ["earlier", "earlier_end"]
        insert(
            body,
            index,
            [
                helper.make_node("Constant", [], ["by"], value_ints=[1]),
                helper.make_node("Sub", [begin, "by"], ["earlier"]),
                helper.make_node("Sub", [end, "by"], ["earlier_end"]),
            ],
        )
        assert axis

    report, failed = verified_wrong(altered(bundle, tmp_path, "prefill", state_is_a_frame_late))
    kinds = {(case.graph, case.source) for case in failed}
    assert ("stream", "after prefill") in kinds
    if bundle.manifest.program.name != "h3":
        # Of histories in two pieces; H3's convolution comes last, and sees only the end of the second.
        assert ("prefill", "reference") in kinds
    assert {f"prefill/test_data_set_{index}" for index in range(2)} <= {source for _, source in kinds}
    # The output of a history at once is right, and so is the stream without one.
    assert not any(case.graph == "window" or (case.graph, case.source) == ("stream", "reference") for case in failed)
    assert report.departure is not None
    assert report.departure.node == node_of(bundle, "prefill", "CausalConv1d")


OPS = [
    ("h3", "CausalConv1d"),
    ("h3", "DiagonalScan"),
    ("hyena", "CausalConv1d"),
    ("hymba", "CausalConv1d"),
    ("hymba", "SelectiveScan"),
    ("hymba", "SlidingAttention"),
    ("ss_transformer", "CausalConv1d"),
    ("ss_transformer", "LinearScan"),
    ("ss_transformer", "SlidingAttention"),
]


@pytest.mark.parametrize(("bundle", "op"), OPS, indirect=["bundle"])
def test_a_wrong_state_with_the_right_output_is_found_at_its_node(bundle: ee.Bundle, op: str, tmp_path: Path) -> None:
    def state_is_negated(model: onnx.ModelProto) -> None:
        body = body_of(model, op)
        body.node.append(helper.make_node("Neg", body.output[1:2], ["negative"]))
        body.output[1] = "negative"

    report, failed = verified_wrong(altered(bundle, tmp_path, "stream", state_is_negated))
    # The first frame of a stream is right (and another: Hyena's first taps are 0); test data tells by its states.
    assert min(case.length for case in failed if "/" not in case.source) in (2, 3)
    assert "stream/test_data_set_0" in {case.source for case in failed}
    assert report.departure is not None
    assert report.departure.node == node_of(bundle, "stream", op)


@ATTENTIVE
def test_a_state_that_turns_into_nan_later_is_found(bundle: ee.Bundle, tmp_path: Path) -> None:
    rank = len(next(state for state in bundle.manifest.states if state.name == "0.ssm").shape)

    def nan_after_thirty_frames(model: onnx.ModelProto) -> None:
        axes = helper.make_node("Constant", [], ["axes"], value_ints=list(range(1, rank)))
        limit = helper.make_node("Constant", [], ["limit"], value_int=29)
        nodes = [
            axes,
            limit,
            number("nan", math.nan),
            helper.make_node("GreaterOrEqual", ["past.0.position", "limit"], ["late_entries"]),
            helper.make_node("Unsqueeze", ["late_entries", "axes"], ["late"]),
            helper.make_node("Where", ["late", "nan", "right"], ["present.0.ssm"]),
        ]
        replace_output(model, "present.0.ssm", nodes)

    report, failed = verified_wrong(altered(bundle, tmp_path, "stream", nan_after_thirty_frames))
    streams = [case for case in report.cases if (case.source, case.batch, case.magnitude) == ("reference", 1, 1.0)]
    streams = [case for case in streams if case.graph == "stream"]
    assert {case.length for case in streams if not case.passed} == set(range(31, 10 * WINDOW + 1))
    assert report.worst.max_abs == math.inf
    assert {case.graph for case in failed} == {"stream"}


@ATTENTIVE
def test_keys_and_values_that_change_places_are_found(bundle: ee.Bundle, tmp_path: Path) -> None:
    def swap(model: onnx.ModelProto) -> None:
        for old, new in (("past.1.key", "kept"), ("past.1.value", "past.1.key"), ("kept", "past.1.value")):
            use_instead(model.graph, old, new)

    report, failed = verified_wrong(altered(bundle, tmp_path, "stream", swap))
    assert {case.graph for case in failed} == {"stream"}
    assert report.departure is not None
    assert report.departure.node == "blocks.1.attention/sliding_attention"


@pytest.mark.parametrize(
    ("bundle", "state", "initial"),
    [
        ("h3", "1.ssm", 0.5),
        ("h3", "0.conv", -1.0),
        ("hyena", "0.long_conv", 1.0),
        ("hyena", "1.conv", 1.0),
        ("hymba", "0.ssm", 0.5),
        ("hymba", "0.position", 1),
        ("ss_transformer", "1.ssm", 0.5),
        ("ss_transformer", "0.position", 3),
    ],
    indirect=["bundle"],
)
def test_a_wrong_initial_value_is_found(bundle: ee.Bundle, state: str, initial: float, tmp_path: Path) -> None:
    bot = tmp_path / "bot"
    shutil.copytree(bundle.path, bot)
    place = [each.name for each in bundle.manifest.states].index(state)
    set_initial(bot, {place: initial})
    _, failed = verified_wrong(bot)
    first = min(case.length for case in failed if case.source == "reference" and case.graph == "stream")
    assert first == (3 if (bundle.manifest.program.name, state) == ("hyena", "1.conv") else 1)


@ATTENTIVE
def test_what_an_unfilled_slot_holds_is_seen_by_nobody(bundle: ee.Bundle, tmp_path: Path) -> None:
    bot = tmp_path / "bot"
    shutil.copytree(bundle.path, bot)
    rings = [place for place, state in enumerate(bundle.manifest.states) if state.name.endswith((".key", ".value"))]
    set_initial(bot, dict.fromkeys(rings, 1e6))
    assert ee.verify(bot, ["cpu"]).passed


@pytest.mark.parametrize("kind", ["ssm", "conv"])
def test_initial_states_that_change_places_are_found(primed: ee.Bundle, kind: str, tmp_path: Path) -> None:
    bot = tmp_path / "bot"
    shutil.copytree(primed.path, bot)
    first, second = (
        (place, state.initial) for place, state in enumerate(primed.manifest.states) if state.name.endswith(f".{kind}")
    )
    set_initial(bot, {first[0]: second[1], second[0]: first[1]})
    assert ee.verify(primed, ["cpu"]).passed
    verified_wrong(bot)


def test_taps_of_a_stream_that_are_not_the_networks_are_found(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The oldest frame of the window is weighed wrongly: nothing shows before the window is full."""
    from conftest import tiny_bundle

    bundle = tiny_bundle("hyena", tmp_path_factory)

    def oldest_tap_is_off(model: onnx.ModelProto) -> None:
        shape = [2, WINDOW - 1, TINY["hidden_size"]]  # of each order, the oldest first
        taps = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == shape)
        array = numpy_helper.to_array(taps).copy()
        array[:, 0] += 1
        taps.CopyFrom(numpy_helper.from_array(array, taps.name))

    report, failed = verified_wrong(altered(bundle, tmp_path, "stream", oldest_tap_is_off))
    assert min(case.length for case in failed if "/" not in case.source) >= WINDOW
    assert report.departure is not None
    assert report.departure.node.startswith("blocks.0/")


@pytest.mark.parametrize("output", [0, 1])
@any_architecture
def test_nothing_is_written_when_a_frames_body_is_wrong(
    bundle: ee.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: int
) -> None:
    """All the way from a lowering to the message of a build."""
    helpers.trace_once(monkeypatch)
    helpers.replace_bodies(monkeypatch, "SelectiveScan", lambda body: helpers.negated(body, output), "frame")
    with pytest.raises(ee.CheckError) as caught:
        ee.build(bundle.manifest.program.name, graph="stream", output=tmp_path / "b", **TINY)
    assert "hymba was not written: " in str(caught.value)
    node = "blocks.0.mamba/selective_scan (edifice::SelectiveScan_frame_6to2)"
    assert f"the first node that departs is {node}, by" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# What is wrong with the runtime, not with a graph


def failing_sources(bundle: ee.Bundle) -> set[str]:
    return {case.source for case in ee.verify(bundle, ["cpu"]).cases if not case.passed}


@any_architecture
def test_a_restore_that_does_nothing_is_found(bundle: ee.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ee.Stream, "restore", lambda *_: None)
    assert failing_sources(bundle) == {"snapshot"}
    # What must be equal does not need more than float32.
    assert "more than float32" not in ee.verify(bundle, ["cpu"]).summary()


@any_architecture
def test_what_is_right_to_rounding_and_not_the_same_again_is_found(
    bundle: ee.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, turn = ee.Stream.step, itertools.count(1)
    noisy = lambda stream, frame: real(stream, frame) + np.float32(1e-9 * (next(turn) % 97))  # noqa: E731
    monkeypatch.setattr(ee.Stream, "step", noisy)
    assert failing_sources(bundle) == {"snapshot"}


@any_architecture
def test_a_reset_of_an_entry_that_resets_nothing_or_all_is_found(
    bundle: ee.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ee.Stream.reset
    for wrong in (
        lambda *_: None,
        lambda stream, *_: real(stream),
        lambda stream, entries=None: real(stream, entries and [1]),
    ):
        monkeypatch.setattr(ee.Stream, "reset", wrong)
        assert failing_sources(bundle) == {"reset entry"}


# Without torch


@any_architecture
def test_without_torch_the_states_of_test_data_tell(
    bundle: ee.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "_load_reference", lambda *_: None)
    report = ee.verify(bundle, ["cpu"])
    assert (report.passed, report.reference, report.frames, report.prefixes) == (True, "test data", 0, 0)
    assert len(report.cases) == 2 + 3 + 2 + 1
    for graph, output in (("stream", 1), ("stream", 9), ("prefill", 4)):
        bot = tmp_path / f"{graph}{output}"
        shutil.copytree(bundle.path, bot)
        name = f"{graph}/test_data_set_1/output_{output}.pb"
        tensor = onnx.load_tensor(bot / name)
        array = numpy_helper.to_array(tensor).copy()
        array.flat[0] += 1
        forge(bot, name, numpy_helper.from_array(array, tensor.name).SerializeToString())
        wrong = ee.verify(bot, ["cpu"])
        assert [case.source for case in wrong.cases if not case.passed] == [f"{graph}/test_data_set_1"]
        assert wrong.departure is None

"""The command line when all is well: its surface, what every command prints, and its exit status."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_helpers import COMMAND, Capture, cli, done, error_of, snapshot, tiny_build, unchanged
from conftest import ANY, GOLDEN, TINY, any_architecture

import edifice_export as ee
from edifice_reference.models.registry import ARCHITECTURES

COMMANDS = {
    "list": {"--json"},
    "build": set(),
    "export": {
        *("--target", "--precision", "--optimize", "--inline", "--single-file", "--opset", "--seed", "--tolerance"),
        *("--output", "--json"),
    },
    "verify": {"--provider", "--tolerance", "--every-prefix", "--source", "--json"},
    "run": {"--input", "--output", "--stride", "--stream", "--provider", "--threads", "--optimization", "--json"},
    "bench": {
        *("--graph", "--provider", "--threads", "--batch", "--length", "--against", "--rounds", "--plot", "--json")
    },
    "inspect": {"--batch", "--sequence", "--graph", "--explain", "--json"},
    "convert": {"--architecture", "--names", "--option", "--json"},
    "scaffold": {"--output", "--json"},
    "doctor": {"--json"},
}
OF_EVERY_BUILD = {
    "--weights", "--numerics", "--graph", "--target", "--precision", "--optimize", "--inline", "--single-file",
    "--opset", "--seed", "--tolerance", "--output", "--json",
}  # fmt: skip


def listed_options(capfd: Capture, *command: str) -> set[str]:
    text = done(capfd, *command, "--help").out
    return set(re.findall(r"^ +(--[\w-]+)", text, re.MULTILINE)) - {"--help"}


def random_frames(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def save(path: Path, frames: np.ndarray) -> Path:
    match path.suffix:
        case ".npy":
            np.save(path, frames)
        case ".npz":
            np.savez(path, state_sequence=frames, labels=np.zeros(3))
        case ".csv":
            np.savetxt(path, frames, delimiter=",", fmt="%.9g")
    return path


def test_commands(capfd: Capture) -> None:
    text = done(capfd, "--help").out
    assert set(re.findall(r"^  (\w+)  ", text.partition("Commands:")[2], re.MULTILINE)) == set(COMMANDS)
    assert listed_options(capfd) == {"--debug", "--version"}
    assert done(capfd).out == text


@pytest.mark.parametrize("command", COMMANDS)
def test_options(capfd: Capture, command: str) -> None:
    assert listed_options(capfd, command) == COMMANDS[command]


def test_build_lists_the_architectures(capfd: Capture) -> None:
    text = done(capfd, "build", "--help").out.partition("Architectures:")[2]
    assert re.findall(r"^  (\w+)", text, re.MULTILINE) == list(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_build_options(capfd: Capture, name: str) -> None:
    fields = dataclasses.fields(ARCHITECTURES[name].config_class)
    flags = {f"--{field.name.replace('_', '-')}" for field in fields}
    assert listed_options(capfd, "build", name) == flags | OF_EVERY_BUILD
    words = done(capfd, "build", name, "--help").words
    assert "[18 to 25] [default: 20]" in words
    assert "[default: 1e-05]" in words
    assert "exported/ARCHITECTURE" in words
    assert "--no-optimize " in words
    for field in fields:
        low, high, below = (field.metadata[key] for key in ("minimum", "maximum", "below"))
        allowed = f"{low} to {high}" if below == np.inf else f"{low} to below {below}"
        if field.type in ("bool", bool):
            assert f"--no-{field.name.replace('_', '-')} " in words
            documented = f"[default {str(field.default).lower()}]"
        else:
            documented = f"[{allowed}; default {field.default}]"
        assert f"{field.metadata['help']} {documented}" in words


def test_what_needs_no_model_imports_no_model() -> None:
    script = """
        import sys
        from edifice_export.cli.app import main
        for arguments in ([], ["--help"], ["list"], ["build", "--help"], ["build", "no_such"], ["verify", "--help"],
                          ["run", "--help"], ["bench", "--help"], ["inspect", "--help"], ["convert", "--help"],
                          ["doctor", "--help"], ["no_such"]):
            try:
                main(arguments)
            except SystemExit:
                print("imported:", sorted({"torch", "numpy", "onnx", "onnxruntime", "onnxscript"} & set(sys.modules)))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, timeout=60
    )
    assert set(re.findall("imported: .*", result.stdout)) == {"imported: []"}
    assert result.stdout.count("imported:") == 12


def test_list(capfd: Capture) -> None:
    lines = done(capfd, "list").out.splitlines()
    assert [line.split()[0] for line in lines] == list(ARCHITECTURES)
    listed = json.loads(done(capfd, "list", "--json").out)
    for line, entry in zip(lines, listed, strict=True):
        assert set(entry) == {"name", "summary", "edifice_module"}
        assert line.split("  ", 1)[1].strip() == entry["summary"] == ARCHITECTURES[entry["name"]].summary


@any_architecture
def test_build_again_gives_the_same_bytes(capfd: Capture, tmp_path: Path, bundle: ee.Bundle) -> None:
    target = tmp_path / "bot"
    shutil.copytree(bundle.path, target)
    arguments = tiny_build(bundle.manifest.program.name, "--seed=1", f"--output={target}", "--json")
    printed = json.loads(done(capfd, *arguments).out)
    assert printed.pop("bundle") == str(target)
    assert printed == json.loads((target / "manifest.json").read_text())
    assert snapshot(target) == snapshot(bundle.path)
    assert list(tmp_path.iterdir()) == [target]


def test_build_into_the_working_folder(capfd: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bot").mkdir()
    monkeypatch.chdir(tmp_path / "bot")
    for name in (".", "..", tmp_path):
        outcome = cli(capfd, *tiny_build(next(iter(ARCHITECTURES)), f"--output={name}"))
        assert "is the working folder" in error_of(outcome)
    assert [path.name for path in tmp_path.rglob("*")] == ["bot"]


def test_build_without_meta_tokens(capfd: Capture, tmp_path: Path) -> None:
    done(capfd, *tiny_build("hymba", "--num-meta-tokens=0", "--graph=window", f"--output={tmp_path / 'bot'}"))
    assert ee.verify(tmp_path / "bot").passed


def test_build_with_edifice_weights(capfd: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # An option that repeats what the file says is no contradiction.
    lines = done(capfd, "build", "hymba", "--weights", GOLDEN / "hymba_tinyvar.safetensors", "--hidden-size=16").out
    assert re.fullmatch(
        r"built exported/hymba: hymba, edifice numerics, opset 20\n"
        r"verified: ONNX Runtime agrees with the float64 reference in \d+ cases, every prefix length of the window "
        r"among them; largest error \d\.\de-\d+\n"
        r"followed as a stream, frame by frame, for 60 frames, and from \d lengths of history\n",
        lines,
    )
    built = ee.load("exported/hymba")
    assert built.bundle.manifest.program.options["window_size"] == 6
    assert built.bundle.manifest.weights["source"] == "hymba_tinyvar.safetensors"
    assert [str(path) for path in Path().rglob("*") if path.name.startswith(".")] == []


def test_verify(capfd: Capture, bundle: ee.Bundle) -> None:
    with unchanged(bundle.path):
        text = done(capfd, "verify", bundle.path, "--every-prefix").out
    assert "prefix lengths verified: 7 of 7\n" in text
    assert re.search(r"followed as a stream, frame by frame, for 70 frames, and from \d lengths of history\n", text)
    assert re.search(r"^ok: (\d+) of \1 cases agree with the float64 reference; largest error", text, re.MULTILINE)
    report = json.loads(done(capfd, "verify", bundle.path, "--provider", "cpu", "--tolerance", "1e-3", "--json").out)
    assert (report["passed"], report["providers"], report["tolerance"]) == (True, ["cpu"], 1e-3)
    lengths = {
        (case["graph"], case["batch"], case["length"]) for case in report["cases"] if case["source"] == "reference"
    }
    assert lengths >= {("window", batch, length) for batch in (1, 2, 5) for length in range(1, 8)}
    assert lengths >= {("stream", 1, length) for length in range(1, 71)}
    # What must be equal has no limit to divide by, and is equal.
    assert all(case["max_abs"] == 0 for case in report["cases"] if case["limit"] == 0)
    assert report["cases"] == sorted(report["cases"], key=lambda case: -case["max_abs"] / (case["limit"] or 1))
    assert report["amplified"] == 0


@any_architecture
def test_verify_that_fails(capfd: Capture, bundle: ee.Bundle) -> None:
    with unchanged(bundle.path):
        outcome = cli(capfd, "verify", bundle.path, "--tolerance", "1e-12", "--json")
    message = error_of(outcome, status=1)
    report = json.loads(outcome.out)
    assert report["passed"] is False
    assert f"the first node that departs is {report['departure']['node']} " in message
    assert "torch in float32 departs by" in message


def test_inspect(capfd: Capture, tmp_path: Path, bundle: ee.Bundle) -> None:
    model = bundle.path / "window/model.onnx"
    figures = json.loads(done(capfd, "inspect", bundle.path, "--json").out)
    assert figures["model"] == str(model)
    assert figures["sizes"] == {"batch": 1, "sequence": 7}
    assert figures["parameters"] >= sum(np.prod(t.dims) for t in onnx.load(model).graph.initializer if t.data_type == 1)
    assert json.loads(figures["metadata"]["edifice.program"])["name"] == bundle.manifest.program.name
    text = done(capfd, "inspect", bundle.path).out
    assert f"{figures['parameters']:,}" in text
    assert f"{figures['flops']:,}" in text
    asked = json.loads(done(capfd, "inspect", bundle.path, "--batch=4", "--sequence=6", "--json").out)
    assert asked["sizes"] == {"batch": 4, "sequence": 6}
    assert asked["flops"] > 2 * figures["flops"]
    lone = shutil.copy(model, tmp_path / "lone.onnx")
    alone = json.loads(done(capfd, "inspect", lone, "--sequence=7", "--json").out)
    assert alone == figures | {"model": str(lone)}


def test_doctor(capfd: Capture) -> None:
    found = json.loads(done(capfd, "doctor", "--json").out)
    assert found["can_build"] is True
    assert {package for package, version in found["packages"].items() if version} >= {"torch", "onnx", "onnxruntime"}
    assert {"name": "cpu", "usable": True, "missing": None} in found["providers"]
    assert all(state["usable"] != bool(state["missing"]) for state in found["providers"])
    text = done(capfd, "doctor").out
    assert re.search(r"^build +works$", text, re.MULTILINE)
    for state in found["providers"]:
        line = f"{state['name']} +{'yes' if state['usable'] else 'no'}"
        assert re.search(f"^{line}", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("suffix", "shape", "stride"),
    [
        (".npy", (7, 6), 1),
        (".npy", (3, 6), 1),
        (".npy", (3, 5, 6), 1),
        (".npz", (7, 6), 1),
        (".csv", (7, 6), 1),
        (".npy", (20, 6), 1),
        (".csv", (20, 6), 3),
        (".npz", (2, 20, 6), 5),
        (".npy", (8, 6), 100),
    ],
)
@any_architecture
def test_run(
    capfd: Capture, tmp_path: Path, bundle: ee.Bundle, suffix: str, shape: tuple[int, ...], stride: int
) -> None:
    frames = random_frames(*shape)
    source, target = save(tmp_path / f"x{suffix}", frames), tmp_path / "y.npy"
    text = done(capfd, "run", bundle.path, "--input", source, "--output", target, "--stride", stride).out
    model = ee.load(bundle)
    starts = range(0, max(shape[-2] - 7, 0) + 1, stride)
    windows = [model(frames[..., start : start + 7, :]) for start in starts]
    expected = np.stack(windows, axis=-2) if shape[-2] > 7 else windows[0]
    found = np.load(target)
    assert (found.dtype, found.shape) == (np.dtype(np.float32), expected.shape)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert f"{target} float32 {list(expected.shape)}\n" in text
    unused = shape[-2] - starts[-1] - min(7, shape[-2])
    assert (f"the last {unused} frames fill no window at stride {stride}\n" in text) == (unused > 0)
    assert set(tmp_path.iterdir()) == {source, target}


@any_architecture
def test_run_reports_as_json(capfd: Capture, tmp_path: Path, bundle: ee.Bundle) -> None:
    source, target = save(tmp_path / "x.npy", random_frames(2, 20, 6)), tmp_path / "y.npy"
    arguments = ["--input", source, "--output", target, "--stride", 5, "--threads", 1, "--provider", "cuda"]
    report = json.loads(done(capfd, "run", bundle.path, *arguments, "--provider", "cpu", "--json").out)
    assert report.pop("providers")["cpu"] > 0
    assert list(report.pop("passed_over")) == ["cuda"]
    assert report == {
        "output": str(target),
        "shape": [2, 3, TINY["hidden_size"]],
        "windows": 6,
        "window": 7,
        "stride": 5,
        "unused_frames": 3,
        "lines": None,
    }


@pytest.mark.parametrize("place", range(4))
def test_debug_anywhere(place: int) -> None:
    command = ["verify", "no_such", "--json"]
    command.insert(place, "--debug")
    result = subprocess.run([COMMAND, *command], capture_output=True, text=True, check=False, timeout=60)
    assert re.fullmatch(
        r"Traceback .*RequestError: bundle no_such: [^\n]*\nerror: bundle no_such: [^\n]*\n", result.stderr, re.DOTALL
    )
    assert result.returncode == 2


@pytest.mark.parametrize(
    ("arguments", "status", "err"),
    [
        ("list", 0, ""),
        ("verify no_such", 2, r"error: [^\n]*\n"),
        ("list --debug", 0, ""),
        ("verify no_such --debug", 2, r"Traceback .*RequestError: [^\n]*\nerror: [^\n]*\n"),
        ("verify {changed}", 1, r"error: [^\n]*\n"),
    ],
)
@any_architecture
def test_exit_status(tmp_path: Path, bundle: ee.Bundle, arguments: str, status: int, err: str) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(bundle.path, changed)
    (changed / "weights.safetensors").write_bytes(b"")
    command = [COMMAND, *arguments.format(changed=changed).split()]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == status
    assert re.fullmatch(err, result.stderr, re.DOTALL)


def test_a_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen([COMMAND, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""


@any_architecture
def test_in_a_real_process(tmp_path: Path, bundle: ee.Bundle) -> None:
    source, target = save(tmp_path / "x.npy", random_frames(7, 6)), tmp_path / "y.npy"
    command = [COMMAND, "run", str(bundle.path), "--input", str(source), "--output", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert re.fullmatch(r"ran 1 window of 7 frames on cpu \(\d+ nodes\): \S+ float32 \[8\]\n", result.stdout)
    assert result.stderr == ""
    np.testing.assert_allclose(np.load(target), ee.load(bundle)(np.load(source)), rtol=0, atol=1e-6)


def test_full_standard_output() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run([COMMAND, "list"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert re.fullmatch(r"error: [^\n]*No space left on device[^\n]*\n", result.stderr)
    assert "bug" not in result.stderr
    assert result.returncode == 2


def heed_hangups() -> None:
    """Whether or not the tests themselves were started to ignore them."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("number", "moment", "old"),
    [
        (signal.SIGINT, "new", False),
        (signal.SIGTERM, "new/window/model.onnx", True),
        (signal.SIGHUP, "new/weights.safetensors", True),
    ],
)
@any_architecture
def test_signal(tmp_path: Path, bundle: ee.Bundle, number: signal.Signals, moment: str, old: bool) -> None:
    """Sent in the middle of a build: once the folder that is moved into place at the end exists, or a model in it."""
    if old:
        shutil.copytree(bundle.path, tmp_path / "bot")
    with unchanged(tmp_path):
        command = [COMMAND, *tiny_build(bundle.manifest.program.name)]
        with subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_hangups
        ) as process:
            while process.poll() is None and not list(tmp_path.glob(f".bot.*/{moment}")):
                time.sleep(0.01)
            process.send_signal(number)
            out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (128 + number, "")
    assert err == "error: interrupted; nothing is left half written\n"


@any_architecture
def test_nohup_is_heeded(tmp_path: Path, bundle: ee.Bundle) -> None:
    """A hangup that whoever started the command chose to ignore is ignored."""
    script = """
        import os, signal, sys
        from edifice_export.cli import app as cli
        from edifice_export.runtime import run
        real = run.run_recording
        def hung_up(*arguments):
            signal.raise_signal(signal.SIGHUP)
            return real(*arguments)
        run.run_recording = hung_up
        signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))
        cli.main(sys.argv[2:])
    """
    save(tmp_path / "x.npy", random_frames(7, 6))
    arguments = ["run", str(bundle.path), "--input=x.npy", "--output=y.npy"]
    for way, status in (("SIG_IGN", 0), ("SIG_DFL", 128 + signal.SIGHUP)):
        command = [sys.executable, "-c", textwrap.dedent(script), way, *arguments]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=60).returncode == status


def test_an_interrupt_that_a_library_catches_stops_the_build_too(tmp_path: Path) -> None:
    script = """
        import signal, sys
        from edifice_export.cli import app as cli
        from edifice_export.building import assemble
        real = assemble._write_examples
        def catching(*arguments):
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                return real(*arguments)
        assemble._write_examples = catching
        cli.main(sys.argv[1:])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), *tiny_build(ANY, "--graph=window")]
    with unchanged(tmp_path):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr == "error: interrupted; nothing is left half written\n"

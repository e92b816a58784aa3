"""What tests of the command line share: running it here, its one error line, folders that must not change."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import pytest
from conftest import TINY

from edifice_export import lowerings as functions
from edifice_export.building import assemble
from edifice_export.bundle.bundle import hash_files
from edifice_export.bundle.manifest_reader import read_manifest
from edifice_export.cli.app import main
from edifice_export.graph import trace

COMMAND = str(Path(sys.executable).parent / "edifice-export")
"""The installed command, whether or not its environment is active."""

Capture = pytest.CaptureFixture[str]
GRAPHS: dict[Any, Any] = {}
REMOVED = "(removed)"
"""In place of a value for edit_manifest: take the field away."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run of the command line ended and what it printed."""

    status: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """Standard output as one line."""
        return " ".join(self.out.split())


def cli(capfd: Capture, *arguments: object) -> Outcome:
    """Runs `edifice-export` with these arguments; what C++ prints is captured too."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return Outcome(ended.value.code, out, err)  # type: ignore[arg-type]


def done(capfd: Capture, *arguments: object) -> Outcome:
    """Runs a request that is met, quietly."""
    outcome = cli(capfd, *arguments)
    assert (outcome.status, outcome.err) == (0, ""), outcome
    return outcome


def refused(capfd: Capture, *arguments: object, status: int = 2) -> str:
    """Runs a request that is refused without a trace in the working folder, and returns the message."""
    with unchanged(Path.cwd()):
        outcome = cli(capfd, *arguments)
    assert outcome.out == ""
    return error_of(outcome, status)


def error_of(outcome: Outcome, status: int = 2) -> str:
    """The message of a run that failed as it should: this status and exactly one line, which starts with `error:`."""
    assert re.fullmatch(r"error: \S[^\n]*\n", outcome.err), outcome
    assert "this is a bug" not in outcome.err, outcome
    assert outcome.status == status, outcome
    return outcome.err


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder, hidden or not: the bytes of a file, where a link points, `folder`."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*"))}


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Asserts that the block leaves a folder byte for byte as it was."""
    before = snapshot(folder)
    yield
    after = snapshot(folder)
    assert after == before, sorted({name for name in before | after if before.get(name) != after.get(name)})


def tiny_build(name: str, *arguments: str) -> list[str]:
    """Arguments that build a tiny bundle in the folder `bot`."""
    return ["build", name, *to_flags(TINY), "--output=bot", *arguments]


def to_flags(options: Mapping[str, Any]) -> list[str]:
    """Options as the command line takes them."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def furnish(bundle: Path) -> None:
    """Fills the working folder: a bundle, others with something wrong, recordings, an old output, somebody's notes."""
    frames = np.zeros((9, TINY["embed_dim"]), np.float32)
    recordings = {"x": frames, "wide": np.hstack([frames, frames]), "flat": frames[0], "deep": frames[None, None]}
    recordings |= {"double": frames.astype(np.float64), "nan": np.where(np.arange(9)[:, None] == 8, np.nan, frames)}
    for name, array in recordings.items():
        np.save(f"{name}.npy", array)
    Path("y.npy").write_bytes(b"old")
    Path("x.txt").write_text("1 2 3")
    Path("notes").mkdir()
    Path("notes/todo.txt").write_text("mine")
    Path("link").symlink_to("notes")
    shutil.copytree(bundle, "bot")
    for copy in ("mixed", "mixed_link", "damaged", "newer"):
        shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("stream", "prefill"))
    Path("mixed/window/.todo").write_text("mine")
    Path("mixed_link/window/notes").symlink_to(Path("notes").absolute())
    Path("damaged/manifest.json").write_text("{")
    edit_manifest(Path("newer"), ("schema_version",), 99)


def edit_manifest(bundle: Path, place: tuple[str | int, ...], value: Any) -> None:
    """Sets or removes what stands at a place of a manifest."""
    content = json.loads((bundle / "manifest.json").read_text())
    parent: Any = content
    for key in place[:-1]:
        parent = parent[key]
    if value is REMOVED:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    (bundle / "manifest.json").write_text(json.dumps(content))


def set_initial(bundle: Path, initial: Mapping[int, Any]) -> None:
    """Has the manifest and the models of a bundle say that states, by their place, start from something else."""
    for place, value in initial.items():
        edit_manifest(bundle, ("states", place, "initial"), value)
    for graph in ("stream", "prefill"):
        says = read_manifest(bundle).essentials(graph)
        model = onnx.load(bundle / graph / "model.onnx")
        for entry in model.metadata_props:
            entry.value = says.get(entry.key, entry.value)
        forge(bundle, f"{graph}/model.onnx", model.SerializeToString())


def forge(bundle: Path, name: str, content: bytes) -> None:
    """Replaces a file of a bundle and vouches for it in the manifest."""
    (bundle / name).write_bytes(content)
    entries = {path: dataclasses.asdict(entry) for path, entry in hash_files(bundle).items()}
    edit_manifest(bundle, ("files",), entries)


def trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the slowest step of builds (with fresh weights) once for all tests; what follows gets a copy."""
    real = trace.trace

    def cached(model: Any, *arguments: Any) -> Any:
        key = model.config, model.numerics, *arguments
        if key not in GRAPHS:
            GRAPHS[key] = real(model, *arguments)
        return GRAPHS[key].clone()

    monkeypatch.setattr(trace, "trace", cached)


def raising(error: BaseException) -> Callable[..., Any]:
    """A function that raises this error whatever it is given."""

    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def negated(function: Any, output: int = 0) -> Any:
    """An onnxscript function with a wrong body: one of its outputs is the negative of what it should be."""

    def to_function_proto() -> onnx.FunctionProto:
        proto = function.to_function_proto()
        proto.node.append(onnx.helper.make_node("Neg", [proto.output[output]], ["negative"]))
        proto.output[output] = "negative"
        return proto

    return SimpleNamespace(to_function_proto=to_function_proto)


def replace_bodies(
    monkeypatch: pytest.MonkeyPatch, op: str, change: Callable[[Any], Any], lowering: str | None = None
) -> None:
    """Changes the bodies of an op, or those of one of its lowerings alone."""
    key = f"edifice::{op}"
    known = functions.LOWERINGS[key]
    changed = tuple(
        dataclasses.replace(each, body=change(each.body)) if lowering in (None, each.name) else each
        for each in known.lowerings
    )
    assert changed != known.lowerings
    monkeypatch.setitem(functions.LOWERINGS, key, dataclasses.replace(known, lowerings=changed))


@contextmanager
def small_disk(folder: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk with room for a bundle and a half; where none can be mounted, writing a model fills the disk."""
    folder.mkdir()
    pages = sum(-(-path.stat().st_size // 4096) for path in bundle.rglob("*") if path.is_file())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={6 * pages}k", "tmpfs", str(folder)]
    if os.geteuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0:
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    else:
        monkeypatch.setattr(assemble, "save_model", raising(OSError(errno.ENOSPC, "No space left on device")))
        yield folder


def flip(file: Path, place: int) -> None:
    """Flips one bit."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def link_outside(file: Path) -> None:
    """Moves a file to the working folder and links to it."""
    file.symlink_to(file.rename("outside").absolute())


@contextmanager
def permissions(path: str, mode: int) -> Iterator[None]:
    """Gives a path permissions that hold for root too, whose right to override them is set aside (Linux)."""
    libc, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0)  # this thread; 64 bits of capabilities
    held, fewer = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, held) == 0
    fewer[:] = [held[0] & ~0b110, *held[1:]]  # effective: not CAP_DAC_OVERRIDE, not CAP_DAC_READ_SEARCH
    before = os.stat(path).st_mode
    os.chmod(path, mode)
    try:
        assert libc.capset(header, fewer) == 0
        # Otherwise it asks what could be done if the right were taken up again.
        with patch.object(os, "access", functools.partial(os.access, effective_ids=True)):
            yield
    finally:
        libc.capset(header, held)
        os.chmod(path, before)


def _content(path: Path) -> bytes | str:
    if path.is_symlink():
        return os.readlink(path)
    return "folder" if path.is_dir() else path.read_bytes()

"""Small whole bundles, for what looks at their files alone; a process that is killed at each of its steps in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edifice_export.bundle import staging
from edifice_export.bundle.bundle import hash_files
from edifice_export.errors import RequestError
from edifice_export.writing import files

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "fcntl.flock", "exchange"}


def small_manifest(**changed: Any) -> dict[str, Any]:
    """What the manifests of all schemas say, but for the files."""
    return {
        "schema_version": 1,
        "architecture": "hymba",
        "options": {},
        "numerics": "standard",
        "opset": 20,
        "weights": {"source": "fresh"},
        "versions": {"edifice-export": "0.1.0"},
        "graphs": {"window": {"model": "window/model.onnx"}},
        "reference": "weights.safetensors",
        "parity": {},
        **changed,
    }


def fill(folder: Path, text: str) -> None:
    """Writes a bundle that holds a text, as a build does: the manifest last."""
    (folder / "window").mkdir(parents=True)
    (folder / "window/model.onnx").write_text(text)
    (folder / "weights.safetensors").write_text(text)
    vouch(folder)


def vouch(folder: Path, **changed: Any) -> None:
    """Writes a manifest that lists all files there are."""
    entries = {name: dataclasses.asdict(entry) for name, entry in hash_files(folder).items()}
    (folder / "manifest.json").write_text(json.dumps({"files": entries, **small_manifest(**changed)}))


def what_is_at(target: Path) -> str | None:
    """The text of the bundle at a place, None if there is nothing; asserts that it is whole and holds nothing else."""
    if not os.path.lexists(target):
        return None
    found = {path.relative_to(target).as_posix() for path in target.rglob("*")}
    assert found == {"manifest.json", "weights.safetensors", "window", "window/model.onnx"}, found
    text = (target / "weights.safetensors").read_text()
    assert (target / "window/model.onnx").read_text() == text
    listed = json.loads((target / "manifest.json").read_text())["files"]
    assert listed == {name: dataclasses.asdict(entry) for name, entry in hash_files(target).items()}
    return text


def build(target: Path, text: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Builds a bundle that holds a text; something may happen before it is in its place."""
    with staging.staging(target) as folder:
        fill(folder, text)
        meanwhile()


def write(target: Path, text: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    """The same for a file."""
    with files.replacing(target) as unfinished:
        unfinished.write_text(text)
        meanwhile()


def kill_at(step: int, work: Callable[[], None]) -> bool:
    """Does work in a process that is killed before this step of it; says whether it had so many.

    Steps are what changes files and folders: between two of them it doesn't matter when it is killed.
    """
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            left -= event in CHANGES or (event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)))
            if left == -1:
                left = -2
                os.kill(os.getpid(), signal.SIGKILL)

        real = staging.exchange
        staging.exchange = lambda one, other: sys.audit("exchange") or real(one, other)
        sys.addaudithook(count)
        with contextlib.suppress(KeyboardInterrupt):
            work()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


def kill_everywhere(folder: Path, kind: str, before: str) -> None:
    """Kills a writer at each step; prints how many there were, and what was found after a kill and in the end.

    Another one is killed while it clears up, and then one fails, so that what it finds is there in the end, or is done.
    """
    target, old = folder / "bot", "old" if before == "old" else None
    make, found, seen, steps = (write, read, set(), 0) if kind == "file" else (build, what_is_at, set(), 0)
    if kind == "renames":
        staging.exchange = lambda *_: False
    killed = True
    while killed:
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
        if old is not None:
            make(target, old)
        elif before == "empty":
            target.mkdir()
        killed = kill_at(steps, lambda: make(target, "new"))
        steps += 1
        seen.add(("killed", found_or_empty(found, target)))
        kill_at(steps % 9, lambda: make(target, "newer", interrupt))
        if steps % 2:
            make(target, "newer")
            assert found(target) == "newer"
        else:
            with contextlib.suppress(KeyboardInterrupt):
                make(target, "newer", interrupt)
            seen.add(("in the end", found_or_empty(found, target)))
        assert [path.name for path in folder.iterdir()] == ["bot"] * os.path.lexists(target), list(folder.rglob("*"))
    print(json.dumps({"steps": steps, "found": sorted(seen, key=str)}))


def interrupt() -> None:
    raise KeyboardInterrupt


def found_or_empty(found: Callable[[Path], str | None], target: Path) -> str | None:
    return "empty" if target.is_dir() and not any(target.iterdir()) else found(target)


def read(target: Path) -> str | None:
    return target.read_text() if target.exists() else None


def race(folder: Path) -> None:
    """Four processes build to one place, again and again; prints what became of all attempts."""
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            outcomes = []
            for turn in range(12):
                try:
                    build(folder / "bot", f"{number} {turn} " + "x" * 9999)
                    outcomes.append("built")
                except RequestError as error:
                    outcomes.append("busy" if "another process is writing it" in str(error) else str(error))
                    time.sleep(0.002)
            (folder / f"outcomes{number}").write_text(json.dumps(outcomes))
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    found = [json.loads((folder / f"outcomes{number}").read_text()) for number in range(4)]
    assert what_is_at(folder / "bot") is not None
    print(
        json.dumps(
            {
                "outcomes": [each for outcomes in found for each in outcomes],
                "left": sorted(path.name for path in folder.iterdir()),
            }
        )
    )


if __name__ == "__main__":
    if sys.argv[1] == "race":
        race(Path(sys.argv[2]))
    else:
        kill_everywhere(Path(sys.argv[2]), *sys.argv[3:])

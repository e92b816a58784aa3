"""Nothing of the user's is ever lost: what an output may replace, what comes while it is made, kills at every step."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import permissions
from small_bundles import build, fill, vouch, what_is_at, write

from edifice_export.bundle import staging as module
from edifice_export.bundle.staging import staging
from edifice_export.errors import RequestError
from edifice_export.writing.exchange import exchange
from edifice_export.writing.files import is_within, replacing, same_file

SCRIPT = Path(__file__).with_name("small_bundles.py")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where a whole bundle is, beside notes of the user's."""
    (tmp_path / "notes").mkdir(mode=0o755)
    (tmp_path / "notes/todo.txt").write_text("mine")
    fill(tmp_path / "bot", "old")
    return tmp_path / "bot"


@pytest.fixture(params=[True, False], ids=["exchange", "renames"])
def exchanging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the system's exchange, and as on a system that has none."""
    if not request.param:
        monkeypatch.setattr(module, "exchange", lambda *_: False)
    return bool(request.param)


def everything(folder: Path, hidden: bool = False) -> dict[str, tuple[int, bytes | str]]:
    """All that is below a folder, with its rights; but for what is being made, unless that is asked for."""
    found: dict[str, tuple[int, bytes | str]] = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if hidden or ".edifice-export" not in str(path):
            content = os.readlink(path) if stat.S_ISLNK(mode) else path.read_bytes() if stat.S_ISREG(mode) else ""
            found[str(path)] = mode, content
    return found


def refused_meanwhile(way: Callable[..., None], place: Path, change: Callable[[Path], Any], says: str) -> None:
    """Asserts that what is written is refused if something is changed meanwhile, and that all stays as it is then."""
    before = {}

    def meanwhile() -> None:
        change(place)
        before.update(everything(place.parent))

    with pytest.raises(RequestError, match=says):
        way(place, "new", meanwhile)
    assert everything(place.parent, hidden=True) == before


def hide_behind_a_link(target: Path) -> None:
    target.rename(target.with_name("moved"))
    target.symlink_to("moved")


def link_within(target: Path) -> None:
    """The same content, by a link that doesn't leave the bundle."""
    (target / "window/model.onnx").unlink()
    (target / "window/model.onnx").symlink_to("../weights.safetensors")


def vouch_for_a_photo(target: Path, **fields: Any) -> None:
    shutil.rmtree(target)
    target.mkdir()
    (target / "photo.jpg").write_bytes(b"mine")
    entry = {"size": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}
    (target / "manifest.json").write_text(json.dumps({"files": {"photo.jpg": entry}, **fields}))


def vouch_for_nothing(target: Path) -> None:
    shutil.rmtree(target)
    target.mkdir()
    vouch(target)


COMES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "file": (lambda target: (target / "todo.txt").write_text("mine"), "holds todo.txt, which is not of the bundle"),
    "file below": (lambda target: (target / "window/todo.txt").write_text("mine"), "holds window/todo.txt, which"),
    "folder": (lambda target: (target / "mine").mkdir(), "holds mine, which is not of the bundle"),
    "link": (lambda target: (target / "notes").symlink_to("../notes"), "holds notes, which is not of the bundle"),
    "dangling link": (lambda target: (target / "window/x").symlink_to("nowhere"), "holds window/x, which is not"),
    "link for a file": (lambda target: link_within(target), "holds window/model.onnx, which is not of the bundle"),
    "pipe": (lambda target: os.mkfifo(target / "pipe"), "holds pipe, which is not of the bundle"),
    "edit": (lambda target: (target / "window/model.onnx").write_text("won"), "window/model.onnx .* was changed"),
    "loss": (lambda target: (target / "weights.safetensors").unlink(), "weights.safetensors .* is missing or"),
    "no manifest": (lambda target: (target / "manifest.json").unlink(), "holds files and no bundle"),
    "torn manifest": (lambda target: (target / "manifest.json").write_text("{"), "holds a damaged bundle"),
    "empty manifest": (
        lambda target: (target / "manifest.json").write_text("{}"),
        "or none of this tool; move it away",
    ),
    "photo": (vouch_for_a_photo, "or none of this tool; move it away or choose another --output"),
    "photo of a schema": (lambda target: vouch_for_a_photo(target, schema_version=3), "or none of this tool; move it"),
    "no files": (vouch_for_nothing, "or none of this tool; move it away or choose another --output"),
    "other tool": (lambda target: vouch(target, versions={"other": "1"}), "or none of this tool; move it away"),
    "no graphs": (lambda target: vouch(target, graphs={}), "or none of this tool; move it away"),
    "unlisted model": (lambda target: vouch(target, graphs={"window": {"model": "x"}}), "or none of this tool"),
    "link in its place": (hide_behind_a_link, "is a symbolic link; name the folder that it leads to"),
}
"""What may come to a bundle that is to be replaced, and what is said then."""


@pytest.mark.parametrize("kind", COMES)
def test_only_a_whole_bundle_of_this_tool_is_replaced(target: Path, kind: str) -> None:
    change, says = COMES[kind]
    change(target)
    before = everything(target.parent)
    with pytest.raises(RequestError, match=f"^--output {target}: .*{says}"), staging(target):
        pytest.fail("it is refused before anything is built")
    assert everything(target.parent, hidden=True) == before


@pytest.mark.parametrize("kind", COMES)
@pytest.mark.usefixtures("exchanging")
def test_what_comes_while_a_bundle_is_built_is_never_lost(target: Path, kind: str) -> None:
    change, says = COMES[kind]
    refused_meanwhile(build, target, change, f"^--output {target}: .*{says}")


@pytest.mark.parametrize("kind", COMES)
def test_what_comes_just_before_the_exchange_is_put_back(
    target: Path, exchanging: bool, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    change, says = COMES[kind]
    before: dict[str, Any] = {}

    def late(one: Path, other: Path) -> bool:
        if not before:
            change(target)
            before.update(everything(target.parent))
        return exchanging and exchange(one, other)

    monkeypatch.setattr(module, "exchange", late)
    with pytest.raises(RequestError, match=f"^--output {target}: .*{says}"):
        build(target, "new")
    assert everything(target.parent, hidden=True) == before


@pytest.mark.usefixtures("exchanging")
def test_what_comes_as_the_old_bundle_is_removed_stays(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can know the path; who works in the folder can write there. The next build doesn't lose it either."""
    real = module._remove

    def late(folder: Path, files: Any) -> None:
        (folder / "window/todo.txt").write_text("mine")
        real(folder, files)

    monkeypatch.setattr(module, "_remove", late)
    with pytest.raises(
        RequestError, match="holds files that came into a bundle while a new one took its place"
    ) as first:
        build(target, "new")
    monkeypatch.undo()
    assert what_is_at(target) == "new"
    with pytest.raises(RequestError, match=re.escape(str(first.value))):
        build(target, "newer")
    left = Path(str(first.value).split(": ")[0])
    assert [path.relative_to(left).as_posix() for path in left.rglob("*")] == ["window", "window/todo.txt"]
    shutil.rmtree(left)
    build(target, "newer")
    assert what_is_at(target) == "newer"
    assert sorted(os.listdir(target.parent)) == ["bot", "notes"]


@pytest.mark.parametrize(
    ("come", "says"),
    [
        (lambda place: place.write_text("mine"), "is a file"),
        (lambda place: place.symlink_to("notes"), "is a symbolic link"),
        (lambda place: place.symlink_to("nowhere"), "is a symbolic link"),
        (lambda place: (place / "mine").mkdir(parents=True), "holds files and no bundle"),
        (lambda place: fill(place, "another"), "was changed while this was built"),
    ],
)
@pytest.mark.parametrize("empty", [True, False])
def test_what_comes_where_nothing_was(target: Path, come: Callable[[Path], Any], says: str, empty: bool) -> None:
    place = target.with_name("free")
    if empty:
        place.mkdir()

    def change(place: Path) -> None:
        if empty:
            place.rmdir()
        come(place)

    refused_meanwhile(build, place, change, f"^--output {place}: {says}")


@pytest.mark.parametrize("schema", [1, 2, 3, 99])
@pytest.mark.usefixtures("exchanging")
def test_a_whole_bundle_of_any_schema_is_replaced(target: Path, schema: int) -> None:
    vouch(target, schema_version=schema, more="fields")
    build(target, "new")
    assert what_is_at(target) == "new"
    assert sorted(os.listdir(target.parent)) == ["bot", "notes"]


@pytest.mark.parametrize("name", ["../bot", "notes/../bot", "here/bot", "n" * 255, "here/no/such/bot"])
def test_a_target_by_any_name(target: Path, name: str) -> None:
    (target.parent / "here").symlink_to(".")
    place = target.parent / "notes" / name if name.startswith("..") else target.parent / name
    build(place, "new")
    assert what_is_at(place) == "new"
    assert [path for path in target.parent.rglob("*") if path.name.startswith(".")] == []


@contextlib.contextmanager
def unmovable(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder that is a mount point, where one can be mounted; or of which a move fails so."""
    mount = {"tmpfs": ["-t", "tmpfs", "tmpfs"], "bind": ["--bind", str(folder)]}.get(kind)
    if mount and os.geteuid() == 0 and subprocess.run(["mount", *mount, folder], check=False).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", folder], check=True)
        return
    number, real = {"EPERM": errno.EPERM, "EXDEV": errno.EXDEV}.get(kind, errno.EBUSY), os.rename

    def rename(source: Path, place: Path) -> None:
        if folder in (Path(source), Path(place)):
            raise OSError(number, os.strerror(number))
        real(source, place)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        yield


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("tmpfs", "is a mount point; name a new folder in it"),
        ("bind", "is a mount point; name a new folder in it"),
        ("EPERM", "can't write there: Operation not permitted; choose another"),
        ("EXDEV", "can't write there: Invalid cross-device link; choose another"),
    ],
)
@pytest.mark.parametrize("empty", [True, False])
def test_what_cannot_be_moved_is_refused_before_the_build(
    target: Path, monkeypatch: pytest.MonkeyPatch, kind: str, says: str, empty: bool
) -> None:
    if empty:
        shutil.rmtree(target)
        target.mkdir()
    before = everything(target.parent)
    with unmovable(target, kind, monkeypatch), pytest.raises(RequestError, match=says), staging(target):
        pytest.fail("it is refused before anything is built")
    assert everything(target.parent, hidden=True) == before


@pytest.mark.parametrize("locked", ["", "bot", "bot/window"])
def test_no_rights_to_replace_are_found_before_the_build(target: Path, locked: str) -> None:
    """Nobody's rights are widened to remove anything."""
    with permissions(str(target.parent / locked), 0o555):
        before = everything(target.parent)
        with pytest.raises(RequestError, match="can't write there: Permission denied"), staging(target):
            pytest.fail("it is refused before anything is built")
        assert everything(target.parent, hidden=True) == before


def test_an_empty_folder_without_rights_in_its_parent(target: Path) -> None:
    (target.parent / "notes/empty").mkdir(mode=0o777)
    refused = pytest.raises(RequestError, match="can't write there: Permission denied")
    with permissions(str(target.parent / "notes"), 0o555), refused, staging(target.parent / "notes/empty"):
        pytest.fail("it is refused before anything is built")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("turn", range(4))
@pytest.mark.usefixtures("exchanging")
def test_a_move_that_fails(
    target: Path, monkeypatch: pytest.MonkeyPatch, turn: int, after: bool, error: BaseException
) -> None:
    """The old bundle or the new one is there, whichever move is the last that is done."""
    turns, real, swap = iter(range(99)), os.rename, module.exchange

    def failing(move: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def moving(one: Any, other: Any) -> Any:
            due = next(turns) == turn + 1  # the first move is the one that always fails
            result = None if due and not after else move(one, other)
            if due:
                raise error
            return result

        return moving

    monkeypatch.setattr(os, "rename", failing(real))
    monkeypatch.setattr(module, "exchange", failing(swap))
    with contextlib.suppress(RequestError, KeyboardInterrupt):
        build(target, "new")
    due = next(turns) > turn + 1
    monkeypatch.undo()
    assert what_is_at(target) in ({"old", "new"} if due else {"new"})
    assert sorted(os.listdir(target.parent)) == ["bot", "notes"]


def run_script(*arguments: object) -> Any:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)


@pytest.mark.parametrize(
    ("kind", "before", "least", "killed"),
    [
        ("exchange", "old", 20, ["new", "old"]),
        ("exchange", "nothing", 13, ["new", None]),
        ("exchange", "empty", 14, ["empty", "new"]),
        ("renames", "old", 22, ["new", "old", None]),
        ("file", "old", 9, ["new", "old"]),
        ("file", "nothing", 9, ["new", None]),
    ],
)
def test_a_kill_at_any_step(tmp_path: Path, kind: str, before: str, least: int, killed: list[str | None]) -> None:
    """Whole or as it was at once, or after the next build where two renames are needed; and nothing hidden stays."""
    outcome = run_script("kill", tmp_path, kind, before)
    assert outcome["steps"] > least
    places: dict[str, list[str | None]] = {"killed": [], "in the end": []}
    for moment, found in outcome["found"]:
        places[moment].append(found)
    assert sorted(places["killed"], key=str) == sorted(killed, key=str)
    assert sorted(places["in the end"], key=str) == [
        each for each in sorted(killed, key=str) if each or before != "old"
    ]


def test_builds_at_once_to_one_place(tmp_path: Path) -> None:
    """Each of them is whole in its turn, or refused at once; nothing hidden stays."""
    outcome = run_script("race", tmp_path)
    assert outcome["left"] == ["bot", *(f"outcomes{number}" for number in range(4))]
    assert set(outcome["outcomes"]) <= {"built", "busy"}
    assert "built" in outcome["outcomes"]


@pytest.mark.parametrize("way", [build, write])
def test_who_writes_is_not_disturbed(tmp_path: Path, way: Callable[[Path, str], None]) -> None:
    place, refused = tmp_path / "place", []

    def another() -> None:
        with pytest.raises(
            RequestError, match=f"^{place}: another process is writing it; wait for that, or name"
        ) as error:
            way(place, "second")
        refused.append(error)

    with staging(place) if way is build else replacing(place) as new:
        fill(new, "first") if way is build else new.write_text("first")
        thread = threading.Thread(target=another)
        thread.start()
        thread.join()
        build(tmp_path / "other", "not in its way")
    assert len(refused) == 1
    assert (what_is_at(place) if way is build else place.read_text()) == "first"
    assert sorted(os.listdir(tmp_path)) == ["other", "place"]


def test_a_lock_on_what_was_just_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who held it may remove it between the moment that another opens it and the one that he locks it."""
    real, removed = fcntl.flock, []

    def flock(file: int, how: int) -> None:
        real(file, how)
        if not removed:
            removed.append(os.readlink(f"/proc/self/fd/{file}"))
            os.unlink(removed[0])

    monkeypatch.setattr("fcntl.flock", flock)
    with staging(tmp_path / "bot") as folder:
        fill(folder, "new")
        with pytest.raises(RequestError, match="another process is writing it"):
            build(tmp_path / "bot", "second")
    assert removed
    assert what_is_at(tmp_path / "bot") == "new"


def test_a_place_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(RequestError, match=r"no file can be locked there \(No locks available\)"):
        build(tmp_path / "bot", "new")


def test_a_link_where_outputs_are_made_is_not_followed(target: Path) -> None:
    with staging(target) as folder:
        hidden = folder.parent
        fill(folder, "new")
    (target.parent / "notes/new").mkdir()
    hidden.symlink_to("notes")
    before = everything(target.parent, hidden=True)
    with pytest.raises(RequestError, match="can't write there"):
        build(target, "newer")
    assert everything(target.parent, hidden=True) == before


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "link": (lambda path: path.symlink_to("notes/todo.txt"), "is a symbolic link; name the file that it leads to"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "is a symbolic link; name the file"),
    "folder": (lambda path: path.mkdir(), "is a folder; name a file in it"),
    "pipe": (lambda path: os.mkfifo(path), "is no ordinary file; name another"),
    "file": (lambda path: path.write_text("mine"), "was written by something else meanwhile, and is left so"),
}


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_comes_meanwhile_stays(target: Path, kind: str, old: bool) -> None:
    come, says = FILES[kind]
    path = target.with_name("y.npy")
    if old:
        path.write_text("old one")

    def change(path: Path) -> None:
        path.unlink(missing_ok=True)
        come(path)

    refused_meanwhile(write, path, change, f"^{path}: {says}")


@pytest.mark.parametrize("kind", list(FILES)[:-1])
def test_a_file_replaces_nothing_but_a_file(target: Path, kind: str) -> None:
    come, says = FILES[kind]
    path = target.with_name("y.npy")
    come(path)
    before = everything(target.parent)
    with pytest.raises(RequestError, match=f"^{path}: {says}"), replacing(path):
        pytest.fail("it is refused before anything is made")
    assert everything(target.parent, hidden=True) == before


def test_other_names_of_a_file_that_is_replaced_keep_it(tmp_path: Path) -> None:
    (tmp_path / "y").write_text("old")
    (tmp_path / "z").hardlink_to(tmp_path / "y")
    write(tmp_path / "y", "new")
    assert [(tmp_path / name).read_text() for name in "yz"] == ["new", "old"]


def test_names_of_one_thing(target: Path) -> None:
    (target.parent / "here").symlink_to("bot")
    weights = target / "weights.safetensors"
    for other in (target.parent / "here/weights.safetensors", target / "window/../weights.safetensors"):
        assert same_file(weights, other)
        assert is_within(other, target)
        assert is_within(other.with_name("no such"), target)
    assert not same_file(weights, target / "no such")
    assert not is_within(target.parent / "bot2", target)
    assert is_within(target, target.parent / "here")

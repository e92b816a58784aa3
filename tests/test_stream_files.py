"""Streams: states in files go on bitwise, and only where they belong."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_bundle
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from stream_helpers import WINDOW, agrees, contents, frames, reference, same, steps, with_other_weights

import edifice_export as ee
from edifice_export.bundle.bundle import open_bundle
from edifice_reference.models.registry import ARCHITECTURES


@pytest.fixture(scope="module")
def model(bundle: ee.Bundle) -> ee.Model:
    return ee.load(bundle, threads=1)


# States in files


def test_a_saved_state_goes_on_bitwise(model: ee.Model, tmp_path: Path) -> None:
    sequence, stream = frames(2, 3 * WINDOW), model.stream(2)
    steps(stream, sequence[:, :10])
    stream.save(tmp_path / "state")
    wanted = steps(stream, sequence[:, 10:])
    for other in (stream, model.stream(2), ee.load(model.bundle.path, threads=1).stream(2)):
        other.step(frames(2, seed=7))
        other.load(str(tmp_path / "state"))
        assert other.rewindable == 0
        np.testing.assert_array_equal(steps(other, sequence[:, 10:]), wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_saved_state_goes_on_bitwise_in_another_process(model: ee.Model, tmp_path: Path) -> None:
    sequence, stream = frames(1, 12), model.stream()
    steps(stream, sequence[:, :8])
    stream.save(tmp_path / "state")
    np.save(tmp_path / "frames.npy", sequence[:, 8:])
    script = f"""
        import numpy as np, edifice_export as ee
        stream = ee.load({str(model.bundle.path)!r}, threads=1).stream()
        stream.load("state")
        frames = np.load("frames.npy")
        np.save("outputs.npy", [stream.step(frames[:, t]) for t in range(4)])
        stream.save("later")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, check=True, timeout=60)
    found = np.load(tmp_path / "outputs.npy")
    np.testing.assert_array_equal(found, np.stack([stream.step(sequence[:, t]) for t in range(8, 12)]))
    before = contents(stream)
    stream.load(tmp_path / "later")
    assert same(contents(stream), before)


def refuses(stream: ee.Stream, path: Path, says: str) -> None:
    """A state that can't be loaded is named, and the stream stays where it was."""
    before, rewindable = contents(stream), stream.rewindable
    with pytest.raises(ee.RequestError, match=says) as caught:
        stream.load(path)
    assert f"state {path}: " in str(caught.value)
    assert same(contents(stream), before)
    assert stream.rewindable == rewindable


def test_a_state_of_another_bundle_or_batch_is_refused(
    model: ee.Model, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stream = model.stream(2)
    stream.step(frames(2))
    other = next(name for name in ARCHITECTURES if name != model.bundle.manifest.program.name)
    for index, (wrong, says) in enumerate(
        (
            (
                ee.load(tiny_bundle(other, tmp_path_factory)).stream(2),
                f"of another bundle: its architecture is '{other}'",
            ),
            (ee.load(with_other_weights(model.bundle)).stream(2), "of another bundle: its weights is '000000000"),
            (model.stream(1), r"should be float32 \[2, .* found float32 \[1, "),
            (model.stream(3), r"should be float32 \[2, .* found float32 \[3, "),
        )
    ):
        wrong.save(tmp_path / f"{index}")
        refuses(stream, tmp_path / f"{index}", says)
    refuses(stream, model.bundle.file("weights.safetensors"), "is not the state of a stream")
    refuses(stream, tmp_path / "none", "can't be read: .*o such file")
    refuses(stream, tmp_path, "can't be read")


def test_a_state_with_other_numbers_is_refused(model: ee.Model, tmp_path: Path) -> None:
    stream, path = model.stream(2), tmp_path / "state"
    steps(stream, frames(2, 3))
    stream.save(path)
    tensors = load_file(path)
    with safe_open(path, framework="numpy") as file:
        said = file.metadata()
    name = next(name for name in tensors if name.endswith("conv"))
    worse: list[tuple[dict[str, np.ndarray], str]] = [
        ({name: tensors[name].astype(np.float16)}, f"{name} should be float32 .* found float16"),
        ({name: tensors[name].astype(np.float64)}, f"{name} should be float32 .* found float64"),
        ({name: tensors[name].view(np.int32)}, f"{name} should be float32 .* found int32"),
        ({name: tensors[name][..., :-1].copy()}, f"{name} should be float32"),
        ({name: tensors[name][0].copy()}, f"{name} should be float32"),
        ({"9.ssm": tensors[name]}, "not those of this bundle's states: 9.ssm"),
    ]
    for value in (np.nan, np.inf, -np.inf, 3.4e38, -1e19, 1e12, 1.001e6):
        broken = tensors[name].copy()
        broken.flat[-1] = value
        worse.append(({name: broken}, rf"{name} holds numbers that no stream has, .* and not up to 1e\+06"))
    if "0.position" in tensors:
        for position in (-1, -(2**63), 2**63 - 1):
            worse.append(({"0.position": np.array([3, position])}, "0.position holds numbers that no stream has"))
    for changed, says in worse:
        save_file({**tensors, **changed}, path, said)
        refuses(stream, path, says)
    save_file({other: value for other, value in tensors.items() if other != name}, path, said)
    refuses(stream, path, f"not those of this bundle's states: {name}")
    save_file(tensors, path, {**said, "format": "edifice-export stream state 2"})
    refuses(stream, path, "is not the state of a stream")
    save_file({**tensors, name: np.full_like(tensors[name], 1e6)}, path, said)
    stream.load(path)
    save_file(tensors, path, said)
    stream.load(path)


@pytest.mark.parametrize("value", [1e6, -1e6])
def test_states_up_to_their_limit_give_what_the_reference_gives(model: ee.Model, tmp_path: Path, value: float) -> None:
    stream, path, frame = model.stream(2), tmp_path / "state", frames(2, seed=4)
    steps(stream, frames(2, WINDOW + 1))
    stream.save(path)
    tensors = load_file(path)
    with safe_open(path, framework="numpy") as file:
        said = file.metadata()
    random = np.random.default_rng(1)
    for name, tensor in tensors.items():
        if tensor.dtype == np.float32:
            tensors[name] = (value * random.uniform(-1, 1, tensor.shape)).astype(np.float32)
            tensors[name].flat[0] = value
    save_file(tensors, path, said)
    stream.load(path)
    given = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    with torch.no_grad():
        wanted, _ = reference(model.bundle).extend(torch.from_numpy(frame).double(), exact)
    assert agrees(stream.step(frame), wanted.numpy())


def test_a_state_that_overflowed_is_not_saved(model: ee.Model, tmp_path: Path) -> None:
    stream = model.stream()
    for value in (np.nan, np.inf, 1e7):
        numbers = contents(stream)
        name = next(name for name in numbers if name.endswith("conv"))
        numbers[name].flat[1] = value
        mark = ee.Snapshot(stream._upload(numbers), stream._identity())
        other = model.stream()
        other.restore(mark)
        with pytest.raises(ee.RequestError, match=f"{name} is not finite or beyond .*; reset, restore or rewind"):
            other.save(tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_no_state(model: ee.Model, tmp_path: Path) -> None:
    stream, path = model.stream(2), tmp_path / "state"
    steps(stream, frames(2, 3))
    stream.save(path)
    whole, before = path.read_bytes(), contents(stream)
    header = 8 + int.from_bytes(whole[:8], "little")
    stream.step(frames(2, seed=1))
    for cut in (0, 1, 7, 8, header // 2, header, header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refuses(stream, path, "can't be read")
    path.write_bytes(b"not a state")
    refuses(stream, path, "can't be read")
    for place, bit in zip(range(header), itertools.cycle((0x01, 0x04, 0x20, 0x80, 0x02)), strict=False):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        here = contents(stream)
        try:
            stream.load(path)
        except ee.RequestError:
            assert same(contents(stream), here)
        else:
            # A change of what says nothing, such as a space.
            assert same(contents(stream), before)
            stream.step(frames(2, seed=1))


def test_a_state_that_cannot_be_written_is_refused(model: ee.Model, tmp_path: Path) -> None:
    stream = model.stream()
    (tmp_path / "old").mkdir()
    (tmp_path / "old/inside").write_bytes(b"")
    for target in (tmp_path / "no/state", tmp_path / "old", Path("/proc/state")):
        with pytest.raises(ee.RequestError, match=f"{target}: (can't be written|is a folder)"):
            stream.save(target)
    assert {path.name for path in tmp_path.rglob("*")} == {"old", "inside"}


def test_a_state_takes_no_place_but_its_own(model: ee.Model, tmp_path: Path) -> None:
    """The bundle's files are its own, and a link is not what it leads to."""
    stream = model.stream()
    (tmp_path / "old").write_text("mine")
    (tmp_path / "link").symlink_to("old")
    with pytest.raises(ee.RequestError, match="link: is a symbolic link"):
        stream.save(tmp_path / "link")
    with pytest.raises(ee.RequestError, match="is inside the bundle"):
        stream.save(model.bundle.path / "weights.safetensors")
    assert (tmp_path / "link").read_text() == "mine"
    assert open_bundle(model.bundle.path)


@pytest.mark.parametrize("turn", [0, 1])
def test_a_state_is_written_whole_or_not_at_all(
    model: ee.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    """Whichever write fills the disk: there is one, beside the file."""
    stream, path = model.stream(), tmp_path / "state"
    stream.save(path)
    old, turns, real = path.read_bytes(), itertools.count(), Path.write_bytes
    stream.step(frames(1))

    def write(file: Path, data: bytes) -> int:
        if next(turns) != turn:
            return real(file, data)
        real(file, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    if turn == 0:
        with pytest.raises(ee.RequestError, match="No space left on device"):
            stream.save(path)
        assert path.read_bytes() == old
    else:
        stream.save(path)
        assert path.read_bytes() != old
    assert [found.name for found in tmp_path.iterdir()] == ["state"]

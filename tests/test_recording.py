"""Recordings: what is refused, that windows are those of a plain loop, bounded memory, no file left behind."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edifice_export.errors import RequestError
from edifice_export.runtime.csv_recording import CsvLines
from edifice_export.runtime.recording import iter_windows, open_output, open_recording, window_starts

WIDTH = 4


@pytest.fixture(autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Temporary files of a test are in a folder of their own, which must be empty when the test ends."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def frames(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def npy(array: np.ndarray) -> bytes:
    np.save(stream := io.BytesIO(), array)
    return stream.getvalue()


def npy_header(*shape: int) -> bytes:
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream := io.BytesIO(), header)
    return stream.getvalue()


def npz(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED, declared: int | None = None) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
            archive.getinfo(name).file_size = declared or len(content)
    return stream.getvalue()


def csv(array: np.ndarray) -> bytes:
    return "".join(",".join(map(repr, row)) + "\n" for row in array.tolist()).encode()


def refusal(context: AbstractContextManager[Any]) -> str:
    with pytest.raises(RequestError) as caught, context:
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextmanager
def memory_under(limit: int) -> Iterator[None]:
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < limit


def fail_inside(context: AbstractContextManager[Any], folder: Path, error: type[BaseException]) -> None:
    with context:
        assert list(folder.rglob("*"))
        raise error


def read(path: Path, width: int = WIDTH) -> tuple[np.ndarray, bool]:
    with open_recording(path, width) as (array, batched, _):
        assert array.dtype == np.float32
        assert not array.flags.writeable
        return np.array(array), batched


@pytest.mark.parametrize(
    ("suffix", "shape"),
    [(suffix, shape) for suffix in (".npy", ".NPY", ".npz") for shape in ((7, WIDTH), (1, WIDTH), (3, 7, WIDTH))]
    + [(".csv", (7, WIDTH)), (".csv", (1, WIDTH))],
)
def test_round_trip(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    x = frames(*shape)
    save = {".npy": npy, ".npz": lambda x: npz({"any.npy": npy(x)}), ".csv": csv}[suffix.lower()]
    (tmp_path / f"x{suffix}").write_bytes(save(x))
    found, batched = read(tmp_path / f"x{suffix}")
    assert batched == (len(shape) == 3)
    np.testing.assert_array_equal(found, x if batched else x[None])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_takes_state_sequence_among_others(tmp_path: Path, save: Callable[..., None]) -> None:
    x = frames(1000, 100)  # more than is copied at once
    save(tmp_path / "x.npz", labels=np.zeros(3), state_sequence=x)
    np.testing.assert_array_equal(read(tmp_path / "x.npz", 100)[0], x[None])


@pytest.mark.parametrize("shape", [(7, WIDTH), (3, 7, WIDTH)])
def test_fortran_order(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = np.asfortranarray(frames(*shape))
    np.save(tmp_path / "x.npy", x)
    assert b"'fortran_order': True" in (tmp_path / "x.npy").read_bytes()
    found, _ = read(tmp_path / "x.npy")
    np.testing.assert_array_equal(found.reshape(shape), x)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("1,2\n3,4", (None, 1, 2)),
        ("a,b\n1,2\n3,4\n", (1, 2, 3)),
        ("\ufeff1,2\r\n3,4\r\n\r\n\n", (None, 1, 2)),
        ('\ufeff"a",b\r1,2\r3,4\r', (1, 2, 3)),
        (" 1 ,\t2\n3e0,+4.\n \n", (None, 1, 2)),
        ('"1","2"\n"3",40.e-1', (None, 1, 2)),
        ('"speed, left","a ""quoted"" name"\n1,2\n.3e1,4\n', (1, 2, 3)),
        ("größe,一月\n1,2\n3,4\n", (1, 2, 3)),
        ("nano,e1\n1,2\n3,4\n", (1, 2, 3)),
    ],
)
def test_csv_dialects(tmp_path: Path, text: str, lines: tuple[int | None, int, int]) -> None:
    (tmp_path / "x.csv").write_bytes(text.encode())
    np.testing.assert_array_equal(read(tmp_path / "x.csv", 2)[0], [[[1, 2], [3, 4]]])
    with open_recording(tmp_path / "x.csv", 2) as recording:
        assert recording.lines == CsvLines(*lines)


def test_lines_of_a_csv_in_words() -> None:
    assert str(CsvLines(1, 2, 9)) == "line 1 taken as the header, lines 2 to 9 as frames"
    assert str(CsvLines(None, 1, 1)) == "no header, line 1 as a frame"


def test_a_file_without_lines_says_nothing_of_them(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", frames(3, WIDTH))
    with open_recording(tmp_path / "x.npy", WIDTH) as recording:
        assert recording.lines is None


GOOD = npy(frames(5, WIDTH))
OBJECT = npy(np.array([[None] * WIDTH]))
TO_FLOAT32 = r"; convert it with x\.astype\(np\.float32\)"
REFUSED = {
    "empty": ("x.npy", b"", "empty file"),
    "pickle": ("x.npy", b"\x80\x04]\x94.", "magic string"),
    "truncated": ("x.npy", GOOD[:-1], "truncated"),
    "trailing bytes": ("x.npy", GOOD + b"1", "don't match"),
    "header bomb": ("x.npy", npy_header(1 << 62, 1 << 62, WIDTH) + b"1234", "don't match"),
    "negative": ("x.npy", npy_header(-1, -5, WIDTH), "a frame or more"),
    "long header": ("x.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 20_000, "array header"),
    "deep header": ("x.npy", b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000, "can't read"),
    "unknown version": ("x.npy", GOOD.replace(b"NUMPY\x01", b"NUMPY\x09"), "can't read"),
    "float64": ("x.npy", npy(np.zeros((5, WIDTH))), "float64" + TO_FLOAT32),
    "big-endian": ("x.npy", npy(np.zeros((5, WIDTH), ">f4")), ">f4" + TO_FLOAT32),
    "object": ("x.npy", OBJECT, "object" + TO_FLOAT32),
    "rank 1": ("x.npy", npy(frames(WIDTH)), r"\[frames, 4\] or \[batch, frames, 4\]; it has the shape \[4\]"),
    "rank 4": ("x.npy", npy(frames(1, 1, 5, WIDTH)), r"shape \[1, 1, 5, 4\]"),
    "width": ("x.npy", npy(frames(5, 3)), r"\[frames, 4\] .* shape \[5, 3\]"),
    "no frame": ("x.npy", npy(frames(0, WIDTH)), r"a frame or more; it has the shape \[0, 4\]"),
    "no batch": ("x.npy", npy(frames(0, 5, WIDTH)), r"a frame or more; it has the shape \[0, 5, 4\]"),
    "extension": ("x.wav", GOOD, r"\.npy, \.npz or \.csv; .* '\.wav'"),
    "not zip": ("x.npz", GOOD, "BadZipFile"),
    "truncated zip": ("x.npz", npz({"a.npy": GOOD})[:-30], "BadZipFile"),
    "damaged zip": ("x.npz", npz({"a.npy": GOOD}, zipfile.ZIP_STORED).replace(GOOD[-9:], b"damaged!!"), "CRC"),
    "no array": ("x.npz", npz({"a.txt": b"1"}), "one array, or one named 'state_sequence'; it holds: none"),
    "two arrays": ("x.npz", npz({"a.npy": GOOD, "b\n.npy": GOOD}), r"it holds: 'a', 'b\\n'; save"),
    "lzma": ("x.npz", npz({"a.npy": GOOD}, zipfile.ZIP_LZMA), "deflated"),
    "npz object": ("x.npz", npz({"a.npy": OBJECT}), "'a.npy' in .* object" + TO_FLOAT32),
    "npz width": ("x.npz", npz({"a.npy": npy(frames(5, 3))}), r"'a\.npy' in .*shape \[5, 3\]"),
    "npz shorter than declared": ("x.npz", npz({"a.npy": GOOD[:-4]}, declared=len(GOOD)), "truncated"),
    "npz longer than declared": ("x.npz", npz({"a.npy": GOOD + b"1234"}, declared=len(GOOD)), "CRC"),
    "only header": ("x.csv", b"a,b,c,d\n", "only a header"),
    "only blank": ("x.csv", b"\n \n", "blank lines"),
    "columns": ("x.csv", b"1,2,3,4\n1,2,3\n", "line 2: expected 4 numbers .*found 3 columns"),
    "columns of the header": ("x.csv", b"a,b,c\n1,2,3,4\n", "line 1: expected 4 numbers .*found 3 columns"),
    "semicolons": ("x.csv", b"a;b;c;d\n1;2;3;4\n", "line 1: expected 4 numbers separated by commas, found 1 col"),
    "word": ("x.csv", b"1,2,3,4\n1,2,3,4\n1,two,3,4\n", "line 3, column 2: expected a number .*'two'"),
    "second header": ("x.csv", b"a,b,c,d\na,b,c,d\n1,2,3,4\n", "line 2, column 1: expected a number .*'a'"),
    "mistyped first line": ("x.csv", b"1,2,3,4O\n1,2,3,4\n", "line 1, column 4: expected a number .*'4O'"),
    "first line of numbers and names": (
        "x.csv",
        b"1,b,3,d\n1,2,3,4\n",
        "line 1, column 2: .*'b'; correct it; a header",
    ),
    "broken first line": ("x.csv", b"1.0.0,2-,3;,4f\n1,2,3,4\n", r"line 1, column 1: expected a number .*'1\.0\.0'"),
    "signs alone": ("x.csv", b"-,+,-.,.\n1,2,3,4\n", "line 1, column 1: expected a number .*'-'"),
    "missing first line": ("x.csv", b"NaN,NA,null,None\n1,2,3,4\n", "line 1, column 1: expected a number .*'NaN'"),
    "infinite first line": ("x.csv", b"inf,-inf,Infinity,+inf\n1,2,3,4\n", "line 1, column 1: .*'inf'"),
    "one name for all": ("x.csv", b"?,?,?,?\n1,2,3,4\n", r"line 1, column 1: .*'\?'"),
    "empty first line": ("x.csv", b",,,\n1,2,3,4\n", "line 1, column 1: expected a number .*''"),
    "header of pandas": (
        "x.csv",
        b"0,1,2,3\n1,2,3,4\n",
        r"line 1: counts the columns .*pandas.*header=False.*0 as 0\.0",
    ),
    "quoted header of pandas": ("x.csv", b'"0","1","2","3"\n1,2,3,4\n', "line 1: counts the columns"),
    "index of pandas": ("x.csv", b",a,b,c,d\n0,1,2,3,4\n", r"line 1: .*found 5 columns; the first.*\(index=False\)"),
    "underscores": ("x.csv", b"1,2,3,4\n1_0,2,3,4\n", "line 2, column 1: expected a number .*'1_0'"),
    "underscores first": ("x.csv", b"1_0,2_0,3_0,4_0\n1,2,3,4\n", "line 1, column 1: .*'1_0'"),
    "Arabic digits": ("x.csv", "1,2,3,4\n1,2,3,\u0664\n".encode(), "line 2, column 4: .*'\u0664'"),
    "Arabic digits first": ("x.csv", "\u0661,\u0662,\u0663,\u0664\n1,2,3,4\n".encode(), "line 1, column 1: .*'\u0661'"),
    "wide digits": ("x.csv", "1,2,3,4\n\uff11,2,3,4\n".encode(), "line 2, column 1: .*'\uff11'"),
    "hexadecimal": ("x.csv", b"1,2,3,4\n1,2,0x10,4\n", "line 2, column 3: .*'0x10'"),
    "decimal commas": ("x.csv", b'"1,5","2,5","3,5","4,5"\n', "line 1, column 1: .*'1,5'"),
    "minus sign": ("x.csv", "1,2,3,4\n1,2,\u22123,4\n".encode(), "line 2, column 3: .*'\u22123'"),
    "hard space": ("x.csv", "1,2,3,4\n1,2,3,\u00a04\n".encode(), r"line 2, column 4: .*'\\xa04'"),
    "not a number": ("x.csv", b"1,2,3,4\n1,2,3,nan\n", "line 2, column 4: expected a number .*'nan'"),
    "beyond the limit": ("x.csv", b"1,2,3,4\n1,-3.4e38,3,4\n", r"line 2, column 2: -3\.4e38: numbers up to 1e\+12"),
    "beyond float32": ("x.csv", b"1,2,3,4\n1,2,1e39,4\n", r"line 2, column 3: 1e39: numbers up to 1e\+12"),
    "beyond float64": ("x.csv", b"1,2,3,4\n1,2,3,1e999\n", "line 2, column 4: 1e999: give finite numbers only"),
    "open quote": ("x.csv", b'1,2,3,4\n1,2,3,"4\n1,2,3,4\n', "line 2: .*correct the quotes"),
    "quote that goes on": ("x.csv", b'a,b,c,"d\ne"\n1,2,3,4\n', "line 1: a quoted field goes on in the next line"),
    "text after a quote": ("x.csv", b'1,2,3,"4"5\n', "line 1: .*correct the quotes"),
    "UTF-16": ("x.csv", "a,b,c,d\n1,2,3,4\n".encode("utf-16"), "line 1, column 1: "),
    "blank first line": ("x.csv", b"\n1,2,3,4\n", "line 1: .*blank"),
    "blank line inside": ("x.csv", b"1,2,3,4\n\n\n1,2,3,4\n", "line 2: .*blank"),
    "not text": ("x.csv", b"1,2,3,4\n\xff\x00,2,3,4\n", "line 2, column 1: "),
    "not text first": ("x.csv", b"\xff\xfe,b,c,d\n1,2,3,4\n", "line 1, column 1: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    name, content, expected = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    message = refusal(open_recording(tmp_path / name, WIDTH))
    assert re.search(expected, message)
    assert str(tmp_path / name) in message or "shorter" in case


def test_refused_paths(tmp_path: Path) -> None:
    assert "does not exist" in refusal(open_recording(tmp_path / "no.npy", WIDTH))
    assert "is a folder" in refusal(open_recording(tmp_path, WIDTH))


def test_npz_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_in = {"lying": npy(frames(5, WIDTH)) + bytes(20 << 20), "honest": npy(np.zeros((1 << 20, WIDTH), np.float32))}
    for name, content in bytes_in.items():
        (tmp_path / f"{name}.npz").write_bytes(npz({"a.npy": content}))
        assert (tmp_path / f"{name}.npz").stat().st_size < len(content) / 100
    monkeypatch.setattr(shutil, "copyfileobj", lambda *_: pytest.fail("unpacked before it was checked"))
    with memory_under(1 << 20):
        assert "don't match" in refusal(open_recording(tmp_path / "lying.npz", WIDTH))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12345))
    assert re.search(r"16777344 bytes; TMPDIR has 12345", refusal(open_recording(tmp_path / "honest.npz", WIDTH)))


def test_csv_line_without_end(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"1,2,3,4\n" + b"1," * (20 << 20))
    with memory_under(10 << 20):
        message = refusal(open_recording(tmp_path / "x.csv", WIDTH))
    assert re.search(r"line 2: expected numbers .*found over \d+ characters", message)


def test_csv_quote_without_end(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b'1,2,3,4\n1,2,3,"4\n' + b"1,2,3,4\n" * (2 << 20))
    with memory_under(10 << 20):
        message = refusal(open_recording(tmp_path / "x.csv", WIDTH))
    assert re.search(r"line 2: .*correct the quotes", message)


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("suffix", [".npz", ".csv"])
def test_temporary_files_go_after_an_error(
    tmp_path: Path, scratch: Path, suffix: str, error: type[BaseException]
) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(npz({"a.npy": GOOD}) if suffix == ".npz" else csv(frames(5, WIDTH)))
    with pytest.raises(error):
        fail_inside(open_recording(path, WIDTH), scratch, error)


def plain_windows(x: np.ndarray, window: int, stride: int) -> Iterator[np.ndarray]:
    for entry in x:
        start = 0
        while start == 0 or start + window <= len(entry):
            yield entry[start : start + window]
            start += stride


sizes = st.integers(1, 12)


@given(batch=st.integers(1, 3), length=st.integers(1, 40), window=st.integers(1, 45), stride=sizes, chunk=sizes)
def test_windows_are_those_of_a_plain_loop(batch: int, length: int, window: int, stride: int, chunk: int) -> None:
    x = np.arange(batch * length * 3, dtype=np.float32).reshape(batch, length, 3)
    expected = list(plain_windows(x, window, stride))
    assert len(window_starts(length, window, stride)) * batch == len(expected)
    chunks = list(iter_windows(x, window, stride, chunk))
    assert all(c.flags.c_contiguous and c.dtype == np.float32 for c in chunks)
    assert [len(c) for c in chunks[:-1]] == [chunk] * (len(chunks) - 1)
    assert 1 <= len(chunks[-1]) <= chunk
    np.testing.assert_array_equal(np.concatenate(chunks), np.stack(expected))


def test_stride_is_positive() -> None:
    with pytest.raises(RequestError, match="stride must be an integer from 1 upward, got 0"):
        window_starts(10, 4, 0)


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize(("window", "stride"), [(8, 1), (8, 3), (50, 1)])
@pytest.mark.parametrize("value", [np.nan, -np.inf, np.float32(-3.4e38), np.float32(1e13)])
def test_place_of_a_value_that_no_model_takes(chunk: int, window: int, stride: int, value: float) -> None:
    x = frames(3, 20, WIDTH)
    x[1, 16, 2] = value
    x[1, 17, 0] = x[2, 0, 0] = np.inf
    with pytest.raises(RequestError, match=rf"\[1, 16, 2\] it is {re.escape(f'{value:g}')};"):
        list(iter_windows(x, window, stride, chunk))


def test_memory_does_not_grow_with_the_recording(tmp_path: Path) -> None:
    np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(200_000, 256))
    assert (tmp_path / "x.npy").stat().st_size > 200_000_000
    with memory_under(5 * 8 * 100 * 256 * 4), open_recording(tmp_path / "x.npy", 256) as (array, *_):
        total = sum(windows.shape[0] * windows.shape[1] for windows in iter_windows(array, 100, 100, 8))
    assert total == 200_000


def test_output(tmp_path: Path) -> None:
    path = tmp_path / "y.npy"
    path.write_bytes(b"old")
    with open_output(path, (3, 2)) as output:
        reserved = next(tmp_path.rglob("new")).stat()
        assert reserved.st_blocks * 512 >= reserved.st_size
        assert path.read_bytes() == b"old"
        output[:] = 7
    np.testing.assert_array_equal(np.load(path), np.full((3, 2), 7, np.float32))
    assert path.stat().st_ino == reserved.st_ino
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["other", "y.npy"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_output_is_whole_or_not_there(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fail_inside(open_output(tmp_path / "y.npy", (3, 2)), tmp_path, error)
    assert os.listdir(tmp_path) == []


def test_output_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.npy").mkdir()
    assert "is a folder" in refusal(open_output(tmp_path / "folder.npy", (3, 2)))
    assert "'.txt'; name it *.npy" in refusal(open_output(tmp_path / "y.txt", (3, 2)))
    assert f"directory: '{tmp_path / 'none'}'" in refusal(open_output(tmp_path / "none" / "y.npy", (3, 2)))
    assert re.search(r"takes \d{16} bytes; \d+ are free", refusal(open_output(tmp_path / "y.npy", (1 << 50,))))
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=OSError(errno.ENOSPC, "disk full")), raising=False)
    assert "disk full" in refusal(open_output(tmp_path / "y.npy", (3, 2)))
    monkeypatch.setattr(os, "mkdir", Mock(side_effect=OSError(errno.EACCES, "not yours")))  # root may write anywhere
    assert "not yours" in refusal(open_output(tmp_path / "y.npy", (3, 2)))
    assert os.listdir(tmp_path) == ["folder.npy"]

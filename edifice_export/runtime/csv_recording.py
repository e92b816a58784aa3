"""Recordings in CSV: python's csv module tells fields from quotes, commas and line ends, and each must be a number."""

from __future__ import annotations

import csv
import dataclasses
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from ..errors import RequestError
from ..values import MAX_MAGNITUDE, why_beyond

__all__ = ["CsvLines", "unpack_csv"]

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")

_MISSING = frozenset(("", "nan", "inf", "infinity", "na", "n/a", "null", "none"))
"""What stands where a number is missing, which makes no name of a column."""


@dataclasses.dataclass(frozen=True)
class CsvLines:
    """Which lines of a file were taken as what, counted from 1.

    Attributes:
        header: 1 if that line names the columns.
        first: the line of the first frame.
        last: the line of the last frame.
    """

    header: int | None
    first: int
    last: int

    def __str__(self) -> str:
        header = "no header" if self.header is None else f"line {self.header} taken as the header"
        frames = (
            f"line {self.first} as a frame"
            if self.first == self.last
            else f"lines {self.first} to {self.last} as frames"
        )
        return f"{header}, {frames}"


def unpack_csv(path: Path, width: int, unpacked: Path) -> CsvLines:
    """Writes the frames of a CSV file, float32 [frames, width], to another file, in bounded memory.

    Every line is a frame of numbers such as -1.5e3, between which and around which spaces may stand. The first may name
    the columns instead: distinct names, none of which starts as a number does. Lines at the end may be blank.

    Args:
        path: the file, UTF-8.
        width: numbers of a frame.
        unpacked: where the frames go.

    Raises:
        RequestError: names the line and the column of what is none of that.
    """
    header, first, last, blank = None, 0, 0, 0
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as source, unpacked.open("wb") as copy:
        for line, row in _rows(source, path, (1 << 20) + 64 * width):
            fields = [field.strip(" \t") for field in row]
            if not any(fields) and len(fields) < 2:
                blank = blank or line
                continue
            if blank:
                raise RequestError(f"{path}, line {blank}: expected {width} numbers, found a blank line; remove it")
            if len(fields) != width:
                raise RequestError(
                    f"{path}, line {line}: expected {width} numbers separated by commas, found {len(fields)} columns; "
                    f"{_columns_hint(fields, width, line)}"
                )
            if line == 1 and _is_header(fields, path):
                header = line
                continue
            array("f", _numbers(fields, path, line)).tofile(copy)
            first, last = first or line, line
    if not first:
        raise RequestError(f"{path} must have a frame or more; it has only a header or blank lines; record some")
    return CsvLines(header, first, last)


def _rows(source: TextIO, path: Path, limit: int) -> Iterator[tuple[int, list[str]]]:
    """Rows with the number of their line; a row is one line, and a line is not endless."""

    def lines() -> Iterator[str]:
        for line, text in enumerate(iter(lambda: source.readline(limit), ""), 1):
            if len(text) == limit and text[-1] not in "\r\n":
                raise RequestError(
                    f"{path}, line {line}: expected numbers separated by commas, found over {limit} characters; "
                    "split the line"
                )
            yield text

    reader = csv.reader(lines(), strict=True)
    line = 0
    while True:
        line += 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise RequestError(f"{path}, line {line}: {error}; correct the quotes") from error
        if reader.line_num != line:
            raise RequestError(f"{path}, line {line}: a quoted field goes on in the next line; correct the quotes")
        yield line, row


def _is_header(fields: Sequence[str], path: Path) -> bool:
    """Whether the first line names the columns.

    Raises:
        RequestError: it is what pandas names columns by default, and could be a frame.
    """
    if list(fields) == [str(index) for index in range(len(fields))]:
        raise RequestError(
            f"{path}, line 1: counts the columns from 0, as pandas does for a header; remove the line "
            "(to_csv(header=False)), or if it is a frame write 0 as 0.0"
        )
    return len(set(fields)) == len(fields) and all(map(_is_name, fields))


def _is_name(field: str) -> bool:
    start = field.lstrip("+-.,")[:1]
    plain = field.isprintable() and "\ufffd" not in field
    return plain and start != "" and not start.isdigit() and field.lower().lstrip("+-") not in _MISSING


def _numbers(fields: Sequence[str], path: Path, line: int) -> list[float]:
    numbers = []
    for column, field in enumerate(fields, 1):
        if _NUMBER.fullmatch(field) is None:
            hint = "; a header names every column, each name another, and none starts with a digit" if line == 1 else ""
            raise RequestError(
                f"{path}, line {line}, column {column}: expected a number such as -1.5e3, found {field[:80]!r}; "
                f"correct it{hint}"
            )
        numbers.append(float(field))
        if not -MAX_MAGNITUDE <= numbers[-1] <= MAX_MAGNITUDE:
            raise RequestError(f"{path}, line {line}, column {column}: {field[:80]}: {why_beyond(numbers[-1])}")
    return numbers


def _columns_hint(fields: Sequence[str], width: int, line: int) -> str:
    if line == 1 and len(fields) == width + 1 and not fields[0]:
        return "the first, which numbers the rows, is not a part of a frame (pandas: to_csv(index=False))"
    return "correct it"

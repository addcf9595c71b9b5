"""A list of images and labels in a CSV file."""

from __future__ import annotations

import csv
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from data.readers.base import TEST, TRAIN, VALIDATION
from data.readers.images import Listing, check_files, is_inside

SPLITS = {"train": TRAIN, "val": VALIDATION, "validation": VALIDATION, "test": TEST}
COLUMNS = ("path", "label", "truth", "split")
WHOLE = re.compile(r"-?[0-9]{1,18}")


class Row(NamedTuple):
    line: int  # the last one, where it has several
    path: str
    label: str
    truth: str = ""
    split: str = ""


def _rows(path: Path) -> Iterator[Row]:
    """The rows, one by one. ValueError for what cannot be one."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, skipinitialspace=True, strict=True)
        try:
            columns = [column.strip() for column in next(lines, [])]
            _check_columns(path, columns)
            for cells in lines:
                line = lines.line_num
                if not cells:
                    continue
                if len(cells) != len(columns):
                    raise ValueError(f"{_at(path, line)}: {len(cells)} cells; the header has {len(columns)}")
                words = ((name, cell.strip()) for name, cell in zip(columns, cells, strict=True))
                row = Row(line, **{name: word if name == "path" else sys.intern(word) for name, word in words})
                if not row.path or not row.label:
                    raise ValueError(f"{_at(path, line)}: path and label must not be empty")
                yield row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"manifest {path}, after line {lines.line_num}: {error}") from error


def _at(path: Path, line: int) -> str:
    return f"manifest {path}, line {line}"


def _check_columns(path: Path, columns: list[str]) -> None:
    if not columns:
        raise ValueError(f"manifest {path} is empty; its first line must name the columns: {', '.join(COLUMNS)}")
    for column in columns:
        if column not in COLUMNS:
            close = hint(column, COLUMNS)
            raise ValueError(f"manifest {path}: column {column!r} is not known{close}; allowed are {', '.join(COLUMNS)}")
    for column in COLUMNS:
        if columns.count(column) > 1 or (column in ("path", "label") and column not in columns):
            times = columns.count(column)
            raise ValueError(f"manifest {path}: column {column!r} is there {times} times; once is needed")


def hint(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def first_in_manifest(path: Path) -> str:
    for row in _rows(path):
        check_path(path.parent, os.path.realpath, row.path, _at(path, row.line))
        return row.path
    raise ValueError(f"manifest {path} has no rows")


def check_path(top: Path, real: Callable[[str], str], name: str, listed_in: str) -> None:
    """ValueError where an image is not in ``top``, with links followed; ``real`` is os.path.realpath."""
    if is_inside(name):
        parent, base = os.path.split(os.path.join(top, name))
        path = os.path.join(real(parent), base)
        if (os.path.realpath(path) if os.path.islink(path) else path).startswith(real(str(top)) + os.sep):
            return
    if os.path.isabs(name):
        raise ValueError(f"{listed_in}: {name!r} is not allowed; write paths from {top} on, where the images must lie")
    raise ValueError(f"{listed_in}: {name!r} leads out of {top}; images must lie in that folder")


def read_manifest(path: Path) -> Listing:
    rows = list(_rows(path))
    if not rows:
        raise ValueError(f"manifest {path} has no rows")
    real = functools.cache(os.path.realpath)
    seen: dict[str, str] = {}
    for row in rows:
        check_path(path.parent, real, row.path, _at(path, row.line))
        place = os.path.normpath(row.path)
        if place in seen:
            raise ValueError(f"{_at(path, row.line)}: {row.path!r} is listed twice, first as {seen[place]!r}")
        seen[place] = row.path
    check_files(path.parent, [row.path for row in rows], f"manifest {path}")
    return _labelled(path, rows)


def _labelled(path: Path, rows: list[Row]) -> Listing:
    is_split = any(row.split for row in rows)
    for row in rows:
        if is_split and row.split not in SPLITS:
            close, allowed = hint(row.split, SPLITS), ", ".join(SPLITS)
            raise ValueError(f"{_at(path, row.line)}: split {row.split!r} is not allowed{close}; write one of {allowed}")
    trained = [row for row in rows if not is_split or SPLITS[row.split] == TRAIN]
    if not trained:
        raise ValueError(f"manifest {path} has no training rows")
    numbers = all(WHOLE.fullmatch(row.label) for row in rows)

    def read(text: str) -> str:
        return str(int(text)) if numbers and WHOLE.fullmatch(text) else text

    classes = sorted({read(row.label) for row in trained}, key=int if numbers else None)
    if numbers and int(classes[0]) < 0:
        raise ValueError(f"manifest {path}: label {classes[0]} is not allowed; integers must not be negative")
    index = {name: label for label, name in enumerate(classes)}
    index[""] = -1
    for row in rows:
        if read(row.label) not in index:
            raise ValueError(f"{_at(path, row.line)}: label {row.label!r} is in no training row{hint(row.label, classes)}")
        if read(row.truth) not in index:
            close = hint(row.truth, classes)
            raise ValueError(
                f"{_at(path, row.line)}: truth {row.truth!r} is not one of the labels{close}; leave empty what is not known"
            )
    return Listing(
        path.parent,
        [row.path for row in rows],
        tuple(classes),
        torch.tensor([index[read(row.label)] for row in rows]),
        torch.tensor([SPLITS[row.split] for row in rows]) if is_split else None,
        torch.tensor([index[read(row.truth)] for row in rows]),
    )

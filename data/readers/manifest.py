"""A list of images and labels in a CSV file."""

from __future__ import annotations

import csv
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from data.readers.base import TEST, TRAIN, VALIDATION, Options
from data.readers.images import Listing, check_files, is_inside
from data.text import hint, look_alike_notes, read_text, some
from errors import UserError

SPLITS = {"train": TRAIN, "val": VALIDATION, "validation": VALIDATION, "test": TEST}
SPLIT_FOLDERS = SPLITS | {"training": TRAIN, "valid": VALIDATION, "dev": VALIDATION, "testing": TEST}  # in any case
COLUMNS = ("path", "label", "truth", "split")
NEEDED = ("path", "label")
DELIMITERS = (",", ";", "\t")
WHOLE = re.compile(r"(-?[0-9]{1,18})(\.0*)?")  # pandas writes 3.0 for 3 in a column in which some are missing
NO_LABEL = {  # the words that pandas reads as a missing value, and also writes as one
    *("", "nan", "NaN", "-nan", "-NaN", "NA", "<NA>", "N/A", "n/a", "#N/A", "#N/A N/A", "#NA", "None", "null", "NULL"),
    *("1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"),
}


class Row(NamedTuple):
    line: int  # the last one, where it has several
    path: str
    label: str
    truth: str = ""
    split: str = ""


class Header(NamedTuple):
    delimiter: str
    columns: list[str]  # in small letters


def _header(path: Path, text: str) -> Header:
    """What the first line says: of the delimiters the one that makes most of it known. ValueError where columns are missing."""
    read = [Header(sign, _columns(text, sign)) for sign in DELIMITERS]
    header = max(read, key=lambda header: len(set(COLUMNS) & set(header.columns)))
    columns = header.columns
    if not any(columns):
        raise UserError(f"manifest {path} is empty; its first line must name the columns: {', '.join(COLUMNS)}")
    for column in COLUMNS:
        if columns.count(column) > 1:
            raise UserError(f"manifest {path}: column {column!r} is there {columns.count(column)} times; once is needed")
    for column in NEEDED:
        if column not in columns:
            others = [name for name in columns if name not in COLUMNS]
            meant = next((name for name in others if hint(name, COLUMNS) == hint(column, [column])), "")
            there = f"{meant!r} is there{hint(meant, COLUMNS)}" if meant else f"it has {some([repr(name) for name in columns])}"
            raise UserError(f"manifest {path}: the first line must name the column {column!r}; {there}")
    return header


def _columns(text: str, delimiter: str) -> list[str]:
    lines = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, delimiter=delimiter)
    return [column.strip().lower() for column in next(lines, [])]


def _rows(path: Path, text: str, header: Header) -> Iterator[Row]:
    """The rows, one by one. ValueError for what cannot be one."""
    lines = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True, delimiter=header.delimiter)
    known = [(place, name) for place, name in enumerate(header.columns) if name in COLUMNS]
    try:
        next(lines)
        for cells in lines:
            line = lines.line_num
            if not cells:
                continue
            if len(cells) != len(header.columns):
                raise UserError(f"{_at(path, line)}: {len(cells)} cells; the header has {len(header.columns)}")
            words = ((name, cells[place].strip()) for place, name in known)
            row = Row(line, **{name: word if name == "path" else sys.intern(word) for name, word in words})
            if not row.path:
                raise UserError(f"{_at(path, line)}: path must not be empty")
            yield row
    except csv.Error as error:
        raise UserError(f"manifest {path}, after line {lines.line_num}: {error}") from error


def _at(path: Path, line: int) -> str:
    return f"manifest {path}, line {line}"


def check_path(top: Path, real: Callable[[str], str], name: str, listed_in: str, options: Options) -> None:
    """ValueError where an image is not in ``top``, with links followed unless they may lead out; ``real`` is
    os.path.realpath."""
    if is_inside(name):
        if options.follow_links:
            return
        parent, base = os.path.split(os.path.join(top, name))
        path = os.path.join(real(parent), base)
        if (os.path.realpath(path) if os.path.islink(path) else path).startswith(real(str(top)) + os.sep):
            return
    if os.path.isabs(name):
        raise UserError(f"{listed_in}: {name!r} is not allowed; write paths from {top} on, where the images must lie")
    more = " (links that lead out of it: --follow-links)" if is_inside(name) else ""
    raise UserError(f"{listed_in}: {name!r} leads out of {top}; images must lie in that folder{more}")


def read_manifest(path: Path, options: Options) -> Listing:
    """All that it lists. ValueError names the line that cannot be read, or the files that are missing."""
    text = read_text(path, f"manifest {path}")
    header = _header(path, text)
    rows = list(_rows(path, text, header))
    if not rows:
        raise UserError(f"manifest {path} has no rows")
    real = functools.cache(os.path.realpath)
    seen: dict[str, str] = {}
    for row in rows:
        check_path(path.parent, real, row.path, _at(path, row.line), options)
        place = os.path.normpath(row.path)
        if place in seen:
            raise UserError(f"{_at(path, row.line)}: {row.path!r} is listed twice, first as {seen[place]!r}")
        seen[place] = row.path
    check_files(path.parent, [row.path for row in rows], f"manifest {path}")
    extra = [
        f"{name!r}{hint(name, COLUMNS)}" if name else "one without a name" for name in header.columns if name not in COLUMNS
    ]
    notes = [f"columns that are not read: {some(extra)}"] if extra else []
    return _labelled(path, rows, notes)


def _labelled(path: Path, rows: list[Row], notes: list[str]) -> Listing:
    unlabelled = [row for row in rows if row.label in NO_LABEL]
    if unlabelled:
        rest = len(unlabelled) - 1
        more = f", and so in {rest} more row{'s' if rest > 1 else ''}" if rest else ""
        raise UserError(
            f"{_at(path, unlabelled[0].line)}: {unlabelled[0].label!r} is not a label{more}; leave out images without one (a"
            f" class that is really called so can be given as a folder: folder:PATH)"
        )
    is_split = any(row.split for row in rows)
    for row in rows:
        if is_split and row.split.lower() not in SPLIT_FOLDERS:
            close, allowed = hint(row.split.lower(), SPLIT_FOLDERS), ", ".join(SPLIT_FOLDERS)
            raise UserError(f"{_at(path, row.line)}: split {row.split!r} is not allowed{close}; write one of {allowed}")
    split = [SPLIT_FOLDERS[row.split.lower()] if is_split else TRAIN for row in rows]
    trained = [row for row, part in zip(rows, split, strict=True) if part == TRAIN]
    if not trained:
        raise UserError(f"manifest {path} has no training rows")
    numbers = all(WHOLE.fullmatch(row.label) for row in rows)

    def read(text: str) -> str:
        whole = WHOLE.fullmatch(text) if numbers else None
        return str(int(whole[1])) if whole else text

    classes = sorted({read(row.label) for row in trained}, key=int if numbers else None)
    if numbers and int(classes[0]) < 0:
        raise UserError(f"manifest {path}: label {classes[0]} is not allowed; integers must not be negative")
    index = {name: label for label, name in enumerate(classes)}
    unknown = dict.fromkeys(NO_LABEL, -1)
    others: dict[str, int] = {}  # truths that are no class, and how often
    for row, part in zip(rows, split, strict=True):
        truth = read(row.truth)
        if read(row.label) not in index:
            raise UserError(f"{_at(path, row.line)}: label {row.label!r} is in no training row{hint(row.label, classes)}")
        if truth not in index and truth not in unknown:
            if part == TEST:
                close = hint(truth, classes)
                raise UserError(f"{_at(path, row.line)}: truth {truth!r} of a test row is not one of the labels{close}")
            others[truth] = others.get(truth, 0) + 1
    if others:
        named = some([f"{name!r}{hint(name, classes)}" for name in others])
        notes = [*notes, f"rows whose truth is no label (open set): {sum(others.values())}, with {named}"]
    index = unknown | dict.fromkeys(others, len(classes)) | index
    return Listing(
        path.parent,
        [row.path for row in rows],
        tuple(classes),
        torch.tensor([index[read(row.label)] for row in rows]),
        torch.tensor(split) if is_split else None,
        torch.tensor([index[read(row.truth)] for row in rows]),
        notes=(*notes, *look_alike_notes([*classes, *others])),
    )

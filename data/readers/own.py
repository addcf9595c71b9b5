"""A user's own images: a folder per class, or a list in a CSV file."""

from __future__ import annotations

import csv
import difflib
import functools
import hashlib
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from data.noise import label_bytes
from data.readers.base import TEST, TRAIN, VALIDATION, Options, RawTable, Source
from data.readers.images import (
    Listing,
    check_files,
    count_suffixes,
    entries,
    files_under,
    in_words,
    is_image,
    is_inside,
    reading,
)
from data.readers.pixels import RESIZES, read_colour, shorter_side

SPLITS = {"train": TRAIN, "val": VALIDATION, "validation": VALIDATION, "test": TEST}
SPLIT_FOLDERS = SPLITS | {"training": TRAIN, "valid": VALIDATION, "dev": VALIDATION, "testing": TEST}  # in any case
COLUMNS = ("path", "label", "truth", "split")
LARGEST = 224  # side of images, unless more is asked for
LARGEST_SMALL = 64  # up to this side images are augmented and learnt as those of CIFAR are, above it as those of ImageNet
WHOLE = re.compile(r"-?[0-9]{1,18}")


def folder(argument: str, options: Options) -> Source:
    """``folder:PATH``: one folder per class, whose sorted names are the classes, with images in it or in folders within it.

    Where the folders at the top are train, val, validation or test, in any case, these are the split, and the classes are
    those of train. Hidden files are left out, and so are files that are no images, which are counted by their suffix. The
    labels are given labels; those of test are clean, too. ValueError where a class is empty or in test only.
    """
    path = _path("folder", argument, "PATH")
    return _source("folder", path, lambda: _read_folder(path, options), options)


def manifest(argument: str, options: Options) -> Source:
    """``manifest:FILE.csv`` with a header and the columns path, label and, where there are any, truth and split, in any order.

    Paths are relative to the file's folder and stay in it. Labels are names or integers; the classes are those that occur, in
    order, in training rows where there is a split. An empty truth is one that is not known. The split is train, val, validation
    or test; the label of a test row is its clean label where it has no truth. ValueError names the line that is not so.
    """
    path = _path("manifest", argument, "FILE.csv")
    return _source("manifest", path, lambda: _read_manifest(path, options), options)


def _path(kind: str, argument: str, form: str) -> Path:
    if not argument:
        raise ValueError(f"data set {kind} needs a path; write {kind}:{form}")
    return Path(os.path.abspath(os.path.expanduser(argument)))


def _source(kind: str, path: Path, read: Callable[[], Listing], options: Options) -> Source:
    """What both have in common. ``read`` lists the files, once for a source: one that is made later sees later changes."""
    name = f"{kind}:{path}"
    resize, background = options.resize or "crop", options.background or "white"
    if resize not in RESIZES:
        raise ValueError(f"--resize: {resize!r} is not allowed; it must be one of {', '.join(RESIZES)}")
    read_colour(background)

    @functools.cache
    def listing() -> Listing:
        if not (path.is_file() if kind == "manifest" else path.is_dir()):
            raise ValueError(f"data set {name}: there is no such {'file' if kind == 'manifest' else 'folder'}")
        with reading(f"data set {name}"):
            found = read()
        if len(found.classes) < 2:
            raise ValueError(f"data set {name}: there must be at least two classes, not {len(found.classes)}")
        return found

    with reading(f"data set {name}"):
        size = options.image_size or min(LARGEST, shorter_side(listing().paths))
    large = size > LARGEST_SMALL
    cropped = large and resize == "crop"
    stored = math.ceil(8 * size / 7) if cropped else size  # 256 for 224, as is usual for ImageNet

    def build() -> RawTable:
        return (found := listing()).table(found.decoding(stored, resize, background))

    def stamp() -> str:
        found = listing()
        digest = hashlib.sha256(repr((found.classes, sorted(found.left_out.items()))).encode())
        with reading(f"data set {name}"):
            for state in found.states():
                digest.update(state)
        for column in (found.given, found.truth, found.split):
            digest.update(b"|" if column is None else label_bytes(column))
        return digest.hexdigest()

    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem)[:40]
    rule = f"{path} {size} {resize} {background}"
    return Source(
        name,
        f"{kind}-{stem}-{hashlib.sha256(os.fsencode(rule)).hexdigest()[:8]}",
        build,
        defaults={
            "noise": "none",
            "model": "resnet50-imagenet" if large else "small-cnn",
            "batch_size": 128,
            "augmentation": "weak",
        },
        stream=kind,
        stamp=stamp,
        views="imagenet" if cropped else "flip-crop",
        launch_views="crop" if cropped else "shift",  # whether left and right mean the same is for the user to say
        input_size=size if cropped else 0,
        image_size=size,
        skip_damaged=options.skip_damaged,
    )


# --- a folder per class -----------------------------------------------------------------------------------------------------


def _parts(path: Path) -> list[tuple[int, Path]]:
    """The folders that hold the class folders, each with its part of the split, training first."""
    tops, _ = entries(path)
    parts = sorted((SPLIT_FOLDERS[top.name.lower()], top) for top in tops if top.name.lower() in SPLIT_FOLDERS)
    others = [top.name for top in tops if top.name.lower() not in SPLIT_FOLDERS]
    trained = bool(parts) and parts[0][0] == TRAIN
    if not parts or (others and not trained):
        return [(TRAIN, path)]
    if others:
        raise ValueError(
            f"folder {path} has {parts[0][1].name} and {others[0]}; write {', '.join(SPLITS)} above the classes, or none"
        )
    if not trained:
        raise ValueError(f"folder {path} has {', '.join(top.name for _, top in parts)}, but no train")
    return parts


def _images(path: Path) -> tuple[list[Path], Counter[str]]:
    """The images of a class, and how many other files there are of each suffix."""
    files = list(files_under(path))
    images = [file for file in files if is_image(file)]
    others = count_suffixes([file for file in files if not is_image(file)])
    if not images:
        held = f"it holds {in_words(others)}" if others else "it is empty"
        raise ValueError(f"class folder {path} holds no images that Pillow reads; {held}")
    return images, others


def _read_folder(path: Path, options: Options) -> Listing:
    parts = _parts(path)
    classes = tuple(below.name for below in entries(parts[0][1])[0])
    if not classes:
        raise ValueError(f"folder {parts[0][1]} has no class folders; one per class is needed")
    left_out: Counter[str] = Counter()
    for part in sorted({path, *(part for _, part in parts)}):
        for suffix, number in count_suffixes(entries(part)[1]).items():
            left_out[f"{suffix} in no class folder"] += number
    names: list[str] = []
    labels: list[int] = []
    split: list[int] = []
    for kind, part in parts:
        for below in entries(part)[0]:
            if below.name not in classes:
                raise ValueError(f"class folder {below}: {below.name!r} is not in train{_hint(below.name, classes)}")
            images, others = _images(below)
            names += [str(image.relative_to(path)) for image in images]
            labels += [classes.index(below.name)] * len(images)
            split += [kind] * len(images)
            left_out += others
    check_files(path, names, f"folder {path}")  # a link may lead nowhere
    real = functools.cache(os.path.realpath)
    for name in names:
        _check_path(path, real, name, f"folder {path}", options)
    is_split = parts != [(TRAIN, path)]
    return Listing(path, names, classes, torch.tensor(labels), torch.tensor(split) if is_split else None, left_out=left_out)


# --- a list in a CSV file ---------------------------------------------------------------------------------------------------


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
            hint = _hint(column, COLUMNS)
            raise ValueError(f"manifest {path}: column {column!r} is not known{hint}; allowed are {', '.join(COLUMNS)}")
    for column in COLUMNS:
        if columns.count(column) > 1 or (column in ("path", "label") and column not in columns):
            times = columns.count(column)
            raise ValueError(f"manifest {path}: column {column!r} is there {times} times; once is needed")


def _hint(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _check_path(top: Path, real: Callable[[str], str], name: str, listed_in: str, options: Options) -> None:
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
        raise ValueError(f"{listed_in}: {name!r} is not allowed; write paths from {top} on, where the images must lie")
    more = " (links that lead out of it: --follow-links)" if is_inside(name) else ""
    raise ValueError(f"{listed_in}: {name!r} leads out of {top}; images must lie in that folder{more}")


def _read_manifest(path: Path, options: Options) -> Listing:
    rows = list(_rows(path))
    if not rows:
        raise ValueError(f"manifest {path} has no rows")
    real = functools.cache(os.path.realpath)
    seen: dict[str, str] = {}
    for row in rows:
        _check_path(path.parent, real, row.path, _at(path, row.line), options)
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
            hint, allowed = _hint(row.split, SPLITS), ", ".join(SPLITS)
            raise ValueError(f"{_at(path, row.line)}: split {row.split!r} is not allowed{hint}; write one of {allowed}")
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
            raise ValueError(f"{_at(path, row.line)}: label {row.label!r} is in no training row{_hint(row.label, classes)}")
        if read(row.truth) not in index:
            hint = _hint(row.truth, classes)
            raise ValueError(
                f"{_at(path, row.line)}: truth {row.truth!r} is not one of the labels{hint}; leave empty what is not known"
            )
    return Listing(
        path.parent,
        [row.path for row in rows],
        tuple(classes),
        torch.tensor([index[read(row.label)] for row in rows]),
        torch.tensor([SPLITS[row.split] for row in rows]) if is_split else None,
        torch.tensor([index[read(row.truth)] for row in rows]),
    )

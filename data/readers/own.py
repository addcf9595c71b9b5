"""A user's own images: a folder per class, or a list in a CSV file."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from data.noise import label_bytes
from data.readers.base import TRAIN, Options, RawTable, Source
from data.readers.images import (
    Listing,
    check_files,
    count_suffixes,
    entries,
    files_under,
    in_words,
    is_image,
    reading,
)
from data.readers.manifest import SPLIT_FOLDERS, SPLITS, check_path, read_manifest
from data.readers.pixels import RESIZES, read_colour, shorter_side
from data.text import hint, look_alike_notes
from errors import UserError

LARGEST = 224  # side of images, unless more is asked for
LARGEST_SMALL = 64  # up to this side images are augmented and learnt as those of CIFAR are, above it as those of ImageNet
MOVE = "each folder there is a class, and images without labels have to be moved away"


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
    order, in training rows where there is a split. An empty truth is one that is not known, and one that is no class (open set)
    counts as a wrong label. The split is written as folders of one are named; the label of a test row is its clean label where
    it has no truth. The file is a text in UTF-8, or in UTF-16 with a byte order mark, whose cells are separated by commas,
    semicolons or tabs; other columns are left out with a line. ValueError names the line that is not so.
    """
    path = _path("manifest", argument, "FILE.csv")
    return _source("manifest", path, lambda: read_manifest(path, options), options)


def _path(kind: str, argument: str, form: str) -> Path:
    if not argument:
        raise UserError(f"data set {kind} needs a path; write {kind}:{form}")
    return Path(os.path.abspath(os.path.expanduser(argument)))


def _source(kind: str, path: Path, read: Callable[[], Listing], options: Options) -> Source:
    """What both have in common. ``read`` lists the files, once for a source: one that is made later sees later changes."""
    name = f"{kind}:{path}"
    resize, background = options.resize or "crop", options.background or "white"
    if resize not in RESIZES:
        raise UserError(f"--resize: {resize!r} is not allowed; it must be one of {', '.join(RESIZES)}")
    read_colour(background)

    @functools.cache
    def listing() -> Listing:
        if not (path.is_file() if kind == "manifest" else path.is_dir()):
            raise UserError(f"data set {name}: there is no such {'file' if kind == 'manifest' else 'folder'}")
        with reading(f"data set {name}"):
            found = read()
        if len(found.classes) < 2:
            raise UserError(f"data set {name}: there must be at least two classes, not {len(found.classes)}")
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
        digest = hashlib.sha256(repr((found.classes, sorted(found.left_out.items()), found.notes)).encode())
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
        raise UserError(
            f"folder {path} has {parts[0][1].name} and {others[0]}; write {', '.join(SPLITS)} above the classes, or none"
        )
    if not trained:
        raise UserError(f"folder {path} has {', '.join(top.name for _, top in parts)}, but no train")
    return parts


def _images(path: Path) -> tuple[list[Path], Counter[str]]:
    """The images of a class, and how many other files there are of each suffix."""
    files = list(files_under(path))
    images = [file for file in files if is_image(file)]
    others = count_suffixes([file for file in files if not is_image(file)])
    if not images:
        held = f"it holds {in_words(others)}" if others else "it is empty"
        raise UserError(f"class folder {path} holds no images that Pillow reads; {held}")
    return images, others


def _read_folder(path: Path, options: Options) -> Listing:
    parts = _parts(path)
    classes = tuple(below.name for below in entries(parts[0][1])[0])
    if not classes:
        raise UserError(f"folder {parts[0][1]} has no class folders; one per class is needed")
    left_out: Counter[str] = Counter()
    for part in sorted({path, *(part for _, part in parts)}):
        where = "in no class folder" if part == path else f"in no class folder of {part.name}"
        for suffix, number in count_suffixes(entries(part)[1]).items():
            left_out[f"{suffix} {where}"] = number
    names: list[str] = []
    labels: list[int] = []
    split: list[int] = []
    for kind, part in parts:
        for below in entries(part)[0]:
            if below.name not in classes:
                raise UserError(f"class folder {below}: {below.name!r} is not in train{hint(below.name, classes)}; {MOVE}")
            images, others = _images(below)
            names += [str(image.relative_to(path)) for image in images]
            labels += [classes.index(below.name)] * len(images)
            split += [kind] * len(images)
            left_out += others
    check_files(path, names, f"folder {path}")  # a link may lead nowhere
    real = functools.cache(os.path.realpath)
    for name in names:
        check_path(path, real, name, f"folder {path}", options)
    is_split = parts != [(TRAIN, path)]
    return Listing(
        path,
        names,
        classes,
        torch.tensor(labels),
        torch.tensor(split) if is_split else None,
        left_out=left_out,
        notes=look_alike_notes(classes),
    )

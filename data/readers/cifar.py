"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), and the human labels of CIFAR-10N and CIFAR-100N (Wei et al. 2022).

The published files are pickles, which can run any code when they are read. So nothing is read before its MD5 is that of the
published file, and by an unpickler that makes numpy arrays and Python's own containers only (human labels that were saved again
as tensors: by torch's, with ``weights_only``). That is also why torchvision,
whose constructor checks the MD5 of the batches before it unpickles them without limits, does the download alone; and it takes
seconds to import.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.durable import lock_path
from data.readers.base import TEST, TRAIN, Options, RawTable, Source, without_argument
from errors import UserError


class Published(NamedTuple):
    """What is published under one name. Image order is that of the files."""

    folder: str
    train: dict[str, str]  # file: MD5
    test: dict[str, str]
    meta: dict[str, str]
    labels: str  # key in the files
    classes: str  # key in meta

    def missing(self, folder: Path) -> list[str]:
        """Files that are not there."""
        return [file for file in (*self.train, *self.test, *self.meta) if not (folder / file).is_file()]


CIFAR = {
    "cifar10": Published(
        "cifar-10-batches-py",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        {"test_batch": "40351d587109b95175f43aff81a1287e"},
        {"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
        "labels",
        "label_names",
    ),
    "cifar100": Published(
        "cifar-100-python",
        {"train": "16019d7e3df5f24257cddd939b257f8d"},
        {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        {"meta": "7973b15100ade9c7d40fb424638fde48"},
        "fine_labels",
        "fine_label_names",
    ),
}
DAMAGE = (  # what unpickling raises for a file that is not what it seems to be
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, OSError, EOFError, ValueError, TypeError, LookupError),
    *(AttributeError, ImportError, ArithmeticError, MemoryError, RuntimeError),
)
HUMAN_FILES = {"cifar10n": "CIFAR-10_human.pt", "cifar100n": "CIFAR-100_human.pt"}
HUMAN_LABELS = {  # argument: key in the file
    "cifar10n": {
        "aggregate": "aggre_label",
        "random1": "random_label1",
        "random2": "random_label2",
        "random3": "random_label3",
        "worst": "worse_label",
    },
    "cifar100n": {"": "noisy_label"},
}
SUPERCLASSES = (  # of CIFAR-100: fine classes, which are numbered by the alphabet
    (4, 30, 55, 72, 95),  # aquatic mammals
    (1, 32, 67, 73, 91),  # fish
    (54, 62, 70, 82, 92),  # flowers
    (9, 10, 16, 28, 61),  # food containers
    (0, 51, 53, 57, 83),  # fruit and vegetables
    (22, 39, 40, 86, 87),  # household electrical devices
    (5, 20, 25, 84, 94),  # household furniture
    (6, 7, 14, 18, 24),  # insects
    (3, 42, 43, 88, 97),  # large carnivores
    (12, 17, 37, 68, 76),  # large man-made outdoor things
    (23, 33, 49, 60, 71),  # large natural outdoor scenes
    (15, 19, 21, 31, 38),  # large omnivores and herbivores
    (34, 63, 64, 66, 75),  # medium-sized mammals
    (26, 45, 77, 79, 99),  # non-insect invertebrates
    (2, 11, 35, 46, 98),  # people
    (27, 29, 44, 78, 93),  # reptiles
    (36, 50, 65, 74, 80),  # small mammals
    (47, 52, 56, 59, 96),  # trees
    (8, 13, 48, 58, 90),  # vehicles 1
    (41, 69, 81, 85, 89),  # vehicles 2
)


def _rings(groups: tuple[tuple[int, ...], ...]) -> dict[int, int]:
    """Each class to the next of its group, the last to the first."""
    return {one: group[(place + 1) % len(group)] for group in groups for place, one in enumerate(group)}


MAPS: dict[str, dict[str, dict[int, int]]] = {
    # truck -> automobile, bird -> airplane, deer -> horse, cat <-> dog (Patrini et al. 2017)
    "cifar10": {"cifar10": {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}},
    # Both are called asymmetric in the literature. In blocks of consecutive classes, as in the code of ELR, SELC and APL, 6 of
    # 100 classes go to one of the same superclass.
    "cifar100": {
        "superclass": _rings(SUPERCLASSES),
        "blocks": _rings(tuple(tuple(range(first, first + 5)) for first in range(0, 100, 5))),
    },
}


def cifar10(argument: str, options: Options) -> Source:
    """50,000 training and 10,000 test images of 32 x 32; ``cifar-10-batches-py`` in the folder of the data sets."""
    without_argument("cifar10", argument)
    return _source("cifar10", "cifar10", options)


def cifar100(argument: str, options: Options) -> Source:
    """The same with 100 classes; ``cifar-100-python`` in the folder of the data sets."""
    without_argument("cifar100", argument)
    return _source("cifar100", "cifar100", options)


def cifar10n(argument: str, options: Options) -> Source:
    """CIFAR-10 with human labels for training, ``CIFAR-10_human.pt`` beside it: 9, 17, 18, 18 and 40 % are wrong."""
    return _human("cifar10n", "cifar10", argument, options)


def cifar100n(argument: str, options: Options) -> Source:
    """CIFAR-100 with human labels for training, ``CIFAR-100_human.pt`` beside it: 40 % are wrong."""
    return _human("cifar100n", "cifar100", argument, options)


def _human(name: str, clean: str, argument: str, options: Options) -> Source:
    keys = HUMAN_LABELS[name]
    if argument not in keys:
        known = ", ".join(f"{name}:{key}" if key else name for key in keys)
        raise UserError(f"data set {name}: {argument!r} is not one of its labels; write {known}")
    path = options.root.absolute() / HUMAN_FILES[name]
    return _source(f"{name}:{argument}" if argument else name, clean, options, path, keys[argument])


def _source(name: str, clean: str, options: Options, human: Path | None = None, key: str = "") -> Source:
    """``human`` holds the labels that people gave to the training images of the data set ``clean``."""
    published, root = CIFAR[clean], options.root.absolute()
    folder = root / published.folder

    def build() -> RawTable:
        missing = published.missing(folder)
        if missing and not options.download:
            raise UserError(f"data set {name}: {missing[0]} is not in {folder}; put it there as published, or use --download")
        if missing:
            _download(clean, root)
        table = read_cifar(folder, published)
        if human is None:
            return table
        assert table.truth is not None
        assert table.split is not None
        given, train = table.truth.clone(), table.split == TRAIN
        given[train] = read_human(human, key, table.truth[train], table.num_classes)
        return RawTable(table.shape, table.blocks, table.num_classes, table.truth, given, table.split, table.classes)

    def stamp() -> str:
        if human is None:
            return ""
        if not human.is_file():
            where = "published at github.com/UCSC-REAL/cifar-10-100n"
            raise UserError(f"data set {name}: {human.name} is not in {root}; put it there, as {where}")
        return hashlib.sha256(human.read_bytes()).hexdigest()

    return Source(
        name,
        name.replace(":", "-"),
        build,
        defaults={
            "noise": "symmetric:0.4" if human is None else "none",
            "model": "resnet34",
            "batch_size": 128,
            "augmentation": "weak",
        },
        stream=clean,  # the same images are held out whatever the labels
        stamp=stamp,
        maps=MAPS[clean],
        views="flip-crop",
    )


def _download(name: str, root: Path) -> None:
    """Fetches what is missing. A file is there as a whole or not at all, and of two processes one fetches."""
    from torchvision import datasets  # takes seconds to import
    from torchvision.datasets.utils import download_and_extract_archive

    known, published = getattr(datasets, name.upper()), CIFAR[name]
    folder = root / published.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_path(root / f".{name}.lock", f"another process fetches {name}"), TemporaryDirectory(dir=root) as scratch:
            if published.missing(folder):
                download_and_extract_archive(known.url, str(root), scratch, known.filename, known.tgz_md5)
                for path in (Path(scratch) / published.folder).iterdir():
                    path.replace(folder / path.name)
    except (OSError, RuntimeError) as error:
        raise UserError(f"data set {name}: {known.url} cannot be brought to {root} ({error})") from error


def read_cifar(folder: Path, published: Published) -> RawTable:
    """Training rows, then test rows, in the order of the files. ValueError where a file is not the published one."""
    parts = [_read(folder, file, md5) for file, md5 in {**published.train, **published.test}.items()]
    (meta,) = (_read(folder, file, md5) for file, md5 in published.meta.items())
    images = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
    labels = torch.tensor([label for part in parts for label in part[published.labels]])
    split = torch.full_like(labels, TRAIN)
    split[-len(parts[-1]["data"]) :] = TEST
    classes = tuple(meta[published.classes])
    return RawTable.of(torch.from_numpy(images), len(classes), labels, split=split, classes=classes)


def _read(folder: Path, file: str, md5: str) -> Any:
    content = (folder / file).read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise UserError(f"{folder / file} is not the published file (its MD5 differs); delete it, and use --download")
    return Unpickler(io.BytesIO(content), encoding="latin1").load()


def read_human(path: Path, key: str, truth: Tensor, num_classes: int) -> Tensor:
    """Human labels int64 [N] of the training images, whose clean labels are ``truth``.

    The file is an archive of ``torch.save`` that holds a dictionary of numpy arrays or, where somebody has saved it again, of
    tensors. ValueError for another file, and for one whose ``clean_label`` is not the truth: it would be of other images, or in
    another order.
    """
    try:
        content = _load_saved(path)
        columns = [np.asarray(content[name]) for name in ("clean_label", key)]
        clean, given = (torch.from_numpy(column.astype(np.int64)) for column in columns)
    except DAMAGE as error:
        reason = next(filter(None, str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} cannot be read ({' '.join(reason.split())})") from error
    if not torch.equal(clean, truth):
        raise UserError(f"{path}: its clean_label is not that of these {len(truth)} images; it is another or a damaged file")
    whole = np.array_equal(columns[1], given.numpy())
    if not whole or given.shape != truth.shape or not bool(((given >= 0) & (given < num_classes)).all()):
        raise UserError(f"{path}: {key} is not {len(truth)} labels of 0..{num_classes - 1}")
    return given


def _load_saved(path: Path) -> Any:
    """What ``torch.save`` has written: of numpy arrays by :class:`Unpickler`, of tensors by torch's own that runs no code."""
    with zipfile.ZipFile(path) as archive:
        (inner,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        pickled = archive.read(inner)
    try:
        return Unpickler(io.BytesIO(pickled)).load()
    except NotForArraysError as error:
        if not error.module.startswith("torch"):
            raise
    arrays = [np.ndarray, np.dtype, *map(type, map(np.dtype, ("int32", "int64", "uint8")))]
    names = [(RECONSTRUCT, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    with torch.serialization.safe_globals([*arrays, *names, (_latin1, "_codecs.encode")]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


RECONSTRUCT: Any = np.empty(0).__reduce__()[0]  # numpy's own; its module has had two names


class NotForArraysError(pickle.UnpicklingError):
    """A pickle asks for something of ``module`` that arrays, containers and numbers do not need."""

    def __init__(self, module: str, name: str) -> None:
        super().__init__(f"it asks for {module}.{name}, which such a file does not need")
        self.module = module


class Unpickler(pickle.Unpickler):
    """Makes numpy arrays and Python's own containers and numbers; anything else is refused before it is looked up."""

    ALLOWED = {  # noqa: RUF012 (nobody writes it)
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise NotForArraysError(module, name)
        return self.ALLOWED[module, name]

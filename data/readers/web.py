"""Images whose labels came with them from the web: ANIMAL-10N, Clothing1M and WebVision, each laid out as it is published."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from data.noise import label_bytes
from data.readers.base import TEST, TRAIN, Options, RawTable, Source, without_argument
from data.readers.images import Listing, check_files, entries, files_under, is_image, is_inside, reading
from data.readers.pixels import Decoding
from data.seeds import generator
from data.text import read_text
from errors import UserError
from hparams import Value

ANIMALS = ("cat", "lynx", "wolf", "coyote", "cheetah", "jaguar", "chimpanzee", "orangutan", "hamster", "guinea-pig")
CLOTHES = (
    *("T-Shirt", "Shirt", "Knitwear", "Chiffon", "Sweater", "Hoodie", "Windbreaker", "Jacket", "Down Coat", "Suit", "Shawl"),
    *("Dress", "Vest", "Underwear"),
)
VALPREP = "github.com/soumith/imagenetloader.torch"
WEBVISION_CLASSES, WEBVISION_USED = 1000, 50  # the first 50 are what the literature trains on ("mini")


def animal10n(argument: str, options: Options) -> Source:
    """``ANIMAL-10N/raw_image/{training,testing}/LABEL_*.jpg`` or ``ANIMAL-10N/{training,testing}`` (Song et al. 2019).

    50,000 training images, about 8 % wrong, and 5,000 test images of 64 x 64. LABEL is the integer before the first ``_``.
    """
    without_argument("animal10n", argument)

    def read() -> Listing:
        folder = _folder("animal10n", options, "ANIMAL-10N")
        if (folder / "raw_image").is_dir():
            folder /= "raw_image"
        _need("animal10n", folder, "training", "testing")
        return _read_animal10n(folder)

    return _source("animal10n", read, 64, 0, {"model": "vgg19-bn", "batch_size": 128}, skip_damaged=options.skip_damaged)


def clothing1m(argument: str, options: Options) -> Source:
    """``Clothing1M`` with the four lists of keys and labels and ``images/`` (Xiao et al. 2015).

    Training images are a subset of the noisy million with PER_CLASS of each class, drawn once for all; a smaller subset is
    part of a larger one. Without PER_CLASS it is as many as the smallest class has. The test set is the clean one. Keys may be
    with or without ``images/``, and that folder may be missing. As with WebVision the middle square of an image is kept, of
    which random parts are cut; published code cuts them from the whole image, its shorter side brought to 256.
    """
    if argument and not re.fullmatch("[1-9][0-9]*", argument):
        raise UserError(f"data set clothing1m: {argument!r} is not allowed after it; write clothing1m or clothing1m:PER_CLASS")

    def read() -> Listing:
        folder = _folder("clothing1m", options, "Clothing1M")
        lists = ("noisy_train_key_list.txt", "noisy_label_kv.txt", "clean_test_key_list.txt", "clean_label_kv.txt")
        _need("clothing1m", folder, *lists)
        return _read_clothing1m(folder, int(argument or 0))

    name = f"clothing1m:{int(argument)}" if argument else "clothing1m"
    return _source(name, read, 256, 224, {"model": "resnet50-imagenet", "batch_size": 64}, skip_damaged=options.skip_damaged)


def webvision(argument: str, options: Options) -> Source:
    """The first 50 classes of WebVision 1.0, images from Google: ``WebVision/{info,google,val_images_256}`` (Li et al. 2017).

    The test set is WebVision's validation set; with ``webvision:ilsvrc12`` it is that of ILSVRC 2012 for the same classes, from
    ``ILSVRC2012/val/WNID/``, into which the published files, all in one folder, have to be sorted first (valprep.sh does it).
    Which class is which WNID is read off ``info/synsets.txt``.
    """
    if argument not in ("", "ilsvrc12"):
        raise UserError(f"data set webvision: {argument!r} is not allowed after it; write webvision or webvision:ilsvrc12")

    def read() -> Listing:
        info = _folder("webvision", options, "WebVision") / "info"
        _need("webvision", info, "train_filelist_google.txt", "synsets.txt", *([] if argument else ["val_filelist.txt"]))
        imagenet = _ilsvrc(options) if argument else None
        return _read_webvision(options.root.absolute(), imagenet)

    name = f"webvision:{argument}" if argument else "webvision"
    return _source(name, read, 256, 227, {"model": "inception-resnet-v2", "batch_size": 32}, skip_damaged=options.skip_damaged)


def _folder(name: str, options: Options, *parts: str) -> Path:
    folder = options.root.absolute().joinpath(*parts)
    if not folder.is_dir():
        raise UserError(f"data set {name}: there is no folder {folder}; put it there as it is published")
    return folder


def _ilsvrc(options: Options) -> Path:
    """ILSVRC's validation images by WNID. ValueError where they are not there, or still lie in one folder."""
    folder, how = options.root.absolute() / "ILSVRC2012" / "val", f"one folder per WNID, as valprep.sh sorts them ({VALPREP})"
    if not folder.is_dir():
        raise UserError(f"data set webvision:ilsvrc12: there is no folder {folder}; put the validation images there, {how}")
    folders, files = entries(folder)
    flat = sum(map(is_image, files))
    if flat and not folders:
        raise UserError(f"data set webvision:ilsvrc12: {folder} holds {flat} images in no folder of a class; it needs {how}")
    return folder


def _need(name: str, folder: Path, *files: str) -> None:
    for file in files:
        if not (folder / file).exists():
            raise UserError(f"data set {name}: {file} is not in {folder}; it must be there as it is published")


def _source(
    name: str, read: Callable[[], Listing], size: int, input_size: int, defaults: dict[str, Value], *, skip_damaged: bool
) -> Source:
    def listing() -> Listing:
        with reading(f"data set {name}"):
            return read()

    def build() -> RawTable:
        found = listing()
        check_files(found.folder, found.names, f"data set {name}")
        return found.table(Decoding(3, size))

    def stamp() -> str:
        found = listing()
        digest = hashlib.sha256("\n".join([*found.classes, *found.names]).encode("utf-8", "surrogateescape"))
        for column in (found.given, found.truth, found.split):
            digest.update(b"|" if column is None else label_bytes(column))
        return digest.hexdigest()

    return Source(
        name,
        name.replace(":", "-"),
        build,
        defaults={"noise": "none", **defaults, "augmentation": "weak"},
        stamp=stamp,
        views="imagenet" if input_size else "flip-crop",
        input_size=input_size,
        skip_damaged=skip_damaged,
    )


def _lines(path: Path) -> list[str]:
    return read_text(path, str(path)).replace("\r\n", "\n").rstrip("\n").split("\n")


def _pairs(path: Path, num_classes: int) -> dict[str, int]:
    """``PATH LABEL`` of each line. ValueError names a line that is not so."""
    pairs = {}
    for number, line in enumerate(_lines(path), start=1):
        name, _, label = line.strip().rpartition(" ")
        if not is_inside(name.removeprefix("images/")) or re.fullmatch("[0-9]+", label) is None:
            raise UserError(f"{path}, line {number}: {line[:200]!r} is not a path inside the data set, a space and a label")
        if int(label) >= num_classes:
            raise UserError(f"{path}, line {number}: label {label} is not allowed; labels are 0..{num_classes - 1}")
        pairs[name] = int(label)
    return pairs


def _read_animal10n(folder: Path) -> Listing:
    names, labels, split = [], [], []
    for part, kind in (("training", TRAIN), ("testing", TEST)):
        for path in filter(is_image, files_under(folder / part)):
            label = path.name.partition("_")[0]
            if not re.fullmatch("[0-9]+", label) or int(label) >= len(ANIMALS):
                raise UserError(f"image {path}: {label!r} before the first _ is no label; labels are 0..{len(ANIMALS) - 1}")
            names.append(os.path.relpath(path, folder))
            labels.append(int(label))
            split.append(kind)
    return Listing(folder, names, ANIMALS, torch.tensor(labels), torch.tensor(split))


def _read_clothing1m(folder: Path, per_class: int) -> Listing:
    noisy, clean = (_pairs(folder / f"{kind}_label_kv.txt", len(CLOTHES)) for kind in ("noisy", "clean"))
    train = _keys(folder / "noisy_train_key_list.txt", noisy)
    test = _keys(folder / "clean_test_key_list.txt", clean)
    labels = torch.tensor([noisy[key] for key in train])
    sizes = torch.bincount(labels, minlength=len(CLOTHES))
    if not 1 <= (per_class or 1) <= int(sizes.min()):
        fewest = CLOTHES[int(sizes.argmin())]
        raise UserError(f"data set clothing1m: {per_class or 1} per class are too many; {fewest} has {int(sizes.min())}")
    random = generator("clothing1m", "subset")
    drawn = []
    for label, size in enumerate(sizes.tolist()):
        order = torch.randperm(size, generator=random)
        drawn.append((labels == label).nonzero().squeeze(1)[order[: per_class or int(sizes.min())]])
    chosen = [train[row] for row in torch.cat(drawn).sort().values.tolist()]
    images = folder / "images"
    return Listing(
        images if images.is_dir() else folder,
        [key.removeprefix("images/") for key in (*chosen, *test)],
        CLOTHES,
        torch.tensor([*(noisy[key] for key in chosen), *(clean[key] for key in test)]),
        torch.tensor([TRAIN] * len(chosen) + [TEST] * len(test)),
        torch.tensor([clean.get(key, -1) for key in (*chosen, *test)]),
    )


def _keys(path: Path, labels: dict[str, int]) -> list[str]:
    keys = [line.strip() for line in _lines(path)]
    for number, key in enumerate(keys, start=1):
        if key not in labels:
            raise UserError(f"{path}, line {number}: {key[:200]!r} has no label")
    return keys


def _read_webvision(root: Path, imagenet: Path | None) -> Listing:
    """Rows of WebVision, then those of the test set; ``imagenet`` holds ILSVRC's validation images by WNID."""
    info = root / "WebVision" / "info"
    synsets = [line.partition(" ") for line in _lines(info / "synsets.txt")[:WEBVISION_USED]]
    for number, (wnid, _, _) in enumerate(synsets, start=1):
        if not re.fullmatch("n[0-9]{8}", wnid):
            raise UserError(f"{info / 'synsets.txt'}, line {number}: {wnid!r} is no WNID, as n01440764 is")
    if len(synsets) < WEBVISION_USED:
        raise UserError(f"{info / 'synsets.txt'} has {len(synsets)} lines; at least {WEBVISION_USED} are needed")
    train = {f"WebVision/{name}": label for name, label in _first_classes(info / "train_filelist_google.txt")}
    if imagenet is None:
        test = {f"WebVision/val_images_256/{name}": label for name, label in _first_classes(info / "val_filelist.txt")}
    else:
        test = {
            str(path.relative_to(root)): label
            for label, (wnid, _, _) in enumerate(synsets)
            for path in (filter(is_image, files_under(imagenet / wnid)) if (imagenet / wnid).is_dir() else ())
        }
    for label, (wnid, _, _) in enumerate(synsets):
        if label not in test.values():
            raise UserError(f"{imagenet or info / 'val_filelist.txt'} holds no images of class {label}, {wnid}")
    labels = torch.tensor([*train.values(), *test.values()])
    split = torch.tensor([TRAIN] * len(train) + [TEST] * len(test))
    return Listing(root, [*train, *test], tuple(names.partition(",")[0] for _, _, names in synsets), labels, split)


def _first_classes(path: Path) -> list[tuple[str, int]]:
    return [(name, label) for name, label in _pairs(path, WEBVISION_CLASSES).items() if label < WEBVISION_USED]

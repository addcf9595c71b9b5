"""Where images and labels come from, and what each source uses when the user says nothing.

A data set is written ``NAME`` or ``NAME:ARGUMENT``; each name has a reader, a function of the argument and of
:class:`Options` that returns a :class:`Source`. A new reader is a function in :mod:`data.readers` and a line here.
"""

from __future__ import annotations

import torch

from data.readers import cifar, own, web
from data.readers.base import TEST, TRAIN, VALIDATION, Options, RawTable, Reader, Source, without_argument

__all__ = ["READERS", "TEST", "TRAIN", "VALIDATION", "Options", "RawTable", "Source", "find_source"]


def _digits(argument: str, options: Options) -> Source:
    """scikit-learn's optical digits: 1,797 images of 8 x 8, stored as 0..16 and scaled by 15 to 0..240."""
    without_argument("digits", argument)

    def build() -> RawTable:
        from sklearn.datasets import load_digits  # takes a second to import

        digits = load_digits()
        images = torch.from_numpy(digits.images * 15).to(torch.uint8).unsqueeze(1)
        return RawTable.of(images, 10, truth=torch.from_numpy(digits.target).to(torch.int64))

    return Source(
        "digits",
        "digits",
        build,
        defaults={"noise": "symmetric:0.4", "model": "small-cnn", "batch_size": 64, "augmentation": "weak"},
        maps={"mnist": {2: 7, 3: 8, 5: 6, 6: 5, 7: 1}},  # that of the literature for MNIST (Patrini et al. 2017)
    )


READERS: dict[str, Reader] = {
    "digits": _digits,
    "folder": own.folder,
    "manifest": own.manifest,
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "cifar10n": cifar.cifar10n,
    "cifar100n": cifar.cifar100n,
    "animal10n": web.animal10n,
    "clothing1m": web.clothing1m,
    "webvision": web.webvision,
}


def find_source(data: str, options: Options | None = None) -> Source:
    """The source of that name. ValueError for an unknown one, or for an argument that its reader does not take."""
    name, _, argument = data.partition(":")
    if name not in READERS:
        raise ValueError(f"unknown data set {data!r}; known are {', '.join(READERS)}")
    return READERS[name](argument, options or Options())

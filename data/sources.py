"""Where images and labels come from, and what each source uses when the user says nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hparams import Value


@dataclass(frozen=True)
class RawTable:
    """A decoded source: images uint8 [N, C, H, W]; clean labels and labels of its own, int64 [N], where there are any."""

    images: Tensor
    truth: Tensor | None
    given: Tensor | None


@dataclass(frozen=True)
class Source:
    """A named data set; ``build`` decodes it, which happens once per machine (:mod:`data.cache`)."""

    name: str
    build: Callable[[], RawTable]
    num_classes: int
    defaults: Mapping[str, Value]  # hyperparameters by name, and "noise" and "model"
    confusions: Mapping[int, int]  # class -> class that asymmetric noise flips it to; empty where the source has no map


def _digits() -> RawTable:
    """scikit-learn's optical digits: 1,797 images of 8 x 8, stored as 0..16 and scaled by 15 to 0..240."""
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    images = torch.from_numpy(digits.images * 15).to(torch.uint8).unsqueeze(1)
    return RawTable(images, truth=torch.from_numpy(digits.target).to(torch.int64), given=None)


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "digits",
            _digits,
            num_classes=10,
            defaults={"noise": "symmetric:0.4", "model": "small-cnn", "batch_size": 64, "augmentation": "weak"},
            confusions={2: 7, 3: 8, 5: 6, 6: 5, 7: 1},  # the map that the literature uses for MNIST (Patrini et al. 2017)
        ),
    )
}


def find_source(name: str) -> Source:
    """The source of that name. ValueError for an unknown one."""
    if name not in SOURCES:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(SOURCES)}")
    return SOURCES[name]

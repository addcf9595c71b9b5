"""scikit-learn's optical digits, which come with it."""

from __future__ import annotations

import torch

from data.readers.base import Options, RawTable, Source, without_argument


def digits(argument: str, options: Options) -> Source:
    """1,797 images of 8 x 8, stored as 0..16 and scaled by 15 to 0..240."""
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

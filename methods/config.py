"""The hyperparameters that methods have in common. A method's own are in its file, in a subclass. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass

from data.names import VIEW_DESCRIPTIONS
from hparams import hyperparameter


@dataclass(frozen=True)
class Config:
    """Hyperparameters that every method has. Lengths and memories are fractions of the full budget."""

    lr: float = hyperparameter(
        0.05, "learning rate at the start; falls to 0 along a half cosine", legal="(0, inf)", search=(0.005, 0.1), log=True
    )
    weight_decay: float = hyperparameter(
        1e-3, "L2 penalty, coupled, on every parameter", legal="[0, inf)", search=(1e-5, 1e-2), log=True
    )
    momentum: float = hyperparameter(0.9, "momentum of SGD", legal="[0, 1)")
    batch_size: int = hyperparameter(128, "images in a batch", legal="[2, 2147483647]")
    dropout: float = hyperparameter(0.0, "probability of dropping a feature before the head", legal="[0, 1)")
    augmentation: str = hyperparameter("weak", "which view of an image is trained on", choices=("none", "weak", "strong"))
    views: str = hyperparameter(
        "auto",
        "how images are changed in the weak and the strong view (auto: as suits the data set)",
        choices=("auto", *VIEW_DESCRIPTIONS),
    )

    def begins(self) -> float:
        """The fraction of the budget at which the method proper starts; before it, trials are not comparable."""
        return 0.0


@dataclass(frozen=True)
class GivenLabelsConfig(Config):
    """For methods whose loss is a cross-entropy on the given labels, which can be smoothed."""

    label_smoothing: float = hyperparameter(0.0, "mass of a given label that is spread over all classes", legal="[0, 1]")

"""The turning point of a warm-up: where a network stops learning the right labels and starts learning the wrong ones too.

After each epoch a Gaussian mixture of two components is fitted to the losses of all samples, scaled to [0, 1]. The distance
of its means rises while right labels are learnt and falls as wrong ones follow; its largest value, smoothed, is the turning
point.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods.base import Clock
from methods.parts.mixture import GaussianMixture, min_max

WINDOW = 3  # epochs whose separations are averaged
UNKNOWN = -1


class TurningPoint(nn.Module):
    """Sees the losses of one epoch after the other, and knows the turning point once it has passed.

    It is the epoch of the largest smoothed separation, recognised when ``patience``, a fraction of the budget, has gone by
    since. State: the last separations, the largest smoothed one with its epoch, and the epoch from which on it is passed.
    """

    separations: Tensor
    peak: Tensor
    start: Tensor

    def __init__(self, patience: float, device: torch.device) -> None:
        super().__init__()
        self.patience = patience
        self.register_buffer("separations", torch.zeros(WINDOW, device=device))  # the newest is the last
        self.register_buffer("peak", torch.zeros(2, device=device))
        self.register_buffer("start", torch.tensor(UNKNOWN, device=device))
        self.known_start = UNKNOWN  # the same for the host, which must not wait for the device in a step
        self.register_load_state_dict_post_hook(_read_start)  # type: ignore[no-untyped-call]

    def observe(self, losses: Tensor, clock: Clock) -> None:
        """Takes the losses [N] of all samples at the end of the epoch."""
        separation = GaussianMixture.fit(min_max(losses)).separation.float()
        self.separations.copy_(torch.cat([self.separations[1:], separation.reshape(1)]))
        smoothed = float(self.separations.sum()) / min(WINDOW, clock.epoch + 1)
        largest, epoch = self.peak.tolist()
        if smoothed > largest:
            self.peak.copy_(torch.tensor([smoothed, clock.epoch]))
        elif clock.epoch - epoch >= self.patience * clock.epochs:
            self.start.fill_(clock.epoch + 1)
            self.known_start = int(self.start)

    def passed(self, clock: Clock) -> bool:
        """True from the epoch on at whose start the turning point is known."""
        return UNKNOWN < self.known_start <= clock.epoch


def _read_start(point: TurningPoint, _keys: object) -> None:
    point.known_start = int(point.start)

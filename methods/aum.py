"""AUM: two probes measure by what margin each given label wins, labels that win by too little go, and a new network trains.

Pleiss, Zhang, Elenberg & Weinberger, "Identifying Mislabeled Data using the Area Under the Margin Ranking", NeurIPS 2020. The
margin of a sample at an update is z_y - max_{k != y} z_k, and its area AUM the mean over a probe's epochs, from the logits of
the training step itself. In each of two probes floor(N / (K + 1)) random samples, none of them in both, are labelled as a class
of their own, K: no image looks like that class, so these threshold samples show what the area of a wrong label is. A sample is
flagged if more than 1 - ``percentile`` of them have a larger area, and removed if each probe in which it kept its label flags
it. The probes train at a constant learning rate on cross-entropy, each for the fraction ``probe`` of the budget; the final run
starts anew and trains on the samples that are left.

Differs from the paper: one trial holds all three runs, so that it costs what others cost, in the paper's proportions of 150,
150 and 300 epochs; all have one batch size (paper: 64 for the probes, 256 for the final run) and one learning rate, which falls
along half a cosine over the final run alone. If less than two samples were left, none is removed.
Differs from the official code: removed samples are in no batch (there they weigh 0, but normalise the batch); floor(N / K)
threshold samples there; its first epoch is left out of the area; margins are float32, not float16.
State: three networks and their optimisers; sum and number of the margins of two probes, float32, and which probe a sample is a
threshold of, int64: 24 bytes per sample.

Predictions are those of the network that is being trained, over the K classes that there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.table import Batch, TrainData
from hparams import hyperparameter
from losses import cross_entropy
from methods.base import Clock, GivenLabelsConfig, Learner, Method, Step, Task, half_cosine

PROBES = 2


@dataclass(frozen=True)
class AUMConfig(GivenLabelsConfig):
    """The published defaults: probes of 150 epochs, a final run of 300, the 99th percentile."""

    probe: float = hyperparameter(
        0.25,
        "length of each of the two probes, as a fraction of the budget; the rest is the final run",
        legal="(0, 0.5)",
        search=(0.05, 0.35),
    )
    percentile: float = hyperparameter(
        0.99,
        "quantile of the threshold samples' areas that a sample must reach to stay; lower removes less",
        legal="(0, 1)",
        search=(0.9, 0.999),
    )

    def begins(self) -> float:
        """The start of the final run."""
        return PROBES * self.probe


class AUM(Method[Batch]):
    """Two probes with a class too many, then cross-entropy on what they did not find mislabelled."""

    Config = AUMConfig
    config: AUMConfig
    summary = "two probe runs rank the labels by their margin, the final run leaves out the worst (Pleiss et al. 2020)"
    phase: Tensor
    share_kept: Tensor
    threshold: Tensor
    margins: Tensor
    visits: Tensor

    def __init__(self, config: AUMConfig, task: Task) -> None:
        super().__init__(config, task)
        self.final = Learner(task.make_net(), config)
        self.probes = nn.ModuleList(Learner(task.make_net(task.num_classes + 1), config) for _ in range(PROBES))
        N, device = task.num_samples, task.labels.device
        size = N // (task.num_classes + 1)
        threshold = torch.full((N,), PROBES)  # the probe in which a sample is a threshold sample; PROBES: in none
        threshold[torch.randperm(N)[: PROBES * size]] = torch.arange(PROBES).repeat_interleave(size)
        self.register_buffer("threshold", threshold.to(device))
        self.register_buffer("margins", torch.zeros(N, PROBES, device=device))
        self.register_buffer("visits", torch.zeros(N, PROBES, device=device))
        self.register_buffer("phase", torch.tensor(0))  # whose turn it was last, for predictions
        self.register_buffer("share_kept", torch.tensor(1.0))

    def batches(self, data: TrainData, clock: Clock) -> Iterable[Batch]:
        self.phase.fill_(self.phase_at(clock))
        if self.phase_at(clock) < PROBES:
            yield from data.shuffled(self.config.batch_size)
            return
        keep = self.kept()
        self.share_kept.copy_(keep.float().mean())
        yield from data.shuffled(self.config.batch_size, keep=keep)

    def step(self, batch: Batch, clock: Clock) -> Step:
        phase, K = self.phase_at(clock), self.task.num_classes
        learner = self.learner(phase)
        logits = learner(self.task.view(self.config.augmentation)(batch.images))
        scalars = {}
        if phase < PROBES:
            labels = torch.where(self.threshold[batch.index] == phase, K, batch.labels)
            loss = cross_entropy(logits, labels).mean()
            self.margins[batch.index, phase] += margin(logits.detach(), labels)
            self.visits[batch.index, phase] += 1
        else:
            loss = cross_entropy(logits, batch.labels, self.config.label_smoothing).mean()
            scalars["select/kept"] = self.share_kept.clone()
        learner.update(loss, self.learning_rate(clock))
        return Step(loss.detach(), batch.index, logits.detach()[:, :K].softmax(dim=1), scalars)

    def phase_at(self, clock: Clock) -> int:
        """The probe that runs in this epoch, 0 or 1, or 2 for the final run."""
        return sum(clock.has_begun(end * self.config.probe) for end in range(1, PROBES + 1))

    def learner(self, phase: int) -> Learner:
        learner = self.probes[phase] if phase < PROBES else self.final
        assert isinstance(learner, Learner)
        return learner

    def learning_rate(self, clock: Clock) -> float:
        """Constant in the probes; half a cosine over the final run."""
        if self.phase_at(clock) < PROBES:
            return self.config.lr
        return half_cosine(self.config.lr, clock.since(self.config.begins()))

    def kept(self) -> Tensor:
        """bool [N]: the samples that a probe judged and did not flag, or that none judged; all if hardly any is left."""
        seen = self.visits > 0
        areas = self.margins / self.visits  # not a number where never seen, and not asked for there
        judged, clean = torch.zeros_like(seen), torch.zeros_like(seen)
        for probe in range(PROBES):
            of_threshold = (self.threshold == probe) & seen[:, probe]
            judged[:, probe] = (self.threshold != probe) & seen[:, probe]
            clean[:, probe] = ~flagged(areas[:, probe], areas[of_threshold, probe], self.config.percentile)
        keep = (judged & clean).any(dim=1) | ~judged.any(dim=1)
        return keep if int(keep.sum()) >= 2 else torch.ones_like(keep)

    def predict(self, images: Tensor) -> Tensor:
        """Of the network that was trained last: the softmax over the K classes, without the one of threshold samples."""
        logits: Tensor = self.learner(int(self.phase))(self.task.plain(images))
        return logits[:, : self.task.num_classes].softmax(dim=1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y - max_{k != y} z_k per sample: logits [B, K], labels int64 [B] -> [B]."""
    own = labels.unsqueeze(1)
    others = logits.scatter(1, own, -torch.inf)
    return logits.gather(1, own).squeeze(1) - others.amax(dim=1)


def flagged(areas: Tensor, of_threshold: Tensor, percentile: float) -> Tensor:
    """bool [N]: more than 1 - ``percentile`` of the areas ``of_threshold`` [M] are strictly larger than that of areas [N]."""
    larger = len(of_threshold) - torch.searchsorted(of_threshold.sort().values, areas.contiguous(), right=True)
    return larger > round((1 - percentile) * len(of_threshold), 9)

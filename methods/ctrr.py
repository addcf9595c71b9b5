"""CTRR: cross-entropy plus a contrastive term that keeps the features of one image, and of images predicted alike, together.

Yi, Liu, She, McLeod & Wang, "On Learning Contrastive Representations for Learning with Noisy Labels", CVPR 2022. Two strong
views of each image: q_i = predictor(projector(features(first view))), k_j = the running mean of features and projector on the
second, without gradient; both as unit vectors with coordinates clipped to [1e-4, 1 - 1e-4], G_ij = <q_i, k_j>. The network's
prediction p for a weak view says which pairs belong together: W_ii = 1, W_ij = <p_i, p_j> where that is at least tau, else 0,
each row divided by its sum. loss = CE(y, p) + strength * sum_j W_ij (2 + c_ij), c_ii = -G_ii, c_ij = log(1 - G_ij). After each
update the running mean moves, average <- a average + (1 - a) network.

Differs from the paper: this is the form of the released code (BYOL's predictor and running mean, weighted pairs, rows of sum 1,
one direction), on which its published table depends; the paper's own sum over pairs above the threshold was not at hand. tau is
K^(agreement - 1), so that one range suits any K: 0.4 and 0.8 at K = 10 are 0.60 and 0.90, 0.05 at K = 100 is 0.35. a follows
from ``averaging``, a fraction of the budget. Projector and predictor keep the paper's ratios to the feature dimension F:
F -> 4 F -> F / 4 (512 -> 2048 -> 128) and F / 4 -> F -> F / 4. The schedule is this project's (SGD, half a cosine).
Differs from the official code: the views are this project's; the network sees the strong view before the weak one (there after
it), so the last batch that batch normalisation records in a step is the weak one; a last, smaller batch is kept; 1 - G is at
least 1e-6 (there it can be negative by a rounding). The generalised cross-entropy, ``q``, is not clipped.
State: network, projector and predictor with their optimiser, the running mean of features and projector (parameters; its
statistics of batch normalisation are recorded on its own batches and never used); nothing per sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from data.table import Batch, TrainData
from hparams import hyperparameter
from losses import contrastive_losses, cross_entropy, generalized_cross_entropy
from methods.base import Clock, GivenLabelsConfig, Learner, Method, Step, Task
from methods.parts.moving_average import MovingAverage, averaging_momentum
from models.network import Network


@dataclass(frozen=True)
class CTRRConfig(GivenLabelsConfig):
    """The published defaults for CIFAR-10 with symmetric noise of 20 %: lambda 50, tau 0.4, 550 epochs in batches of 256.
    With the generalised cross-entropy (q 0.6) lambda is 4 to 8. So few epochs as 30 need less of it, too."""

    strength: float = hyperparameter(
        50.0, "weight of the contrastive term, lambda in the paper", legal="[0, inf)", search=(0.5, 200.0), log=True
    )
    agreement: float = hyperparameter(
        0.6,
        "how alike two predictions must be to be a pair: 0 as two uniform ones, 1 fully; tau = K^(agreement - 1)",
        legal="[0, 1]",
        search=(0.2, 0.95),
    )
    averaging: float = hyperparameter(
        0.00093,
        "memory of the running mean of the weights, as a fraction of the budget (0.99 per step at 107,000 steps)",
        legal="(0, 1]",
        search=(0.0005, 0.05),
        log=True,
    )
    q: float = hyperparameter(
        0.0,
        "exponent of a generalised cross-entropy on the given labels, which cannot be smoothed; 0 is cross-entropy",
        legal="[0, 1]",
        search=(0.0, 0.9),
    )


class ContrastiveNetwork(nn.Module):
    """A classifier with a projector on its features, and a predictor on that: float32 [B, C, H, W] -> logits [B, K]."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        num_features, num_projected = network.num_features, max(2, network.num_features // 4)
        self.network = network
        self.projector = perceptron(num_features, 4 * num_features, num_projected)
        self.predictor = perceptron(num_projected, num_features, num_projected)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    @property
    def encoder(self) -> nn.Module:
        """Features and projector, the part that is averaged: images -> [B, F / 4]."""
        return nn.Sequential(self.network.features, self.projector)

    def queries(self, images: Tensor) -> Tensor:
        """images -> [B, F / 4], to be held against the average's keys."""
        predicted: Tensor = self.predictor(self.encoder(images))
        return predicted.float()


class CTRR(Method[Batch]):
    """One learner on given labels, whose features are also compared with a slower copy's."""

    Config = CTRRConfig
    config: CTRRConfig
    summary = "contrastive regularisation, images predicted alike share their features (Yi et al. 2022)"

    def __init__(self, config: CTRRConfig, task: Task) -> None:
        super().__init__(config, task)
        contrastive = ContrastiveNetwork(task.make_net())
        self.learner = Learner(contrastive, config)
        self.average = MovingAverage(contrastive.encoder)

    def batches(self, data: TrainData, clock: Clock) -> Iterable[Batch]:
        return data.shuffled(self.config.batch_size)

    def step(self, batch: Batch, clock: Clock) -> Step:
        net = self.learner.net
        assert isinstance(net, ContrastiveNetwork)
        queries = net.queries(self.task.strong(batch.images))
        keys = self.average(self.task.strong(batch.images))
        logits = self.learner(self.task.view(self.config.augmentation)(batch.images))
        probabilities = logits.detach().softmax(dim=1)
        threshold = self.task.num_classes ** (self.config.agreement - 1)
        contrast = contrastive_losses(queries, keys, probabilities, threshold)
        loss = (self.label_losses(logits, batch.labels) + self.config.strength * contrast).mean()
        self.learner.update(loss, self.learning_rate(clock))
        momentum = averaging_momentum(self.config.averaging, clock, self.task, self.config.batch_size)
        self.average.follow(net.encoder, momentum)
        return Step(loss.detach(), batch.index, probabilities)

    def label_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of the given labels, per sample: logits [B, K], labels int64 [B] -> [B]."""
        if self.config.q:
            return generalized_cross_entropy(logits, labels, self.config.q)
        return cross_entropy(logits, labels, self.config.label_smoothing)

    def predict(self, images: Tensor) -> Tensor:
        probabilities: Tensor = self.learner(self.task.plain(images)).softmax(dim=1)
        return probabilities


def perceptron(num_in: int, num_hidden: int, num_out: int) -> nn.Sequential:
    """One hidden layer with batch normalisation and ReLU."""
    return nn.Sequential(nn.Linear(num_in, num_hidden), nn.BatchNorm1d(num_hidden), nn.ReLU(), nn.Linear(num_hidden, num_out))

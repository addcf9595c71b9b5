"""ALR: adaptive label refinement. Soft labels by temporal ensembling, hardened by an entropy term.

Zhang, Cheng, Lu, Zhou, Li & Zhang, "Efficient Adaptive Label Refinement for Label Noise Learning", arXiv 2502.00386, 2025.
Warm-up: cross-entropy on the given labels. Then per batch: t <- a t + (1 - a) p, with t the given label at the start, and
loss = CE(t, p) + entropy_weight * H(p). The gradient of the entropy raises the logits of the classes above exp(-H(p)): a
threshold per sample and step that nobody sets. The predictions harden, and the labels follow through the running mean.

Differs from the paper: this is a reconstruction. The abstract gives the parts (hard labels, soft labels from the model's
predictions, an entropy loss that gradually hardens the confident ones); the equations here come from those and from the
methods that it builds on (SELC, and the entropy loss of joint optimisation and PENCIL). Every value of a hyperparameter is
ours or SELC's.
Differs from the official code: none was published.
State: t, float32 [N, K], one-hot at the start: 4 K bytes per sample.

Everything but the one term is SELC's own code, so ``entropy_weight`` 0 is SELC bit for bit (adding a zero is exact).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hparams import hyperparameter
from losses import entropy
from methods.selc import SELC, SELCConfig


@dataclass(frozen=True)
class ALRConfig(SELCConfig):
    """SELC's, and the weight of the entropy: small, as the literature's are (0.1 to 0.8)."""

    entropy_weight: float = hyperparameter(
        0.2,
        "weight of the entropy of the prediction, lambda: hardens confident labels; 0 is SELC",
        legal="[0, inf)",
        search=(0.05, 1.6),
        log=True,
    )


class ALR(SELC):
    """SELC whose corrected labels harden."""

    Config = ALRConfig
    config: ALRConfig
    summary = "adaptive label refinement, soft labels from the predictions, hardened by their entropy (Zhang et al. 2025)"

    def refinement_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """CE(t, p) + entropy_weight * H(p) per sample: logits and targets [B, K] -> [B].

        Gradient in the logits: (p_k - t_k) - entropy_weight * p_k (log p_k + H).
        """
        return super().refinement_loss(logits, targets) + self.config.entropy_weight * entropy(logits)

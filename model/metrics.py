"""Top-1 and top-5 error and loss, as sums that workers can add up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LabeledImages(Protocol):
    """What the network learns and is judged from."""

    @property
    def images(self) -> Tensor:
        """float [n, 3, 227, 227] on the network's device."""

    @property
    def labels(self) -> Tensor:
        """int64 [n] on the same device."""


@dataclasses.dataclass(frozen=True)
class Score:
    """How a network did on some images."""

    images: int
    """How many were judged."""
    loss: float
    """Mean cross-entropy in nats."""
    top1_error: float
    """The fraction whose class was not the most probable."""
    top5_error: float
    """The fraction whose class was not among the five most probable."""

    @classmethod
    def of(cls, sums: Tensor) -> Score:
        """From float64 [4]: images, summed loss, top-1 errors, top-5 errors.

        Raises:
            ValueError: if no image was judged.
        """
        images, loss, top1, top5 = sums.tolist()
        if images == 0:
            raise ValueError("no image was judged: the split is empty")
        return cls(int(images), loss / images, top1 / images, top5 / images)


def batch_metrics(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """float64 [4] of one batch: images, summed loss, top-1 errors, top-5 errors.

    Args:
        log_probabilities: [n, classes].
        labels: int64 [n].
    """
    best = log_probabilities.topk(min(5, log_probabilities.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    loss = F.nll_loss(log_probabilities, labels, reduction="sum")
    # Not torch.tensor, whose copy to a GPU would wait for all that is queued there.
    images = torch.full((), len(labels), dtype=torch.float64, device=labels.device)
    counts = [images, loss, (~hits[:, 0]).sum(), (~hits.any(dim=1)).sum()]
    return torch.stack([count.double() for count in counts])


@torch.no_grad()
def evaluate(network: nn.Module, batches: Iterable[LabeledImages], device: torch.device, crops: int = 1) -> Tensor:
    """Judges a network in evaluation mode; float64 [4] of sums on `device`, as `batch_metrics`.

    Args:
        network: gives logits [n, classes].
        batches: with `crops` successive rows an image; never cut within one image.
        device: where the sums are kept.
        crops: 1, or 10 for the paper's ten crops, whose softmax outputs are averaged (section 4.1).
    """
    was_training = network.training
    network.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in batches:
        log_probabilities = F.log_softmax(network(batch.images).float(), dim=1)
        if crops > 1:
            # The logarithm of the mean: of the mean itself, rounded to 0, it would be infinite.
            log_probabilities = log_probabilities.unflatten(0, (-1, crops)).logsumexp(dim=1) - math.log(crops)
        sums += batch_metrics(log_probabilities, batch.labels[::crops])
    network.train(was_training)
    return sums

"""Errors and losses against counts by hand and float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.metrics import Score, evaluate
from tests.model.test_training import Images


class Lookup(nn.Module):
    """Takes an image's first value as the row of a table of logits; counts dropout as a fault."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        return self.table[images[:, 0, 0, 0].long()]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


@pytest.mark.paper
@pytest.mark.parametrize("views", [1, 10])
@pytest.mark.parametrize("spread", [3, 60])
def test_views_are_averaged_after_the_softmax(views: int, spread: float) -> None:
    """Also of a network so sure that float32 rounds probabilities to 0."""
    generator = np.random.default_rng(1)
    logits = generator.normal(0, spread, (30 * views, 6)).astype(np.float32)
    labels = np.repeat(generator.integers(0, 6, 30), views)
    images = torch.arange(30 * views, dtype=torch.float32).reshape(-1, 1, 1, 1)
    cuts = [slice(0, 20 * views), slice(20 * views, None)]
    network = Lookup(torch.from_numpy(logits)).train()
    batches = [Images(images[cut], torch.from_numpy(labels[cut])) for cut in cuts]
    score = Score.of(evaluate(network, batches, torch.device("cpu"), views))
    mean = softmax(logits.astype(np.float64)).reshape(30, views, 6).mean(axis=1)
    assert score.images == 30
    assert score.top1_error == pytest.approx(np.mean(mean.argmax(axis=1) != labels[::views]))
    if spread == 3:  # Of a network that is surer, classes are level in float32.
        assert score.top5_error == pytest.approx(np.mean(mean.argmin(axis=1) == labels[::views]))
    assert score.loss == pytest.approx(-np.log(mean[np.arange(30), labels[::views]]).mean(), rel=1e-5)
    assert network.training


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        Score.of(torch.zeros(4))

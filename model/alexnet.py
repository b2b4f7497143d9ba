"""AlexNet as the paper describes it (Krizhevsky, Sutskever, Hinton, NIPS 2012).

One tower by default; `groups=2` cuts conv2, conv4 and conv5 in two, as the paper's two GPUs did (section 3.2). What
stands in for the paper's normalization, if anything does, has a name: see NORMALIZATIONS in model/recipe.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model.lrn import PAPER_ALPHA, PAPER_K, PAPER_SIZE, LocalResponseNorm
from model.recipe import PAPER_DROPOUT, PAPER_HIDDEN_BIAS

INPUT_SIZE = 227  # The paper says 224 (section 3.5); only 227 gives its 55 x 55 maps with stride 4 and no padding.
PAPER_WEIGHT_STD = 0.01  # section 5

LAST_LAYER = "fc8"
BIASED_LAYERS = ("conv2", "conv4", "conv5", "fc6", "fc7")
HIDDEN_UNITS = {"conv1": 96, "conv2": 256, "conv3": 384, "conv4": 384, "conv5": 256, "fc6": 4096, "fc7": 4096}


class AlexNet(nn.Module):
    """The network of the paper's figure 2: [N, 3, 227, 227] pixels less their mean -> [N, classes] logits.

    Args:
        classes: how many classes the last layer tells apart.
        groups: 1 for one tower (62,378,344 parameters at 1000 classes), 2 for the paper's two (60,965,224).
        dropout: the probability with which fc6 and fc7 outputs are dropped in training (section 4.2).
        normalization: one of NORMALIZATIONS, as `Recipe` checks.

    Raises:
        ValueError: if `groups` is neither 1 nor 2, or there are fewer than two classes.
    """

    def __init__(
        self, classes: int, groups: int = 1, dropout: float = PAPER_DROPOUT, normalization: str = "lrn"
    ) -> None:
        super().__init__()
        if groups not in (1, 2):
            raise ValueError(f"groups is {groups}: 1 (one tower) or 2 (the paper's two GPUs)")
        if classes < 2:
            raise ValueError(f"{classes} class(es): a classifier needs at least two")
        self.conv1 = nn.Conv2d(3, 96, 11, stride=4)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=groups)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=groups)
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=groups)
        self.fc6 = nn.Linear(256 * 6 * 6, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, classes)
        self.norm1, self.norm2 = (local_response(normalization, channels) for channels in (96, 256))
        self.pool_first = normalization == "caffenet"
        self.batch_norms = nn.ModuleDict()
        if normalization == "batch":
            for name, units in HIDDEN_UNITS.items():
                kind = nn.BatchNorm2d if name.startswith("conv") else nn.BatchNorm1d
                self.batch_norms[name] = kind(units, affine=False)
        self.pool = nn.MaxPool2d(3, stride=2)  # overlapping: section 3.4
        self.dropout = nn.Dropout(dropout)

    def features(self, x: Tensor) -> Tensor:
        """The convolutional half: [N, 3, 227, 227] -> [N, 256, 6, 6]."""
        x = self._normalize_and_pool(self.norm1, self._activate("conv1", self.conv1(x)))
        x = self._normalize_and_pool(self.norm2, self._activate("conv2", self.conv2(x)))
        x = self._activate("conv3", self.conv3(x))
        x = self._activate("conv4", self.conv4(x))
        return self.pool(self._activate("conv5", self.conv5(x)))

    def last_hidden(self, x: Tensor) -> Tensor:
        """fc7's outputs, by which the paper compares images (section 6.1): [N, 3, 227, 227] -> [N, 4096]."""
        x = self.features(x).flatten(1)
        x = self.dropout(self._activate("fc6", self.fc6(x)))
        return self.dropout(self._activate("fc7", self.fc7(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc8(self.last_hidden(x))

    def _activate(self, name: str, sums: Tensor) -> Tensor:
        return torch.relu(self.batch_norms[name](sums) if self.batch_norms else sums)

    def _normalize_and_pool(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(self.pool(x)) if self.pool_first else self.pool(norm(x))

    @torch.no_grad()
    def initialize(self, seed: int, hidden_bias: float = PAPER_HIDDEN_BIAS, scheme: str = "gaussian") -> None:
        """Draws every weight by `seed`, as a `scheme` of INITIALIZATIONS says; biases are 0 but for BIASED_LAYERS."""
        generator = torch.Generator().manual_seed(seed)
        for name, layer in self.named_children():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                std = PAPER_WEIGHT_STD if scheme == "gaussian" else math.sqrt(2.0 / layer.weight[0].numel())
                layer.weight.copy_(torch.empty(layer.weight.shape).normal_(0.0, std, generator=generator))
                assert layer.bias is not None
                layer.bias.fill_(hidden_bias if name in BIASED_LAYERS else 0.0)


def local_response(normalization: str, channels: int) -> nn.Module:
    """The layer that stands where the paper normalizes, by its name in NORMALIZATIONS."""
    if normalization == "batch":
        return nn.Identity()
    if normalization == "lrn":
        return LocalResponseNorm(channels, alpha=PAPER_ALPHA, k=PAPER_K)
    return LocalResponseNorm(channels, alpha=PAPER_ALPHA / PAPER_SIZE, k=1.0)

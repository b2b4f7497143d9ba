"""AlexNet as the paper describes it (Krizhevsky, Sutskever, Hinton, NIPS 2012).

One tower by default; `groups=2` cuts conv2, conv4 and conv5 in two, as the paper's two GPUs did (section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.lrn import LocalResponseNorm

INPUT_SIZE = 227  # The paper says 224 (section 3.5); only 227 gives its 55 x 55 maps with stride 4 and no padding.
PAPER_WEIGHT_STD = 0.01  # section 5
PAPER_HIDDEN_BIAS = 1.0  # section 5: conv2, conv4, conv5 and the fully connected hidden layers; 0 elsewhere
PAPER_DROPOUT = 0.5  # section 4.2
FEATURES = 256 * 6 * 6

BIASED_LAYERS = ("conv2", "conv4", "conv5", "fc6", "fc7")


class AlexNet(nn.Module):
    """The network of the paper's figure 2: [N, 3, 227, 227] pixels less their mean -> [N, classes] logits.

    Args:
        classes: how many classes the last layer tells apart.
        groups: 1 for one tower (62,378,344 parameters at 1000 classes), 2 for the paper's two (60,965,224).
        dropout: the probability with which fc6 and fc7 outputs are dropped in training (section 4.2).

    Raises:
        ValueError: if `groups` is neither 1 nor 2 or there are fewer than two classes.
    """

    def __init__(self, classes: int, groups: int = 1, dropout: float = PAPER_DROPOUT) -> None:
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
        self.fc6 = nn.Linear(FEATURES, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, classes)
        self.norm1 = LocalResponseNorm(96)
        self.norm2 = LocalResponseNorm(256)
        self.pool = nn.MaxPool2d(3, stride=2)  # overlapping: section 3.4
        self.dropout = nn.Dropout(dropout)

    def features(self, x: Tensor) -> Tensor:
        """The convolutional half: [N, 3, 227, 227] -> [N, 256, 6, 6]."""
        x = self.pool(self.norm1(torch.relu(self.conv1(x))))
        x = self.pool(self.norm2(torch.relu(self.conv2(x))))
        x = torch.relu(self.conv3(x))
        x = torch.relu(self.conv4(x))
        return self.pool(torch.relu(self.conv5(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1)
        x = self.dropout(torch.relu(self.fc6(x)))
        x = self.dropout(torch.relu(self.fc7(x)))
        return self.fc8(x)

    @torch.no_grad()
    def initialise(self, seed: int, hidden_bias: float = PAPER_HIDDEN_BIAS) -> None:
        """Draws every weight from N(0, 0.01) by `seed`; biases are `hidden_bias` in the layers of section 5, else 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, layer in self.named_children():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.copy_(torch.empty(layer.weight.shape).normal_(0.0, PAPER_WEIGHT_STD, generator=generator))
                assert layer.bias is not None
                layer.bias.fill_(hidden_bias if name in BIASED_LAYERS else 0.0)


def parameter_count(network: nn.Module) -> int:
    """The number of trained values."""
    return sum(p.numel() for p in network.parameters())

"""How the paper trains (section 5), and the named recipes: complete, frozen configurations.

Without torch, so that a command line can show the recipes at once.
"""

from __future__ import annotations

import dataclasses
import math

PAPER_HIDDEN_BIAS = 1.0  # section 5: conv2, conv4, conv5 and the fully connected hidden layers; 0 elsewhere
PAPER_DROPOUT = 0.5  # section 4.2

NORMALIZATIONS = ("lrn", "caffe", "caffenet", "batch")
"""
lrn: the paper's (section 3.3).
caffe: with k = 1 and alpha times the mean instead of the sum, as Caffe computes it (models/bvlc_alexnet).
caffenet: the same, but after the pooling (models/bvlc_reference_caffenet).
batch: none of it; every hidden layer's sums are normalized over the batch instead, without scale and shift, as in
    cvjena/cnn-models' AlexNet. A batch is what one worker has in the network at once: the literature keeps it so with
    many workers, since statistics over all would make another loss (Goyal et al., arXiv 1706.02677, section 2.3), and
    torch.nn.SyncBatchNorm, which exchanges them, has no CPU form. Evaluation and checkpoints take the mean of all
    workers' running statistics.
"""

INITIALIZATIONS = ("gaussian", "he")
"""gaussian: N(0, 0.01) (section 5); he: N(0, 2 / inputs of a unit) (He et al. 2015), Caffe's "msra"."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what is learned, but for the data; the defaults are the paper's."""

    batch_size: int = 128
    """Images per step over all workers (section 5)."""
    epochs: int = 90
    """At most this many; "roughly 90 cycles" (section 5)."""
    lr: float = 0.01
    """Learning rate at the start (section 5)."""
    momentum: float = 0.9
    """Section 5."""
    weight_decay: float = 0.0005
    """Section 5."""
    biases: str = "paper"
    """paper: one rate for all layers, and decay on "the weight variable" w (section 5), which is read as every weight
    and bias; caffe: twice the rate and no decay (lr_mult 2, decay_mult 0 in models/bvlc_alexnet/train_val.prototxt)."""
    optimizer: str = "sgd"
    """sgd: the paper's update; lars: with a rate scaled for each layer (model/optimizer.py)."""
    trust_coefficient: float = 0.001
    """LARS's trust coefficient (arXiv 1708.03888)."""
    schedule: str = "plateau"
    """plateau: the paper's, a tenth when the validation metric stops improving; poly: lr * (1 - step / steps) ** power
    over all epochs, as Caffe's policy of that name."""
    power: float = 2.0
    """Of the poly schedule."""
    warm_up_epochs: int = 0
    """Epochs over which the rate rises linearly to what the schedule says; the paper has none."""
    normalization: str = "lrn"
    """lrn (section 3.3), caffe, caffenet or batch: see NORMALIZATIONS."""
    initialization: str = "gaussian"
    """Of the weights: gaussian, N(0, 0.01) (section 5), or he."""
    hidden_bias: float = PAPER_HIDDEN_BIAS
    """Initial bias of conv2, conv4, conv5, fc6 and fc7 (section 5)."""
    dropout: float = PAPER_DROPOUT
    """On the outputs of fc6 and fc7 (section 4.2)."""
    groups: int = 1
    """1: one tower; 2: the paper's two GPUs (section 3.2)."""
    color: str = "eigenvalue"
    """How the color shift scales (section 4.1): eigenvalue, std (the 2012 source's) or none."""
    plateau_metric: str = "top1_error"
    """What must improve on the validation set: top1_error (section 5: "the validation error rate") or loss."""
    patience: int = 3
    """Epochs without an improvement before the rate drops. The paper judged by hand and gives no number."""
    gradient_compression: str = "none"
    """none: workers exchange gradients in float32; bfloat16: in half the bytes, with 8 significant bits."""
    seed: int = 0
    """Of the initial weights, the plan and dropout."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "momentum", "weight_decay", "hidden_bias", "trust_coefficient", "power", "warm_up_epochs"):
            if not math.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number, not below 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1)")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                text = name.replace("_", " ")
                raise ValueError(f"the {text} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"the seed is {self.seed}; it must lie in [0, 2^63)")

    def rate(self, plateau_lr: float, epoch: int, step: int, steps: int) -> float:
        """The learning rate of one step.

        Args:
            plateau_lr: what the plateau schedule has come to; the poly schedule does not ask it.
            epoch: epochs completed.
            step: steps completed of the epoch under way.
            steps: steps in an epoch.
        """
        done = epoch * steps + step
        # Goyal et al. 2017.
        rise = min(1.0, (done + 1) / (self.warm_up_epochs * steps)) if self.warm_up_epochs else 1.0
        if self.schedule == "plateau":
            return plateau_lr * rise
        return self.lr * rise * (1.0 - done / (self.epochs * steps)) ** self.power


CHOICES = {
    "biases": ("paper", "caffe"),
    "optimizer": ("sgd", "lars"),
    "schedule": ("plateau", "poly"),
    "normalization": NORMALIZATIONS,
    "initialization": INITIALIZATIONS,
    "plateau_metric": ("top1_error", "loss"),
    "gradient_compression": ("none", "bfloat16"),
}
"""What the fields that name a choice may hold; the plan checks `color`, and the network `groups`."""

RECIPES = {
    # The smallest deviation from the paper that learns reliably: BVLC's Caffe reproduction starts the same layers at
    # 0.1; docs/paper.md says why.
    #   Command:   python jobs/train.py --data SHARDS --storage RUNS --name NAME
    #   Hardware:  one GPU; with --workers, as many as divide 128 images sensibly (up to 8).
    #   Expected:  42.9 % top-1, 19.8 % top-5 error by the center crop: BVLC's AlexNet, two towers, by
    #              models/bvlc_alexnet/readme.md (57.1 and 80.2 % right). Not run to its end here.
    "default": Recipe(hidden_bias=0.1),
    # To the letter, as far as the letter goes; docs/paper.md names the rest.
    #   Command:   python jobs/train.py --recipe paper --groups 2 ...
    #   Hardware:  one GPU; the paper's were two GTX 580 for five to six days.
    #   Expected:  40.7 % top-1, 18.2 % top-5 by ten crops: the paper's table 2, one network of five convolutions. With
    #              ten classes and biases of 1 most units fell asleep at once (docs/paper.md), and BVLC saw flat loss.
    "paper": Recipe(),
    # Thousands of images a step: LARS with warm-up (You, Gitman, Ginsburg, arXiv 1708.03888; arXiv 1709.05011 goes to
    # 32,768 images with batch normalization). The rate of 10, the trust of 0.001, poly of power 2 and 100 epochs are
    # those of the authors' solver for 8,192 images, models/bvlc_alexnet/solver_8K.prototxt of borisgin/nvcaffe, which
    # bounds LARS by the rate and has no warm-up; its twin for batch normalization rises over 600 steps, four epochs.
    #   Command:   python jobs/train.py --recipe large-batch --workers 8 --gpus ...
    #   Hardware:  8 to 32 GPUs, with 256 to 1,024 images of a step on each.
    #   Expected:  as the default recipe, about 43 % top-1 error by the center crop: "without loss in accuracy" up to
    #              8,192 images, says the abstract of arXiv 1708.03888. Not run to its end here.
    "large-batch": Recipe(
        batch_size=8192,
        epochs=100,
        lr=10.0,
        optimizer="lars",
        schedule="poly",
        power=2.0,
        warm_up_epochs=2,
        hidden_bias=0.1,
    ),
    # Batch normalization instead of LRN and dropout: AlexNet_cvgj/train.prototxt and train.solver of cvjena/cnn-models
    # (Simon et al., arXiv 1612.01452). 320,000 steps of 256 are 64 epochs. Theirs also normalizes the pixels by a batch
    # norm of the input; ours subtracts the mean, and the first layer's norm takes out the scale.
    #   Command:   python jobs/train.py --recipe batchnorm ...
    #   Hardware:  one GPU with all 256 images in it at once (--workers 1): statistics are of what is in a network at
    #              once, there 128.
    #   Expected:  39.9 % top-1, 18.1 % top-5 error by the center crop (their README). Not run to its end here.
    "batchnorm": Recipe(
        batch_size=256,
        epochs=64,
        lr=0.05,
        biases="caffe",
        schedule="poly",
        power=1.0,
        normalization="batch",
        initialization="he",
        hidden_bias=0.0,
        dropout=0.0,
        groups=2,
        color="none",
    ),
}
"""Complete, named configurations. A recipe's comment says the command, the hardware it is meant for, and the score to
expect with its source."""

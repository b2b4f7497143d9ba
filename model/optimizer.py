"""The paper's update (section 5), and LARS, which keeps it stable with thousands of images a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from model.recipe import Recipe


class LARS(torch.optim.SGD):
    """SGD with momentum whose rate is scaled for each parameter: You, Gitman, Ginsburg, arXiv 1708.03888.

    v <- m v + lr * q * (g + decay * w),  q = trust_coefficient * |w| / (|g| + decay * |w|),  w <- w - v

    q is 1 where |w| or |g| is 0, as in the authors' Caffe (`SGDSolver::GetLocalRate`), which also scales biases. torch
    has no such optimizer. The gradients are left scaled: after a step, they hold q * (g + decay * w).

    `groups` have `params`, `lr` and `weight_decay` each.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, trust_coefficient: float) -> None:
        # SGD itself adds no decay: it would not be scaled.
        own = [{**group, "weight_decay": 0.0, "scaled_decay": group["weight_decay"]} for group in groups]
        super().__init__(own, momentum=momentum, fused=True)
        self._trust_coefficient = trust_coefficient

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            decay = group["scaled_decay"]
            for parameter in group["params"]:
                gradient = parameter.grad
                weight_norm = torch.linalg.vector_norm(parameter)
                norm = torch.linalg.vector_norm(gradient)
                scale = self._trust_coefficient * weight_norm / (norm + decay * weight_norm)
                # A tensor's condition stays on its device: nothing waits for it.
                scale = torch.where((weight_norm > 0) & (norm > 0), scale, torch.ones_like(scale))
                gradient.add_(parameter, alpha=decay).mul_(scale)
        return super().step(closure)


def make_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """The recipe's optimizer, with one group for weights and one for biases; see `set_rate` for their rate."""
    named = list(network.named_parameters())
    caffe = recipe.biases == "caffe"
    groups: list[dict[str, Any]] = [
        {
            "params": [parameter for name, parameter in named if name.endswith("bias") == biases],
            "rate_scale": 2.0 if biases and caffe else 1.0,
            "lr": recipe.lr * (2.0 if biases and caffe else 1.0),
            "weight_decay": 0.0 if biases and caffe else recipe.weight_decay,
        }
        for biases in (False, True)
    ]
    if recipe.optimizer == "lars":
        return LARS(groups, recipe.momentum, recipe.trust_coefficient)
    return torch.optim.SGD(groups, momentum=recipe.momentum, fused=True)


@torch.no_grad()
def set_rate(optimizer: torch.optim.SGD, lr: float) -> None:
    """Gives every group the rate `lr`, by its own scale, and keeps the velocity as it is.

    The paper's velocity v contains the rate (section 5), torch's momentum b does not: v = -lr * b. At a change of the
    rate, b is scaled so that v stays, which makes torch's update the paper's.
    """
    for group in optimizer.param_groups:
        rate = lr * group["rate_scale"]
        if rate == group["lr"]:
            continue
        for parameter in group["params"]:
            if "momentum_buffer" in optimizer.state.get(parameter, {}):
                optimizer.state[parameter]["momentum_buffer"].mul_(group["lr"] / rate)
        group["lr"] = rate


def resume_rate(optimizer: torch.optim.SGD, lr: float) -> None:
    """Tells an optimizer under which rate its restored momentum was made."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate_scale"]

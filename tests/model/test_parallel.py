"""Gradients and statistics averaged over workers, and a host that does not run ahead of its GPU."""

import copy
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.parallel import STEPS_AHEAD, InFlightStepLimit, data_parallel, no_sync
from model.recipe import Recipe
from model.training import Trainer, Worker
from tests.model.test_training import Images
from tests.ranks import run_ranks

WORLD = 3  # Of two workers' values, the sum does not depend on their order.
FEATURES = 300
ROWS = torch.arange(30.0).reshape(10, 3) ** 2  # To normalize: four, three and three of them on the workers.


def averaged(network: DistributedDataParallel, images: Tensor, steps: int) -> list[list[Tensor]]:
    """The gradients that the workers exchanged in each of so many equal steps of two micro-batches."""
    found = []
    for _ in range(steps):
        network.zero_grad()
        with no_sync(network):
            network(images[:2]).square().sum().backward()
        network(images[2:]).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None])
    return found


def steps(rank: int, world: int, folder: Path) -> None:
    """Saves this worker's own gradients, the averaged ones of equal steps, and the statistics of another's rows."""
    torch.manual_seed(rank)
    own = nn.Sequential(*(nn.Linear(FEATURES, FEATURES) for _ in range(8)))
    images, sent = torch.randn(4, FEATURES), []
    all_reduce = torch.distributed.all_reduce

    def count(tensor: Tensor, async_op: bool = False) -> object:
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, async_op=async_op)

    # DDP gives all the weights of rank 0.
    network = data_parallel(own, world)
    compressed = data_parallel(copy.deepcopy(own), world, "bfloat16")
    assert isinstance(network, DistributedDataParallel)
    assert isinstance(compressed, DistributedDataParallel)
    exact = averaged(network, images, 3)
    with mock.patch.object(torch.distributed, "all_reduce", count):
        rounded = averaged(compressed, images, 2)
    own.zero_grad()
    own(images).square().sum().backward()
    torch.save([exact, rounded, [parameter.grad for parameter in own.parameters()], sent], folder / f"rank{rank}")

    normalized = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2))
    trainer = Trainer(normalized, Recipe(batch_size=len(ROWS)), Worker(rank, world, torch.device("cpu")))
    rows = ROWS.tensor_split(WORLD)[rank]
    trainer.step([Images(rows, torch.zeros(len(rows), dtype=torch.int64))])
    torch.save(dict(normalized.named_buffers()), folder / f"statistics{rank}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each worker has saved."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(WORLD, folder, steps, folder)
    return folder


def test_batch_normalization_keeps_the_mean_of_each_workers_own_statistics(folder: Path) -> None:
    # torch's momentum is a tenth.
    parts = np.array_split(ROWS.double().numpy(), WORLD)
    means, variances = [part.mean(axis=0) for part in parts], [part.var(axis=0, ddof=1) for part in parts]
    for rank in range(WORLD):
        kept = torch.load(folder / f"statistics{rank}", weights_only=True)
        np.testing.assert_allclose(kept["0.running_mean"], 0.1 * np.mean(means, axis=0), rtol=1e-6)
        np.testing.assert_allclose(kept["0.running_var"], 0.9 + 0.1 * np.mean(variances, axis=0), rtol=1e-6)


def test_the_first_step_averages_as_all_others_do_to_the_bit(folder: Path) -> None:
    """A resumed run's first step is another run's later one. In bfloat16 half the bytes are sent."""
    ranks = [torch.load(folder / f"rank{rank}", weights_only=True) for rank in range(WORLD)]
    alone = [torch.stack(each).double().mean(dim=0) for each in zip(*(own for _, _, own, _ in ranks), strict=True)]
    largest = [float(torch.stack(each).abs().max()) for each in zip(*(own for _, _, own, _ in ranks), strict=True)]
    for exact, rounded, _, sent in ranks:
        for found, precision in ((exact, 1e-4), (rounded, 2.0**-7)):
            for gradient, expected, scale in zip(found[0], alone, largest, strict=True):
                torch.testing.assert_close(gradient.double(), expected, rtol=precision, atol=precision * scale)
            for later in found[1:]:
                assert all(torch.equal(one, two) for one, two in zip(found[0], later, strict=True))
        assert all(torch.equal(one, one.bfloat16().float()) for one in rounded[0])
        assert all(torch.equal(one, two) for one, two in zip(rounded[0], ranks[0][1][0], strict=True))
        assert sorted(sent) == sorted(2 * [2 * gradient.numel() for gradient in alone])


def test_no_more_than_two_steps_are_queued_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [mock.Mock() for _ in range(5)]
    stream = mock.Mock(record_event=mock.Mock(side_effect=events))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    limit = InFlightStepLimit(torch.device("cuda", 0))
    for steps in range(1, 6):
        limit.after_step()
        waited_for = [event.synchronize.called for event in events]
        assert waited_for == [steps - number > STEPS_AHEAD for number in range(5)]

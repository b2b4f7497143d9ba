"""How many workers a run has and what each gets: as asked, as the nodes have room, or refused."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest

from jobs.cli.workers import Workers
from jobs.cluster.nodes import Node
from jobs.training.config import TrainConfig
from jobs.training.resources import Resources, check_shortage, few_images
from model.recipe import RECIPES

CLUSTER = "10.0.0.0:6379"


def test_a_batch_that_the_most_workers_cannot_share_is_refused() -> None:
    config = TrainConfig("data", "storage", "run", workers=Workers(2, 8), batch_size=7)
    with pytest.raises(ValueError, match="8 workers cannot share a batch of 7: use fewer --workers or a larger"):
        config.make_recipe()
    assert dataclasses.replace(config, workers=Workers(2, 7)).make_recipe().batch_size == 7


@pytest.mark.parametrize(
    ("workers", "batch_size", "micro_batch", "part"),
    [
        (Workers(1, 1), 128, 1024, None),
        (Workers(1, 1), 129, 128, 129),
        (Workers(2, 2), 257, 128, 129),
        (Workers(2, 2), 256, 128, None),
        (Workers(2, 4), 6, 128, 1),  # With four, two have 1
        (Workers(1, 1), 4, 1, 4),
    ],
)
def test_batch_normalization_refuses_a_single_image(
    workers: Workers, batch_size: int, micro_batch: int, part: int | None
) -> None:
    told = f"batch normalization needs two images, and of . worker.s. one would have {part} of"
    with pytest.raises(ValueError, match=told) if part else contextlib.nullcontext():
        workers.check_single_images(batch_size, micro_batch)


def cluster(*nodes: tuple[int, int]) -> list[Node]:
    """Nodes of so many cores and GPUs."""
    return [Node(str(i), f"10.0.0.{i}", gpus, cpus) for i, (cpus, gpus) in enumerate(nodes)]


@pytest.mark.parametrize(
    ("workers", "nodes", "cores"),
    [
        (Workers(2, 4), [(8, 0)], 4),  # What is there, for the two that start
        (Workers(2, 4), [(24, 3)], 8),  # One for each GPU that is there
        (Workers(2, 4), [(2, 1)], 2),  # The second comes with a node of its own
        (None, [(16, 8)], 2),
        (Workers(16, 16), [(4, 0), (96, 8)], 12),
        (None, [(8, 0), (8, 0)], 8),  # No worker is spread over nodes
        (Workers(3, 3), [(8, 0), (8, 0)], 4),
        (Workers(2, 2), [(4, 1), (4, 1), (32, 0)], 4),
        (Workers(4, 4), [(2, 0)], 1),  # Nodes are to come
    ],
)
def test_a_worker_has_its_share_of_the_cores_of_its_node(
    workers: Workers | None, nodes: list[tuple[int, int]], cores: int
) -> None:
    found = Resources.of(TrainConfig("data", "storage", "run", workers=workers), cluster(*nodes))
    gpus = sum(count for _, count in nodes)
    default = Workers(max(gpus, 1), max(gpus, 1))
    assert found == Resources(workers or default, gpus > 0, cores)


def test_gpus_are_refused_on_a_machine_without_and_awaited_on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig("data", "storage", "run", workers=Workers(8, 8), gpus=True)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match="--gpus was given, and Ray sees no GPU on this machine: leave it out"):
        Resources.of(config, cluster((8, 0)))
    monkeypatch.setenv("RAY_ADDRESS", CLUSTER)
    with pytest.raises(ValueError, match=r"no node with a GPU is there yet.*: give --cpus-per-worker, as 12"):
        Resources.of(config, cluster((0, 0)))
    assert Resources.of(dataclasses.replace(config, cpus_per_worker=12), cluster((0, 0))).cpus_per_worker == 12


def test_workers_that_fit_no_node_are_waited_for_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resources, nodes = Resources(Workers(2, 2), False, 12), cluster((16, 0), (8, 0))
    monkeypatch.setenv("RAY_ADDRESS", CLUSTER)
    check_shortage(resources, nodes)
    said = capsys.readouterr().out
    assert "waiting for the cluster to grow: the run needs room for 2 worker(s) of 12 core(s) each" in said
    assert "and there is room for 1 now (10.0.0.0 with 16 core(s) and 0 GPU(s), 10.0.0.1 with 8" in said
    check_shortage(Resources(Workers(2, 2), False, 8), nodes)
    assert not capsys.readouterr().out
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ValueError, match=r"room for 2 worker.*use fewer --workers"):
        check_shortage(resources, nodes)


def test_gpus_that_get_few_images_are_told_of_the_recipe_for_them() -> None:
    for workers, gpus, recipe in ((4, True, "default"), (5, False, "default"), (32, True, "large-batch")):
        assert few_images(Resources(Workers(1, workers), gpus, 1), RECIPES[recipe]) is None
    warning = few_images(Resources(Workers(1, 5), True, 1), RECIPES["default"])
    assert warning is not None
    assert "a GPU gets 25 of a batch's 128 images" in warning
    assert "--recipe large-batch with its 8192 images" in warning

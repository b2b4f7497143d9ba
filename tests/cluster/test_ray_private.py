"""Fails when Ray changes a private name that jobs/cluster/ray_private.py relies on."""

from __future__ import annotations

import importlib
import inspect
import subprocess

import pytest
from ray._private import ray_constants, services
from ray.train.torch import TorchTrainer

from jobs.cluster import ray_private
from jobs.training.backend import NodeTrainer


def test_the_train_context_has_the_preemption_context() -> None:
    context = importlib.import_module("ray.train.v2._internal.execution.context")
    assert "preemption_context" in inspect.signature(context.TrainContext).parameters
    preemption = importlib.import_module("ray.train.v2._internal.execution.preemption")
    assert preemption.PreemptionContext().preemption_info is None


def test_ray_starts_its_processes_through_the_names_that_a_local_start_replaces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    popen = services.ConsolePopen
    assert issubclass(popen, subprocess.Popen)
    assert "ConsolePopen(" in inspect.getsource(services.start_ray_process)
    with ray_private.local_start():
        assert services.ConsolePopen.keywords == {"process_group": 0}
        assert services.get_node_ip_address() == "127.0.0.1"
    assert services.ConsolePopen is popen


def test_the_trainer_calls_the_hooks_and_a_local_ray_has_no_cleaner(monkeypatch: pytest.MonkeyPatch) -> None:
    source = inspect.getsource(TorchTrainer.fit) + inspect.getsource(TorchTrainer._initialize_and_run_controller)
    assert "callbacks=self._create_default_callbacks()" in source
    assert "self._register_sigint_handler(controller)" in source
    trainer = NodeTrainer(lambda: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    names = [type(one).__name__ for one in trainer._create_default_callbacks()]
    monkeypatch.delenv("RAY_ADDRESS")
    local = [type(one).__name__ for one in trainer._create_default_callbacks()]
    assert "PlacementGroupCleanerCallback" in names
    assert local == [name for name in names if name != "PlacementGroupCleanerCallback"]

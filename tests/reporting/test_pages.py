"""The commands that the pages for cluster users show are commands that the jobs take."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tyro

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    "train": "TrainConfig",
    "doctor": "DoctorConfig",
    "benchmark": "BenchmarkConfig",
    "evaluate": "EvaluateConfig",
}


def commands(page: str) -> list[tuple[str, list[str]]]:
    """The jobs that a page shows in indented lines or in comments, each with its arguments."""
    lines = re.findall(r"^(?:    |# {2,})(.*)$", (ROOT / page).read_text(), re.MULTILINE)
    text = "\n".join(lines).replace("\\\n", " ")
    found = re.findall(r"python jobs/(\w+)\.py(.*)", text)
    return [(job, shlex.split(rest)) for job, rest in found if job in CONFIGS]


@pytest.mark.parametrize(
    ("page", "jobs"),
    [
        ("CLUSTER.md", {"train", "doctor", "benchmark"}),
        ("README.md", {"train", "doctor", "evaluate"}),
        ("cluster.yaml", {"train"}),
        ("cluster-gcp.yaml", {"train"}),
    ],
)
def test_every_command_shown_is_taken(page: str, jobs: set[str]) -> None:
    shown = commands(page)
    assert {job for job, _ in shown} >= jobs
    for job, arguments in shown:
        config: Any = getattr(importlib.import_module(f"jobs.{job}"), CONFIGS[job])
        tyro.cli(config, args=arguments)


def test_a_flag_that_is_not_there_is_noticed() -> None:
    config: Any = importlib.import_module("jobs.doctor").DoctorConfig
    with pytest.raises(SystemExit):
        tyro.cli(config, args=["--worker", "8"])

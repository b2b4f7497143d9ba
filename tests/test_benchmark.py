"""The benchmark's verdict, and that its rates are of what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.benchmark import Rates

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("loader", "network", "verdict"),
    [
        (1000.0, 100.0, "the network is the limit: the loader could feed 10.0 times as much"),
        (90.0, 100.0, "the loader is the limit, at 90% of what the network takes and 45% of bare decoding"),
        (105.0, 100.0, "the loader is the limit, at 105% of what the network takes"),
    ],
)
def test_the_verdict_names_the_slower_part(loader: float, network: float, verdict: str) -> None:
    rates = Rates(200.0, loader, network, min(loader, network), 0.0)
    assert rates.verdict.startswith(verdict)


@pytest.mark.slow
def test_the_benchmark_writes_its_rates(shard_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "rates.json"
    arguments = ["--data", str(shard_set), "--batch-size", "8", "--steps", "2", "--rounds", "1", "--no-gpu"]
    done = subprocess.run(
        [sys.executable, "jobs/benchmark.py", *arguments, "--json", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rates = json.loads(out.read_text())
    # On a CPU, nothing feeds or is fed faster than its parts.
    assert rates["decode_limit_images_per_s"] > rates["network_images_per_s"]
    assert rates["loader_images_per_s"] > rates["network_images_per_s"]
    assert rates["train_images_per_s"] > 0
    assert 0 <= rates["data_wait"] < 1
    assert rates["verdict"] in done.stdout

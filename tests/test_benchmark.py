"""The benchmark's verdict, and that its rates are of what they say."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jobs.benchmark import BenchmarkConfig, main
from jobs.stages import ADVICE, Chains, Findings, Rates, Stages, stated_ms

ROOT = Path(__file__).resolve().parent.parent
# Rates at which a batch of 100 takes 10 ms to read, 65 in the graph, 15 of them to augment; 100 forward and 300 with
# backward.
CHAINS = Chains(read=10_000.0, graph=100 / 0.065, augment=100 / 0.015, forward=1_000.0, gradients=100 / 0.3)


def findings(loader_ms: float, network_ms: float, all_reduce: float | None = None, machines: int = 1) -> Findings:
    """Of batches of 100 that take so long; training goes as the slower of the two."""
    slower = max(loader_ms, network_ms)
    rates = Rates(2_000.0, 1e5 / loader_ms, 1e5 / network_ms, 1e5 / slower, 0.0, 2.5)
    return Findings(rates, Stages.of(rates, CHAINS, 100, all_reduce), 2, 100, machines)


def test_stages_are_what_each_chain_adds() -> None:
    stages = findings(80.0, 310.0, 40.0).stages
    expected = {"read": 10, "decode": 50, "augment": 15, "hand_over": 15, "forward": 100, "backward": 200, "update": 10}
    assert dataclasses.asdict(stages) == pytest.approx({**expected, "all_reduce": 40})
    # A whole measured a little faster than its part: that stage is 0, never less.
    assert findings(50.0, 290.0).stages.hand_over == 0
    assert findings(50.0, 290.0).stages.update == 0


@pytest.mark.parametrize(
    ("found", "limit", "words"),
    [
        (findings(80, 800), "update", "the network is the limit: update; the loader could feed 10.0 times as much"),
        (findings(80, 310), "backward", "the network is the limit: backward; the loader could feed 3.9 times as much"),
        (
            findings(330, 310),
            "hand_over",
            "the loader is the limit: hand-over, 2 threads; it gives 94% of what the network",
        ),
        (
            findings(65, 60),
            "decode",
            "the loader is the limit: decode, 2 threads; it gives 92% of what the network takes",
        ),
        (findings(300, 310), "hand_over", "the loader is the limit: hand-over, 2 threads; it gives 103% of what"),
        (findings(80, 310, 1000, 1), "backward", "the network is the limit: backward"),
        (
            findings(80, 310, 310, 4),
            "all_reduce",
            "the exchange between machines is the limit: all-reduce, 60% of a step",
        ),
        (findings(80, 310, None, 4), "backward", "the network is the limit: backward"),
    ],
)
def test_the_verdict_names_the_stage_that_decides(found: Findings, limit: str, words: str) -> None:
    assert found.limit == limit
    assert found.verdict.startswith(words)
    assert any(ADVICE[limit] in line for line in found.lines())


def test_the_estimate_is_the_papers_ninety_epochs() -> None:
    """Four machines, 100 images each in 310 ms, and 2 * 3 / 4 of a 40 ms exchange between two."""
    assert findings(80, 310, 40, 4).hours == pytest.approx(90 * 1_281_167 / 400 * (0.310 + 0.060) / 3600)
    assert findings(80, 310, 40, 1).hours == pytest.approx(90 * 1_281_167 / 100 * 0.310 / 3600)
    # 250 MB at 10 Gbit/s: a fifth of a second.
    assert stated_ms(250_000_000, 10.0) == pytest.approx(200.0)


def test_what_was_not_measured_is_said() -> None:
    assert "  all-reduce                  not measured: give --network-gbit" in findings(80, 310).lines()


def test_checking_a_gpu_where_there_is_none_is_refused(shard_set: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    with pytest.raises(ValueError, match="--check-gpu needs a GPU"):
        main(BenchmarkConfig(data=shard_set, check_gpu=True))


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
    assert 0 < rates["host_us_per_image"] < 1e4
    assert rates["verdict"] in done.stdout
    assert rates["advice"] in done.stdout
    assert rates["hours_90_epochs"] > 0
    times = rates["stages_ms"]
    assert list(times) == ["read", "decode", "augment", "hand_over", "forward", "backward", "update", "all_reduce"]
    assert all(value >= 0 for value in times.values())
    # Stages of the network add up to its step; an all-reduce moves 4 bytes of each of 58 million parameters.
    network = times["forward"] + times["backward"] + times["update"]
    assert network >= 0.99 * 8e3 / rates["network_images_per_s"]
    assert min(times["forward"], times["backward"], times["read"], times["decode"], times["all_reduce"]) > 0

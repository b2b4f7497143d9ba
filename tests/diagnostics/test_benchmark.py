"""The benchmark's verdict, and that its rates are of what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jobs.benchmark import BenchmarkConfig, Rates, main
from tests.processes import run_here


def rates(loader_ms: float, network_ms: float) -> Rates:
    """Of batches of 100 that take so long; training goes as the slower of the two."""
    slower = max(loader_ms, network_ms)
    return Rates(2_000.0, 1e5 / loader_ms, 1e5 / network_ms, 1e5 / slower, 0.0, 2.5, 2, 100)


@pytest.mark.parametrize(
    ("found", "words", "advice"),
    [
        (rates(80, 310), "the network is the limit; the loader could feed 3.9 times as much", "a faster device"),
        (
            rates(65, 60),
            "the loader is the limit, with 2 threads: it gives 92% of what the network takes and 77% of bare decoding",
            "more cores",
        ),
        (rates(300, 310), "the loader is the limit, with 2 threads: it gives 103% of what", "more cores"),
    ],
)
def test_the_verdict_names_what_decides(found: Rates, words: str, advice: str) -> None:
    assert found.verdict()[0].startswith(words)
    assert any(line.startswith("to go faster: ") and advice in line for line in found.lines())


def test_the_estimate_is_the_papers_ninety_epochs() -> None:
    assert rates(80, 310).hours == pytest.approx(90 * 1_281_167 / 100 * 0.310 / 3600)


def test_checking_a_gpu_where_there_is_none_is_refused(shard_set: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    with pytest.raises(ValueError, match="--check-gpu needs a GPU"):
        main(BenchmarkConfig(data=shard_set, check_gpu=True))


@pytest.mark.slow
def test_the_benchmark_writes_its_rates(shard_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "rates.json"
    arguments = ["--data", shard_set, "--batch-size", 8, "--steps", 2, "--rounds", 1, "--no-gpu"]
    done = run_here("benchmark", *arguments, "--json", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    # On a CPU, nothing feeds or is fed faster than its parts.
    assert found["decode_limit_images_per_s"] > found["network_images_per_s"]
    assert found["loader_images_per_s"] > found["network_images_per_s"]
    assert found["train_images_per_s"] > 0
    assert 0 <= found["data_wait"] < 1
    assert 0 < found["host_us_per_image"] < 1e4
    assert found["verdict"] in done.stdout
    assert found["advice"] in done.stdout
    assert found["hours_90_epochs"] > 0
    # The profiler's table names what convolves, forward and backward.
    assert "convolution" in done.stdout

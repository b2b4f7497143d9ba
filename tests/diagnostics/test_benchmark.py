"""The benchmark's verdict, and that its rates are of what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jobs.benchmark import BenchmarkConfig, Rates, main
from pipeline.staging.decoded_cache import stage_pixels
from tests.processes import run_here


@pytest.mark.parametrize(
    ("loader_ms", "network_ms", "words", "advice"),
    [
        (80, 310, "the network is the limit; the loader could feed 3.9 times as much", "a faster device"),
        (65, 60, "the loader is the limit, with 2 threads: it gives 92% of what the network takes", "more cores"),
        (300, 310, "the loader is the limit, with 2 threads: it gives 103% of what", "more cores"),
    ],
)
def test_the_verdict_names_what_decides(loader_ms: float, network_ms: float, words: str, advice: str) -> None:
    """Of batches of 100 that take so long."""
    found = Rates(2_000.0, 1e5 / loader_ms, 1e5 / network_ms, 100.0, 0.0, 2.5, 2, 100)
    assert found.verdict()[0].startswith(words)
    assert any(line.startswith("to go faster: ") and advice in line for line in found.lines())


def test_checking_a_gpu_where_there_is_none_is_refused(shard_set: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    with pytest.raises(ValueError, match="--check-gpu needs a GPU"):
        main(BenchmarkConfig(data=shard_set, check_gpu=True))


def test_a_set_of_pixels_is_refused(shard_set: Path, tmp_path: Path) -> None:
    pixels = stage_pixels(str(shard_set), tmp_path, print, 1)
    with pytest.raises(ValueError, match=f"--data {pixels} is staged as pixels"):
        main(BenchmarkConfig(data=pixels, gpu=False))


@pytest.mark.slow
def test_the_benchmark_writes_its_rates(shard_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "rates.json"
    arguments = ["--data", shard_set, "--batch-size", 8, "--steps", 2, "--rounds", 1, "--no-gpu"]
    done = run_here("benchmark", *arguments, "--json", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["hours_90_epochs"] == pytest.approx(90 * 1_281_167 / found["train_images_per_s"] / 3600)
    # On a CPU, nothing feeds or is fed faster than its parts.
    assert found["decode_limit_images_per_s"] > found["network_images_per_s"]
    assert found["loader_images_per_s"] > found["network_images_per_s"]
    assert 0 <= found["data_wait"] < 1
    assert 0 < found["host_us_per_image"] < 1e4
    assert found["verdict"] in done.stdout
    assert found["advice"] in done.stdout
    # The profiler's table names what convolves, forward and backward.
    assert "convolution" in done.stdout

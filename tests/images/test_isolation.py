"""A decoder that crashes or hangs costs one image: in a child process, in a shard, and in the job on Ray."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.images import isolation
from pipeline.images.decode import ImageError
from pipeline.images.isolation import LIMIT_S, IsolatedConverter
from pipeline.images.resize import convert
from pipeline.sharding.shards import BadImageError, build_in_steps
from tests.photographs import encoded, photograph, write_source
from tests.processes import outside_clusters
from tests.shard_sets import PER_SHARD, planned

ROOT = Path(__file__).resolve().parents[2]
# Read at the start of every Python, Ray's workers and their children included: bytes behind an image do not matter, but
# these end the process as a fault in a decoder does, or stop it where no signal wakes it. Nothing is imported before it
# is asked for, which would take each of Ray's processes seconds.
FAULTY = """
import importlib.util, os, signal, sys

class Finder:
    def find_spec(name, path, target=None):
        if name != "pipeline.images.isolation":
            return None
        sys.meta_path.remove(Finder)
        spec = importlib.util.find_spec(name)
        whole = spec.loader.exec_module
        def exec_module(module):
            whole(module)
            convert = module.convert
            def faulty(data, quality):
                if data.endswith(b"CRASH"):
                    os.kill(os.getpid(), signal.SIGSEGV)
                while data.endswith(b"HANG"):
                    signal.pause()
                return convert(data, quality)
            module.convert = faulty
            module.LIMIT_S = {limit_s}
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder)
"""


def environment(folder: Path, limit_s: float = LIMIT_S) -> dict[str, str]:
    """One in which an image that ends in CRASH crashes its decoder, and one that ends in HANG never leaves it."""
    (folder / "sitecustomize.py").write_text(FAULTY.format(limit_s=limit_s))
    kept = outside_clusters()
    return {**kept, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def child_pid() -> int:
    (process,) = multiprocessing.active_children()
    assert process.pid is not None
    return process.pid


def test_a_child_converts_as_its_parent_does_and_is_replaced_when_it_crashes_or_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(photograph(1, 300, 280))
    expected = convert(data, 90)
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    with IsolatedConverter() as child:
        assert child.convert(data, 90) == expected
        with pytest.raises(ImageError, match="the file is empty"):
            child.convert(b"", 90)
        # What is no fault of an image is none in a child either: here a quality that there is not.
        with pytest.raises(TypeError):
            child.convert(data, "high")  # type: ignore[arg-type]
        assert child.convert(data, 90) == expected

        with pytest.raises(ImageError, match=r"the decoder crashed \(signal 11\)"):
            child.convert(data + b"CRASH", 90)
        assert child.convert(data, 90) == expected

        stopped = child_pid()
        # A process that is stopped never answers.
        os.kill(stopped, signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr(isolation, "LIMIT_S", 0.0)
            with pytest.raises(ImageError, match=r"the decoder hangs \(no result within 0 s\)"):
                child.convert(data, 90)
        assert child_pid() != stopped
        assert child.convert(data, 90) == expected


def test_a_crashing_image_is_named_where_none_may_be_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "images", images=2, longest=280)
    plan = planned(source)
    bad = Path(plan.shards[0].entries[0].path)
    bad.write_bytes(bad.read_bytes() + b"CRASH")
    plan = planned(source)
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadImageError, match=rf"{bad}: the decoder crashed \(signal 11\); replace or remove the image"):
        list(build_in_steps(tmp_path / "out", plan.shards[0], plan.image, set_aside=False, careful=True))


def test_a_worker_whose_decoder_hangs_ends_itself(tmp_path: Path) -> None:
    script = "from pipeline.images.isolation import convert_or_exit; convert_or_exit(b'HANG', 90)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(tmp_path, limit_s=0.1),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "Timeout (0:00:00.1" in done.stderr
    assert "convert_or_exit" in done.stderr


@pytest.mark.slow
def test_the_job_sets_a_faulty_image_aside(tmp_path: Path) -> None:
    """One in each of two shards: a worker dies of the one, and another worker, or its child, of the other."""
    source = write_source(tmp_path / "images", images=3, longest=280)
    faults = {b"CRASH": "the decoder crashed (signal 11)", b"HANG": "the decoder hangs (no result within 5 s)"}
    expected = set()
    for shard, (ending, reason) in zip(planned(source).shards, faults.items(), strict=False):
        bad = Path(shard.entries[0].path)
        bad.write_bytes(bad.read_bytes() + ending)
        expected.add((str(bad), reason))

    job = [sys.executable, str(ROOT / "jobs" / "shard_imagenet.py"), "--source", str(source)]
    job += ["--output", str(tmp_path / "out"), "--samples-per-shard", str(PER_SHARD)]
    done = subprocess.run(
        [*job, "--workers", "1", "--max-bad-fraction", "0.3"],
        env=environment(tmp_path, limit_s=5),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {(reject["path"], reject["reason"]) for reject in rejects} == expected

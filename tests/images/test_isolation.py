"""A decoder that crashes or hangs costs one image: in a child process, in a shard, and in the job on Ray."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.images.decode import ImageError
from pipeline.images.isolation import IsolatedConverter, KilledError
from pipeline.images.resize import convert
from tests import ROOT
from tests.photographs import encoded, photograph, write_source
from tests.processes import outside_clusters
from tests.shard_sets import PER_SHARD, planned

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
            module.LIMIT_S = 2
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder)
"""


def test_a_child_converts_as_its_parent_does_and_is_replaced_when_it_is_killed() -> None:
    data = encoded(photograph(1, 300, 280))
    expected = convert(data, 90)
    with IsolatedConverter() as child:
        assert child.convert(data, 90) == expected
        with pytest.raises(ImageError, match="the file is empty"):
            child.convert(b"", 90)
        # What is no fault of an image is none in a child either: here a quality that there is not.
        with pytest.raises(TypeError):
            child.convert(data, "high")  # type: ignore[arg-type]
        (process,) = multiprocessing.active_children()
        process.kill()
        with pytest.raises(KilledError, match=r"was killed \(signal 9\)"):
            child.convert(data, 90)
        assert child.convert(data, 90) == expected


@pytest.mark.slow
def test_the_job_sets_faulty_images_aside(tmp_path: Path) -> None:
    """Workers hang at one image and end themselves; then a child hangs at it, and its successor crashes at the next."""
    source = write_source(tmp_path / "images", images=3, longest=280)
    entries = planned(source).shards[0].entries
    faults = {b"HANG": "the decoder hangs (no result within 2 s)", b"CRASH": "the decoder crashed (signal 11)"}
    expected = set()
    for (ending, reason), entry in zip(faults.items(), entries, strict=False):
        bad = Path(entry.path)
        bad.write_bytes(bad.read_bytes() + ending)
        expected.add((str(bad), reason))

    (tmp_path / "sitecustomize.py").write_text(FAULTY)
    job = [sys.executable, str(ROOT / "jobs" / "shard_imagenet.py"), "--source", str(source)]
    job += ["--output", str(tmp_path / "out"), "--samples-per-shard", str(PER_SHARD)]
    done = subprocess.run(
        [*job, "--workers", "1", "--max-bad-fraction", "0.3"],
        env=outside_clusters() | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {(reject["path"], reject["reason"]) for reject in rejects} == expected

"""Other people's readers take the sets: the same keys, labels and bytes as `tarfile` finds in the tars."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def, types

from tests.damage import places
from tests.photographs import decoded
from tests.shard_sets import tars

SPLITS = {"train": (45, 5), "val": (15, 2)}  # Images and shards of `shard_set`.


def stored(root: Path, split: str) -> list[tuple[str, int, bytes]]:
    """Key, label and JPEG of a split's samples in the order of its tars."""
    return [(place.key, place.number, place.jpeg) for place in places(root, split)]


def test_hugging_face_datasets_streams_the_set(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    files = {split: [str(path) for path in tars(shard_set, split)] for split in SPLITS}
    streams = datasets.load_dataset("webdataset", data_files=files, streaming=True)
    for split, (_, shards) in SPLITS.items():
        stream = streams[split]
        # So many workers can share it.
        assert stream.num_shards == shards
        rows = list(stream.cast_column("jpg", datasets.Image(decode=False)))
        assert [(row["__key__"], row["cls"], row["jpg"]["bytes"]) for row in rows] == stored(shard_set, split)
    first = next(iter(streams["train"]))["jpg"]
    np.testing.assert_array_equal(np.asarray(first), decoded(stored(shard_set, "train")[0][2]))


def test_timm_reads_the_set(shard_set: Path) -> None:
    import timm.data

    for split, (samples, shards) in SPLITS.items():
        # Without an _info.json, timm wants to be told how many samples there are.
        spec = f"{split}/{split}-{{000000..{shards - 1:06d}}}.tar|{samples}"
        found = timm.data.create_dataset("wds/shards", root=str(shard_set), split=spec, is_training=False, batch_size=1)
        assert len(found) == samples
        expected = [(label, decoded(jpeg).tobytes()) for _, label, jpeg in stored(shard_set, split)]
        assert [(label, image.tobytes()) for image, label in found] == expected


def test_webdataset_reads_the_set(shard_set: Path) -> None:
    urls = [str(tar) for tar in tars(shard_set, "train")]
    samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    read = [(sample["__key__"], int(sample["cls"]), sample["jpg"]) for sample in samples]
    assert read == stored(shard_set, "train")


def test_dali_reads_the_set_by_its_indexes(shard_set: Path) -> None:
    paths, expected = tars(shard_set, "train"), stored(shard_set, "train")

    @pipeline_def(batch_size=len(expected), num_threads=1, device_id=None)
    def pipe() -> tuple[object, ...]:
        streams: Any = fn.readers.webdataset(
            paths=[str(path) for path in paths],
            index_paths=[str(path.with_suffix(".idx")) for path in paths],
            ext=["jpg", "cls"],
            missing_component_behavior="error",
        )
        jpg, label = streams
        return jpg, label, fn.decoders.image(jpg, device="cpu", output_type=types.RGB)

    built = pipe()
    built.build()
    jpgs, labels, decoded = built.run()
    for i, (_, label, jpeg) in enumerate(expected):
        assert np.asarray(jpgs[i]).tobytes() == jpeg
        assert int(bytes(np.asarray(labels[i]))) == label
        assert np.asarray(decoded[i]).shape == (256, 256, 3)


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar command")
def test_tar_unpacks_the_set(shard_set: Path, tmp_path: Path) -> None:
    for path in tars(shard_set, "train"):
        done = subprocess.run(["tar", "-xf", path, "-C", tmp_path], capture_output=True, text=True, check=True)
        assert done.stderr == ""
    expected = {
        name: data
        for key, label, jpeg in stored(shard_set, "train")
        for name, data in ((f"{key}.cls", str(label).encode()), (f"{key}.jpg", jpeg))
    }
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == expected

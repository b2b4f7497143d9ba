"""Shards and the set: every reader takes them, damage and other settings never get in, bad images are counted."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from pipeline.dataset.annotation import ShardAnnotation, ShardError, read_annotation
from pipeline.dataset.info import read_dataset, write_json
from pipeline.dataset.split_reader import SplitReader
from pipeline.sharding.pack import index_of, pack
from pipeline.sharding.set_folder import claim_folder, is_left_over, with_encoder_of
from pipeline.sharding.shard_plan import SetPlan, inputs_digest
from pipeline.sharding.shard_set import ShardSetError, find_finished, finish, tidy
from pipeline.sharding.shards import build_shard
from tests.photographs import encoded, photograph, write_source
from tests.shard_sets import build_all, contents, make, planned, tars

wds2idx = importlib.import_module("wds2idx")  # DALI's own indexer, which comes without types.


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "images", images=6, longest=300)


@pytest.fixture
def source(images: Path, tmp_path: Path) -> Path:
    """A copy to spoil: 15 training and 3 validation images."""
    return Path(shutil.copytree(images, tmp_path / "images"))


# What is stored, and who can read it.


def test_every_image_is_stored_once_under_its_own_label(images: Path, tmp_path: Path) -> None:
    plan = planned(images)
    output = make(tmp_path / "out", plan)
    info = read_dataset(output)
    assert [label.wnid for label in info.classes] == ["n0", "n1", "n2"]
    for split, entries in plan.listing.splits.items():
        reader = SplitReader(output, info, split)
        stored = {reader.key(i): int(reader.labels[i]) for i in range(len(reader))}
        assert stored == {entry.key: entry.label for entry in entries}
        assert len(reader) == len(entries) == info.splits[split].samples
    assert sum(shard.samples for shard in info.splits["train"].shards) == 15
    assert [shard.samples for shard in info.splits["train"].shards] == [4, 4, 4, 3]


def test_order_mixes_classes_and_depends_on_seed_split_and_count_alone(images: Path, tmp_path: Path) -> None:
    keys = [entry.key for shard in planned(images).shards if shard.split == "train" for entry in shard.entries]
    assert keys != sorted(keys)
    few = [
        entry.key for shard in planned(images, per_shard=3).shards if shard.split == "train" for entry in shard.entries
    ]
    assert few == keys
    renamed = Path(shutil.copytree(images, tmp_path / "renamed"))
    for folder in list(renamed.iterdir()):
        for file in list(folder.iterdir()):
            file.write_bytes(b"other bytes")
    assert [e.key for s in planned(renamed).shards if s.split == "train" for e in s.entries] == keys


def test_index_equals_dalis_own(shard_set: Path, tmp_path: Path) -> None:
    for tar in [*tars(shard_set, "train"), *tars(shard_set, "val")]:
        creator = wds2idx.IndexCreator(str(tar), str(tmp_path / "reference.idx"), verbose=False)
        creator.create_index()
        creator.close()
        assert tar.with_suffix(".idx").read_bytes() == (tmp_path / "reference.idx").read_bytes()


def test_tar_members_are_plain_and_where_the_index_says(shard_set: Path) -> None:
    tar = tars(shard_set, "train")[0]
    data = tar.read_bytes()
    fields = [line.split(" ") for line in tar.with_suffix(".idx").read_text().splitlines()[1:]]
    listed = {line[i + 3]: (int(line[i + 1]), int(line[i + 2])) for line in fields for i in (0, 4)}
    with tarfile.open(tar) as archive:
        members = archive.getmembers()
        for member in members:
            file = archive.extractfile(member)
            assert file is not None
            start, size = listed[member.name]
            assert file.read() == data[start : start + size]
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert (member.mode, member.pax_headers) == (0o644, {})
    extensions = [member.name.partition(".")[2] for member in members]
    assert extensions == ["cls", "jpg"] * (len(members) // 2)


def test_webdataset_reads_the_set_in_order(shard_set: Path) -> None:
    reader = SplitReader(shard_set, read_dataset(shard_set), "train")
    urls = [str(tar) for tar in tars(shard_set, "train")]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [reader.key(i) for i in range(len(reader))]
    assert [int(sample["cls"]) for sample in samples] == reader.labels.tolist()
    assert all(sample["jpg"] == reader.image(i).tobytes() for i, sample in enumerate(samples))


def test_dali_reads_the_set_in_order(shard_set: Path) -> None:
    reader = SplitReader(shard_set, read_dataset(shard_set), "train")
    paths = tars(shard_set, "train")

    @pipeline_def(batch_size=len(reader), num_threads=1, device_id=None)
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
    assert [int(bytes(np.asarray(labels[i]))) for i in range(len(reader))] == reader.labels.tolist()
    for i in range(len(reader)):
        assert np.array_equal(np.asarray(jpgs[i]), reader.image(i))
        assert np.asarray(decoded[i]).shape == (256, 256, 3)


def test_pca_equals_numpy_on_the_stored_training_pixels(shard_set: Path) -> None:
    info = read_dataset(shard_set)
    reader = SplitReader(shard_set, info, "train")
    decoded = [np.asarray(Image.open(io.BytesIO(reader.image(i).tobytes()))) for i in range(len(reader))]
    pixels = np.stack(decoded).reshape(-1, 3) / 255
    values, vectors = np.linalg.eigh(np.cov(pixels.T, ddof=0))
    assert info.rgb.pixels == len(pixels)
    np.testing.assert_allclose(info.rgb.mean, pixels.mean(axis=0), rtol=0, atol=1e-9)
    np.testing.assert_allclose(info.rgb.eigenvalues, values[::-1], rtol=0, atol=1e-9)
    aligned = np.abs((np.array(info.rgb.eigenvectors) * vectors[:, ::-1]).sum(axis=0))
    np.testing.assert_allclose(aligned, 1, rtol=0, atol=1e-9)
    for path in [*(shard_set / "train").glob("*.json"), *(shard_set / "val").glob("*.json")]:
        assert read_annotation(path).rgb == info.rgb


def test_rows_match_the_files(shard_set: Path) -> None:
    for name, split in read_dataset(shard_set).splits.items():
        for row in split.shards:
            data = (shard_set / name / f"{row.name}.tar").read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (row.bytes, row.sha256)
    assert sorted(p.name for p in shard_set.iterdir()) == [
        "contact_sheet.jpg",
        "dataset.json",
        "rejects.jsonl",
        "rgb_pca.png",
        "train",
        "train.arrow",
        "val",
        "val.arrow",
    ]


# So many bytes that what ends a tar, two blocks of zeros and what fills its record of 20 blocks, is every way long.
@pytest.mark.parametrize("last", [10_000, 2_560, 3_072, 3_584, 4_096, 4_608])
def test_a_tar_and_its_index_are_those_of_tarfile(last: int) -> None:
    samples = [("k" * 90, 999, b"jpeg"), ("a", 0, b""), ("b", 7, bytes(512)), ("c", 12, bytes(last))]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, label, jpeg in samples:
            for name, data in ((f"{key}.cls", str(label).encode()), (f"{key}.jpg", jpeg)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    buffer.seek(0)
    assert pack(samples) == (buffer.getvalue(), index_of(buffer))


# Going on, and what must not be mixed in.


def test_the_same_bytes_again_and_from_another_place(images: Path, source: Path, tmp_path: Path) -> None:
    assert contents(make(tmp_path / "1", planned(images))) == contents(make(tmp_path / "2", planned(source)))


def spoil_tar(folder: Path) -> None:
    tar = folder / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[3000] ^= 1
    tar.write_bytes(data)


def cut_tar(folder: Path) -> None:
    tar = folder / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:5000])


def lose_annotation(folder: Path) -> None:
    (folder / "train-000001.json").unlink()


def spoil_annotation(folder: Path) -> None:
    (folder / "train-000001.json").write_text("{")


def lose_index(folder: Path) -> None:
    (folder / "train-000001.idx").unlink()


def spoil_index(folder: Path) -> None:
    (folder / "train-000001.idx").write_text("v1.2 0\n")


@pytest.mark.parametrize("damage", [spoil_tar, cut_tar, lose_annotation, spoil_annotation, lose_index, spoil_index])
def test_only_a_damaged_shard_is_built_again(images: Path, tmp_path: Path, damage: object) -> None:
    plan = planned(images)
    whole = contents(make(tmp_path / "whole", plan))
    output = tmp_path / "out"
    build_all(output, plan)
    (output / "train" / ".train-000002.tar.0123.tmp").write_bytes(b"half a shard")
    assert callable(damage)
    damage(output / "train")
    claim_folder(output, plan)
    built = [build_shard(output, shard, plan.image, set_aside=True) for shard in plan.shards]
    assert [shard.name for shard, result in zip(plan.shards, built, strict=True) if not result.kept] == ["train-000001"]
    finish(output, plan, built, 0.0)
    assert contents(output) == whole


def test_a_changed_source_leaves_nothing_old_behind(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    build_all(output, planned(source))
    assert len(tars(output, "train")) == 4
    # Fewer images, one of them another: the order changes, the last shard goes.
    for number in range(2):
        (source / f"n{number}" / f"n{number}_0.JPEG").unlink()
        (source / f"n{number}" / f"n{number}_1.JPEG").unlink()
    (source / "n2" / "n2_0.JPEG").write_bytes(encoded(photograph(99, 280, 270)))
    assert contents(make(output, planned(source))) == contents(make(tmp_path / "fresh", planned(source)))
    assert len(tars(output, "train")) == 3


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"quality": 80}, r"quality \(90, not 80\)"),
        ({"seed": 1}, r"seed \(0, not 1\)"),
        ({"per_shard": 5}, "samples per shard"),
    ],
)
def test_other_settings_are_refused_by_name(images: Path, tmp_path: Path, other: dict[str, int], named: str) -> None:
    plan = planned(images)
    build_all(tmp_path / "out", plan)
    with pytest.raises(ShardSetError, match=f"unfinished set of another {named}.*another --output"):
        claim_folder(tmp_path / "out", planned(images, **other))
    make(tmp_path / "out", plan)
    before = contents(tmp_path / "out")
    with pytest.raises(ShardSetError, match=f"finished set of another {named}.*delete"):
        find_finished(tmp_path / "out", planned(images, **other))
    assert contents(tmp_path / "out") == before


def test_another_source_is_refused(images: Path, source: Path, tmp_path: Path) -> None:
    build_all(tmp_path / "out", planned(images))
    (source / "n0" / "n0_0.JPEG").unlink()
    with pytest.raises(ShardSetError, match="unfinished set of another source"):
        claim_folder(tmp_path / "out", planned(source))
    make(tmp_path / "out", planned(images))
    with pytest.raises(ShardSetError, match="finished set of another source or --val-fraction: give another --output"):
        find_finished(tmp_path / "out", planned(source))


def test_a_finished_set_is_found_and_a_holed_one_mended(images: Path, tmp_path: Path) -> None:
    plan = planned(images)
    assert find_finished(tmp_path / "out", plan) is None
    output = make(tmp_path / "out", plan)
    whole = contents(output)
    assert find_finished(output, plan) == read_dataset(output)
    assert contents(output) == whole
    tars(output, "train")[2].unlink()
    assert find_finished(output, plan) is None
    assert contents(make(output, plan)) == whole


def test_a_repair_that_was_killed_before_its_end_goes_on(images: Path, tmp_path: Path) -> None:
    plan = planned(images)
    output = make(tmp_path / "out", plan)
    whole = contents(output)
    tars(output, "train")[2].unlink()
    build_all(output, plan)
    # Every tar is there, and the annotation of one says nothing of the set.
    assert find_finished(output, plan) is None
    assert contents(make(output, plan)) == whole


def test_a_folder_of_other_things_is_left_alone(images: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "train-000000.tar").write_bytes(b"somebody's")
    with pytest.raises(ShardSetError, match="holds 'train' and no shard set of this program: give --output a new"):
        claim_folder(tmp_path / "out", planned(images))
    assert contents(tmp_path / "out") == {"train/train-000000.tar": b"somebody's"}


def upgraded(plan: SetPlan) -> SetPlan:
    """The plan of a machine with another Pillow."""
    return dataclasses.replace(plan, image={**plan.image, "encoder": {**plan.image["encoder"], "pillow": "0.1"}})


def test_a_finished_set_outlives_an_upgrade_and_what_is_missing_wants_the_old_versions(
    images: Path, tmp_path: Path
) -> None:
    then = upgraded(planned(images))
    # Made by the encoder of today, and said to be of another.
    for shard in then.shards:
        built = build_shard(tmp_path / "now", shard, planned(images).image, set_aside=True)
        made = dataclasses.replace(built.annotation, inputs=inputs_digest(shard, then.image))
        write_json(tmp_path / "now" / shard.split / f"{shard.name}.json", made.to_json())
    output = tmp_path / "now"
    then.claim.write(output)
    plan = with_encoder_of(output, planned(images))
    assert plan.image == then.image
    finish(output, plan, [build_shard(output, shard, plan.image, set_aside=True) for shard in plan.shards], 0.0)
    plan = with_encoder_of(output, planned(images))
    assert find_finished(output, plan) == read_dataset(output)
    tars(output, "train")[2].unlink()
    assert find_finished(output, plan) is None
    with pytest.raises(ShardError, match=r"^train-000002 must be encoded by .*pillow 0\.1, .* can be kept") as found:
        build_shard(output, plan.shards[2], plan.image, set_aside=True)
    assert "\n" not in str(found.value)
    assert build_shard(output, plan.shards[1], plan.image, set_aside=True).kept


def test_images_that_are_stored_as_they_are_need_no_encoder(shard_set: Path, tmp_path: Path) -> None:
    plan = planned(shard_set)
    built = build_shard(tmp_path, plan.shards[0], upgraded(plan).image, set_aside=True)
    assert built.annotation.samples == len(plan.shards[0].entries)


@pytest.mark.parametrize("broken", ["ImageFont.load_default", "pca_figure"])
def test_pictures_that_cannot_be_drawn_cost_a_warning(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: object) -> None:
        assert (tmp_path / "out" / "dataset.json").exists()
        raise RuntimeError("no font\nat all")

    plan, output, lines = planned(images), tmp_path / "out", list[str]()
    built = build_all(output, plan)
    with monkeypatch.context() as patched:
        patched.setattr(f"pipeline.sharding.pictures.{broken}", fail)
        info = finish(output, plan, built, 0.0, lines.append)
    (line,) = lines
    assert line.startswith("warning: the set is finished, without contact_sheet.jpg and rgb_pca.png")
    assert line.endswith("(RuntimeError: no font at all)")
    assert find_finished(output, plan) == info
    assert not is_left_over(output)
    tidy(output, info, lines.append)
    assert contents(output) == contents(make(tmp_path / "whole", plan))


def test_annotation_survives_json(images: Path, tmp_path: Path) -> None:
    plan = planned(images)
    built = build_shard(tmp_path, plan.shards[0], plan.image, set_aside=True).annotation
    assert read_annotation(tmp_path / "train" / "train-000000.json") == built
    assert ShardAnnotation.from_json(built.to_json()) == built
    assert dataclasses.replace(built, rgb=None) == built

"""Sets made by other programs: annotated without a change to their tars, and read as if they had been made here."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def

from pipeline.annotate import annotate_shard
from pipeline.annotated_set import begin, find_shards
from pipeline.annotation import read_annotation
from pipeline.dataset import DatasetError, DatasetInfo, read_dataset
from pipeline.label_names import CONFLICT, name_labels
from pipeline.loader import Loader
from pipeline.plan import center_crops
from pipeline.split_reader import SplitReader
from pipeline.verify import check_set, check_shard
from tests.foreign_shards import (
    WNIDS,
    contents,
    described,
    digests,
    jpeg_of,
    picture_of,
    sample,
    stored,
    unpacked,
    write_set,
    write_shards,
)
from tests.processes import outside_clusters

JOB = Path(__file__).resolve().parents[1] / "jobs" / "shard_imagenet.py"
DEADLINE_S = 120
wds2idx = importlib.import_module("wds2idx")  # DALI's own indexer, which comes without types.


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("foreign") / "set")


@pytest.fixture(scope="module")
def done(foreign: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same set annotated; not to be changed."""
    root = Path(shutil.copytree(foreign, tmp_path_factory.mktemp("done") / "set"))
    described(root)
    return root


@pytest.fixture
def copy(foreign: Path, tmp_path: Path) -> Path:
    """The set without annotations, to do anything with."""
    return Path(shutil.copytree(foreign, tmp_path / "set"))


def check_reading(root: Path, info: DatasetInfo) -> None:
    """Our reader and DALI against `tarfile` and Pillow."""
    assert read_dataset(root) == info
    for split in ("train", "val"):
        expected = unpacked(root, split)
        reader = SplitReader(root, info, split)
        assert [reader.key(i) for i in range(len(reader))] == [one["__key__"] for one in expected]
        assert reader.labels.tolist() == [int(one["cls"]) for one in expected]
        assert [reader.image(i).tobytes() for i in range(len(reader))] == [jpeg_of(one) for one in expected]
        loader = Loader(reader, info.rgb, len(reader), torch.device("cpu"), 1)
        (batch,) = loader.run([center_crops(np.arange(len(reader)))])
        assert batch.labels.tolist() == reader.labels.tolist()
        pixels = np.stack([np.asarray(picture_of(one)) for one in expected]).astype(np.float64)
        window = pixels[:, 14:241, 14:241] - 255 * np.array(info.rgb.mean)
        np.testing.assert_allclose(batch.images.permute(0, 2, 3, 1), window, rtol=0, atol=1e-4)


def check_statistics(root: Path, info: DatasetInfo) -> None:
    """The RGB PCA against numpy's of all training pixels, decoded by Pillow."""
    pixels = np.stack([np.asarray(picture_of(one)) for one in unpacked(root, "train")]).reshape(-1, 3) / 255
    covariance = np.cov(pixels.T, ddof=0)
    values, vectors = np.linalg.eigh(covariance)
    assert info.rgb.pixels == len(pixels)
    np.testing.assert_allclose(info.rgb.mean, pixels.mean(axis=0), rtol=0, atol=1e-9)
    np.testing.assert_allclose(info.rgb.std, pixels.std(axis=0), rtol=0, atol=1e-9)
    np.testing.assert_allclose(info.rgb.covariance, covariance, rtol=0, atol=1e-9)
    np.testing.assert_allclose(info.rgb.eigenvalues, values[::-1], rtol=0, atol=1e-9)
    aligned = np.abs((np.array(info.rgb.eigenvectors) * vectors[:, ::-1]).sum(axis=0))
    np.testing.assert_allclose(aligned, 1, rtol=0, atol=1e-9)
    for path in [*(root / "train").glob("*.json"), *(root / "val").glob("*.json")]:
        assert read_annotation(path).rgb == info.rgb


def faults(root: Path) -> list[str]:
    """What verifying finds, every image decoded."""
    info = read_dataset(root)
    reports = [check_shard(root, split, row, info, True) for split, part in info.splits.items() for row in part.shards]
    return [str(fault) for report in reports for fault in report.faults] + [
        str(fault) for fault in check_set(root, info, reports)
    ]


def check_index(tar: Path, scratch: Path) -> None:
    creator = wds2idx.IndexCreator(str(tar), str(scratch / "reference.idx"), verbose=False)
    creator.create_index()
    creator.close()
    assert tar.with_suffix(".idx").read_text() == (scratch / "reference.idx").read_text()


def test_the_tars_stay_as_they_are_and_nothing_else_is_left(foreign: Path, done: Path) -> None:
    assert digests(done) == digests(foreign)
    info = read_dataset(done)
    assert {
        f"{split}/{row.name}.tar": row.sha256 for split, part in info.splits.items() for row in part.shards
    } == digests(foreign)
    assert set(contents(done)) == {
        "dataset.json",
        "rejects.jsonl",
        "contact_sheet.jpg",
        "rgb_pca.png",
        "train.arrow",
        "val.arrow",
        *(str(Path(name).with_suffix(suffix)) for name in digests(foreign) for suffix in (".tar", ".idx", ".json")),
    }


def test_the_statistics_are_numpys(done: Path) -> None:
    check_statistics(done, read_dataset(done))


def test_our_reader_and_dali_read_it(done: Path) -> None:
    check_reading(done, read_dataset(done))


def test_the_index_is_dalis_own(done: Path, tmp_path: Path) -> None:
    for name in digests(done):
        check_index(done / name, tmp_path)


def test_it_passes_and_fails_verification(done: Path, tmp_path: Path) -> None:
    assert faults(done) == []
    root = Path(shutil.copytree(done, tmp_path / "set"))
    tar = root / "train" / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    place = data.index(stored(8)) + 500
    data[place] ^= 1
    tar.write_bytes(data)
    found = faults(root)
    assert found[0].startswith("train/train-000001: the sha256 of its tar is ")
    assert any(fault.startswith("train/train-000001 n03888257_8: ") for fault in found)
    assert all(fault.startswith("train/train-000001") for fault in found)


def test_grey_images_notes_and_other_extensions(tmp_path: Path) -> None:
    """What ImageNet's images bring along: some are grey, img2dataset adds a .json and a .txt, some say .jpeg."""
    root = tmp_path / "set"
    for split, first in (("train", 0), ("val", 50)):
        samples: list[dict[str, Any]] = [sample(number) for number in range(first, first + 12)]
        for one in samples[1::4]:
            one["jpg"] = stored(first, "L")
        for one in samples[2::4]:
            one["jpeg"] = one.pop("jpg")
        for one in samples[3::4]:
            one.update({"json": {"width": 256}, "txt": "a caption", "JPG": one.pop("jpg")})
        write_shards(root, split, samples)
    info = described(root)
    check_statistics(root, info)
    check_reading(root, info)
    assert faults(root) == []
    for name in digests(root):
        check_index(root / name, tmp_path)


def test_images_that_webdataset_encodes_itself(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for split in ("train", "val"):
        write_shards(root, split, (sample(number, jpg=picture_of(sample(number))) for number in range(6)))
    info = described(root)
    check_statistics(root, info)
    check_reading(root, info)


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar command")
@pytest.mark.parametrize("folder", [".", "photos.new"])
def test_a_set_that_tar_made_of_folders(folder: str, tmp_path: Path) -> None:
    """With ./ before each name, or a folder with a dot, at which no key may end; folders are members, too."""
    root, whole = tmp_path / "set", tmp_path / "files"
    for split, first in (("train", 0), ("val", 50)):
        (root / split).mkdir(parents=True)
        (whole / split / folder).mkdir(parents=True)
        for one in map(sample, range(first, first + 6)):
            for extension in ("jpg", "cls"):
                data = one[extension] if extension == "jpg" else f"{one['cls']}\n".encode()
                (whole / split / folder / f"{one['__key__']}.{extension}").write_bytes(data)
        (whole / split / folder / ".hidden").write_text("as a desktop leaves behind")
        tar = root / split / "shard.tar"
        subprocess.run(["tar", "--sort=name", "-cf", tar, "-C", whole / split, folder], check=True)
        (whole / split / folder / ".hidden").unlink()
    info = described(root)
    check_reading(root, info)
    # DALI's indexer finds nothing where names begin with ./, its reader does by our index.
    paths = [root / split / "shard.tar" for split in ("train", "val")]

    @pipeline_def(batch_size=12, num_threads=1, device_id=None)
    def pipe() -> tuple[object, ...]:
        streams: Any = fn.readers.webdataset(
            paths=[str(path) for path in paths],
            index_paths=[str(path.with_suffix(".idx")) for path in paths],
            ext=["jpg", "cls"],
            missing_component_behavior="error",
        )
        return tuple(streams)

    built = pipe()
    built.build()
    jpgs, labels = built.run()
    expected = unpacked(root, "train") + unpacked(root, "val")
    assert len(expected) == 12
    for i, one in enumerate(expected):
        assert bytes(np.asarray(jpgs[i])) == one["jpg"]
        assert bytes(np.asarray(labels[i])) == one["cls"]


@pytest.mark.parametrize("lost", ["train/train-000001.json", "train/train-000001.idx", "val/val-000001.json"])
def test_what_a_kill_left_out_is_added_to_the_same_bytes(lost: str, done: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(done, tmp_path / "set"))
    (root / lost).unlink()
    kept = {path: path.stat().st_mtime_ns for path in root.rglob("*.tar")}
    described(root)
    assert contents(root) == contents(done)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_job_killed_before_its_end_leaves_an_unfinished_set(copy: Path, done: Path) -> None:
    # As after the first shards of a first run: annotations without the set's statistics, and no dataset.json.
    for split, name in find_shards(copy)[:2]:
        annotate_shard(copy, split, name, None)
    written = {path: path.stat().st_mtime_ns for path in copy.rglob("*.idx")}
    assert described(copy) == read_dataset(done)
    assert contents(copy) == contents(done)
    assert len(written) == 2
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_set_with_a_shard_to_annotate_anew_is_unfinished(done: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(done, tmp_path / "set"))
    begin(root, find_shards(root))
    assert read_dataset(root) == read_dataset(done)
    (root / "val" / "val-000000.json").unlink()
    begin(root, find_shards(root))
    with pytest.raises(DatasetError, match="is unfinished"):
        read_dataset(root)


def test_a_second_run_writes_nothing(done: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(done, tmp_path / "set"))
    written = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    described(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == written


def test_a_shard_added_later_is_counted(done: Path, tmp_path: Path) -> None:
    root, more = Path(shutil.copytree(done, tmp_path / "set")), tmp_path / "more"
    write_shards(more, "train", map(sample, range(30, 36)))
    shutil.copy(more / "train" / "train-000000.tar", root / "train" / "train-000003.tar")
    info = described(root)
    assert info.splits["train"].samples == 21
    check_statistics(root, info)
    assert info.fingerprint != read_dataset(done).fingerprint


def test_the_samples_name_the_classes(done: Path, tmp_path: Path) -> None:
    assert [(label.index, label.wnid) for label in read_dataset(done).classes] == list(enumerate(WNIDS))
    root = tmp_path / "set"
    for split in ("train", "val"):
        notes = ({"filename": f"{WNIDS[number % 3]}_{number}.JPEG", "label": number % 3} for number in range(6))
        samples = (sample(number, __key__=f"{number:08d}", json=note) for number, note in enumerate(notes))
        write_shards(root, split, samples)
    assert tuple(label.wnid for label in described(root).classes) == WNIDS


def test_numbers_where_nothing_names_the_classes_and_a_file_that_does(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for split in ("train", "val"):
        write_shards(root, split, (sample(number, __key__=f"{number:08d}") for number in range(6)))
    assert [label.wnid for label in described(root).classes] == ["class_0000", "class_0001", "class_0002"]
    given = tmp_path / "classes.txt"
    given.write_text("n01440764 tench, Tinca tinca\nn02102040 English springer\nspade\nn03888257\n")
    # Of the fourth class there is no image.
    classes = described(root, given).classes
    assert [(label.wnid, label.name) for label in classes] == [
        ("n01440764", "tench, Tinca tinca"),
        ("n02102040", "English springer"),
        ("spade", "spade"),
        ("n03888257", "n03888257"),
    ]
    assert faults(root) == []


def test_a_thousand_classes_are_imagenets() -> None:
    names = name_labels(1000, {})
    assert [names.names[label] for label in (0, 388, 999)] == ["tench", "giant panda", "toilet tissue"]
    assert names.wnids[999] == "class_0999"
    # Not where the images contradict it.
    several = name_labels(1000, {3: CONFLICT})
    assert several.names == several.wnids


def annotating(root: Path) -> subprocess.CompletedProcess[str]:
    """The command as a user gives it, on this machine's Ray."""
    kept = outside_clusters()
    return subprocess.run(
        [sys.executable, str(JOB), "--annotate-only", "--output", str(root), "--workers", "2"],
        env={**kept, "PYTHONPATH": str(JOB.parents[1])},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.mark.slow
def test_the_command_names_faults_and_finishes_the_set_once_they_are_mended(copy: Path, done: Path) -> None:
    tar = copy / "train" / "train-000001.tar"
    right = tar.read_bytes()
    tar.write_bytes(right.replace(stored(7), stored(7)[:1000] + bytes(len(stored(7)) - 1000)))
    refused = annotating(copy)
    assert refused.returncode == 1
    (fault,) = refused.stdout.splitlines()
    assert fault.startswith("FAULT train/train-000001 n02102040_7: ")
    assert refused.stderr.splitlines()[-1] == (
        f"error: {copy} has 1 faults in 1 shards, see above: mend them, or make another set of it, which resizes "
        f"images and sets bad ones aside: python jobs/shard_imagenet.py --source {copy} --output OTHER"
    )
    assert not (copy / "dataset.json").exists()
    tar.write_bytes(right)
    finished = annotating(copy)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[:4] == [
        "class names: the wnids that the samples' keys or .json state; label 0 is n01440764 (n01440764)",
        f"The shard set is in {copy}",
        f"  train: 15 images, 3 shards, {sum(path.stat().st_size for path in copy.glob('train/*.tar')):,} bytes",
        f"  val: 9 images, 2 shards, {sum(path.stat().st_size for path in copy.glob('val/*.tar')):,} bytes",
    ]
    assert contents(copy) == contents(done)

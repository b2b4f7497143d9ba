"""Tars as sources: the same images give the same set in any form, and no tar loses an image without a word."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.dataset.annotation import ShardError
from pipeline.images.resize import Converted, convert, encoder_settings
from pipeline.sharding.set_folder import claim_folder
from pipeline.sharding.shard_plan import SetPlan, plan_shards
from pipeline.sharding.shard_set import finish
from pipeline.sharding.shards import build_shard
from pipeline.sources.files import SourceError, read_bytes
from pipeline.sources.names import is_imagenet, names_of
from pipeline.sources.sources import Listing, read_source
from pipeline.storage.retry import SourceReadError
from tests.photographs import encoded, photograph, write_source

Contents = dict[str, bytes]


def tar_of(contents: Contents, form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def tar_of_tars(folder: Path, form: int = tarfile.GNU_FORMAT) -> bytes:
    """A folder of class folders as ImageNet's training tar holds it, in an order that is not the sorted one."""
    classes = sorted((path for path in folder.iterdir() if path.is_dir()), reverse=True)
    inner = {
        f"{path.name}.tar": tar_of({f.name: f.read_bytes() for f in sorted(path.iterdir(), reverse=True)}, form)
        for path in classes
    }
    return tar_of(inner, form)


def listed(
    source: Path, source_val: Path | None = None, labels: Path | None = None, ids: Path | None = None
) -> Listing:
    return read_source(source, source_val, 0.25, 0, labels, ids)


def comparable(listing: Listing) -> list[tuple[str, str, int, int]]:
    return [(s, e.key, e.label, e.size) for s, entries in listing.splits.items() for e in entries]


def made(listing: Listing, output: Path, max_bad_fraction: float = 0.0) -> dict[str, bytes]:
    """Every file of the set that a listing gives."""
    image = encoder_settings(90)
    plan = SetPlan(listing, image, 0, 5, tuple(plan_shards(listing, 0, 5)))
    claim_folder(output, plan)
    built = [build_shard(output, shard, image, set_aside=True) for shard in plan.shards]
    finish(output, plan, built, max_bad_fraction)
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ of class folders, and beside them tars/ with ImageNet's own tars and the labels of the second."""
    root = tmp_path_factory.mktemp("imagenet")
    write_source(root / "train", images=4, longest=280)
    write_source(root / "other", images=2, longest=280, first_seed=50)
    flat: Contents = {}
    wnids = []
    # The classes alternate, as they do in ImageNet's validation set.
    for number in range(6):
        wnid, name = f"n{(number * 2 + 1) % 3}", f"ILSVRC2012_val_{number + 1:08d}.JPEG"
        data = (root / "other" / wnid / f"{wnid}_{number // 3}.JPEG").read_bytes()
        (root / "val" / wnid).mkdir(parents=True, exist_ok=True)
        (root / "val" / wnid / name).write_bytes(data)
        flat[name] = data
        wnids.append(wnid)
    shutil.rmtree(root / "other")
    tars = root / "tars"
    tars.mkdir()
    (tars / "ILSVRC2012_img_train.tar").write_bytes(tar_of_tars(root / "train"))
    (tars / "ILSVRC2012_img_val.tar").write_bytes(tar_of(dict(reversed(flat.items()))))
    (tars / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in wnids))
    ids = {"n0": 3, "n1": 1, "n2": 2}
    (tars / "ids.txt").write_text("".join(f"{ids[wnid]}\n" for wnid in wnids))
    (tars / "synsets.txt").write_text("".join(f"{i} {wnid} a name, another\n" for wnid, i in ids.items()))
    return root


# The same set in any form.


def test_folders_and_tars_give_the_same_bytes(imagenet: Path, tmp_path: Path) -> None:
    folders, tars = listed(imagenet), listed(imagenet / "tars", labels=imagenet / "tars" / "wnids.txt")
    assert comparable(tars) == comparable(folders)
    assert tars.fingerprint == folders.fingerprint
    assert tars.splits["train"][0].where.endswith("ILSVRC2012_img_train.tar/n0.tar/n0_0.JPEG")
    expected = made(folders, tmp_path / "folders")
    assert len(expected) == 3 * 3 + 3 * 2 + 6
    assert made(tars, tmp_path / "tars") == expected


def test_tars_may_be_named_one_by_one_and_labeled_by_id(imagenet: Path) -> None:
    tars = imagenet / "tars"
    train, val = tars / "ILSVRC2012_img_train.tar", tars / "ILSVRC2012_img_val.tar"
    by_id = listed(train, val, tars / "ids.txt", tars / "synsets.txt")
    assert by_id.fingerprint == listed(imagenet).fingerprint
    assert by_id.roots == (str(train), str(val))
    assert listed(train, imagenet / "val").fingerprint == by_id.fingerprint


def test_a_flat_folder_is_labeled_as_a_flat_tar_is(imagenet: Path, tmp_path: Path) -> None:
    with tarfile.open(imagenet / "tars" / "ILSVRC2012_img_val.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    assert (
        listed(imagenet / "train", tmp_path, imagenet / "tars" / "wnids.txt").fingerprint
        == listed(imagenet).fingerprint
    )


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_found_where_every_format_puts_them(tmp_path: Path, form: int) -> None:
    long = "x" * (95 if form == tarfile.USTAR_FORMAT else 180)
    # USTAR keeps names in the file system's encoding, as the others do in pax records or longer headers.
    images = {f"./{long}.jpg": b"long", "é 日本.png": b"foreign", "last.jpg": b"L" * 512}
    classes = {"a.tar": tar_of(images, form), "b.tar": tar_of({"1.jpg": b"one", "2.jpg": b""}, form)}
    (tmp_path / "s.tar").write_bytes(tar_of(classes, form))
    entries = [entry for split in listed(tmp_path / "s.tar").splits.values() for entry in split]
    read = {Path(e.member).name: read_bytes(e.path, e.offset, e.size) for e in entries}
    assert read == {Path(name).name: data for name, data in [*images.items(), ("1.jpg", b"one"), ("2.jpg", b"")]}


def test_names_in_latin_1_are_read_as_a_folder_of_them_is(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 10)):
        for i in range(2):
            place = os.path.join(
                os.fsencode(tmp_path), b"folders", folder.encode(), f"caf\xe9 {i}.JPEG".encode("latin-1")
            )
            os.makedirs(os.path.dirname(place), exist_ok=True)
            Path(os.fsdecode(place)).write_bytes(encoded(photograph(seed + i, 270, 260)))
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"folders/a", "na\xefve.JPEG".encode("latin-1")))).write_bytes(
        b""
    )
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(tmp_path / "folders", "s")
    folders, tars = listed(tmp_path / "folders"), listed(tmp_path / "s.tar")
    assert comparable(tars) == comparable(folders)
    keys = {entry.key for entries in folders.splits.values() for entry in entries}
    assert keys == {"a_caf_xE9_x200", "a_caf_xE9_x201", "a_na_xEFve", "b_caf_xE9_x200", "b_caf_xE9_x201"}
    results: list[dict[str, bytes]] = []
    for listing in (folders, tars):
        results.append(made(listing, tmp_path / f"out{len(results)}", max_bad_fraction=0.5))
        (reject,) = results[-1].pop("rejects.jsonl").splitlines()
        assert json.loads(reject)["path"].endswith("a/na\udcefve.JPEG")
    assert {name for name in results[0] if name.endswith(".tar")} == {"train/train-000000.tar", "val/val-000000.tar"}
    assert all(results[1][name] == data for name, data in results[0].items() if name.endswith((".tar", ".arrow")))


def test_what_is_no_image_is_counted_and_hidden_files_are_not(tmp_path: Path) -> None:
    one = {"1.jpg": b"1", "2.jpg": b"2", "notes.txt": b"", "._1.jpg": b"of a Mac", ".git/3.jpg": b""}
    (tmp_path / "s.tar").write_bytes(tar_of({"a.tar": tar_of(one), "b.tar": tar_of(one), "readme.txt": b""}))
    listing = listed(tmp_path / "s.tar")
    assert (listing.images, listing.classes) == (4, ("a", "b"))
    assert listing.notes == ("files ignored, since their extensions are not those of images: 3 (3 .txt)",)


# Tars that cannot be trusted.


def with_member(change: Callable[[tarfile.TarInfo], None]) -> bytes:
    """A class tar whose second image's header was changed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("1.jpg", "2.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 3
            if name == "2.jpg":
                change(member)
            tar.addfile(member, io.BytesIO(b"abc") if member.isreg() else None)
    return buffer.getvalue()


def named(name: str) -> Callable[[tarfile.TarInfo], None]:
    return lambda member: setattr(member, "name", name)


def kind(type_: bytes) -> Callable[[tarfile.TarInfo], None]:
    def change(member: tarfile.TarInfo) -> None:
        member.type, member.linkname, member.size = type_, "1.jpg", 0

    return change


def with_size(type_: bytes, size: int) -> bytes:
    """A class tar whose second header claims a size that nothing can have."""
    member = tarfile.TarInfo("2.jpg")
    member.type, member.size = type_, size
    return tar_of({"1.jpg": b"abc"})[:1024] + member.tobuf(tarfile.GNU_FORMAT) + bytes(4096)


GOOD = tar_of({f"{i}.jpg": b"abc" * 300 for i in range(4)})
DAMAGED = bytearray(GOOD)
DAMAGED[2 * (512 + 1024) + 5] ^= 1  # in the third member's header


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (with_member(named("../../etc/2.jpg")), "a.tar holds '../../etc/2.jpg', a name that leads out of it"),
        (with_member(named("/etc/2.jpg")), "holds '/etc/2.jpg', a name that leads out of it"),
        (with_member(named("1.jpg")), "holds 1.jpg twice: make it again with each file once"),
        (with_member(named("d/1.jpg")), "a.tar holds the folder 'd', whose images would be left out: move them"),
        (with_size(tarfile.REGTYPE, -1536), "a.tar (is damaged: its member '2.jpg' has -1536 bytes|is no whole tar)"),
        (
            with_size(tarfile.XHDTYPE, 2**40),
            "a.tar is no whole tar .*after its member '1.jpg', download or copy it again",
        ),
        (with_member(kind(tarfile.SYMTYPE)), "holds the link '2.jpg', which cannot be read in place.*--dereference"),
        (with_member(kind(tarfile.LNKTYPE)), "holds the link '2.jpg'"),
        (with_member(kind(tarfile.FIFOTYPE)), "holds the special file '2.jpg'"),
        (with_member(kind(tarfile.GNUTYPE_SPARSE)), "holds the sparse file '2.jpg'.*without --sparse"),
        (GOOD[:2100], "no whole tar.*after its member '1.jpg'.*download or copy it again"),
        (GOOD[: 3 * 1536], "cut off or damaged after its member '2.jpg', at byte 4608"),
        (GOOD[: 3 * 1536 + 100], "cut off or damaged after its member '2.jpg', at byte 4608"),
        (bytes(DAMAGED), "cut off or damaged after its member '1.jpg', at byte 3072: download or copy it again"),
        (b"\x1f\x8b" + bytes(1000), r"no whole tar.*: it is compressed \(gzip\), give what it holds$"),
        (b"PK\3\4" + bytes(1000), r"no whole tar.*: it is compressed \(zip\), give what it holds$"),
        (b"\n<!DOCTYPE html>" + bytes(1000), "no whole tar.*: it is a web page, download it again with the login"),
        (b"text " * 200, "no whole tar.*: give a tar"),
        (GOOD + GOOD, "holds something behind the tar's end, at byte 6144.*: keep such tars apart"),
        (b"", "no whole tar.*: it is empty, download or copy it again"),
        (tar_of({"notes.txt": b""}), "class tar .*a.tar holds 1 files and no image.*add its images or remove it"),
    ],
)
def test_a_bad_class_tar_is_refused_by_name(tmp_path: Path, inner: bytes, message: str) -> None:
    (tmp_path / "s.tar").write_bytes(tar_of({"b.tar": GOOD, "a.tar": inner}))
    with pytest.raises(SourceError, match=message) as caught:
        listed(tmp_path / "s.tar")
    assert f"{tmp_path}/s.tar/a.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"a.tar": GOOD, "./a.tar": GOOD}, "s.tar holds a.tar twice"),
        ({"a.tar": GOOD, "d/a.tar": GOOD}, "holds the class folder 'd' and the tar 'a.tar' beside each other"),
        ({"a/1.jpg": b"", "2.jpg": b""}, "holds the class folder 'a' and 1 images of no class, such as '2.jpg'"),
        ({}, "holds no files and no image: give --source"),
        ({"a.tar": GOOD}, "s.tar/a.tar holds images and not their classes"),
    ],
)
def test_a_bad_outer_tar_is_refused(tmp_path: Path, contents: Contents, message: str) -> None:
    (tmp_path / "s.tar").write_bytes(tar_of(contents))
    with pytest.raises(SourceError, match=message):
        listed(tmp_path / "s.tar")


def test_a_half_copied_training_tar_is_refused_wherever_it_ends(imagenet: Path, tmp_path: Path) -> None:
    data = (imagenet / "tars" / "ILSVRC2012_img_train.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        end = tar.getmembers()[-1].offset_data + tar.getmembers()[-1].size
    for size in range(0, end, end // 20):
        (tmp_path / "s.tar").write_bytes(data[:size])
        with pytest.raises(SourceError):
            listed(tmp_path / "s.tar")


# Labels of a flat validation set.


@pytest.mark.parametrize(
    ("labels", "synsets", "message"),
    [
        (None, None, "holds images and not their classes.*: name these with --val-labels"),
        ("n0\n" * 5, None, "has 5 labels and .*img_val.tar 6 images: give one label a line"),
        ("n0\n" * 5 + "n9\n", None, "line 6 of .* is 'n9', which is no class of --source"),
        ("n0\n\nn1\nn2\nn0\nn1\n", None, "line 2 of .* is ''"),
        ("1\n" * 6, None, "holds numbers: the devkit counts classes in an order of its own.*--val-synsets"),
        ("1\n" * 5 + "7\n", "1 n0\n2 n1\n", "line 6 of .* is 7, which .* does not list"),
        ("1\n" * 6, "1 n8\n", "line 1 of .* is 1, which .* calls 'n8': --source has no such class"),
        ("1\n" * 6, "1 n0\n1 n1\n", "line 2 of .* gives the id 1 again"),
        ("1\n" * 6, "n0 1\n", "line 1 of .* is 'n0 1': give 'id wnid' a line"),
        ("1\n" * 6, "\x00\udcff", "no text in UTF-8: give --val-synsets a text file"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    imagenet: Path, tmp_path: Path, labels: str | None, synsets: str | None, message: str
) -> None:
    paths: list[Path | None] = []
    for name, text in (("labels.txt", labels), ("synsets.txt", synsets)):
        if text is not None:
            (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        paths.append(None if text is None else tmp_path / name)
    with pytest.raises(SourceError, match=message) as caught:
        listed(imagenet / "tars", labels=paths[0], ids=paths[1])
    assert "\n" not in str(caught.value)


def test_labels_without_their_images_are_refused(imagenet: Path, tmp_path: Path) -> None:
    tars = imagenet / "tars"
    with pytest.raises(SourceError, match="--val-labels names the classes of validation images"):
        listed(imagenet / "train", labels=tars / "wnids.txt")
    with pytest.raises(SourceError, match=r"val holds folders and no images beside each other.*leave it out"):
        listed(imagenet, labels=tars / "wnids.txt")
    with pytest.raises(SourceError, match="--val-synsets explains the ids of --val-labels: give that too"):
        listed(imagenet, ids=tars / "synsets.txt")
    with pytest.raises(SourceError, match=r"missing\.txt does not exist: give --val-labels a text file"):
        listed(tars, labels=tmp_path / "missing.txt")
    (tmp_path / "val.tar").write_bytes(tar_of({"val_9.jpg": b"", "val_10.jpg": b""}))
    with pytest.raises(SourceError, match="order is open to doubt: number the images with leading zeros"):
        listed(imagenet / "train", tmp_path / "val.tar", tars / "wnids.txt")


# A tar that changes under the job's hands.


def alike(first_seed: int) -> bytes:
    """A tar of two class tars: other images for another seed, each in the same place and of the same size."""
    images = [encoded(photograph(first_seed + i, 280, 270)).ljust(40_000, b"\0") for i in range(6)]
    assert {len(image) for image in images} == {40_000}
    inner = {f"n{c}.tar": tar_of({f"n{c}_{i}.JPEG": images[3 * c + i] for i in range(3)}) for c in range(2)}
    return tar_of(inner)


def replace(tar: Path) -> None:
    """Another tar of the same layout, written aside and renamed, as a second download would be, in the same second."""
    aside = tar.with_suffix(".new")
    aside.write_bytes(alike(100))
    then = tar.stat().st_mtime_ns
    os.utime(aside, ns=(then, then + 1))
    aside.rename(tar)


def test_a_tar_that_was_replaced_after_it_was_listed_is_noticed(tmp_path: Path) -> None:
    tar = tmp_path / "images.tar"
    tar.write_bytes(alike(0))
    listing = listed(tar)
    shard, *_ = plan_shards(listing, 0, 5)
    replace(tar)
    # Nothing else would tell: names, places and sizes are the same.
    assert comparable(listed(tar)) == comparable(listing)
    with pytest.raises(ShardError, match=r"images\.tar is not the file that was listed.*run the same command again"):
        build_shard(tmp_path / "out", shard, encoder_settings(90), set_aside=True)
    tar.unlink()
    with pytest.raises(SourceReadError, match=r"images\.tar cannot be reached: No such file"):
        build_shard(tmp_path / "out", shard, encoder_settings(90), set_aside=True)
    assert not (tmp_path / "out").exists()


def test_a_tar_that_is_replaced_while_a_shard_is_built_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = tmp_path / "images.tar"
    tar.write_bytes(alike(0))
    shard, *_ = plan_shards(listed(tar), 0, 5)
    # As Ray hands it to a worker.
    shard = pickle.loads(pickle.dumps(shard))
    converted: list[int] = []

    def convert_and_replace(data: bytes, quality: int) -> Converted:
        if len(converted) == 2:
            replace(tar)
        converted.append(len(data))
        return convert(data, quality)

    monkeypatch.setattr("pipeline.images.isolation.convert", convert_and_replace)
    with pytest.raises(ShardError, match=r"images\.tar is not the file that was listed"):
        build_shard(tmp_path / "out", shard, encoder_settings(90), set_aside=True)
    assert len(converted) == len(shard.entries)
    assert not (tmp_path / "out").exists()


# Class names.


def test_only_imagenets_own_classes_get_its_names() -> None:
    assert names_of(("n01440764", "n01443537")) == ("n01440764", "n01443537")
    assert not is_imagenet(tuple(f"n{number:08d}" for number in range(1000)))
    assert not is_imagenet(())


def test_imagenets_names_are_in_the_order_of_the_sorted_wnids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.names.is_imagenet", lambda wnids: True)
    names = names_of(())
    assert len(names) == 1000
    # Well-known places: n01440764, n01443537, n02123045, n07753592, n15075141.
    assert [names[i] for i in (0, 1, 281, 954, 999)] == ["tench", "goldfish", "tabby", "banana", "toilet tissue"]

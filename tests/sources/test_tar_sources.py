"""Tars as sources: the same images give the same set as folders, and no tar loses an image without a word."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest

from pipeline.dataset.annotation import ShardError
from pipeline.images.resize import Converted, convert, encoder_settings
from pipeline.sources.files import SourceError, read_bytes
from pipeline.storage.retry import SourceReadError
from tests.photographs import encoded, photograph
from tests.shard_sets import build_shard
from tests.sources.layouts import images, listed, made, set_plan, tar_of, write


def test_folders_and_tars_give_the_same_set(forms: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    tars = listed(forms / "tars", labels=forms / "tars" / "wnids.txt")
    assert tars.fingerprint == listed(forms / "folders").fingerprint
    assert tars.splits["train"][0].where.endswith("ILSVRC2012_img_train.tar/n0.tar/n0_1.JPEG")
    assert len(expected) == 3 * 3 + 3 * 2 + 5
    assert made(tars, tmp_path / "tars") == expected


def test_validation_tars_and_flat_folders_are_labeled_by_name_or_id(forms: Path, tmp_path: Path) -> None:
    tars, folders = forms / "tars", forms / "folders"
    train, val = tars / "ILSVRC2012_img_train.tar", tars / "ILSVRC2012_img_val.tar"
    right = listed(folders).fingerprint
    by_id = listed(train, val, tars / "ids.txt", tars / "synsets.txt")
    assert (by_id.fingerprint, by_id.roots) == (right, (str(train), str(val)))
    assert listed(train, folders / "val").fingerprint == right
    with tarfile.open(val) as tar:
        tar.extractall(tmp_path, filter="data")
    assert listed(folders / "train", tmp_path, tars / "wnids.txt").fingerprint == right


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_found_where_every_format_puts_them(tmp_path: Path, form: int) -> None:
    """USTAR keeps names in the file system's encoding, the others also in records or members before the image."""
    long = "x" * (95 if form == tarfile.USTAR_FORMAT else 180)
    pictures = {f"./{long}.jpg": b"long", "é 日本.png": b"foreign", "last.jpg": b"L" * 512, "z.jpg": b""}
    (tmp_path / "s.tar").write_bytes(tar_of({"a.tar": pictures, "b.tar": {"1.jpg": b"1", "2.jpg": b"2"}}, form))
    entries = [entry for split in listed(tmp_path / "s.tar").splits.values() for entry in split if entry.wnid == "a"]
    read = {entry.member.rpartition("/")[2]: read_bytes(entry.path, entry.offset, entry.size) for entry in entries}
    assert read == {name.removeprefix("./"): data for name, data in pictures.items()}


def test_names_in_latin_1_are_read_as_a_folder_of_them_is(tmp_path: Path) -> None:
    photographs = {
        f"{folder}/caf\udce9 {i}.JPEG": encoded(photograph(i, 270, 260)) for folder in "ab" for i in range(2)
    }
    write(tmp_path / "folders", {**photographs, "a/na\udcefve.JPEG": b""})
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(tmp_path / "folders", "s")
    tars = listed(tmp_path / "s.tar")
    assert images(tars) == images(listed(tmp_path / "folders"))
    keys = {entry.key for entries in tars.splits.values() for entry in entries}
    assert keys == {"a_caf_xE9_x200", "a_caf_xE9_x201", "a_na_xEFve", "b_caf_xE9_x200", "b_caf_xE9_x201"}
    (reject,) = made(tars, tmp_path / "out")["rejects.jsonl"].splitlines()
    assert json.loads(reject)["path"].endswith("a/na\udcefve.JPEG")


# Tars that cannot be trusted.


def then(name: str = "2.jpg", kind: bytes = tarfile.REGTYPE, size: int = 0) -> bytes:
    """A class tar of one image whose second header is this one."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, "1.jpg", size
    return tar_of({"1.jpg": b"abc"})[:1024] + member.tobuf(tarfile.GNU_FORMAT) + bytes(4096)


GOOD = tar_of({f"{i}.jpg": b"abc" * 300 for i in range(4)})
DAMAGED = bytearray(GOOD)
DAMAGED[2 * (512 + 1024) + 5] ^= 1  # in the third member's header


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (then("../../etc/2.jpg"), "a.tar holds '../../etc/2.jpg', a name that leads out of it"),
        (then("/etc/2.jpg"), "holds '/etc/2.jpg', a name that leads out of it"),
        (then("1.jpg"), "holds 1.jpg twice: make it again with each file once"),
        (then("d/1.jpg"), "a.tar holds the folder 'd', whose images would be left out: move them"),
        (then(size=-1536), "a.tar (is damaged: its member '2.jpg' has -1536 bytes|is no whole tar)"),
        (then(kind=tarfile.XHDTYPE, size=2**40), "a.tar is no whole tar .*after its member '1.jpg', download"),
        (then(kind=tarfile.SYMTYPE), "holds the link '2.jpg', which cannot be read in place.*--dereference"),
        (then(kind=tarfile.LNKTYPE), "holds the link '2.jpg'"),
        (then(kind=tarfile.FIFOTYPE), "holds the special file '2.jpg'"),
        (then(kind=tarfile.GNUTYPE_SPARSE), "holds the sparse file '2.jpg'.*without --sparse"),
        (GOOD[:2100], "no whole tar.*after its member '1.jpg'.*download or copy it again"),
        (GOOD[: 3 * 1536], "cut off or damaged after its member '2.jpg', at byte 4608"),
        (GOOD[: 3 * 1536 + 100], "cut off or damaged after its member '2.jpg', at byte 4608"),
        (bytes(DAMAGED), "cut off or damaged after its member '1.jpg', at byte 3072: download or copy it again"),
        (b"\x1f\x8b" + bytes(1000), r"no whole tar.*: it is compressed \(gzip\), give what it holds$"),
        (b"\n<!DOCTYPE html>" + bytes(1000), "no whole tar.*: it is a web page, download it again with the login"),
        (b"text " * 200, "no whole tar.*: give a tar"),
        (GOOD + GOOD, "holds something behind the tar's end, at byte 6144.*: keep such tars apart"),
        (b"", "no whole tar.*: it is empty, download or copy it again"),
    ],
)
def test_a_bad_class_tar_is_refused_by_name(tmp_path: Path, inner: bytes, message: str) -> None:
    write(tmp_path, {"s.tar": {"b.tar": GOOD, "a.tar": inner}})
    with pytest.raises(SourceError, match=message) as caught:
        listed(tmp_path / "s.tar")
    assert f"{tmp_path}/s.tar/a.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tars_of_one_name_are_refused_not_taken_for_one(tmp_path: Path) -> None:
    write(tmp_path, {"s.tar": {"a.tar": GOOD, "./a.tar": GOOD}})
    with pytest.raises(SourceError, match=r"s\.tar holds a\.tar twice"):
        listed(tmp_path / "s.tar")
    with pytest.raises(SourceError, match=r"part0/0\.tar and .*part1/0\.tar have the same name: name the tars apart"):
        listed(f"{tmp_path}/part{{0,1}}/{{0..1}}.tar")


def test_a_half_copied_training_tar_is_refused_wherever_it_ends(forms: Path, tmp_path: Path) -> None:
    data = (forms / "tars" / "ILSVRC2012_img_train.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        end = tar.getmembers()[-1].offset_data + tar.getmembers()[-1].size
    for size in range(0, end, end // 20):
        (tmp_path / "s.tar").write_bytes(data[:size])
        with pytest.raises(SourceError):
            listed(tmp_path / "s.tar")


# A tar that changes under the job's hands.


@pytest.mark.parametrize("converted_before", [0, 2])
def test_a_tar_that_is_replaced_after_it_was_listed_is_noticed(
    forms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted_before: int
) -> None:
    tar = Path(shutil.copy(forms / "tars" / "ILSVRC2012_img_train.tar", tmp_path / "images.tar"))
    # As Ray hands it to a worker.
    shard = pickle.loads(pickle.dumps(set_plan(listed(tar)).shards[0]))
    converted: list[int] = []

    def replace() -> None:
        """Puts another tar of the same size there, as a second download would, in the same second."""
        written = tar.stat().st_mtime_ns
        aside = Path(shutil.copy(tar, tmp_path / "aside"))
        os.utime(aside, ns=(written, written + 1))
        aside.rename(tar)

    def convert_and_replace(data: bytes, quality: int) -> Converted:
        converted.append(len(data))
        if len(converted) == converted_before:
            replace()
        return convert(data, quality)

    monkeypatch.setattr("pipeline.images.isolation.convert", convert_and_replace)
    if not converted_before:
        replace()
    # Nothing but the time tells.
    with pytest.raises(ShardError, match=r"images\.tar is not the file that was listed.*run the same command again"):
        build_shard(tmp_path / "out", shard, encoder_settings(90))
    assert len(converted) == (len(shard.entries) if converted_before else 0)
    tar.unlink()
    with pytest.raises(SourceReadError, match=r"images\.tar cannot be reached: No such file"):
        build_shard(tmp_path / "out", shard, encoder_settings(90))
    assert not (tmp_path / "out").exists()

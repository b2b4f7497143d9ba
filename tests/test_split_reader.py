"""Opening a split: indexes parsed as plain Python would, the first fault named, and next to nothing kept of a sample.

What befalls shards that are open is in `test_read_faults`.
"""

from __future__ import annotations

import itertools
import os
import resource
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.annotation import ShardAnnotation
from pipeline.dataset import (
    ClassLabel,
    DatasetError,
    DatasetInfo,
    ImageError,
    ShardRow,
    Split,
    read_dataset,
    write_json,
)
from pipeline.keys import may_be_of
from pipeline.pixel_stage import open_split, stage_pixels
from pipeline.rgb_stats import RgbMoments
from pipeline.shard_index import parse_index, read_index
from pipeline.shards import pack
from pipeline.split_reader import SplitReader
from tests import foreign_shards as foreign
from tests import shard_sets
from tests.damage import flip_in_the_middle, overwrite, own_copy, places

BAD = 23  # A sample of the third shard of ten, its fourth.

INDEXES = {
    "as this program writes it": "v1.2 2\ncls 512 1 a.cls jpg 1536 700 a.jpg\ncls 3072 3 b.cls jpg 4096 9 b.jpg\n",
    "no line break at the end": "v1.2 1\ncls 512 1 a.cls jpg 1536 700 a.jpg",
    "image first": "v1.2 1\njpg 512 700 a.jpg cls 2048 1 a.cls\n",
    "a longer extension": "v1.2 1\njpeg 512 700 a.jpeg cls 2048 1 a.cls\n",
    "capitals": "v1.2 2\nJPG 512 700 a.JPG cLs 2048 1 a.cLs\nJpEg 3072 5 b.JpEg CLS 4096 1 b.CLS\n",
    "more parts in some": "v1.2 3\njson 512 9 a.json cls 2 1 a.cls jpg 3 4 a.jpg seg.png 5 6 a.seg.png\n"
    "cls 7 1 b.cls jpg 8 9 b.jpg\ncls 10 1 c.cls jpgs 11 12 c.jpgs jpg 13 14 c.jpg cl 15 16 c.cl\n",
    "both kinds of image": "v1.2 2\njpeg 1 2 a.jpeg jpg 3 4 a.jpg cls 5 6 a.cls\n"
    "jpg 1 2 b.jpg jpeg 3 4 b.jpeg cls 5 6 b.cls\n",
    "the same part twice": "v1.2 1\njpg 1 2 a.jpg jpg 3 4 a.jpg cls 5 6 a.cls cls 7 8 a.cls\n",
    "names that are no ASCII": "v1.2 1\njpg 1 2 ./\u00e9t\u00e9/\u6f22.jpg cls 3 4 ./\u00e9t\u00e9/\u6f22.cls\n",
    "an empty name and large numbers": f"v1.2 1\njpg {10**18 - 1} {2**40} .jpg cls 0 0 .cls\n",
    "nothing": "v1.2 0\n",
}


def check_as_plain_python(path: Path) -> None:
    expected, found = shard_sets.read_index(path), read_index(path)
    assert len(found) == len(expected)
    for number, parts in enumerate(expected):
        offset, size, name = parts["jpg"] if "jpg" in parts else parts["jpeg"]
        assert found.images[number].tolist() == [offset, size]
        assert found.labels[number].tolist() == list(parts["cls"][:2])
        assert (found.name(number), found.key(number)) == (name, name.rpartition(".")[0])


@pytest.mark.parametrize("text", INDEXES.values(), ids=INDEXES)
def test_an_index_is_parsed_as_by_plain_python(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.idx"
    path.write_text(text, encoding="utf-8")
    check_as_plain_python(path)


def test_the_indexes_of_a_set_are(shard_set: Path) -> None:
    paths = sorted(shard_set.rglob("*.idx"))
    assert len(paths) == 7
    for path in paths:
        check_as_plain_python(path)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "is no whole v1.2 index: its first line is b''"),
        (b"v1.1 1\ncls 1 2 a.cls jpg 3 4 a.jpg\n", "is no whole v1.2 index: its first line is b'v1.1 1'"),
        (b"v1.2 2\ncls 1 2 a.cls jpg 3 4 a.jpg\n", "is no whole v1.2 index"),
        (b"v1.2 1\ncls 1 2 a.cls jpg 3 4 a.jpg\n\n", "is no whole v1.2 index"),
        (b"v1.2 2\ncls 1 2 a.cls jpg 3 4 a.jpg\n\n", "its line 3 has fields too many or too few"),
        (b"v1.2 1\ncls 1 2 a.cls  jpg 3 4 a.jpg\n", "its line 2 has fields too many or too few"),
        (b"v1.2 2\ncls 1 2 a.cls jpg\n3 4 a.jpg\n", "its line 2 has fields too many or too few"),
        (b"v1.2 2\ncls 1 2 a jpg 3 4 a\ncls 1 2 b jpg 3 -4 b\n", "its line 3 has no numbers where it should"),
        (b"v1.2 1\ncls 1 2 a jpg 3 4x b\n", "its line 2 has no numbers where it should"),
        (b"v1.2 1\ncls 1 2 a jpg 3  b\n", "its line 2 has no numbers where it should"),
        (b"v1.2 1\ncls 1 2 a jpg 3 1234567890123456789 b\n", "its line 2 has no numbers where it should"),
        (b"v1.2 2\ncls 1 2 a jpg 3 4 a\njpg 3 4 b\n", r"sample 2 has \['jpg'\], not jpg and cls"),
        (b"v1.2 1\npng 1 2 a cls 3 4 a\n", r"sample 1 has \['cls', 'png'\], not jpg and cls"),
    ],
)
def test_an_index_that_is_damaged_is_refused(text: bytes, what: str) -> None:
    with pytest.raises(DatasetError, match=f"^x.idx.* ?{what}"):
        parse_index(text, "x.idx")


def test_keys_are_held_against_classes_as_one_by_one() -> None:
    classes = ["n1", "n12", "n02", "a", "ab", "abcdefghijkl"]
    names = ["n1_1", "n12_1", "n", "n02", "abc", "a", "abcdefghijk", "abcdefghijklm", "ab"]
    pairs = list(itertools.product(names, classes))
    lines = [f"cls 1 2 {name}.cls jpg 3 4 {name}.jpg" for name, _ in pairs]
    # The last name is shorter than what it is held against, and ends the index.
    index = parse_index("\n".join([f"v1.2 {len(pairs) + 1}", *lines, "cls 1 2 ab jpg 3 4 ab"]).encode(), "x.idx")
    wanted = [wnid for _, wnid in pairs] + ["abcdefghijkl"]
    expected = [may_be_of(wnid, name) for name, wnid in pairs] + [False]
    assert index.begin_with(np.array([w.encode() for w in wanted])).tolist() == expected
    assert 0 < sum(expected) < len(expected)


# The name in an error, read when it is needed.


def lose_index(path: Path) -> None:
    path.unlink()


def spoil_index(path: Path) -> None:
    path.write_bytes(b"\0" * 40)


def cut_index(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def change_index(path: Path) -> None:
    """To one that is whole, of a shard whose first sample is another."""
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:], ""]))


def take_anothers(path: Path) -> None:
    path.write_bytes(path.with_name("train-000001.idx").read_bytes())


@pytest.mark.parametrize("change", [lose_index, spoil_index, cut_index, change_index, take_anothers])
def test_an_image_is_named_by_number_where_the_index_has_changed(
    shard_set: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    root = own_copy(shard_set, tmp_path / "shards")
    reader, place = SplitReader(root, read_dataset(root), "train"), places(root, "train")[BAD]
    assert reader.key(BAD) == place.key
    change(place.tar.with_suffix(".idx"))
    before = place.tar.stat()
    flip_in_the_middle(place)
    os.utime(place.tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(
        ImageError, match=r"^train image no\. 4 of train-000002: it is not what was written: .*; build "
    ) as e:
        reader.image(BAD)
    assert (e.value.sample, e.value.shard, e.value.key) == (BAD, "train-000002", "no. 4")
    # The places are those of the shard that is open.
    assert (
        reader.image(BAD - 1).tobytes() == SplitReader(shard_set, read_dataset(shard_set), "train").image(22).tobytes()
    )


def test_an_index_written_again_as_it_was_names_the_image(shard_set: Path, tmp_path: Path) -> None:
    root = own_copy(shard_set, tmp_path / "shards")
    reader, place = SplitReader(root, read_dataset(root), "train"), places(root, "train")[BAD]
    index = place.tar.with_suffix(".idx")
    index.write_bytes(index.read_bytes())
    assert reader.key(BAD) == place.key


# What is refused at once.


@pytest.mark.parametrize("pixels", [False, True])
def test_more_shards_than_files_may_be_open_raise_the_limit(shard_set: Path, tmp_path: Path, pixels: bool) -> None:
    root = stage_pixels(str(shard_set), tmp_path, print, 1) if pixels else shard_set
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 2, hard))
    try:
        reader = open_split(root, read_dataset(root), "train")
        assert sum(reader.image(sample).size > 0 for sample in range(len(reader))) == 45
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_than_the_system_allows_are_refused(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4, 4))
    with pytest.raises(OSError, match=r"a process may have 4 files open, and \d+ are needed: allow more by ulimit -Hn"):
        SplitReader(shard_set, read_dataset(shard_set), "train")


def test_of_several_faults_the_first_shards_is_named(shard_set: Path, tmp_path: Path) -> None:
    root = own_copy(shard_set, tmp_path / "shards")
    lose_index(root / "train" / "train-000003.idx")
    wrong = places(root, "train")[12]
    overwrite(wrong.tar, wrong.label, b"x")
    with pytest.raises(DatasetError, match=rf"sample {wrong.key}\.jpg has the label b'x' of 3 classes.* train-000001$"):
        SplitReader(root, read_dataset(root), "train")


def test_an_index_that_points_beyond_the_tar_is_refused(shard_set: Path, tmp_path: Path) -> None:
    root = own_copy(shard_set, tmp_path / "shards")
    place = places(root, "train")[BAD]
    path, size = place.tar.with_suffix(".idx"), place.tar.stat().st_size
    path.write_text(
        path.read_text().replace(f" {place.image} {place.size} ", f" {place.image} {size - place.image + 1} ")
    )
    with pytest.raises(
        DatasetError, match=rf"sample {place.key}\.jpg lies beyond the end of the file: .*train-000002$"
    ):
        SplitReader(root, read_dataset(root), "train")


def test_labels_as_others_write_them(tmp_path: Path) -> None:
    foreign.write_set(tmp_path)
    texts = [b"0\n", b" 1", b"002\r\n", b"00", b"\t1\n", b"2"]
    foreign.write_shards(tmp_path, "val", (foreign.sample(number, cls=text) for number, text in enumerate(texts)))
    (tmp_path / "val" / "val-000001.tar").unlink()
    assert SplitReader(tmp_path, foreign.described(tmp_path), "val").labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("text", [b"3", b"+1", b"-1", b"1_0", b"1\0", b"\xb9", b"", b"9" * 30])
def test_what_is_no_label_of_the_set_is_refused(tmp_path: Path, text: bytes) -> None:
    """Whatever python or numpy would take it for."""
    info = one_shard(tmp_path, *pack([("n1_0", 1, b"jpeg"), ("n1_1", int("1" * max(len(text), 1)), b"jpeg")]), [4, 4])
    index = tmp_path / "train" / "train-000000.idx"
    if not text:
        index.write_text(index.read_text().replace(" 1 n1_1.cls", " 0 n1_1.cls"))
    label = places(tmp_path, "train")[1].label
    overwrite(tmp_path / "train" / "train-000000.tar", label, text)
    with pytest.raises(DatasetError) as found:
        SplitReader(tmp_path, info, "train")
    assert f"sample n1_1.jpg has the label {text!r} of 3 classes: build the shard again" in str(found.value)


# Numbers of any size, and few bytes of each.


def one_shard(root: Path, tar: bytes, index: str, crc32: list[int], size: int = 0) -> DatasetInfo:
    """The description of a set of three classes and one shard; `size` makes its file longer, by a hole."""
    (root / "train").mkdir(parents=True)
    path = root / "train" / "train-000000.tar"
    path.write_bytes(tar)
    os.truncate(path, max(size, len(tar)))
    path.with_suffix(".idx").write_text(index)
    row = ShardRow("train-000000", len(crc32), path.stat().st_size, "0" * 64)
    annotation = ShardAnnotation(row.name, row.samples, row.bytes, row.sha256, "", RgbMoments(), (), tuple(crc32))
    write_json(path.with_suffix(".json"), annotation.to_json())
    classes = tuple(ClassLabel(i, f"n{i}", f"n{i}") for i in range(3))
    return DatasetInfo(classes, {"train": Split(row.samples, row.bytes, (row,))}, {"encoder": ""}, 0, None, "", 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", [2**31 + 5, 2**32 - 4, 2**32 + 512, 5 * 2**30])
def test_an_image_far_into_a_large_tar(tmp_path: Path, offset: int) -> None:
    index = f"v1.2 1\ncls 512 1 n1_a.cls jpg {offset} 4 n1_a.jpg\n"
    info = one_shard(tmp_path, b"1".rjust(513, b"\0"), index, [zlib.crc32(b"jpeg")], offset + 4)
    overwrite(tmp_path / "train" / "train-000000.tar", offset, b"jpeg")
    reader = SplitReader(tmp_path, info, "train")
    assert reader.image(0).tobytes() == b"jpeg"
    assert reader.key(0) == "n1_a"


@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 2**32 - 2000, 2**32, 3 * 2**31])
def test_images_of_any_size(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    info = one_shard(
        tmp_path, b"1".rjust(513, b"\0"), f"v1.2 1\ncls 512 1 n1_a.cls jpg 1536 {size} n1_a.jpg\n", [7], 1536 + size
    )
    reader = SplitReader(tmp_path, info, "train")
    # So many bytes are not read here, but asked for.
    monkeypatch.setattr(reader._files[0], "read", lambda *asked: repr(asked).encode())
    assert reader.image(0).tobytes() == f"(1536, {size}, 7)".encode()


def test_a_sample_takes_sixteen_bytes(tmp_path: Path) -> None:
    samples = 5000
    packed = pack([(f"n{i % 3}_{i}", i % 3, b"jpeg") for i in range(samples)])
    info = one_shard(tmp_path, *packed, [zlib.crc32(b"jpeg")] * samples)
    SplitReader(tmp_path, info, "train")  # What a first call loads is not the set's.
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        reader = SplitReader(tmp_path, info, "train")
        kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 16 * samples <= kept < 20 * samples
    assert reader.labels.tolist() == [i % 3 for i in range(samples)]

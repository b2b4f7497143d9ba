"""Sources: the same listing from any file system, keys that every reader takes, and nothing lost without a word."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.sources.keys import MAX_KEY
from pipeline.sources.names import is_imagenet, names_of
from pipeline.sources.sources import Listing, permutation
from tests.sources import layouts
from tests.sources.layouts import below, listed


def write(root: Path, *names: str) -> Path:
    return layouts.write(root, {name: name for name in names})


def names(listing: Listing, split: str) -> list[str]:
    return [Path(entry.path).name for entry in listing.splits[split]]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write(tmp_path, "train/1.jpg", "train/2.jpg", "truck/1.jpg", "truck/2.jpg")
    assert listed(tmp_path).classes == ("train", "truck")


def test_keys_begin_with_their_class_hold_plain_characters_and_fit_a_tar(tmp_path: Path) -> None:
    odd = ["a.b c", "sea lion", "é", "日本", "a\\..\\b", "x" * 200, "tab\tnl\n", "%"]
    write(tmp_path, "n01440764/n01440764_10026.JPEG", "n01440764/ILSVRC2012_val_1.JPEG", "b/1.PNG", "b/2.TIF")
    write(tmp_path, *(f"b/{stem}.jpg" for stem in odd))
    keys = {Path(e.path).name: e.key for split in listed(tmp_path).splits.values() for e in split}
    assert len(set(keys.values())) == len(odd) + 4
    assert keys["n01440764_10026.JPEG"] == "n01440764_10026"
    assert keys["ILSVRC2012_val_1.JPEG"] == "n01440764_ILSVRC2012_val_1"
    assert keys["a.b c.jpg"] == "b_a_x2Eb_x20c"
    for key in keys.values():
        assert re.fullmatch(r"[A-Za-z0-9_-]+", key)
        assert len(key) <= MAX_KEY


def test_no_image_is_lost_to_an_equal_key(tmp_path: Path) -> None:
    # a.png's first choice after a.jpg, a_2, belongs to a_2.jpg; A.JPG differs in case alone; abc is in two classes.
    write(tmp_path, "t/a/a.jpg", "t/a/a.png", "t/a/a_2.jpg", "t/a/A.JPG", "t/a/abc.jpg", "t/ab/abc.jpg", "v/a/1.jpg")
    write(tmp_path, "t/a/" + "x" * 150 + "1.jpg", "t/a/" + "x" * 150 + "2.jpg")
    keys = {entry.key.lower() for entry in listed(tmp_path / "t", tmp_path / "v").splits["train"]}
    assert len(keys) == 8


def test_other_files_are_counted_and_hidden_ones_are_not(tmp_path: Path) -> None:
    one = {"1.jpg": b"1", "2.jpg": b"2", "notes.txt": b"", "._1.jpg": b"of a Mac", ".git/3.jpg": b""}
    layouts.write(tmp_path / "folders", {**below("a", one), **below("b", one), "readme.txt": b""})
    layouts.write(tmp_path, {"s.tar": {"a.tar": one, "b.tar": one, "readme.txt": b""}})
    for source in ("folders", "s.tar"):
        listing = listed(tmp_path / source)
        assert (listing.images, listing.classes) == (4, ("a", "b"))
        assert listing.notes == ("files ignored, since their extensions are not those of images: 3 (3 .txt)",)


@pytest.mark.parametrize(
    ("val", "used", "unread"),
    [
        (None, "3.jpg", "test/, c/, x.tar.gz, 1 images"),
        ("c/val", "4.jpg", "test/, c/, validation/, x.tar.gz, 1 images"),
        ("validation", "3.jpg", "test/, c/, x.tar.gz, 1 images"),
    ],
)
def test_named_validation_images_go_first_and_what_lies_beside_is_named(
    tmp_path: Path, val: str | None, used: str, unread: str
) -> None:
    write(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/1.jpg", "validation/a/3.jpg", "validation/b/3.jpg")
    write(tmp_path, "c/val/a/4.jpg", "c/val/b/4.jpg", "x.tar.gz", "sample.jpg", "LICENSE.txt")
    listing = listed(tmp_path, None if val is None else tmp_path / val)
    assert names(listing, "val") == [used, used]
    assert listing.notes == (f"beside the images to train on, not read: {unread}",)
    assert listed(tmp_path / "train", tmp_path / "validation").notes == ()


def test_split_off_part_is_seeded_and_leaves_every_class_in_both(tmp_path: Path) -> None:
    write(tmp_path, *(f"a/{i:03d}.jpg" for i in range(100)), "b/1.jpg", "b/2.jpg", "c/only.jpg")
    listing = listed(tmp_path, fraction=0.1)
    val = [entry.wnid for entry in listing.splits["val"]]
    assert (val.count("a"), val.count("b"), val.count("c")) == (10, 1, 0)
    everything = {entry.path for split in listing.splits.values() for entry in split}
    assert len(everything) == listing.images == 103
    assert listed(tmp_path, fraction=0.1).fingerprint == listing.fingerprint
    assert names(listed(tmp_path, fraction=0.1, seed=1), "val") != names(listing, "val")
    # Even a fraction close to 1 leaves something to train on.
    assert {entry.wnid for entry in listed(tmp_path, fraction=0.99).splits["train"]} == {"a", "b", "c"}


def test_fingerprint_follows_contents_and_not_the_place(tmp_path: Path) -> None:
    for place in ("x", "y"):
        write(tmp_path / place, *(f"{c}/{i}.jpg" for c in "ab" for i in range(4)))
    before = listed(tmp_path / "x").fingerprint
    assert listed(tmp_path / "y").fingerprint == before
    (tmp_path / "y" / "a" / "0.jpg").write_bytes(b"another size")
    assert listed(tmp_path / "y").fingerprint != before
    assert listed(tmp_path / "x", seed=1).fingerprint != before


def test_listing_and_handing_out_images_imports_no_pandas(tmp_path: Path) -> None:
    """It would take the job, and each of its workers, up to half a second, and 46 MB."""
    write(tmp_path, "a/1.jpg", "a/2.jpg", "b/3.jpg", "b/4.jpg")
    script = """
import pickle, sys
from pipeline.sources.sources import read_source
entries = read_source(sys.argv[1], None, 0.5, 0).splits["train"]
print([entry.key for entry in pickle.loads(pickle.dumps(entries[::-1]))], "pandas" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\['b_.', 'a_.'\] False", done.stdout.strip())


def test_permutation_is_a_fixed_function_of_its_arguments() -> None:
    order = permutation(7, "train", 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() == permutation(7, "train", 1000).tolist()
    assert order.tolist() != permutation(8, "train", 1000).tolist()
    assert order.tolist() != permutation(7, "val", 1000).tolist()
    # Written down, so that no other numpy may silently deal other shards.
    assert permutation(0, "shards train", 8).tolist() == [6, 0, 2, 3, 4, 5, 7, 1]


def test_imagenets_classes_alone_get_its_names_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert names_of(("n01440764", "n01443537")) == ("n01440764", "n01443537")
    assert not is_imagenet(tuple(f"n{number:08d}" for number in range(1000)))
    monkeypatch.setattr("pipeline.sources.names.is_imagenet", lambda wnids: True)
    given = names_of(())
    assert len(given) == 1000
    # Well-known places: n01440764, n01443537, n02123045, n07753592, n15075141.
    assert [given[i] for i in (0, 1, 281, 954, 999)] == ["tench", "goldfish", "tabby", "banana", "toilet tissue"]

"""Sources: the same listing from any file system, keys that every reader takes, and errors that say what to do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.sources.files import UNREADABLE, SourceError
from pipeline.sources.keys import MAX_KEY, escape
from pipeline.sources.sources import Listing, permutation, read_source


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))
    return root


def listed(source: Path, source_val: Path | None = None, fraction: float = 0.1, seed: int = 0) -> Listing:
    return read_source(source, source_val, fraction, seed)


def names(listing: Listing, split: str) -> list[str]:
    return [Path(entry.path).name for entry in listing.splits[split]]


def test_train_and_val_folders(tmp_path: Path) -> None:
    write(tmp_path, "train/b/2.jpg", "train/b/1.JPEG", "train/a/x.png", "val/b/9.webp", "val/a/8.TIF")
    listing = listed(tmp_path)
    assert listing.classes == ("a", "b")
    assert names(listing, "train") == ["x.png", "1.JPEG", "2.jpg"]
    assert [entry.label for entry in listing.splits["train"]] == [0, 1, 1]
    assert [entry.key for entry in listing.splits["train"]] == ["a_x", "b_1", "b_2"]
    assert names(listing, "val") == ["8.TIF", "9.webp"]
    assert [entry.size for entry in listing.splits["val"]] == [len("val/a/8.TIF"), len("val/b/9.webp")]


def test_a_named_validation_folder_goes_first(tmp_path: Path) -> None:
    write(tmp_path, "s/train/a/1.jpg", "s/train/b/1.jpg", "s/val/a/2.jpg", "other/b/3.jpg")
    assert names(listed(tmp_path / "s", tmp_path / "other"), "val") == ["3.jpg"]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write(tmp_path, "train/1.jpg", "train/2.jpg", "truck/1.jpg", "truck/2.jpg")
    assert listed(tmp_path).classes == ("train", "truck")


def test_key_is_the_stem_where_it_begins_with_its_class(tmp_path: Path) -> None:
    write(tmp_path, "n01440764/n01440764_10026.JPEG", "n01440764/ILSVRC2012_val_1.JPEG", "b/1.jpg", "b/2.jpg")
    keys = {Path(e.path).name: e.key for split in listed(tmp_path).splits.values() for e in split}
    assert keys["n01440764_10026.JPEG"] == "n01440764_10026"
    assert keys["ILSVRC2012_val_1.JPEG"] == "n01440764_ILSVRC2012_val_1"


@pytest.mark.parametrize(
    "stem", ["a.b", "sea lion", "é", "日本", "a/../b".replace("/", "\\"), "x" * 200, "tab\tnl\n", "%"]
)
def test_keys_hold_plain_characters_and_fit_a_tar(tmp_path: Path, stem: str) -> None:
    write(tmp_path, f"a/{stem}.jpg", "a/z.jpg", "b/1.jpg", "b/2.jpg")
    for split in listed(tmp_path).splits.values():
        for entry in split:
            assert re.fullmatch(r"[A-Za-z0-9_-]+", entry.key)
            assert len(entry.key) <= MAX_KEY + 4


def test_escape_tells_different_names_apart() -> None:
    assert escape("a.b c") == "a_x2Eb_x20c"
    assert len({escape(text) for text in ("a.b", "a b", "a_b", "ab", "a-b", "é", "e")}) == 7


def test_no_image_is_lost_to_an_equal_key(tmp_path: Path) -> None:
    # a.png's first choice after a.jpg, a_2, belongs to a_2.jpg; A.JPG differs in case alone; abc is in two classes.
    write(tmp_path, "t/a/a.jpg", "t/a/a.png", "t/a/a_2.jpg", "t/a/A.JPG", "t/a/abc.jpg", "t/ab/abc.jpg", "v/a/1.jpg")
    write(tmp_path, "t/a/" + "x" * 150 + "1.jpg", "t/a/" + "x" * 150 + "2.jpg")
    keys = [entry.key.lower() for entry in listed(tmp_path / "t", tmp_path / "v").splits["train"]]
    assert len(keys) == 8
    assert len(set(keys)) == 8


def test_other_files_are_counted_and_hidden_ones_are_not(tmp_path: Path) -> None:
    write(
        tmp_path, "a/1.jpg", "a/2.jpg", "a/notes.txt", "a/.DS_Store", "b/1.jpg", "b/2.jpg", "LICENSE.txt", ".git/x.jpg"
    )
    listing = listed(tmp_path)
    assert listing.notes == ("files ignored, since their extensions are not those of images: 2 (2 .txt)",)
    assert listing.images == 4
    assert listing.classes == ("a", "b")


def test_a_folder_among_the_images_of_a_class_is_refused_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path, "a/1.jpg", "a/more/2.jpg", "b/1.jpg")
    with pytest.raises(SourceError, match=r"/a holds the folder 'more', whose images would be left out: move them"):
        listed(tmp_path)


@pytest.mark.parametrize(
    ("val", "unread"),
    [
        (None, "test/, c/, x.tar.gz, 1 images"),
        ("c/val", "test/, c/, validation/, x.tar.gz, 1 images"),
        ("validation", "test/, c/, x.tar.gz, 1 images"),
    ],
)
def test_what_lies_beside_the_splits_is_named(tmp_path: Path, val: str | None, unread: str) -> None:
    write(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/1.jpg", "validation/a/3.jpg", "validation/b/3.jpg")
    write(tmp_path, "c/val/a/4.jpg", "c/val/b/4.jpg", "x.tar.gz", "sample.jpg", "LICENSE.txt")
    notes = listed(tmp_path, None if val is None else tmp_path / val).notes
    assert notes == (f"beside the images to train on, not read: {unread}",)
    assert listed(tmp_path / "train", tmp_path / "validation").notes == ()


def test_a_class_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "caf\udce9/1.jpg", "b/1.jpg")
    with pytest.raises(SourceError, match=r"the class 'caf\\udce9', a name that is not UTF-8: rename it"):
        listed(tmp_path, tmp_path)


def test_tars_of_one_name_are_refused_not_taken_for_one(tmp_path: Path) -> None:
    pattern = f"{tmp_path}/part{{0,1}}/{{000..001}}.tar"
    with pytest.raises(
        SourceError, match=r"part0/000\.tar and .*part1/000\.tar have the same name: name the tars apart"
    ):
        read_source(pattern, None, 0.1, 0)


def test_a_broken_link_is_listed(tmp_path: Path) -> None:
    write(tmp_path, "t/a/1.jpg", "t/b/1.jpg", "v/a/1.jpg")
    (tmp_path / "t" / "a" / "2.jpg").symlink_to(tmp_path / "nowhere")
    assert [entry.size for entry in listed(tmp_path / "t", tmp_path / "v").splits["train"]] == [9, UNREADABLE, 9]


def test_split_off_part_is_seeded_and_leaves_every_class_in_both(tmp_path: Path) -> None:
    write(tmp_path, *(f"a/{i:03d}.jpg" for i in range(100)), "b/1.jpg", "b/2.jpg", "c/only.jpg")
    listing = listed(tmp_path, fraction=0.1)
    val = [entry.wnid for entry in listing.splits["val"]]
    assert (val.count("a"), val.count("b"), val.count("c")) == (10, 1, 0)
    assert listing.images == 103
    everything = {entry.path for split in listing.splits.values() for entry in split}
    assert len(everything) == 103
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
    script = (
        "import pickle, sys; from pipeline.sources.sources import read_source;"
        "listing = read_source(sys.argv[1], None, 0.5, 0);"
        "print([entry.key for entry in pickle.loads(pickle.dumps(listing.splits['train'][::-1]))]);"
        "sys.exit('pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("_")) == (0, 2), done.stderr


def test_permutation_is_a_fixed_function_of_its_arguments() -> None:
    order = permutation(7, "train", 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() == permutation(7, "train", 1000).tolist()
    assert order.tolist() != permutation(8, "train", 1000).tolist()
    assert order.tolist() != permutation(7, "val", 1000).tolist()
    # Written down, so that no other numpy may silently deal other shards.
    assert permutation(0, "shards train", 8).tolist() == FIXED_ORDER


FIXED_ORDER = [6, 0, 2, 3, 4, 5, 7, 1]


@pytest.mark.parametrize(
    ("files", "folder", "message"),
    [
        ([], "missing", "does not exist: give --source a folder of class folders, a tar"),
        (["x.tar"], "x.tar", "is no whole tar"),
        (["s/1.jpg"], "s", "s holds images and not their classes.*: give --source a folder of class folders"),
        (["s/a/1.jpg"], "s", "holds one class, 'a', at least 2"),
        (
            ["s/a/1.jpg", "s/b/notes.txt"],
            "s",
            "class folder .*/b holds 1 files and no image.*add its images or remove it",
        ),
        (["s/a/1.jpg", "s/b/1.jpg"], "s", "one image a class.*give --source-val"),
        (["s/train/a/1.jpg", "s/train/b/1.jpg", "s/val/c/1.jpg"], "s", "1 classes that .*train has not, the first 'c'"),
        (
            ["s/train/a/1.jpg", "s/train/b/1.jpg", "s/val/1.jpg"],
            "s",
            "val holds images and not their classes.*: name these with --val-labels",
        ),
    ],
)
def test_a_bad_source_is_named_with_its_cure(tmp_path: Path, files: list[str], folder: str, message: str) -> None:
    write(tmp_path, *files)
    with pytest.raises(SourceError, match=message) as caught:
        listed(tmp_path / folder)
    assert "\n" not in str(caught.value)


def test_a_missing_validation_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a/1.jpg", "b/1.jpg")
    with pytest.raises(SourceError, match=r"nowhere does not exist: give --source-val"):
        listed(tmp_path, tmp_path / "nowhere")

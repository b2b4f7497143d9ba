"""Labels of a flat validation set: joined by name or by order, and refused where either is open to doubt."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.sources.files import SourceError
from tests.sources.layouts import A, B, below, class_images, listed, write

CLASSES = below("train", below(A, class_images(A)), below(B, class_images(B)))
ROWS = [("ILSVRC2012_val_00000002", B), ("ILSVRC2012_val_00000001", A), ("ILSVRC2012_val_00000003", B)]
IMAGES = {f"{name}.JPEG": name for name, _ in ROWS}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("text", "notes"),
    [
        ("ImageId,PredictionString\n" + "".join(f"{name},{wnid} 1 2 3 4 {wnid} 5 6 7 8 \n" for name, wnid in ROWS), 0),
        ("".join(f"{name}.JPEG {wnid}\n" for name, wnid in ROWS), 0),
        ("".join(f"val/{name}.JPEG {int(wnid == B)}\n" for name, wnid in ROWS), 1),
        ("".join(f"{name}.JPEG\t{wnid}\t0\t1\t2\t3\r\n" for name, wnid in ROWS), 0),
        ("".join(f'"{name}.JPEG","{wnid}"\n' for name, wnid in [*ROWS, ("other", A)]), 1),
        (f"{A}\n{B}\n{B}\n", 0),
    ],
)
def test_labels_are_joined_by_name_where_names_are_given(tmp_path: Path, text: str, notes: int, encoding: str) -> None:
    write(tmp_path, {**CLASSES, **below("val", IMAGES)})
    (tmp_path / "labels").write_text(text, encoding)
    listing = listed(tmp_path, labels=tmp_path / "labels")
    found = {Path(entry.path).stem: entry.wnid for entry in listing.splits["val"]}
    assert found == dict(ROWS)
    assert len(listing.notes) == notes


@pytest.mark.parametrize(
    ("text", "synsets", "message"),
    [
        # A label a line.
        (f"{A}\n" * 2, None, "has 2 labels and .*val.tar 3 images: give one label a line"),
        (f"{A}\n{A}\nn9\n", None, "line 3 of .* is 'n9', which is no class of --source"),
        (f"{A}\n\n{B}\n", None, "line 2 of .* is ''"),
        (f"{A}\n{B}\n".encode("utf-16-le").decode("latin-1"), None, "is no text in UTF-8"),
        # An id a line.
        ("1\n" * 3, None, "holds numbers: the devkit counts classes in an order of its own.*--val-synsets"),
        ("1\n1\n7\n", f"1 {A}\n2 {B}\n", "line 3 of .* is 7, which .* does not list"),
        ("1\n" * 3, "1 n8\n", "line 1 of .* is 1, which .* calls 'n8': --source has no such class"),
        ("1\n" * 3, f"1 {A}\n1 {B}\n", "line 2 of .* gives the id 1 again"),
        ("1\n" * 3, f"{A} 1\n", f"line 1 of .* is '{A} 1': give 'id wnid' a line"),
        ("1\n" * 3, "\0", "no text in UTF-8: give --val-synsets a text file"),
        # Rows of names and labels.
        (f"{ROWS[1][0]} {A}\n" * 2, None, f"has no row for 2 of the 3 images in .*val.tar, the first '{ROWS[0][0]}'"),
        (f"x {A}\nx {B}\n", None, f"gives 'x' two labels, '{A}' and 'x {B}': list each image once"),
        ("".join(f"{name} 1\n" for name, _ in ROWS), None, "holds numbers: .*--val-synsets"),
        ("".join(f"{name} {int(wnid == B) * 2}\n" for name, wnid in ROWS), None, "holds numbers: .*--val-synsets"),
        (f"x {A}\ny dog\n", None, "row 2 of .* is 'dog', which is no class of --source: give"),
        (f'x,{A}\ny," "\nz,{B}\n', None, f"line 1 of .* is 'x,{A}', which is no class"),
        (f"x {A}\ny {'9' * 5000}\n", None, "row 2 of .* is '9999.*', which is no class of --source: give"),
    ],
    ids=lambda value: value[:40] if value else "",
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, text: str, synsets: str | None, message: str) -> None:
    write(tmp_path, {**CLASSES, "val.tar": IMAGES, "labels": text, "synsets": synsets or ""})
    with pytest.raises(SourceError, match=message) as caught:
        listed(tmp_path, labels=tmp_path / "labels", synsets=None if synsets is None else tmp_path / "synsets")
    assert "\n" not in str(caught.value)


def test_labels_without_their_images_are_refused(forms: Path, tmp_path: Path) -> None:
    tars, folders = forms / "tars", forms / "folders"
    with pytest.raises(SourceError, match=r"holds images and not their classes.*: name these with --val-labels"):
        listed(tars)
    with pytest.raises(SourceError, match="--val-labels names the classes of validation images"):
        listed(folders / "train", labels=tars / "wnids.txt")
    with pytest.raises(SourceError, match=r"val holds folders and no images beside each other.*leave it out"):
        listed(folders, labels=tars / "wnids.txt")
    with pytest.raises(SourceError, match="--val-synsets explains the ids of --val-labels: give that too"):
        listed(folders, synsets=tars / "synsets.txt")
    with pytest.raises(SourceError, match=r"missing\.txt does not exist: give --val-labels a text file"):
        listed(tars, labels=tmp_path / "missing.txt")
    write(tmp_path, {"val/images/1.jpg": b"", "val/more.zip": b""})
    with pytest.raises(SourceError, match=r"val holds 'more\.zip', which is compressed or not whole"):
        listed(folders / "train", tmp_path / "val", tars / "wnids.txt")
    write(tmp_path, {"val.tar": {"val_9.jpg": b"", "val_10.jpg": b""}})
    with pytest.raises(SourceError, match="order is open to doubt: number the images with leading zeros"):
        listed(folders / "train", tmp_path / "val.tar", tars / "wnids.txt")

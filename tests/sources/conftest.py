"""The same images in every form that a source may have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.photographs import encoded, photograph, write_source
from tests.shard_sets import s3_options
from tests.sources.layouts import Layout, below, listed, made, write

ODD_NAME = "n0_a b%20?#é.JPEG"


@pytest.fixture(scope="session")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders/, ImageNet's own tars/, class_tars/ beside each other and inside/train/, and WebDataset shards/.

    The flat validation tars have labels beside them, by wnid and by id.
    """
    root = tmp_path_factory.mktemp("forms")
    train = write_source(root / "folders" / "train", images=4, longest=280)
    (train / "n0" / "n0_0.JPEG").rename(train / "n0" / ODD_NAME)
    # The classes alternate, as they do in ImageNet's validation set.
    wnids = ["n1", "n0", "n2"] * 2
    val = {
        f"ILSVRC2012_val_{number:08d}.JPEG": encoded(photograph(50 + number, 280, 200 + number), quality=92)
        for number in range(1, 7)
    }
    for wnid, name in zip(wnids, val, strict=True):
        write(root / "folders" / "val", {f"{wnid}/{name}": val[name]})
    # No tar is in the sorted order.
    classes: dict[str, dict[str, bytes]] = {}
    for folder in sorted(train.iterdir(), reverse=True):
        files = sorted(folder.iterdir(), reverse=True)
        classes[f"{folder.name}.tar"] = {file.name: file.read_bytes() for file in files}
    ids = {"n0": 3, "n1": 1, "n2": 2}
    flat: Layout = {
        "ILSVRC2012_img_val.tar": dict(reversed(val.items())),
        "wnids.txt": "".join(f"{wnid}\n" for wnid in wnids),
        "ids.txt": "".join(f"{ids[wnid]}\n" for wnid in wnids),
        "synsets.txt": "".join(f"{i} {wnid} a name, another\n" for wnid, i in ids.items()),
    }
    write(root / "tars", {"ILSVRC2012_img_train.tar": classes, **flat})
    write(root / "class_tars", {**classes, **flat})
    noted = {name: {**tar, "notes.txt": b"?"} for name, tar in classes.items()}
    write(root / "inside", {**below("train", noted), **flat})
    for split in ("train", "val"):
        for label in range(3):
            shard: dict[str, bytes | str] = {}
            for file in sorted((root / "folders" / split / f"n{label}").iterdir()):
                shard |= {f"{file.stem}.jpg": file.read_bytes(), f"{file.stem}.cls": str(label)}
            write(root / "shards" / split, {f"x-{label:02d}.tar": shard})
    return root


@pytest.fixture(scope="session")
def expected(forms: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of the set that the folders give."""
    return made(listed(forms / "folders"), tmp_path_factory.mktemp("expected") / "out")


@pytest.fixture
def bucket(forms: Path, s3: str, client: Any) -> str:
    """All forms in a bucket; what stands behind a URL's path."""
    for path in forms.rglob("*.*"):
        client.upload_file(str(path), "bucket", str(path.relative_to(forms)))
    return s3_options(s3)

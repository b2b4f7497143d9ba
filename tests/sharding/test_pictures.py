"""A set's pictures: what they show is what is stored, and equal sets have equal ones on any machine's settings."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.dataset.info import DatasetInfo, read_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.sharding.pictures import (
    IMAGENET_EIGENVALUES,
    IMAGENET_EIGENVECTORS,
    PCA_FILE,
    SHEET_FILE,
    choose,
    contact_sheet,
    pca_figure,
    write_pictures,
)
from pipeline.sharding.set_folder import claim_folder
from pipeline.sharding.shards import build_shard
from tests.foreign_shards import sample, stored, write_set, write_shards
from tests.shard_sets import make, planned

ROOT = Path(__file__).resolve().parents[2]
STYLES = {
    "plain": "",
    "wild": "font.size: 30\naxes.facecolor: red\nsavefig.bbox: tight\nsavefig.dpi: 40\nfont.family: serif\n"
    "lines.antialiased: False\naxes.grid: True\naxes.prop_cycle: cycler('color', ['r'])\n",
}
DEADLINE_S = 300


def decoded(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def tile(sheet: NDArray[np.uint8], row: int, column: int) -> NDArray[np.float64]:
    """[128, 128, 3]: a place of the contact sheet, rows below its heading, columns beside its labels."""
    top, left = 84 + 134 * row, 254 + 134 * column
    return sheet[top : top + 128, left : left + 128].astype(np.float64)


def small(jpeg: bytes) -> NDArray[np.float64]:
    """[128, 128, 3]: a stored image at half its size."""
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB").resize((128, 128), Image.Resampling.BOX), np.float64)


def test_the_sheet_shows_each_class_in_its_row(shard_set: Path) -> None:
    info = read_dataset(shard_set)
    sheet = decoded((shard_set / SHEET_FILE).read_bytes())
    # Three classes of eight images in view.
    assert sheet.shape == (84 + 3 * 134 - 6 + 24, 24 + 230 + 8 * 134 - 6 + 24, 3)
    reader = SplitReader(shard_set, info, "train")
    for label in range(3):
        mine = np.flatnonzero(reader.labels == label)[:8]
        for column, number in enumerate(mine):
            shown = tile(sheet, label, column)
            errors = [np.abs(shown - small(reader.image(i).tobytes())).mean() for i in range(len(reader))]
            assert int(np.argmin(errors)) == number
            assert min(errors) < 3


def test_the_sheet_has_room_for_ten_classes_and_any_number_of_images(tmp_path: Path) -> None:
    """23 classes, of which one has a single image: ten of the full ones are shown, from the first to the last."""
    samples = [
        sample(0, __key__=f"{label:03d}_{number}", cls=label, jpg=stored(label))
        for label in range(23)
        for number in range(1 if label == 4 else 9)
    ]
    write_shards(tmp_path / "set", "train", samples, per_shard=500)
    write_shards(tmp_path / "set", "val", samples[:3])
    root = make(tmp_path / "out", planned(tmp_path / "set", per_shard=500))
    rows = choose(root, read_dataset(root))
    assert [row.label for row in rows][:1] + [row.label for row in rows][-1:] == [0, 22]
    assert len(rows) == 10
    assert 4 not in [row.label for row in rows]
    steps = np.diff([row.label for row in rows])
    assert steps.min() >= 2
    assert steps.max() <= 4
    for row in rows:
        assert len(row.images) == 8
        np.testing.assert_array_equal(row.images[0], decoded(stored(row.label)))
    assert decoded((root / SHEET_FILE).read_bytes()).shape == (84 + 10 * 134 - 6 + 24, 1344, 3)


def test_names_of_any_length_stay_in_their_column(shard_set: Path) -> None:
    info = read_dataset(shard_set)
    rows = choose(shard_set, info)
    plain = decoded(contact_sheet(info, rows))
    names = ("a" * 200, "many words " * 30, "\N{LATIN SMALL LETTER E WITH ACUTE}\N{CJK UNIFIED IDEOGRAPH-4E2D}")
    classes = tuple(dataclasses.replace(label, name=name) for label, name in zip(info.classes, names, strict=True))
    named = decoded(contact_sheet(dataclasses.replace(info, classes=classes), rows))
    assert named.shape == plain.shape
    # Not one pixel of the images is another, up to the JPEG blocks at their edge.
    np.testing.assert_array_equal(named[:, 264:], plain[:, 264:])
    assert not np.array_equal(named[:, :254], plain[:, :254])


def test_few_shards_are_read_of_a_set_of_any_size(tmp_path: Path) -> None:
    write_shards(tmp_path / "set", "train", (sample(n, __key__=f"{n:03d}", jpg=stored(n % 3)) for n in range(40)))
    write_shards(tmp_path / "set", "val", map(sample, range(3)))
    root = make(tmp_path / "out", planned(tmp_path / "set", per_shard=1))
    info = read_dataset(root)
    rows = [row.name for row in info.splits["train"].shards]
    assert len(rows) == 40
    # 16 of them, evenly apart from the first to the last.
    kept = {rows[round(i * 39 / 15)] for i in range(16)}
    for name in set(rows) - kept:
        size = (root / "train" / f"{name}.tar").stat().st_size
        os.truncate(root / "train" / f"{name}.tar", 0)
        os.truncate(root / "train" / f"{name}.tar", size)
    before = {name: (root / name).read_bytes() for name in (SHEET_FILE, PCA_FILE)}
    write_pictures(root, info)
    assert {name: (root / name).read_bytes() for name in before} == before
    (root / "train" / f"{rows[39]}.tar").unlink()
    with pytest.raises(FileNotFoundError, match=f"{rows[39]}.tar"):
        write_pictures(root, info)


@pytest.mark.parametrize("style", list(STYLES))
def test_a_users_settings_do_not_change_a_byte(style: str, shard_set: Path, tmp_path: Path) -> None:
    """In a process of its own, with another matplotlibrc, hash seed, folder and language."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "matplotlibrc").write_text(STYLES[style])
    root = Path(shutil.copytree(shard_set, tmp_path / "set"))
    for name in (SHEET_FILE, PCA_FILE):
        (root / name).unlink()
    code = (
        "import sys, pathlib, matplotlib; from pipeline.dataset.info import read_dataset; "
        "from pipeline.sharding.pictures import write_pictures; root = pathlib.Path(sys.argv[1]); "
        "write_pictures(root, read_dataset(root)); print(matplotlib.rcParams['font.size'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "MPLCONFIGDIR": str(tmp_path / "config"),
            "PYTHONHASHSEED": "7",
            "LC_ALL": "C",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The settings were read, and are as they were.
    assert done.stdout.split() == [{"plain": "10.0", "wild": "30.0"}[style]]
    for name in (SHEET_FILE, PCA_FILE):
        assert (root / name).read_bytes() == (shard_set / name).read_bytes()


def test_shards_done_in_any_order_give_the_same_pictures(tmp_path: Path) -> None:
    plan = planned(write_set(tmp_path / "set"))
    one = make(tmp_path / "one", plan)
    claim_folder(tmp_path / "other", plan)
    for shard in reversed(plan.shards):
        build_shard(tmp_path / "other", shard, plan.image, set_aside=True)
    other = make(tmp_path / "other", plan)
    for name in (SHEET_FILE, PCA_FILE):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_a_callers_own_style_is_left_alone(shard_set: Path) -> None:
    info = read_dataset(shard_set)
    images = [image for row in choose(shard_set, info) for image in row.images]
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert pca_figure(info.rgb, images) == (shard_set / PCA_FILE).read_bytes()
        assert mpl.rcParams["font.size"] == 30


def test_the_components_picture_says_how_it_was_made_by_nothing_but_pixels(shard_set: Path) -> None:
    data = (shard_set / PCA_FILE).read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (1300, 820)
        assert not {name for name in image.info if name != "dpi"}
    assert b"atplotlib" not in data


def other_statistics(info: DatasetInfo) -> DatasetInfo:
    values = (info.rgb.eigenvalues[0] / 4, *info.rgb.eigenvalues[1:])
    return dataclasses.replace(info, rgb=dataclasses.replace(info.rgb, eigenvalues=values))


def test_the_components_picture_shows_the_sets_values(shard_set: Path) -> None:
    """Another eigenvalue moves the bars, the cube's axes and the strip of shifts, and not the eigenvectors."""
    info = read_dataset(shard_set)
    images = [image for row in choose(shard_set, info) for image in row.images]
    pictures = [decoded(pca_figure(some.rgb, images)) for some in (info, other_statistics(info))]
    changed = np.any(pictures[0] != pictures[1], axis=2)
    cube, values, vectors, shifts = (
        changed[40:540, :630],
        changed[40:260, 690:],
        changed[320:520, 690:],
        changed[600:],
    )
    assert cube.any()
    assert values.any()
    assert shifts.any()
    assert not vectors.any()


def test_imagenets_known_values_are_a_pca() -> None:
    """Orthonormal columns by falling eigenvalue, the first nearly gray: as rows they would not be."""
    vectors = np.array(IMAGENET_EIGENVECTORS)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=2e-3)
    assert np.ptp(vectors[:, 0]) < 0.02
    assert sorted(IMAGENET_EIGENVALUES, reverse=True) == list(IMAGENET_EIGENVALUES)

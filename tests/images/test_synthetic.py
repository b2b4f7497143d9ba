"""Generated images: a function of the seed, laid out as ImageNet is, and written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.images.synthetic import CLASSES, encode, write_folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_shaped_like_imagenet_and_made_once(tmp_path: Path) -> None:
    lines: list[str] = []
    (tmp_path / "images").mkdir()  # An empty one is no obstacle.
    write_folder(tmp_path / "images", 3, 2, 1, 0, lines.append)
    made = files_of(tmp_path / "images")
    wnids = [wnid for wnid, _, _ in CLASSES[:3]]
    assert set(made) == {f"train/{wnid}/{wnid}_{number}.JPEG" for wnid in wnids for number in range(2)} | {
        f"val/{wnid}/val_{number:08d}.JPEG" for number, wnid in enumerate(wnids, start=1)
    }
    assert made[f"train/{wnids[1]}/{wnids[1]}_1.JPEG"] == encode(0, 1, 1)
    assert made[f"val/{wnids[1]}/val_00000002.JPEG"] == encode(0, 1, 0, "val")
    assert len(lines) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["images"]

    write_folder(tmp_path / "images", 3, 2, 1, 0, lines.append)
    assert "already there" in lines[-1]
    assert files_of(tmp_path / "images") == made


def test_a_killed_run_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    def die(line: str) -> None:
        raise KeyboardInterrupt(line)

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "images", 2, 1, 1, 0, die)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    write_folder(tmp_path, 2, 1, 1, 0, lambda line: None)
    assert files_of(tmp_path) == {"thesis.tex": b"years of work"}

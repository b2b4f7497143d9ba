"""Generated images: a function of the seed, laid out as ImageNet is, and written whole or not at all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.images.synthetic import CLASSES, MARKER, encode, write_folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_shaped_like_imagenet_and_made_once(tmp_path: Path) -> None:
    lines: list[str] = []
    (tmp_path / "images").mkdir()  # An empty one is no obstacle.
    write_folder(tmp_path / "images", 3, 2, 1, 0, lines.append)
    made = files_of(tmp_path / "images")
    wnids = [wnid for wnid, _, _ in CLASSES[:3]]
    assert set(made) == {MARKER} | {f"train/{wnid}/{wnid}_{number}.JPEG" for wnid in wnids for number in range(2)} | {
        f"val/{wnid}/val_{number:08d}.JPEG" for number, wnid in enumerate(wnids, start=1)
    }
    assert made[f"train/{wnids[1]}/{wnids[1]}_1.JPEG"] == encode(0, 1, 1)
    assert made[f"val/{wnids[1]}/val_00000002.JPEG"] == encode(0, 1, 0, "val")
    assert len(lines) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["images"]

    write_folder(tmp_path / "images", 3, 2, 1, 0, lines.append)
    assert "already there" in lines[-1]
    with pytest.raises(ValueError, match="other settings"):
        write_folder(tmp_path / "images", 3, 2, 1, 1, lines.append)
    assert files_of(tmp_path / "images") == made


@pytest.mark.parametrize("settings", [(2, 1, 1, 0), (2, 3, 1, 9)])
def test_a_killed_run_is_not_taken_for_whole_and_none_of_it_gets_into_another(
    tmp_path: Path, settings: tuple[int, int, int, int]
) -> None:
    def die(line: str) -> None:
        raise KeyboardInterrupt(line)

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "images", *settings, die)
    assert not (tmp_path / "images").exists()
    write_folder(tmp_path / "images", 2, 1, 1, 0, lambda line: None)
    write_folder(tmp_path / "other", 2, 1, 1, 0, lambda line: None)
    assert files_of(tmp_path / "images") == files_of(tmp_path / "other")


@pytest.mark.parametrize("name", ["images", "images.partial"])
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} is not empty")):
        write_folder(tmp_path / "images", 2, 1, 1, 0, lambda line: None)
    assert files_of(tmp_path) == {f"{name}/thesis.tex": b"years of work"}

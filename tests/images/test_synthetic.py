"""Generated images: a function of the seed, shaped like ImageNet and photographs, their colors a hint of the class."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.images.synthetic import ASPECT, CLASSES, MARKER, SHORTER_SIDE, draw, encode, write_folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_image_is_a_function_of_its_arguments() -> None:
    image = draw(7, 3, 5)
    assert np.array_equal(image, draw(7, 3, 5))
    assert encode(7, 3, 5) == encode(7, 3, 5)
    for other in (draw(8, 3, 5), draw(7, 2, 5), draw(7, 3, 6), draw(7, 3, 5, "val")):
        assert image.shape != other.shape or not np.array_equal(image, other)


def test_sizes_grayscale_and_encoding_vary_as_in_a_collection_of_photographs() -> None:
    pictures = [Image.open(io.BytesIO(encode(1, number % len(CLASSES), number))) for number in range(80)]
    shorter = [min(picture.size) for picture in pictures]
    aspect = [picture.width / picture.height for picture in pictures]
    assert SHORTER_SIDE[0] <= min(shorter) < 220 < 480 < max(shorter) <= SHORTER_SIDE[1]
    assert ASPECT[0] - 0.01 < min(aspect) < 0.75 < 1.5 < max(aspect) < ASPECT[1] + 0.01
    assert {picture.mode for picture in pictures} == {"RGB", "L"}
    assert len({str(getattr(picture, "quantization", None)) for picture in pictures}) > 10


@pytest.fixture(scope="module")
def small_images() -> list[np.ndarray]:
    """For each class, float [images, 48, 48, 3]: the central squares, as far as a coarse look can see."""
    return [
        np.stack([_central_square(draw(2, class_index, number)) for number in range(25)])
        for class_index in range(len(CLASSES))
    ]


def _central_square(image: np.ndarray) -> np.ndarray:
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(square.resize((48, 48), Image.Resampling.BOX), dtype=np.float64)


def test_the_mean_color_hints_at_the_class_and_does_not_settle_it(small_images: list[np.ndarray]) -> None:
    means = np.stack([images.mean(axis=(1, 2)) for images in small_images])  # [classes, images, 3]
    centers = means[:, ::2].mean(axis=1)
    distances = np.linalg.norm(means[:, 1::2, None] - centers, axis=3)
    guessed = float((distances.argmin(axis=2) == np.arange(len(CLASSES))[:, None]).mean())
    assert 3 / len(CLASSES) < guessed < 0.9  # by the nearest center; chance is 1 / 8


def test_the_spectrum_falls_as_in_photographs() -> None:
    slopes = []
    for number in range(24):
        gray = draw(3, number % len(CLASSES), number).mean(axis=2)[:180, :108]
        window = np.outer(np.hanning(gray.shape[0]), np.hanning(gray.shape[1]))
        amplitude = np.abs(np.fft.rfft2((gray - gray.mean()) * window))
        frequency = np.hypot(np.fft.fftfreq(gray.shape[0])[:, None], np.fft.rfftfreq(gray.shape[1]))
        band = (frequency > 0.02) & (frequency < 0.25)
        slopes.append(np.polyfit(np.log(frequency[band]), np.log(amplitude[band] + 1e-9), 1)[0])
    assert -1.7 < np.mean(slopes) < -0.8  # Amplitude 1/f has -1; objects with sharp edges before it make it steeper.


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

"""The index of a tar and its rows: what no tar of samples holds is named, where all digests may fit."""

from __future__ import annotations

import io
import tarfile

import pytest

from pipeline.dataset.sample_index import index_of, shard_rows


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("label", [b"+1_0", b"cat", b""])
def test_a_label_that_is_no_number_is_named(label: bytes) -> None:
    tar = tar_of({"n0_0.cls": label, "n0_0.jpg": b"image"})
    with pytest.raises(ValueError, match=r"^n0_0\.cls holds no number that a label may be"):
        shard_rows(tar, index_of(tar))


@pytest.mark.parametrize("names", [("a.cls",), ("a.jpg",), ("a.cls", "a.jpg", "a.jpeg")])
def test_a_sample_is_one_image_and_one_label(names: tuple[str, ...]) -> None:
    tar = tar_of(dict.fromkeys(names, b"1"))
    with pytest.raises(ValueError, match=rf"^{', '.join(names)} are not one \.jpg and one \.cls"):
        shard_rows(tar, index_of(tar))


def test_parts_of_a_sample_that_lie_apart_are_named() -> None:
    """Who reads a WebDataset takes for a sample what lies together."""
    tar = tar_of(dict.fromkeys(("a.cls", "b.cls", "a.jpg", "b.jpg"), b"1"))
    with pytest.raises(ValueError, match=r"^a\.jpg does not follow the other parts of its sample"):
        index_of(tar)

"""The samples of a shard's tar, as every WebDataset reader groups them: neighbors that share a key."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.images.decode import IMAGE_SIZE, MAX_JPEG_BYTES, ImageError
from pipeline.sources.files import SourceError
from pipeline.sources.keys import IMAGE_COMPONENTS, LABEL_COMPONENT, label_number, split_name
from pipeline.sources.tars import Member, Stretch, Window, members_in


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    what: str
    """A clause about the shard or sample."""
    shard: str = ""
    """Empty where it is the set's."""
    sample: str = ""
    """Its key, where one is to blame."""

    def __str__(self) -> str:
        where = " ".join(part for part in (self.shard, self.sample) if part)
        return f"{where}: {self.what}" if where else self.what


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image with its label."""

    key: str
    label: bytes
    """The text of its .cls, without white space around it."""
    jpeg: bytes
    index_line: str
    """All its components in DALI's index."""

    @property
    def number(self) -> int | None:
        """The label; None where its text is no number that a label may have."""
        return label_number(self.label)


def read_samples(location: str, data: bytes, faults: list[Fault], shard: str) -> Iterator[Sample]:
    """The samples of a tar that have an image and a label, in its order; what is wrong is added to `faults`.

    Args:
        location: where the tar lies.
        data: all of it.
        shard: its name, for `faults`.
    """
    for key, parts in itertools.groupby(
        _members(location, data, faults, shard), lambda member: split_name(member.name)[0]
    ):
        group = list(parts)
        components = [(split_name(member.name)[1], member) for member in group]
        images = [member for extension, member in components if extension.lower() in IMAGE_COMPONENTS]
        labels = [member for extension, member in components if extension.lower() == LABEL_COMPONENT]
        if len(images) != 1 or len(labels) != 1:
            names = ", ".join(member.name for member in group)
            faults.append(Fault(f"it has {names}: one .jpg and one .cls must follow each other", shard, key))
            continue
        # The index separates its fields by spaces, its samples by line breaks.
        if any(any(character.isspace() for character in member.name) for member in group):
            faults.append(Fault("its name holds white space, which DALI's index cannot", shard, key))
            continue
        yield Sample(
            key,
            _bytes_of(data, labels[0]).strip(),
            _bytes_of(data, images[0]),
            " ".join(f"{extension} {part.offset} {part.size} {part.name}" for extension, part in components),
        )


def stored_pixels(jpeg: bytes) -> NDArray[np.uint8]:
    """The pixels of a set's image, [IMAGE_SIZE, IMAGE_SIZE, 3].

    Raises:
        ImageError: if it is no JPEG of that size, or one that readers turn.
    """
    if len(jpeg) > MAX_JPEG_BYTES:
        raise ImageError(f"it has {len(jpeg):,} bytes, and an image of a set has at most {MAX_JPEG_BYTES:,}")
    try:
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
            if image.size != (IMAGE_SIZE, IMAGE_SIZE) or image.mode != "RGB":
                raise ImageError(
                    f"it is {image.width} x {image.height} {image.mode}, not {IMAGE_SIZE} x {IMAGE_SIZE} RGB"
                )
            turn = image.getexif().get(ExifTags.Base.Orientation, 1)
            if turn != 1:
                raise ImageError(
                    f"its EXIF says that it is to be turned ({turn}), which some readers do and some do not"
                )
            return np.asarray(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("it is no JPEG") from error
    # As in the conversion: Pillow raises whatever the bytes lead it to.
    except Exception as error:
        raise ImageError(f"it does not decode: {' '.join(str(error).split())[:200]}") from error


def _members(location: str, data: bytes, faults: list[Fault], shard: str) -> Iterator[Member]:
    """The files of a tar as far as it can be read, in the names that wds2idx gives them, hidden ones left out."""
    try:
        with Window(Stretch(location, 0, len(data)), data) as file:
            for member in members_in(file):
                if not member.hidden:
                    yield member
    except SourceError as error:
        faults.append(Fault(f"its tar cannot be read to its end: {error}", shard))


def _bytes_of(data: bytes, member: Member) -> bytes:
    return data[member.offset : member.offset + member.size]

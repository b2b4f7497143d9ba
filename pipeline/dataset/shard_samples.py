"""The samples of a shard's tar, as every WebDataset reader groups them: neighbors that share a key."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

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

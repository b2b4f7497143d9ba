"""A shard's annotation, NAME.json: what the shard holds, by its own account."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from pipeline.images.rgb_stats import RgbMoments, RgbStatistics
from pipeline.storage.locations import Location, shown
from pipeline.storage.remote import read


class ShardError(ValueError):
    """A shard that cannot be built as planned."""


@dataclasses.dataclass(frozen=True)
class Reject:
    """An image that was set aside."""

    path: str
    split: str
    wnid: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "split": self.split, "class": self.wnid, "reason": self.reason}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Reject:
        return cls(str(value["path"]), str(value["split"]), str(value["class"]), str(value["reason"]))


@dataclasses.dataclass(frozen=True)
class ShardAnnotation:
    """The contents of a shard's NAME.json."""

    name: str
    samples: int
    """0 where every image was set aside: such a shard has no tar and no index, which no reader accepts empty."""
    bytes: int
    """Size of the tar."""
    sha256: str
    """Of the tar."""
    inputs: str
    """sha256 over what the shard is made of: see `inputs_digest`."""
    moments: RgbMoments
    """Of the shard's own stored pixels."""
    rejected: tuple[Reject, ...]
    rgb: RgbStatistics | None = None
    """Of the whole training split; None until the set is finished."""

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "rejected": [reject.to_json() for reject in self.rejected]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ShardAnnotation:
        return cls(
            name=str(value["name"]),
            samples=int(value["samples"]),
            bytes=int(value["bytes"]),
            sha256=str(value["sha256"]),
            inputs=str(value["inputs"]),
            moments=RgbMoments.from_json(value["moments"]),
            rejected=tuple(Reject.from_json(reject) for reject in value["rejected"]),
            rgb=None if value["rgb"] is None else RgbStatistics.from_json(value["rgb"]),
        )


def read_annotation(location: Location) -> ShardAnnotation:
    """Reads a shard's NAME.json, at a path or URL.

    Raises:
        ShardError: if it cannot be understood.
        OSError: if it cannot be read.
    """
    try:
        return ShardAnnotation.from_json(json.loads(read(location)))
    # Infinity as a whole number, and JSON that goes too deep.
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ShardError(f"{shown(location)} is no shard's annotation ({type(error).__name__}: {error})") from error

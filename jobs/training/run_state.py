"""What a checkpoint says of its run: what is trained on what, how far it is, and a sha256 of each file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection

from model.progress import Progress
from model.recipe import Recipe
from pipeline.dataset.info import DatasetInfo
from pipeline.images.rgb_stats import RgbStatistics
from pipeline.storage.locations import shown

SCHEMA_VERSION = 3
STATE_FILE = "state.json"

# What has a run's images decoded as before.
DECODER_CURES = {
    "libjpeg-turbo": "--no-gpus, or --stage DIR --stage-as pixels on GPUs",
    "nvjpeg-cuda": "--gpus --gpu-decoder cuda --stage-as jpeg",
    "nvjpeg-hardware": "--gpus --gpu-decoder hardware --stage-as jpeg",
}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or belongs to another data set or configuration."""


class DamagedError(CheckpointError):
    """A checkpoint whose files are not what was written, or are gone: another one of its run may do."""


@dataclasses.dataclass(frozen=True)
class RunFingerprint:
    """What a run trains, and on what: a run may only be continued with the same."""

    recipe: Recipe
    dataset: str
    """The shard set's fingerprint."""
    wnids: tuple[str, ...]
    """The classes, by label."""
    rgb: RgbStatistics
    """Of the training set: evaluation must subtract the same mean."""
    decoder: str = "libjpeg-turbo"
    """What decided the images' pixels (`pipeline.loading.graph.decoder_name`)."""
    precision: str = "float32"
    """float32, or bfloat16 for autocast."""
    init_from: str = ""
    """Where its initial weights are from, for people; empty for those that the recipe draws."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        info: DatasetInfo,
        decoder: str = "libjpeg-turbo",
        precision: str = "float32",
        init_from: str | None = None,
    ) -> RunFingerprint:
        wnids = tuple(label.wnid for label in info.classes)
        return cls(recipe, info.fingerprint, wnids, info.rgb, decoder, precision, shown(init_from or ""))

    def differences(self, other: RunFingerprint) -> list[str]:
        """What differs from another run, one phrase each.

        The number of epochs may, so that a run can be extended; not under a schedule that counts on it. A command may
        leave out where the run's initial weights are from.
        """
        free = {"epochs"} if self.recipe.schedule == "plateau" else set()
        found = [
            f"{field.name} is {getattr(other.recipe, field.name)}, was {getattr(self.recipe, field.name)}"
            for field in dataclasses.fields(Recipe)
            if field.name not in free and getattr(self.recipe, field.name) != getattr(other.recipe, field.name)
        ]
        if self.dataset != other.dataset:
            found.append(f"the shard set is {other.dataset[:12]}, was {self.dataset[:12]}")
        if self.decoder != other.decoder:
            found.append(f"the JPEG decoder is {other.decoder}, was {self.decoder} ({DECODER_CURES[self.decoder]})")
        if self.precision != other.precision:
            found.append(f"the precision is {other.precision}, was {self.precision} (--precision {self.precision})")
        if other.init_from not in ("", self.init_from):
            was = self.init_from or "drawn by the recipe"
            found.append(f"the initial weights are {other.init_from}, were {was} (leave --init-from out)")
        return found


@dataclasses.dataclass(frozen=True)
class State:
    """The contents of `state.json`."""

    identity: RunFingerprint
    progress: Progress
    origin: str = ""
    """Where weights come from that were not trained here; empty for a run's own."""
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    """The sha256 of each other file of the checkpoint, by name."""

    def to_json(self, files: dict[str, str]) -> bytes:
        """`state.json`, with other files' digests and one of its own."""
        value = {
            "schema_version": SCHEMA_VERSION,
            "origin": self.origin,
            "identity": dataclasses.asdict(self.identity),
            "progress": self.progress.to_json(),
            "files": files,
        }
        return json.dumps(value | {"sha256": _digest(value)}, indent=1).encode()

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> State:
        """Parses `state.json`.

        Raises:
            DamagedError: naming `where`, if it is not what this program writes.
        """
        try:
            value = json.loads(text)
            if value["schema_version"] != SCHEMA_VERSION:
                raise ValueError(
                    f"its schema version is {value['schema_version']}, this program reads {SCHEMA_VERSION}"
                )
            if value.pop("sha256") != _digest(value):
                raise ValueError("its sha256 differs from the one in it")
            identity = value["identity"]
            return cls(
                RunFingerprint(
                    Recipe(**identity["recipe"]),
                    str(identity["dataset"]),
                    tuple(identity["wnids"]),
                    RgbStatistics.from_json(identity["rgb"]),
                    _one_of(DECODER_CURES, identity["decoder"]),
                    _one_of(("float32", "bfloat16"), identity["precision"]),
                    str(identity.get("init_from", "")),
                ),
                Progress.from_json(value["progress"]),
                str(value["origin"]),
                dict(value["files"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedError(f"{where} is no {STATE_FILE} of this program: {error!r}") from error


def _digest(value: object) -> str:
    """The sha256 of a JSON value, whatever its layout in a file."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _one_of(names: Collection[str], value: object) -> str:
    """Raises ValueError for any other value."""
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{value!r} is none of {', '.join(names)}")
    return value

"""The whole shard set while it is made: whose folder it is, what is done already, and how it is finished.

While a set is being made its folder holds `unfinished.json`, which says what it is to become. A folder with other
things in it, or another set, is refused by name: nothing that this program did not write is ever replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.dataset.annotation import Reject, ShardAnnotation, ShardError, read_annotation
from pipeline.dataset.info import (
    DATASET_FILE,
    REJECTS_FILE,
    SPLITS,
    TEMPORARY_SUFFIX,
    ClassLabel,
    DatasetInfo,
    ShardRow,
    Split,
    read_dataset,
    write_atomically,
    write_json,
)
from pipeline.dataset.sample_index import describe_index, index_file, index_is_whole, pack_index
from pipeline.images.rgb_stats import RgbMoments, RgbStatistics
from pipeline.sharding.pictures import PCA_FILE, SHEET_FILE, write_pictures
from pipeline.sharding.set_lock import LOCK_FILE
from pipeline.sharding.shards import BuiltShard, ShardPlan, annotation_path, inputs_digest
from pipeline.sources.listing import Listing

UNFINISHED_FILE = "unfinished.json"


class ShardSetError(ValueError):
    """A shard set that cannot be started, continued or finished."""


@dataclasses.dataclass(frozen=True)
class SetPlan:
    """What a set is to become."""

    listing: Listing
    image: dict[str, Any]
    """`encoder_settings`."""
    seed: int
    samples_per_shard: int
    shards: tuple[ShardPlan, ...]

    def settings(self) -> dict[str, Any]:
        """What must be the same for an unfinished set to be continued."""
        return {**self.image, "seed": self.seed, "samples_per_shard": self.samples_per_shard}


def with_encoder_of(root: Path, plan: SetPlan) -> SetPlan:
    """The plan with the encoder versions of the set in ROOT, finished or not, if there is one.

    An upgrade then changes nothing of what is there: versions matter where an image is encoded, and are compared there.
    """
    for name, field in ((UNFINISHED_FILE, "settings"), (DATASET_FILE, "image")):
        # What cannot be read is refused by name where it is used.
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            encoder = dict(json.loads((root / name).read_bytes())[field]["encoder"])
            return dataclasses.replace(plan, image={**plan.image, "encoder": encoder})
    return plan


def find_finished(root: Path, plan: SetPlan) -> DatasetInfo | None:
    """The set in ROOT if it is finished and is what `plan` would make; None if it is still to be made or repaired.

    Raises:
        ShardSetError: if ROOT holds another finished set.
        DatasetError: if ROOT's dataset.json cannot be understood.
    """
    if not (root / DATASET_FILE).exists():
        return None
    info, whole = _compare_finished(root, plan)
    return info if whole else None


def is_left_over(root: Path) -> bool:
    """Whether a job still works on the finished set in ROOT, or was killed between its last file and its end."""
    return (root / UNFINISHED_FILE).exists() or (root / LOCK_FILE).exists()


def tidy(root: Path, info: DatasetInfo, report: Callable[[str], None]) -> None:
    """Draws the pictures of a set that has its `dataset.json`, and removes what only the making of it needed.

    Args:
        report: told if there are no pictures, and why.
    """
    try:
        write_pictures(root, info)
    # matplotlib and Pillow raise whatever a font or a user's settings lead them to, and a picture only informs.
    except Exception as error:
        report(
            f"warning: the set is finished, without {SHEET_FILE} and {PCA_FILE}, which could not be drawn "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        )
    _remove_passing(root)
    (root / UNFINISHED_FILE).unlink(missing_ok=True)


def _compare_finished(root: Path, plan: SetPlan) -> tuple[DatasetInfo, bool]:
    """Reads the finished set in ROOT, which must be what `plan` would make, and whether no file of it is missing.

    Raises:
        ShardSetError: if ROOT holds another finished set.
        DatasetError: if ROOT's dataset.json cannot be understood.
    """
    info = read_dataset(root)
    now = {name: value for name, value in plan.settings().items() if name != "samples_per_shard"}
    different = _differences(
        {**info.image, "seed": info.seed}, now, info.source_fingerprint == plan.listing.fingerprint
    )
    whole = True
    # Where one of these differs every shard does: the samples per shard would be blamed for it.
    if not different:
        annotations = [_read_or_none(root, shard) for shard in plan.shards]
        found = [(shard, annotation) for shard, annotation in zip(plan.shards, annotations, strict=True) if annotation]
        dealt_alike = all(annotation.inputs == inputs_digest(shard, plan.image) for shard, annotation in found)
        rows = [(split, row) for split, content in info.splits.items() for row in content.shards]
        if not dealt_alike or not {row.name for _, row in rows} <= {shard.name for shard in plan.shards}:
            different = "samples per shard"
        whole = None not in annotations and all(_is_there(root, split, row) for split, row in rows)
        whole = whole and all(index_is_whole(root, split, part) for split, part in info.splits.items())
    if different:
        raise ShardSetError(
            f"{root} holds a finished set of another {different}: give another --output, or delete {root} first"
        )
    return info, whole


def check_begun(root: Path, plan: SetPlan) -> None:
    """Makes sure that the unfinished set in ROOT is what `plan` would make.

    Raises:
        ShardSetError: if it is another, or its description cannot be read.
    """
    marker = root / UNFINISHED_FILE
    try:
        begun = json.loads(marker.read_bytes())
        # The same folder with a repaired or added image continues; another folder is more likely a mistake.
        same_source = begun["source_fingerprint"] == plan.listing.fingerprint or begun["roots"] == list(
            plan.listing.roots
        )
        different = _differences(begun["settings"], plan.settings(), same_source)
    except (KeyError, TypeError, ValueError) as error:
        raise ShardSetError(
            f"{marker} cannot be read ({type(error).__name__}): delete {root} and start again"
        ) from error
    if different:
        raise ShardSetError(
            f"{root} holds an unfinished set of another {different}: "
            f"go on with the same, give another --output, or delete {root} first"
        )


def make_folder(root: Path) -> None:
    """Makes sure that there is a folder ROOT.

    Raises:
        ShardSetError: if it cannot be made.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShardSetError(f"cannot make the folder {root}: {error.strerror}; give another --output") from error


def claim_folder(root: Path, plan: SetPlan) -> None:
    """Makes ROOT ready for the set's shards: a new or empty folder, or one where the same set was begun.

    Shards of an earlier state of the source are built again by `build_shard`; those beyond the plan are removed here.

    Raises:
        ShardSetError: if ROOT holds anything else.
        OSError: if ROOT cannot be written.
    """
    make_folder(root)
    marker = root / UNFINISHED_FILE
    if not marker.exists() and not (root / DATASET_FILE).exists():
        there = sorted(item.name for item in root.iterdir() if not _is_passing(item))
        if there:
            raise ShardSetError(
                f"{root} holds {there[0]!r} and no shard set of this program: give --output a new or empty folder"
            )
    if marker.exists():
        check_begun(root, plan)
    state = {
        "settings": plan.settings(),
        "roots": list(plan.listing.roots),
        "source_fingerprint": plan.listing.fingerprint,
    }
    write_json(marker, state)
    (root / DATASET_FILE).unlink(missing_ok=True)
    _remove_passing(root)
    names = {shard.name for shard in plan.shards}
    for split in SPLITS:
        folder = root / split
        if not folder.is_dir():
            continue
        for path in sorted(folder.iterdir()):
            beyond = (
                path.suffix in (".tar", ".idx", ".json")
                and path.stem.startswith(f"{split}-")
                and path.stem not in names
            )
            if beyond:
                path.unlink()


def finish(
    root: Path,
    plan: SetPlan,
    built: Sequence[BuiltShard],
    max_bad_fraction: float,
    report: Callable[[str], None] = print,
) -> DatasetInfo:
    """Merges the shards' moments and rows and writes the set's own files: `dataset.json` last, but for the pictures.

    Args:
        built: one for each of `plan.shards`, in the same order.
        max_bad_fraction: how much of the whole set may be set aside.
        report: told if the pictures could not be drawn.

    Raises:
        ShardSetError: if too many images were set aside or a split has none left; `rejects.jsonl` is written then, and
            `dataset.json` is not.
    """
    annotations = [shard.annotation for shard in built]
    assert [annotation.name for annotation in annotations] == [shard.name for shard in plan.shards]
    pairs = list(zip(plan.shards, annotations, strict=True))
    rejected = sorted(
        (reject for annotation in annotations for reject in annotation.rejected), key=lambda r: (r.split, r.path)
    )
    lines = "".join(json.dumps(reject.to_json()) + "\n" for reject in rejected)
    write_atomically(root / REJECTS_FILE, lines.encode())
    _check_rejected(root, rejected, plan.listing.images, max_bad_fraction)

    splits = {}
    for name in plan.listing.splits:
        rows = [
            ShardRow(a.name, a.samples, a.bytes, a.sha256) for shard, a in pairs if shard.split == name and a.samples
        ]
        if not rows:
            raise ShardSetError(
                f"every {name} image was set aside, the first reason: {rejected[0].reason}; see {root / REJECTS_FILE}"
            )
        for row in rows:
            if not _is_there(root, name, row):
                raise ShardSetError(
                    f"{root / name / row.name}.tar was written but is not here: "
                    "--output must lie on a disk that all nodes share"
                )
        indexed = [
            one.rows for shard, one in zip(plan.shards, built, strict=True) if shard.split == name and len(one.rows)
        ]
        index = pack_index(indexed)
        write_atomically(root / index_file(name), index)
        split = Split(sum(row.samples for row in rows), sum(row.bytes for row in rows), tuple(rows))
        splits[name] = describe_index(split, index)

    training = sum((a.moments for shard, a in pairs if shard.split == "train"), RgbMoments())
    rgb = RgbStatistics.of(training)
    for shard, annotation in pairs:
        write_json(annotation_path(root, shard), dataclasses.replace(annotation, rgb=rgb).to_json())
    info = DatasetInfo(
        classes=tuple(
            ClassLabel(index, wnid, name)
            for index, (wnid, name) in enumerate(zip(plan.listing.classes, plan.listing.class_names, strict=True))
        ),
        splits=splits,
        image=plan.image,
        seed=plan.seed,
        rgb=rgb,
        source_fingerprint=plan.listing.fingerprint,
        set_aside=len(rejected),
    )
    write_json(root / DATASET_FILE, info.to_json())
    tidy(root, info, report)
    return info


def _check_rejected(root: Path, rejected: Sequence[Reject], images: int, max_bad_fraction: float) -> None:
    if len(rejected) / images > max_bad_fraction:
        raise ShardSetError(
            f"{len(rejected)} of {images} images are bad, more than --max-bad-fraction {max_bad_fraction} allows; "
            f"the first is {rejected[0].path}: {rejected[0].reason}. {root / REJECTS_FILE} lists them: repair or "
            f"remove them, or give --max-bad-fraction {math.ceil(len(rejected) / images * 100) / 100}, and run again"
        )


def _differences(then: dict[str, Any], now: dict[str, Any], same_source: bool) -> str:
    """Names what differs between two sets of settings, with its values; empty where nothing does."""
    named = [
        f"{name.replace('_', ' ')} ({then.get(name)}, not {value})"
        for name, value in now.items()
        if then.get(name) != value
    ]
    # The seed also decides what is split off to validate on, so the source's listing cannot be blamed beside it.
    if not same_source and then.get("seed") == now["seed"]:
        named.append("source or --val-fraction")
    return " and ".join(named)


def _read_or_none(root: Path, shard: ShardPlan) -> ShardAnnotation | None:
    try:
        return read_annotation(annotation_path(root, shard))
    except (FileNotFoundError, ShardError):
        return None


def _is_there(root: Path, split: str, row: ShardRow) -> bool:
    tar = root / split / f"{row.name}.tar"
    return tar.is_file() and tar.stat().st_size == row.bytes and tar.with_suffix(".idx").is_file()


def _is_passing(path: Path) -> bool:
    """Whether a path is of a file that was being written, or of a job's lock."""
    return path.name == LOCK_FILE or (path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX))


def _remove_passing(root: Path) -> None:
    """Removes what was being written when a job or a worker was killed."""
    for folder in (root, *(root / split for split in SPLITS)):
        for path in sorted(folder.glob(f".*{TEMPORARY_SUFFIX}")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

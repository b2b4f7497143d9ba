"""Where a shard set is made, a path or URL: what may lie there, and what a job that was killed left.

A folder with other things in it, or another set, is refused by name: nothing that this program did not write is ever
replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path

from pipeline.dataset.info import DATASET_FILE, SPLITS
from pipeline.sharding.claim import UNFINISHED_FILE, ShardSetError, differences, read_claim
from pipeline.sharding.set_lock import LOCK_FILE
from pipeline.sharding.shard_plan import SetPlan
from pipeline.sources.stored_listing import LISTING_FILE
from pipeline.storage.locations import Location, is_url, join, shown
from pipeline.storage.remote import TEMPORARY_SUFFIX, delete, read, scan


def with_encoder_of(root: Location, plan: SetPlan) -> SetPlan:
    """The plan with the encoder versions of the set in ROOT, finished or not, if there is one.

    An upgrade then changes nothing of what is there: versions matter where an image is encoded, and are compared there.
    """
    for name, field in ((UNFINISHED_FILE, "settings"), (DATASET_FILE, "image")):
        # What cannot be understood is refused by name where it is used.
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            encoder = dict(json.loads(read(join(root, name)))[field]["encoder"])
            return dataclasses.replace(plan, image={**plan.image, "encoder": encoder})
    return plan


def is_left_over(root: Location) -> bool:
    """Whether a job still works on the finished set in ROOT, or was killed between its last file and its end."""
    return not names_in(root).isdisjoint((UNFINISHED_FILE, LOCK_FILE))


def make_folder(root: Location) -> None:
    """Makes sure that there is a folder ROOT; a store needs none.

    Raises:
        ShardSetError: if it cannot be made.
    """
    if is_url(root):
        return
    try:
        os.makedirs(root, exist_ok=True)
    except OSError as error:
        raise ShardSetError(f"cannot make the folder {root}: {error.strerror}; give another --output") from error


def check_folder(root: Location) -> None:
    """Raises ShardSetError if ROOT holds anything else than a set, finished or not."""
    names = names_in(root)
    foreign = sorted(name for name in names if not _is_passing(name))
    if foreign and names.isdisjoint((UNFINISHED_FILE, DATASET_FILE)):
        raise ShardSetError(
            f"{shown(root)} holds {foreign[0]!r} and no shard set of this program: give --output a new or empty folder"
        )


def claim_folder(root: Location, plan: SetPlan) -> None:
    """Makes ROOT ready for the set's shards: a new or empty folder, or one where the same set was begun.

    Shards of an earlier state of the source are built again later; those beyond the plan are removed here.

    Raises:
        ShardSetError: if ROOT holds anything else.
        OSError: if ROOT cannot be written.
    """
    make_folder(root)
    check_folder(root)
    mine, there = plan.claim, read_claim(root)
    if there is not None:
        # The same folder with a repaired or added image continues; another folder is more likely a mistake.
        same_source = there.source_fingerprint == mine.source_fingerprint or there.roots == mine.roots
        if different := differences(there.settings, mine.settings, same_source):
            raise ShardSetError(
                f"{shown(root)} holds an unfinished set of another {different}: "
                f"go on with the same, give another --output, or delete {shown(root)} first"
            )
    # A dataset.json stays: it is of the same set, which lacks a file.
    mine.write(root)
    remove_passing(root)
    planned = {shard.name for shard in plan.shards}
    for split in SPLITS:
        for name in names_in(join(root, split)):
            stem, extension = os.path.splitext(name)
            if extension in (".tar", ".idx", ".json") and stem.startswith(f"{split}-") and stem not in planned:
                delete(join(root, split, name))


def names_in(folder: Location) -> set[str]:
    """Of what lies in a folder that may not be there."""
    return {item.name for item in scan(folder, missing_ok=True)}


def _is_passing(name: str) -> bool:
    """Whether a name is of a file that was being written, or of a job's lock or its source's listing."""
    return name in (LOCK_FILE, LISTING_FILE) or (name.startswith(".") and name.endswith(TEMPORARY_SUFFIX))


def remove_passing(root: Location) -> None:
    """Removes what was being written to a disk when a job or a worker was killed."""
    if is_url(root):
        return
    for folder in (Path(root), *(Path(root) / split for split in SPLITS)):
        for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
            path.unlink(missing_ok=True)

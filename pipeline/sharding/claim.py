"""Whose set a folder holds while it is made: `unfinished.json` says what it is to become.

A job whose set is another one is refused by name. On a disk a lock (`set_lock`) keeps a second job away altogether. A
store has no locks: there, two jobs that make the same set do no harm, since they write the same bytes, and of two that
make different ones the workers of the first find the claim of the second before they write a shard.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from pipeline.dataset.annotation import ShardError
from pipeline.dataset.info import write_json
from pipeline.storage.locations import Location, join, shown
from pipeline.storage.remote import read

UNFINISHED_FILE = "unfinished.json"


class ShardSetError(ShardError):
    """A shard set that cannot be started, continued or finished."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a job makes."""

    settings: dict[str, Any]
    """What must be the same for an unfinished set to be continued."""
    roots: list[str]
    """The folders or tars of the source, as `shown`."""
    source_fingerprint: str

    def write(self, root: Location) -> None:
        write_json(join(root, UNFINISHED_FILE), dataclasses.asdict(self))

    def check(self, root: Location) -> None:
        """Makes sure that ROOT, where this was claimed, was not claimed for another set since.

        Raises:
            ShardSetError: if it was.
        """
        now = read_claim(root)
        # Where it is gone, a job that makes the same set has finished it.
        if now is None:
            return
        if different := differences(now.settings, self.settings, now.source_fingerprint == self.source_fingerprint):
            raise ShardSetError(
                f"another job has begun a set of another {different} in {shown(root)}: give another --output"
            )


def read_claim(root: Location) -> Claim | None:
    """What the unfinished set in ROOT is to become; None if there is none.

    Raises:
        ShardSetError: if it cannot be understood.
    """
    marker = join(root, UNFINISHED_FILE)
    try:
        value = json.loads(read(marker))
        return Claim(dict(value["settings"]), list(value["roots"]), str(value["source_fingerprint"]))
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise ShardSetError(
            f"{shown(marker)} cannot be read ({type(error).__name__}): delete {shown(root)} and start again"
        ) from error


def differences(then: dict[str, Any], now: dict[str, Any], same_source: bool) -> str:
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

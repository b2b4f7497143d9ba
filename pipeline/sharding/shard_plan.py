"""What a set is to become, decided before any image is read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from pipeline.sharding.claim import Claim
from pipeline.sources.listing import Entries, Listing
from pipeline.sources.sources import permutation
from pipeline.storage.locations import Location, join


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """The images of one shard."""

    split: str
    name: str
    """train-000000."""
    entries: Entries
    """In the order in which they are stored."""


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

    @property
    def claim(self) -> Claim:
        return Claim(self.settings(), list(self.listing.roots), self.listing.fingerprint)


def plan_shards(listing: Listing, seed: int, samples_per_shard: int) -> list[ShardPlan]:
    """Deals a seeded permutation of each whole split into shards, so that each is a fair sample of its split.

    The order depends on the seed, the split's name and its count alone. The last shard of a split may be short.
    """
    plans = []
    for split, entries in listing.splits.items():
        order = permutation(seed, f"shards {split}", len(entries))
        for number, start in enumerate(range(0, len(order), samples_per_shard)):
            chosen = entries.take(order[start : start + samples_per_shard])
            plans.append(ShardPlan(split, f"{split}-{number:06d}", chosen))
    return plans


def inputs_digest(plan: ShardPlan, image: dict[str, Any]) -> str:
    """sha256 over a shard's name, its images' keys, classes and sizes in order, and the image settings."""
    digest = hashlib.sha256(json.dumps([plan.split, plan.name, image], sort_keys=True).encode())
    for entry in plan.entries:
        digest.update(f"{entry.key} {entry.label} {entry.size}\n".encode())
    return digest.hexdigest()


def shard_file(root: Location, plan: ShardPlan, suffix: str) -> str:
    """The location of a shard's tar, idx or json."""
    return join(root, plan.split, f"{plan.name}.{suffix}")

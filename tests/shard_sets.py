"""Whole shard sets made in this process, without Ray: what the jobs' own must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pipeline.images.resize import encoder_settings
from pipeline.sharding.set_folder import claim_folder
from pipeline.sharding.shard_plan import SetPlan, ShardPlan, plan_shards
from pipeline.sharding.shard_set import finish
from pipeline.sharding.shards import BuiltShard, build_in_steps
from pipeline.sources.sources import read_source

PER_SHARD = 4
SET_IN_BUCKET = "sets/photographs"
SomePath = TypeVar("SomePath", Path, str)


def planned(
    source: Path, quality: int = 90, seed: int = 0, per_shard: int = PER_SHARD, val_fraction: float = 0.1
) -> SetPlan:
    listing = read_source(source, None, val_fraction, seed)
    shards = tuple(plan_shards(listing, seed, per_shard))
    return SetPlan(listing, encoder_settings(quality), seed, per_shard, shards)


def build_shard(root: Path | str, plan: ShardPlan, image: dict[str, Any]) -> BuiltShard:
    *_, built = build_in_steps(root, plan, image)
    assert isinstance(built, BuiltShard)
    return built


def build_all(output: Path | str, plan: SetPlan) -> list[BuiltShard]:
    claim_folder(output, plan)
    return [build_shard(output, shard, plan.image) for shard in plan.shards]


def make(output: SomePath, plan: SetPlan) -> SomePath:
    finish(output, plan, build_all(output, plan))
    return output


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a set but the rejects, whose paths differ with the source's."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def tars(root: Path, split: str) -> list[Path]:
    return sorted((root / split).glob("*.tar"))


def s3_options(server: str) -> str:
    """What stands behind the path in a URL of an S3 server."""
    return f"?region=us-east-1&scheme=http&endpoint_override={server}"


def in_bucket(server: str) -> str:
    """The URL of a set in the bucket "bucket" of an S3 server, with keys that nothing may print."""
    return f"s3://KEY:SECRET@bucket/{SET_IN_BUCKET}{s3_options(server)}"


def stored_in(client: Any) -> dict[str, bytes]:
    """What lies in the bucket, by Amazon's own client; what stands for a folder is left out."""
    keys = [item["Key"] for item in client.list_objects_v2(Bucket="bucket").get("Contents", [])]
    assert all(key.startswith(f"{SET_IN_BUCKET}/") for key in keys)
    return {
        key.removeprefix(f"{SET_IN_BUCKET}/"): client.get_object(Bucket="bucket", Key=key)["Body"].read()
        for key in keys
        if not key.endswith("/")
    }

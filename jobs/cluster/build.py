"""Building a set's shards with Ray: a task a shard, which says how far it is and is made again if its worker dies."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import ray

from jobs.cli.command import log
from jobs.cli.progress import Progress
from jobs.cluster.connection import LostError, stream
from pipeline.dataset.annotation import ShardError
from pipeline.sharding.claim import Claim
from pipeline.sharding.set_lock import at_work
from pipeline.sharding.shard_plan import SetPlan, ShardPlan
from pipeline.sharding.shard_set import check_rejected
from pipeline.sharding.shards import BuiltShard, Step, build_in_steps
from pipeline.storage.locations import shown
from pipeline.storage.retry import SourceReadError

ATTEMPTS = 4
CAREFUL_FROM = 2  # A node may be lost at any shard; a worker that dies twice at the same one may have cause.


def build_all(
    output: str, plan: SetPlan, max_bad_fraction: float, workers: int | None, progress: Progress
) -> list[BuiltShard]:
    """Builds every shard, no more at a time than there are workers; in the plan's order.

    Raises:
        ShardError, SourceReadError: see `build_in_steps`; also if a shard's workers died again and again, or it could
            not be written.
        ShardSetError: once more than `max_bad_fraction` of all images are bad.
    """
    # Attempts are counted here and not by Ray, which would not tell a task which one it is.
    task = ray.remote(_build).options(num_cpus=1, max_retries=0, num_returns="streaming", name="build_shard")
    done: dict[int, BuiltShard] = {}
    reached: dict[int, Step] = {}
    images, rejected = [0] * len(plan.shards), [0] * len(plan.shards)

    def tell(number: int, dealt_with: int, aside: int, worked: bool = True) -> None:
        """Counts each image once, however often its shard is begun."""
        more = max(0, dealt_with - images[number])
        images[number] += more
        rejected[number] = aside
        progress.advance(more, worked, note=f"{sum(rejected):,} set aside")

    calls = ((output, shard, plan.image, plan.claim) for shard in plan.shards)
    try:
        for number, item in stream(task, calls, workers, ATTEMPTS, again=(SourceReadError,)):
            if isinstance(item, str):
                log(item)
            elif isinstance(item, Step):
                reached[number] = item
                tell(number, item.images, item.rejected)
            else:
                done[number] = item
                tell(number, len(plan.shards[number].entries), len(item.annotation.rejected), worked=not item.kept)
                check_rejected(output, plan, done.values(), max_bad_fraction)
    except LostError as error:
        last = reached.get(error.number)
        raise ShardError(
            f"the workers that built {plan.shards[error.number].name} died {error.attempts} times ({error.reason})"
            f"{f', the last one at {last.image}' if last else ''}: look for what ended them, as a lack of memory "
            "would, give fewer --workers or remove the image, and run the same command again to continue"
        ) from error
    except OSError as error:
        if isinstance(error, SourceReadError | ChildProcessError):
            raise
        raise ShardError(
            f"a shard could not be written to {shown(output)}: {error}; make room or give leave to write there, "
            "and run the same command again to continue"
        ) from error
    return [done[number] for number in range(len(plan.shards))]


def _build(
    output: str, shard: ShardPlan, image: dict[str, Any], claim: Claim, attempt: int
) -> Iterator[str | Step | BuiltShard]:
    """The task: says how far the shard is, what the storage client logs, and in the end what it came to."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    storage = logging.getLogger("pipeline.storage")
    storage.addHandler(handler)
    try:
        with at_work(output):
            for item in build_in_steps(output, shard, image, attempt >= CAREFUL_FROM, claim):
                yield from _taken(lines)
                if isinstance(item, Step):
                    yield item
        # The shard itself only now: once the job has it, it waits for whoever is still at work.
        yield from _taken(lines)
        yield item
    finally:
        storage.removeHandler(handler)


def _taken(lines: list[str]) -> Iterator[str]:
    """Empties a list. A generator, as Ray sends to what a task yields from."""
    while lines:
        yield lines.pop(0)

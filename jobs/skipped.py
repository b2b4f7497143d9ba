"""The list of images that a run went on without: RUN/skipped/rank-0000.jsonl, a line for each, one file a rank.

A resumed run meets the same images again, and another number of ranks meets them on others: a list is read as a set.
"""

from __future__ import annotations

import dataclasses
import json

from pyarrow import fs as arrow_fs

from pipeline.dataset import DatasetError
from pipeline.storage import join, on_disk, open_location, read_text
from pipeline.substitutes import Skip

FOLDER = "skipped"


class SkipList:
    """One rank's list; goes on with what an earlier attempt of the run left in it.

    Args:
        run: a local path or URL, the run's folder.
        rank: this worker's.
    """

    def __init__(self, run: str, rank: int) -> None:
        self._filesystem, folder = open_location(join(run, FOLDER))
        self._path = f"{folder}/rank-{rank:04d}.jsonl"
        self._skips = set(_read(self._filesystem, self._path))

    def add(self, skip: Skip) -> None:
        """Says and lists that an image is skipped.

        Raises:
            OSError: if the list cannot be written.
        """
        print(f"skipping a corrupt image, {skip}", flush=True)
        self._skips.add(skip)
        self._filesystem.create_dir(self._path.rpartition("/")[0], recursive=True)
        # Whole each time: object stores do not append, and skips are few.
        with self._filesystem.open_output_stream(self._path) as stream:
            stream.write("".join(json.dumps(dataclasses.asdict(s)) + "\n" for s in sorted(self._skips)).encode())


def read_skips(run: str) -> list[Skip]:
    """All that a run skipped, over all ranks, in order; empty where nothing was.

    Raises:
        DatasetError: if a list cannot be understood.
    """
    filesystem, folder = open_location(join(run, FOLDER))
    files = filesystem.get_file_info(arrow_fs.FileSelector(folder, allow_not_found=True))
    return sorted({skip for file in files for skip in _read(filesystem, file.path)})


def _read(filesystem: arrow_fs.FileSystem, path: str) -> list[Skip]:
    try:
        return [Skip(**json.loads(line)) for line in read_text(filesystem, path).splitlines()]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise DatasetError(f"{path} is no list of skipped images ({error}): remove it") from error


def summary(run: str, data: str) -> str:
    """One line on what a run skipped and how to mend it; empty where nothing was."""
    skips = read_skips(run)
    if not skips:
        return ""
    shards = sorted({skip.shard for skip in skips})
    return (
        f"skipped {len({(s.shard, s.key) for s in skips})} corrupt image(s), {len(skips)} time(s) in all, listed in "
        f"{join(run, FOLDER)}; find the damage in {', '.join(shards)} with: "
        f"python jobs/verify_shards.py --data {on_disk(data)}"
    )

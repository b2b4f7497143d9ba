"""One command at a time on a run: a claim in the run's folder, renewed while the command lives.

A claim is a file `owner-*.json` of its own. Who writes one and then finds no other's is the owner; who finds one takes
its own back. Of two at once the later one to look sees the other, so both never go on, in any store that lists what was
written: no store needs a lock or a conditional write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from pyarrow import fs as arrow_fs

from jobs.cli.command import one_line
from pipeline.storage.locations import join, open_location, shown
from pipeline.storage.remote import read, write

PREFIX = "owner-"
BEAT_SECONDS = 20.0  # From one renewal to the next.
DEAD_SECONDS = 180.0  # Of silence, after which a claim counts no more; a mount may show a renewal a minute late.
ATTEMPTS, MAX_WAIT_S = 8, 1.0  # Of commands that start at the same moment.


class OwnedError(ValueError):
    """A run that another command is at work on."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """What identifies a process."""

    host: str
    pid: int
    started: str
    """When the process began, in ticks of its machine's clock: pids are used again."""
    machine: str
    """The machine's boot and the pid's namespace: within it, the system knows whether the process lives."""
    settled: bool = False
    """Whether it is the run's owner already, and not about to look for others."""

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        return cls(socket.gethostname(), os.getpid(), str(_started(os.getpid())), machine)

    def lives(self, here: Owner, silent_s: float) -> bool:
        """Whether the process may still be at work.

        Args:
            here: this process.
            silent_s: seconds since its last renewal, by the storage's clock.
        """
        if self.machine == here.machine:
            # Of a process that /proc hides, only its silence tells.
            with contextlib.suppress(PermissionError):
                return str(_started(self.pid)) == self.started
        return silent_s < DEAD_SECONDS

    def refusal(self, run: str, here: Owner, silent_s: float) -> str:
        """What a second command is told."""
        text = (
            f"process {self.pid} on {self.host} is at work on the run {shown(run)}: wait for it to end, or give "
            "another --name"
        )
        if self.machine == here.machine:
            return text
        return (
            f"{text}; it was there {max(silent_s, 0):.0f} s ago, and if it is dead, the same command takes the run "
            f"over after {DEAD_SECONDS - silent_s:.0f} s more"
        )


def _started(pid: int) -> int | None:
    """When a process of this machine began, in clock ticks since its boot; None if it has ended.

    Raises:
        PermissionError: if it is another user's and /proc, mounted with hidepid, does not show it.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        # What is hidden looks as if it were not there.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
        return None
    return None if state in "ZX" else int(fields[18])


class Claim:
    """A claim on a run's folder, a path or URL."""

    def __init__(self, run: str, here: Owner) -> None:
        self._run = run
        self._here = here
        self._filesystem, self._path = open_location(run)
        name = f"{PREFIX}{uuid.uuid4().hex}.json"
        self._file, self._location = f"{self._path}/{name}", join(run, name)
        self._followed: list[str] = []
        """Files of those that it took the run over from."""

    def take(self) -> None:
        """Becomes the run's owner.

        Raises:
            OwnedError: if another process is.
            OSError: if the folder cannot be written.
        """
        self._filesystem.create_dir(self._path, recursive=True)
        for attempt in range(1, ATTEMPTS + 1):
            self._write(settled=False)
            rivals = self._others()
            living = self._living(rivals)
            if not living:
                self._write(settled=True)
                # Once more: a store may not yet have listed a claim that was written a moment before.
                living = [one for one in self._living(self._others()) if one[0].settled]
            if not living:
                self._followed = list(rivals)
                self._remove_followed()
                return
            self.release()
            owner, silent = max(living, key=lambda one: one[0].settled)
            if owner.settled or attempt == ATTEMPTS:
                raise OwnedError(owner.refusal(self._run, self._here, silent))
            # Both have just taken theirs back: who waits less comes first.
            time.sleep(random.uniform(0.0, MAX_WAIT_S))

    def renew(self) -> bool:
        """Says that this process lives; whether the run is still its own."""
        mine = self._filesystem.get_file_info(self._file).type == arrow_fs.FileType.File
        if not mine and any(owner.settled for owner, _ in self._others().values()):
            return False
        self._write(settled=True)
        # A renewal that hung while the run was taken over writes its file anew: without it, the next one knows.
        self._remove_followed()
        return True

    def release(self) -> None:
        """Leaves the run to others."""
        self._remove(self._file)

    def _write(self, settled: bool) -> None:
        claim = dataclasses.asdict(dataclasses.replace(self._here, settled=settled))
        write(self._location, json.dumps(claim).encode())

    def _remove_followed(self) -> None:
        for file in self._followed:
            self._remove(file)

    def _remove(self, file: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(file)

    def _read(self, file: str) -> Owner | None:
        """A claim; None where it has been taken back."""
        name = os.path.basename(file)
        try:
            # Again where it fails: another host may be renewing it, and its length then differs from what was asked.
            return Owner(**json.loads(read(join(self._run, name))))
        # Even if it is there again by now: who writes one later looks for this process's own.
        except FileNotFoundError:
            return None
        # Another version's, say: of that, too, silence tells.
        except (ValueError, TypeError):
            return Owner(f"an unknown host ({name} is not of this version)", 0, "", "", settled=True)

    def _living(self, claims: dict[str, tuple[Owner, float]]) -> list[tuple[Owner, float]]:
        return [(owner, silent) for owner, silent in claims.values() if owner.lives(self._here, silent)]

    def _others(self) -> dict[str, tuple[Owner, float]]:
        """Every other claim there, by file: whose, and for how long it has been silent."""
        now, found = None, {}
        for info in self._filesystem.get_file_info(arrow_fs.FileSelector(self._path)):
            if info.path == self._file:
                now = info.mtime_ns
            elif os.path.basename(info.path).startswith(PREFIX) and (owner := self._read(info.path)) is not None:
                found[info.path] = owner, info.mtime_ns
        # By the storage's clock alone: those of the hosts differ.
        return {file: (owner, ((now or written) - written) / 1e9) for file, (owner, written) in found.items()}


@contextlib.contextmanager
def owned(storage: str, run: str, here: Owner | None = None) -> Iterator[None]:
    """Makes this process the only one at work on a run, while it lasts.

    Args:
        storage: the command line's, for people.
        run: the run's folder, a path or URL.
        here: this process; a parameter for tests.

    Raises:
        OwnedError: if another process is.
        ValueError: if the folder cannot be written.
    """
    claim = Claim(run, here or Owner.here())
    try:
        claim.take()
    except OSError as error:
        reason = one_line(error)
        raise ValueError(
            f"the storage {shown(storage)} cannot be written ({reason}): give another --storage"
        ) from error
    over = threading.Event()
    beats = threading.Thread(target=_beat, args=(claim, over, _leave), daemon=True)
    beats.start()
    try:
        yield
    finally:
        over.set()
        beats.join(BEAT_SECONDS)
        # A storage that is gone by now must not hide how the run ended; the claim falls silent.
        with contextlib.suppress(OSError):
            claim.release()


def _beat(claim: Claim, over: threading.Event, lost: Callable[[], None], seconds: float = BEAT_SECONDS) -> None:
    while not over.wait(seconds):
        # A storage that fails now may answer the next time; the next checkpoint says so if it does not.
        with contextlib.suppress(OSError):
            if not claim.renew():
                lost()


def _leave() -> None:
    """Ends this process at once: what it would write belongs to another command's run by now."""
    line = f"error: this command was silent for {DEAD_SECONDS:.0f} s, and another one has taken its run over: leaving"
    print(line, file=sys.stderr, flush=True)
    os._exit(1)

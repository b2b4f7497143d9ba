"""How far a command is: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TextIO, TypeVar

import tqdm

SomeBatch = TypeVar("SomeBatch", bound=Sized)

LINE_EVERY_S = 10.0


class Progress:
    """Counts up to `total` on stderr, with rate and time left.

    Work found done already moves the bar but not the rate, so that a continued job does not promise too much.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._unit = unit
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._start = self._last_line = clock()
        self._count = 0
        self._worked = 0
        # A bar's own rate would count what was found done.
        form = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        terminal = self._stream.isatty()
        self._bar = tqdm.tqdm(total=total, unit=unit, file=self._stream, bar_format=form) if terminal else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def rate(self) -> float:
        """Units a second, of those worked for; 0 before the first."""
        elapsed = self._clock() - self._start
        return self._worked / elapsed if elapsed > 0 else 0.0

    def advance(self, count: int, worked: bool = True, note: str = "") -> None:
        """Counts `count` more units; `worked` says whether they took work now, `note` is shown behind the rate."""
        self._count += count
        if worked:
            self._worked += count
        text = f"{self.rate:,.1f} {self._unit}/s, {self._time_left()} left{', ' + note if note else ''}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(count)
            return
        now = self._clock()
        if now - self._last_line >= LINE_EVERY_S or self._count >= self._total:
            self._last_line = now
            print(f"{self._count:,} of {self._total:,} {self._unit}, {text}", file=self._stream, flush=True)

    def _time_left(self) -> str:
        if self._count >= self._total:
            return "0:00:00"
        if not self._worked:
            return "unknown"
        seconds = round((self._total - self._count) / self.rate)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def counted(batches: Iterable[SomeBatch], total: int) -> Iterator[SomeBatch]:
    """The same batches, with their images shown as progress."""
    with Progress(total, "images") as progress:
        for batch in batches:
            yield batch
            progress.advance(len(batch))

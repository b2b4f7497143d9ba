"""How far a command is: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TextIO, TypeVar

import tqdm

SomeBatch = TypeVar("SomeBatch", bound=Sized)

LINE_EVERY_S = 10.0
LINE = "{n:,} of {total:,}{unit}, {rate_noinv_fmt}, {remaining} left{postfix}"


class _Log:
    """Takes a bar's states as lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := " ".join(text.split()):
            print(line, file=self._stream, flush=True)


class Progress:
    """Counts up to `total` on stderr, with rate and time left.

    Work found done already moves the bar but not the rate, so that a continued job does not promise too much.
    """

    def __init__(self, total: int, unit: str, stream: TextIO | None = None) -> None:
        stream = stream or sys.stderr
        terminal = stream.isatty()
        self._bar = tqdm.tqdm(
            total=total,
            unit=f" {unit}",
            file=stream if terminal else _Log(stream),
            mininterval=0.1 if terminal else LINE_EVERY_S,
            delay=0 if terminal else LINE_EVERY_S,
            leave=terminal,
            miniters=1,
            smoothing=0,  # The rate is the mean.
            disable=False,  # TQDM_DISABLE would take the rate away, too.
            bar_format=None if terminal else LINE,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        # A log's last line, unless the one before says the same.
        if not self._bar.leave and self._bar.n > self._bar.last_print_n:
            self._bar.refresh()
        self._bar.close()

    @property
    def rate(self) -> float:
        """Units a second, of those worked for."""
        return (self._bar.n - self._bar.initial) / self._bar.format_dict["elapsed"]

    def advance(self, count: int, worked: bool = True, note: str = "") -> None:
        """Counts `count` more units; `worked` says whether they took work now, `note` is shown behind the rate."""
        if not worked:
            self._bar.initial += count
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)


def counted(batches: Iterable[SomeBatch], total: int) -> Iterator[SomeBatch]:
    """The same batches, with their images shown as progress."""
    with Progress(total, "images") as progress:
        for batch in batches:
            yield batch
            progress.advance(len(batch))

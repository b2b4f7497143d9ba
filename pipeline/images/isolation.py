"""Decoders that crash or hang: noticed in any process, and in a child process the fault of one image alone."""

from __future__ import annotations

import faulthandler
import multiprocessing
import signal
import sys
from multiprocessing.connection import Connection

from pipeline.images.decode import ImageError
from pipeline.images.resize import Converted, convert

LIMIT_S = 300.0  # Of an image. The slowest that is allowed, 80 megapixels of noise in a progressive JPEG, takes 11 s.


class KilledError(RuntimeError):
    """The child was killed from outside, as for lack of memory: no proof against the image."""


def convert_or_exit(data: bytes, quality: int) -> Converted:
    """`convert` that ends this process by SIGALRM if the decoder hangs: for a worker that is replaced.

    Raises:
        ImageError: see `pipeline.images.resize.convert`.
    """
    # Handled in C, without any lock that the decoder may hold. `faulthandler.dump_traceback_later` does the same, but
    # starts a thread for each image: 4 % of a shard's time.
    faulthandler.register(signal.SIGALRM, file=sys.__stderr__ or sys.stderr, chain=True)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        return convert(data, quality)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class IsolatedConverter:
    """`convert` in a child process, which is started anew after each crash or hang.

    Raises:
        ChildProcessError: if no child can be started.
    """

    def __enter__(self) -> IsolatedConverter:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def convert(self, data: bytes, quality: int) -> Converted:
        """See `pipeline.images.resize.convert`.

        Raises:
            ImageError: also if the decoder crashes or hangs.
            KilledError: if the child is sent a SIGKILL.
        """
        try:
            self._pipe.send((data, quality))
            result = self._pipe.recv()
        # The child has ended.
        except (EOFError, ConnectionError) as error:
            self._child.join()
            code = self._child.exitcode or 0
            self._stop()
            self._start()
            if code == -signal.SIGKILL:
                raise KilledError("the process that decoded it was killed (signal 9)") from error
            if code == -signal.SIGALRM:
                raise ImageError(f"the decoder hangs (no result within {LIMIT_S:g} s)") from error
            how = f"signal {-code}" if code < 0 else f"status {code}"
            raise ImageError(f"the decoder crashed ({how})") from error
        if isinstance(result, Exception):
            raise result
        return result

    def _start(self) -> None:
        # A fork of a worker of Ray's, with its threads, might hang.
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._child = context.Process(target=_serve, args=(other,), daemon=True)
        self._child.start()
        # Only with its last copy elsewhere closed does the child's end tell that the child is gone.
        other.close()
        # A child that cannot even begin says nothing about any image.
        try:
            self._pipe.recv()
        except EOFError as error:
            self._child.join()
            raise ChildProcessError(
                f"a process to decode images in did not start (status {self._child.exitcode}): see that there is "
                "memory for it, and run the same command again to continue"
            ) from error

    def _stop(self) -> None:
        self._pipe.close()
        self._child.join()
        self._child.close()


def _serve(pipe: Connection) -> None:
    """The child: converts until nobody asks any more."""
    pipe.send("ready")
    while True:
        try:
            data, quality = pipe.recv()
        except EOFError:
            return
        try:
            result: Converted | Exception = convert_or_exit(data, quality)
        # Anything but a bad image, such as a lack of memory, is the job's business, as it is without a child.
        except Exception as error:
            result = error
        pipe.send(result)

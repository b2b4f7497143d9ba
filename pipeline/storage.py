"""Where files are kept: a local path or a URL, through the library that Ray keeps its checkpoints with."""

from __future__ import annotations

import os

from pyarrow import fs


def is_url(location: str) -> bool:
    """Whether a location is a URL and not a local path."""
    return "://" in location


def join(location: str, *names: str) -> str:
    """The location of something inside a folder; a local path becomes absolute, a URL keeps its ?options."""
    base, mark, options = location.partition("?") if is_url(location) else (os.path.abspath(location), "", "")
    return "/".join([base.rstrip("/"), *names]) + mark + options


def open_location(location: str) -> tuple[fs.FileSystem, str]:
    """The file system and path of a local path or a URL (s3://, gs://).

    Raises:
        ValueError: for a URL of a kind that pyarrow does not know, or that it cannot open.
    """
    if not is_url(location):
        return fs.LocalFileSystem(), os.path.abspath(location)
    try:
        filesystem, path = fs.FileSystem.from_uri(location)
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{location} cannot be opened: {error}") from error
    return filesystem, path.rstrip("/")


def read_text(filesystem: fs.FileSystem, path: str) -> str:
    """The whole of a text file."""
    with filesystem.open_input_stream(path) as stream:
        return str(stream.read().decode("utf-8"))

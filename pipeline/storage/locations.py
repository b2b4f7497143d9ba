"""Where files are kept: a local path or a URL, through the library that Ray keeps its checkpoints with."""

from __future__ import annotations

import functools
import os
import re
from typing import Any
from urllib.parse import quote, unquote

import fsspec
from fsspec.implementations.http import HTTPFile
from pyarrow import PythonFile, fs

Location = str | os.PathLike[str]
"""A local path or a URL."""

HTTP = ("http", "https")
_MISSING, _FORBIDDEN = (404, 410), (401, 403)  # Answers of an HTTP server
_PLACE_OPTIONS = ("region", "scheme", "endpoint_override")  # Of a URL: where it is. Others may be keys.


class NoRangesError(OSError):
    """A server that hands out whole files only."""


def is_url(location: Location) -> bool:
    """Whether a location is a URL and not a local path."""
    return "://" in os.fspath(location)


def is_http(location: Location) -> bool:
    return is_url(location) and os.fspath(location).partition("://")[0] in HTTP


def check_writable(option: str, location: str) -> None:
    """Raises ValueError for a location of the command line that nothing can be written to.

    A URL with one slash is one, as it would be a folder here.
    """
    if not location or is_http(location) or re.match(r"file:|\w+:/(?!/)", location):
        raise ValueError(f"{option} {shown(location)} cannot be written: give a folder, s3://, gs:// or abfs://")


def join(location: Location, *names: str) -> str:
    """The location of something inside a folder; a local path becomes absolute, a URL keeps its ?options."""
    text = os.fspath(location)
    base, mark, options = text.partition("?") if is_url(text) else (os.path.abspath(text), "", "")
    return "/".join([base.rstrip("/"), *names]) + mark + options


def child(folder: str, name: str) -> str:
    """The location of what a folder lists as `name`, which a URL may have to escape."""
    return join(folder, quote(name, safe="")) if is_url(folder) else f"{folder.rstrip('/')}/{name}"


def parent(location: str) -> str:
    """The folder that something lies in; of what lies in none, such as a bucket, itself."""
    if not is_url(location):
        return os.path.dirname(location)
    base, mark, options = location.partition("?")
    folder = base.rpartition("/")[0]
    return location if folder.endswith("/") else folder + mark + options


def shown(location: Location) -> str:
    """A location for people: a URL without its ?options and user, where keys and signatures may be."""
    text = os.fspath(location)
    if not is_url(text):
        return text
    return unquote(without_user(text.partition("?")[0]))


def without_user(url: str) -> str:
    """A URL without the user and key before its host."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def without_keys(url: str) -> str:
    """A URL as it may be shown and still be opened by whoever has the keys: without user, signature and other secrets.

    Of Azure's, what stands before the host is the container, and after a colon its password.
    """
    base, _, options = url.partition("?")
    scheme, _, rest = base.partition("://")
    user = rest.partition("/")[0].rpartition("@")[0]
    if scheme not in ("abfs", "abfss") or ":" in unquote(user):
        base = without_user(base)
    kept = [option for option in options.split("&") if option.partition("=")[0] in _PLACE_OPTIONS]
    return base + ("?" + "&".join(kept) if kept else "")


def http_reason(error: BaseException | None) -> str:
    """Why HTTP failed. The text of aiohttp's errors holds the whole URL, and with it a signature."""
    status = getattr(error, "status", None)
    return f"the server answers {status}" if status else type(error).__name__


def open_location(location: Location) -> tuple[fs.FileSystem, str]:
    """The file system and path of a local path or a URL (s3://, gs://, or http:// and https:// to read from).

    Raises:
        ValueError: for a URL of a kind that pyarrow does not know, or that it cannot open.
    """
    location = os.fspath(location)
    if not is_url(location):
        return fs.LocalFileSystem(), os.path.abspath(location)
    if is_http(location):
        return _http(), location
    base, mark, options = location.partition("?")
    scheme, _, rest = base.partition("://")
    host, _, path = rest.partition("/")
    if scheme in ("az", "azure"):
        raise ValueError(f"{shown(location)}: for Azure give abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH")
    try:
        filesystem, root = _filesystem(f"{scheme}://{host}/{mark}{options}")
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{shown(location)} cannot be opened: {error}") from error
    return filesystem, f"{root.rstrip('/')}/{unquote(path)}".rstrip("/")


@functools.lru_cache
def _filesystem(root: str) -> tuple[fs.FileSystem, str]:
    # Each has connections of its own, which a file read from the same bucket can use again.
    return fs.FileSystem.from_uri(root)


@functools.cache
def _http() -> fs.FileSystem:
    # fsspec would read 5 MB for every image of 100 kB.
    return fs.PyFileSystem(_HttpHandler(fsspec.filesystem("http", cache_type="none")))


class _HttpHandler(fs.FSSpecHandler):
    """fsspec's HTTP, which calls every failure a missing file, with the failures told apart."""

    def open_input_file(self, path: str) -> PythonFile:
        try:
            file: Any = self.fs.open(path, mode="rb")
        except FileNotFoundError as error:
            if isinstance(error.__cause__, ValueError):
                raise ValueError(f"{shown(path)} is no URL that HTTP can open") from error
            status = getattr(error.__cause__, "status", None)
            if status in _MISSING:
                raise
            if status in _FORBIDDEN:
                raise PermissionError(f"the server answers {status} to {shown(path)}") from error
            raise ConnectionError(f"{shown(path)} cannot be opened: {http_reason(error.__cause__)}") from error
        if not isinstance(file, HTTPFile):
            raise NoRangesError(
                f"the server of {shown(path)} hands out whole files only, so nothing can be read in place: "
                "give a URL of a server that takes ranges, or download the file"
            )
        return PythonFile(file, mode="r")

    def open_input_stream(self, path: str) -> PythonFile:
        return self.open_input_file(path)

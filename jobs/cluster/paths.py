"""Paths of a command line that may run as a submitted job. Imports no Ray, so that a command line is parsed at once."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, TypeVar

from pipeline.storage.locations import is_url

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

PACKAGE_FOLDER = "/working_dir_files/_ray_pkg_"  # Where Ray unpacks a job's working directory.


def in_job_copy() -> bool:
    """Whether this process runs in the temporary copy of the code that `ray job submit --working-dir` makes."""
    return PACKAGE_FOLDER in os.getcwd()


def with_whole_paths(config: Config, *names: str) -> Config:
    """A command's configuration with these of its locations as every node can use them, where they are given.

    Raises:
        ValueError: see `whole_path`.
    """
    given = {name: getattr(config, name) for name in names}
    whole = {
        name: type(location)(whole_path(f"--{name.replace('_', '-')}", str(location)))
        for name, location in given.items()
        if location is not None
    }
    return dataclasses.replace(config, **whole)


def whole_path(option: str, location: str) -> str:
    """A location of the command line as every node can use it: a URL as it is, a path absolute.

    Raises:
        ValueError: for a relative path in the copy of the code that `ray job submit --working-dir` makes: it is
            temporary, and another one as soon as the code changes.
    """
    if is_url(location):
        return location
    if in_job_copy() and not os.path.isabs(location):
        raise ValueError(
            f"{option} is the relative path {location}, and a submitted job runs in a temporary copy of the code: give "
            "an absolute path or a URL"
        )
    # An empty location stays empty: abspath would make it the current folder. Whoever opens it refuses it.
    return location and os.path.abspath(location)

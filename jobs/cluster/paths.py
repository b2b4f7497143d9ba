"""Paths of a command line that may run as a submitted job. Imports no Ray, so that a command line is parsed at once."""

from __future__ import annotations

import os

from pipeline.storage.locations import is_url

PACKAGE_FOLDER = "/working_dir_files/_ray_pkg_"  # Where Ray unpacks a job's working directory.


def in_job_copy() -> bool:
    """Whether this process runs in the temporary copy of the code that `ray job submit --working-dir` makes."""
    return PACKAGE_FOLDER in os.getcwd()


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
    return os.path.abspath(location)

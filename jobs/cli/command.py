"""What every command shares: a dataclass becomes its command line, a known failure one line and exit 1."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import tyro

Config = TypeVar("Config")
Switch = Annotated[
    bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="(default: as the cluster has)")
]


def choose_gpus(gpus: Switch = False, no_gpus: Switch = False) -> bool | None:
    """Two flags for three answers, the third being to look what the cluster has.

    Args:
        gpus: Train on GPUs.
        no_gpus: Use CPUs even if GPUs are available.
    """
    if gpus and no_gpus:
        raise ValueError("--gpus and --no-gpus exclude each other: give one")
    return gpus if gpus or no_gpus else None


GpuChoice = Annotated[bool | None, tyro.conf.arg(name="", constructor=choose_gpus)]


def run(config: type[Config], main: Callable[[Config], None]) -> NoReturn:
    """Parses the command line into `config`, calls `main` with it and exits.

    Exit status 0 when done, 1 with one line on stderr that names the cause and the cure, 2 on wrong usage (tyro's).
    ValueError and OSError are failures that a user can repair; anything else is a bug and keeps its traceback.
    """
    try:
        parsed = tyro.cli(config, description=sys.modules[main.__module__].__doc__)
        _check_urls(parsed)
        main(parsed)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def _check_urls(config: object) -> None:
    """Raises ValueError for a URL where only a path will do: as a path it would name a folder "s3:" right here."""
    assert dataclasses.is_dataclass(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        # A path has lost the second of the slashes.
        if isinstance(value, Path) and re.match("[a-z][a-z0-9]+:/", str(value)):
            flag = f"--{field.name.replace('_', '-')}"
            raise ValueError(f"{flag} is the URL {str(value).replace(':/', '://', 1)}: it takes a path on a disk here")


def log(line: str) -> None:
    """Tells a person, beside what the command prints as its result."""
    print(line, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """The message of an error without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__

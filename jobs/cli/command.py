"""What every command shares: a dataclass becomes its command line, a known failure one line and exit 1."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

import tyro

Config = TypeVar("Config")
FOREIGN_FLAGS = {
    "-b": ("--batch-size",),
    "-j": ("--cpus-per-worker", "--threads", "--workers"),
    "--amp": ("--precision bfloat16",),
    "--ckpt-path": ("--checkpoint", "the same command again, which continues the run"),
    "--devices": ("--workers",),
    "--max-epochs": ("--epochs",),
    "--nproc-per-node": ("--workers",),
    "--resume": ("--checkpoint", "the same command again, which continues the run"),
}
"""Flags of torchrun, timm and PyTorch Lightning, each with what does the same here: the first that the command has."""


def _switch(*aliases: str) -> Any:
    hint = "(default: GPUs if there are any)"
    return tyro.conf.arg(aliases=aliases, help_behavior_hint=hint)


def choose_gpus(
    gpus: Annotated[bool, tyro.conf.FlagCreatePairsOff, _switch("--gpu")] = False,
    no_gpus: Annotated[bool, tyro.conf.FlagCreatePairsOff, _switch("--no-gpu")] = False,
) -> bool | None:
    """Two flags for three answers; None: GPUs if there are any.

    Args:
        gpus: Use GPUs.
        no_gpus: Use CPUs even if GPUs are available.
    """
    if gpus and no_gpus:
        raise ValueError("--gpus and --no-gpus exclude each other: give one")
    return gpus if gpus or no_gpus else None


GpuChoice = Annotated[bool | None, tyro.conf.arg(name="", constructor=choose_gpus)]


def run(config: Callable[..., Config], main: Callable[[Config], None] | str) -> NoReturn:
    """Parses the command line, calls `main` with the result and exits.

    Exit status 0 when done, 1 with one line on stderr that names the cause and the cure, 2 on wrong usage.
    ValueError and OSError are failures that a user can repair; anything else is a bug and keeps its traceback.

    Args:
        config: a dataclass; or a function that makes one of several, each of which is a group of flags.
        main: a function; or the name of the module whose `main` it is, which is imported once the line is parsed.
            Torch, Ray and DALI take seconds to import, and neither --help nor a mistyped flag should wait for them.
    """
    try:
        try:
            _check_foreign_flags(config)
            # Without the prefixes, the flags of a group have the names of its fields.
            parsed = tyro.cli(
                config,
                description=sys.modules["__main__"].__doc__,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
            )
            parsed = _with_home(parsed)
        except ValueError as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            sys.exit(2)
        from jobs.cli.locations import check_locations  # Imports pyarrow.

        check_locations(parsed)
        (importlib.import_module(main).main if isinstance(main, str) else main)(parsed)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def _check_foreign_flags(config: Callable[..., object]) -> None:
    """Raises ValueError for a flag that another trainer has, naming ours."""
    made = config if dataclasses.is_dataclass(config) else get_type_hints(config)["return"]
    flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(made)}
    for argument in sys.argv[1:]:
        given = argument.partition("=")[0]
        for ours in FOREIGN_FLAGS.get(given.replace("_", "-"), ()):
            if not ours.startswith("--") or ours.split()[0] in flags:
                raise ValueError(f"there is no {given}: give {ours}")


def _with_home(config: Any) -> Any:
    """The same, with ~ as the home folder: in --output=~/set, the shell leaves it.

    Raises:
        ValueError: for a URL where only a path will do: as a path it would name a folder "s3:" right here.
    """
    changed = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Path) and re.match("[a-z][a-z0-9]+:/", str(value)):
            raise ValueError(f"--{field.name.replace('_', '-')} is a URL: it takes a path on a disk here")
        if isinstance(value, str | Path) and str(value).startswith("~"):
            changed[field.name] = type(value)(os.path.expanduser(value))
    return dataclasses.replace(config, **changed)


def log(line: str) -> None:
    """Tells a person, beside what the command prints as its result."""
    print(line, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """The message of an error without its line breaks, and without the user and the query of a URL: they hold keys."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"(\w://)(?:[^\s/@]*@)?([^\s?'\"]*)(?:\?[^\s'\"]*[^\s'\":;,.)])?", r"\1\2", text)

"""The order of the rooms (docs/architecture.md): each imports only what stands before it. Read from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = ["storage", "sources", "images", "dataset", "sharding", "staging", "loading"]
JOBS = ["cli", "cluster", "training", "reporting", "diagnostics"]
PRIVATE = re.compile(
    r"_private\b|_internal\b|internal_kv|ray\._|\bray(\.\w+)*\._[a-z]|from ray[.\w]* import .*\b_[A-Za-z]"
)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    """jobs/cli/progress.py -> jobs.cli.progress; a folder's __init__.py is the folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for package in ("pipeline", "model", "jobs") for path in sources(package)}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or within a function, under its full name."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            # `from package import module` imports the module; of `from module import name` only the module counts.
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


# From what knows nothing of the others to what joins them all; `pipeline` and `jobs` themselves are their top folders.
ORDER = ["pipeline", *(f"pipeline.{name}" for name in PIPELINE), "model", *(f"jobs.{name}" for name in JOBS), "jobs"]


def room(module: str) -> str:
    """pipeline.loading.plan -> pipeline.loading; of a command, jobs."""
    folder = ".".join(module.split(".")[:2])
    return folder if folder in ORDER else module.split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_rooms_before_its_own(module: str) -> None:
    mine = room(module)
    for its in {other: room(other) for other in imports(MODULES[module]) if other in MODULES}.items():
        assert ORDER.index(its[1]) <= ORDER.index(mine), f"{module} ({mine}) imports {its[0]} ({its[1]})"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: {other for other in imports(path) if other in MODULES} for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("pipeline", ("ray", "torch.nn", "model", "jobs")), ("model", ("ray", "pipeline", "jobs", "pathlib", "os", "io"))],
)
def test_a_package_knows_nothing_of(package: str, forbidden: tuple[str, ...]) -> None:
    for path in sources(package):
        for name in imports(path):
            # A function on tensors is no part of a network.
            known = any(name == word or name.startswith(f"{word}.") for word in forbidden)
            assert not known or name == "torch.nn.functional", f"{path} imports {name}"


def test_private_names_of_ray_are_in_one_file() -> None:
    files = [path for folder in ("jobs", "pipeline", "model") for path in (ROOT / folder).rglob("*.py")]
    found = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in files
        for line in path.read_text().splitlines()
        if PRIVATE.search(line.replace("ray_private", ""))
    }
    assert {line for line in found if not line.startswith("jobs/cluster/ray_private.py")} == set()
    assert found


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES.values()}))
def test_a_folder_says_what_lives_there(folder: Path) -> None:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))
    assert text, f"{folder}/__init__.py says nothing"

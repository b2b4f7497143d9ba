"""The order of the rooms (docs/architecture.md): each imports only what stands before it. Read from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT

PIPELINE = ["storage", "sources", "images", "dataset", "sharding", "staging", "loading"]
JOBS = ["cli", "cluster", "training", "reporting", "diagnostics"]
# From what knows nothing of the others to what joins them all; `pipeline` and `jobs` themselves are their top folders.
ORDER = ["pipeline", *(f"pipeline.{name}" for name in PIPELINE), "model", *(f"jobs.{name}" for name in JOBS), "jobs"]
PRIVATE = re.compile(
    r"_private\b|_internal\b|internal_kv|ray\._|\bray(\.\w+)*\._[a-z]|from ray[.\w]* import .*\b_[A-Za-z]"
)


def name_of(path: Path) -> str:
    """jobs/cli/progress.py -> jobs.cli.progress; a folder's __init__.py is the folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name_of(path): path.read_text("utf-8")
    for package in ("pipeline", "model", "jobs")
    for path in (ROOT / package).rglob("*.py")
}


def imports(source: str) -> Iterator[str]:
    """Every module that a file imports, at its top or within a function, under its full name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            # `from package import module` imports the module; of `from module import name` only the module counts.
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


IMPORTS = {name: set(imports(source)) for name, source in MODULES.items()}


def rank(module: str) -> int:
    """The place in the order of pipeline.loading for pipeline.loading.plan; of a command, that of jobs."""
    folder = ".".join(module.split(".")[:2])
    return ORDER.index(folder if folder in ORDER else module.split(".")[0])


def test_a_module_imports_only_from_rooms_before_its_own_and_never_itself() -> None:
    graph = {name: found & MODULES.keys() for name, found in IMPORTS.items()}
    assert [f"{name} imports {other}" for name in graph for other in graph[name] if rank(other) > rank(name)] == []
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("pipeline", ("ray", "torch.nn", "model", "jobs")), ("model", ("ray", "pipeline", "jobs", "pathlib", "os", "io"))],
)
def test_a_package_knows_nothing_of(package: str, forbidden: tuple[str, ...]) -> None:
    for module in (name for name in IMPORTS if name.split(".")[0] == package):
        # A function on tensors is no part of a network.
        for name in IMPORTS[module] - {"torch.nn.functional"}:
            assert not any(f"{name}.".startswith(f"{word}.") for word in forbidden), f"{module} imports {name}"


def test_private_names_of_ray_are_in_one_file() -> None:
    using = {
        name
        for name, source in MODULES.items()
        if any(PRIVATE.search(line.replace("ray_private", "")) for line in source.splitlines())
    }
    assert using == {"jobs.cluster.ray_private"}

"""The order of the rooms: each imports only what stands before it, as the README says. Read from the source alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = ["storage", "sources", "images", "dataset", "sharding", "staging", "loading"]
JOBS = ["cli", "cluster", "training", "reporting", "diagnostics"]
RAY_EXCEPTIONS = "jobs/cluster/ray_private.py"


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


def room(module: str) -> str:
    """pipeline.loading.plan -> pipeline.loading; of a command, jobs."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 or MODULES[module].name == "__init__.py" else parts[0]


# From what knows nothing of the others to what joins them all.
ORDER = [*(f"pipeline.{name}" for name in PIPELINE), "model", *(f"jobs.{name}" for name in JOBS), "jobs"]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_rooms_before_its_own(module: str) -> None:
    mine = room(module) if module not in ("pipeline", "model", "jobs") else module
    if module == "pipeline":
        assert not list(imports(MODULES[module]))
        return
    if mine.startswith("model"):
        mine = "model"
    for other in imports(MODULES[module]):
        if other not in MODULES:
            continue
        its = "model" if room(other).startswith("model") else room(other)
        assert ORDER.index(its) <= ORDER.index(mine), f"{module} ({mine}) imports {other} ({its})"
        if mine == "model":
            assert its == "model", f"{module} imports {other}: the network knows nothing of images and files"


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
    for path in [*sources("jobs"), *sources("pipeline")]:
        if str(path.relative_to(ROOT)) == RAY_EXCEPTIONS:
            continue
        for name in imports(path):
            assert not name.startswith("ray.") or not any(part.startswith("_") for part in name.split(".")), (
                f"{path} imports {name}: {RAY_EXCEPTIONS} is the place for it"
            )


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES.values()}))
def test_a_folder_says_what_lives_there(folder: Path) -> None:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))
    assert text, f"{folder}/__init__.py says nothing"

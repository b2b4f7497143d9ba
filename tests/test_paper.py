"""docs/paper.md names the tests that prove its claims, and those have the mark `paper`."""

from __future__ import annotations

import ast
import re

from tests import ROOT


def test_every_test_that_the_table_names_exists_and_is_marked() -> None:
    table = (ROOT / "docs" / "paper.md").read_text("utf-8")
    named = set(re.findall(r"`(test_\w+)\.py::(test_\w+)`", table))
    assert len(named) >= 12
    marked = {
        (path.stem, node.name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and "pytest.mark.paper" in map(ast.unparse, node.decorator_list)
    }
    assert named == marked

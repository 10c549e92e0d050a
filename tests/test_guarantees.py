"""docs/guarantees.md: every test that it names exists, and every row names one."""
import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")


def rows():
    """The rows of all tables, without their heads."""
    lines = TEXT.splitlines()
    return [line for line, after in zip(lines, [*lines[1:], ""])
            if line.startswith("|") and not line.startswith("|---") and not after.startswith("|---")]


def test_every_named_test_exists():
    named = set(re.findall(r"`(test_\w+\.py)::(\w+)`", TEXT))
    assert len(named) > 50
    there = {(path.name, node.name) for path in (ROOT / "tests").glob("test_*.py")
             for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)}
    assert not named - there


def test_every_row_names_a_test():
    found = rows()
    assert len(found) > 35
    for row in found:
        assert re.search(r"`test_\w+\.py::test_\w+`", row), row

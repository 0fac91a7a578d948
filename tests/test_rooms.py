"""Who may import whom: the rooms of the house (CONTRIBUTING.md, Architecture)."""

import ast

import pytest
from pack import PROJECT

OURS = {"method", "store", "pictures", "host", "pipeline", "nodes", "demo", "lab", "tools", "benchmarks"}
MAY = {
    "method": {"method"},
    "store": {"store", "method"},
    "pictures": {"pictures"},
    "host": {"host", "method", "store"},
    "pipeline": {"pipeline", "host", "store", "method"},
    "demo": {"demo", "host"},
    "nodes": {"nodes", "demo", "pipeline", "pictures", "host", "store", "method"},
    "tools": {"tools"},
    "lab": OURS - {"nodes", "benchmarks"},
}
NEVER_SHIPPED = {"diffusers", "ray", "xformers", "pytest"}


def imports(path):
    """(level, dotted module) of every import of a file, wherever it stands in it; names imported count as modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, f"{node.module or ''}.{alias.name}".strip(".")) for alias in node.names)


def room(parts):
    """The room of a path in the project, or of a module in dotted parts."""
    return next((part for part in parts if part in OURS), "")


def files(name):
    folder = PROJECT / ("tav_core" if name in ("method", "store", "pictures", "host", "pipeline") else "") / name
    return sorted(folder.rglob("*.py"))


@pytest.mark.parametrize("name", MAY)
def test_a_room_knows_only_rooms_that_it_may(name):
    assert files(name)
    for path in files(name):
        here = path.relative_to(PROJECT).parent.parts
        for level, module in imports(path):
            if level:
                parts = (*here[: len(here) - level + 1], *module.split("."))
                assert room(parts) in {*MAY[name], ""}, f"{path.name}: {module}"


@pytest.mark.parametrize("name", MAY)
def test_what_is_raised_is_said_in_a_sentence(name):
    """The last of a docstring, and no section."""
    for path in files(name):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert "Raises:" not in (ast.get_docstring(node) or ""), f"{path.name}: {node.name}"


@pytest.mark.parametrize("name", sorted(MAY.keys() - {"lab", "tools"}))
def test_what_ships_needs_no_package_of_the_tests(name):
    for path in files(name):
        assert not {module.partition(".")[0] for level, module in imports(path) if not level} & NEVER_SHIPPED

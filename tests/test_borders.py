"""Rooms of the library use each other by public names only, and arrows run down."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "optax_avg"
MODULES = sorted(ROOT.rglob("*.py"))
ROOMS = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
# From the top of the house to the room that serves all others; those in a row do not
# know each other. Other modules and rooms lie between the second row and the last.
ROWS = [{"cli", "frameworks"}, {"posthoc", "merging"}, {"_checkpoints"}]


def imports_of(path):
    """Modules and names that a module imports from the library, as parts."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            parts = name.split(".")
            if parts[0] == "optax_avg" and len(parts) > 1:
                yield parts[1:]


def room_of(path):
    """The room of a module, None if it stands beside them."""
    first = path.relative_to(ROOT).parts[0]
    return first if first in ROOMS else None


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_room_imports_the_private_parts_of_another(path):
    for room, *inner in imports_of(path):
        if room in ROOMS and room != room_of(path):
            private = [name for name in inner if name.startswith("_")]
            assert not private, f"{path} imports {room}.{'.'.join(inner)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_run_downwards(path):
    own = room_of(path)
    used = {room for room, *_ in imports_of(path)} & ROOMS - {own}
    row = next((i for i, rooms in enumerate(ROWS) if own in rooms), None)
    if path.parent == ROOT and path.name.startswith("_") and path.stem != "__init__":
        assert not used, f"{path} lies in the cellar and imports {used}"
    elif row == len(ROWS) - 1:
        assert not used, f"{path} serves all rooms and imports {used}"
    elif row is not None:
        above = set.union(*ROWS[: row + 1])
        assert not used & above, f"{path} imports {used & above}"
    elif path.name != "__init__.py" or path.parent != ROOT:
        above = set.union(*ROWS[:-1])
        assert not used & above, f"{path} imports {used & above}"


def test_rooms_and_modules_have_an_order():
    uses = {}
    for path in MODULES:
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own != "__init__":
            uses.setdefault(own, set()).update(first for first, *_ in imports_of(path))
            uses[own].discard(own)
    # A circle raises CycleError, which names it.
    order = list(graphlib.TopologicalSorter(uses).static_order())
    assert order.index("sharpness") < order.index("rules")
    assert order.index("optimizers") > max(map(order.index, ("robust", "weights")))

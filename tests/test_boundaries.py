"""Boundaries that the import linter cannot express."""

from __future__ import annotations

import ast
from pathlib import Path

SERVICES = Path(__file__).parent.parent / "services/tandem"


def imported_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_only_two_places_open_process_groups() -> None:
    """`transfer` for KV between workers, one file for the ranks inside of a worker."""
    users = {
        path.relative_to(SERVICES).as_posix()
        for path in SERVICES.rglob("*.py")
        if any(name.startswith("torch.distributed") for name in imported_names(path))
    }
    assert users == {"transfer/group.py", "engine/parallel/group.py"}

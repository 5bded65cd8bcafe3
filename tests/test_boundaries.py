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


def test_only_transfer_opens_process_groups() -> None:
    users = {
        path.relative_to(SERVICES).parts[0]
        for path in SERVICES.rglob("*.py")
        if any(name.startswith("torch.distributed") for name in imported_names(path))
    }
    assert users == {"transfer"}

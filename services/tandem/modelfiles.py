"""Where a model's files are and what its JSON files say. Reads no weights and no tokenizer.

Shared by the engine, which runs the model, and the gateway, which only needs its texts.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tandem.core.errors import ModelLoadError

BUNDLED_MODEL = Path(__file__).parent / "bundled_model"
BUNDLED_MODEL_NAME = "tandem-demo"


def resolve_model(path_or_id: str) -> Path:
    """Return the directory of a model: the bundled one for "", a local one, or one from the Hub.

    Raises `ModelLoadError` when there is no such directory and the Hub cannot give it either.
    """
    if not path_or_id:
        return BUNDLED_MODEL
    local = Path(path_or_id).expanduser()
    if local.is_dir():
        return local.resolve()
    if local.is_absolute() or path_or_id.startswith((".", "~")) or path_or_id.count("/") > 1:
        raise ModelLoadError(f"model: no such directory: {path_or_id}")
    return _download(path_or_id)


def served_name(path_or_id: str, configured: str = "") -> str:
    """Return the name that clients use for a model."""
    if configured:
        return configured
    return Path(path_or_id).name if path_or_id else BUNDLED_MODEL_NAME


def read_json(directory: Path, name: str, *, required: bool = True) -> dict[str, Any]:
    """Return one JSON file of a model directory ({} if it is absent and not required).

    Raises `ModelLoadError` naming the file when it is missing or damaged.
    """
    path = directory / name
    if not path.is_file():
        if required:
            raise ModelLoadError(
                f"{directory}: {name} is missing; a Hugging Face model directory has one"
            )
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def model_revision(directory: Path) -> str:
    """Return a digest that changes when a file of a model directory is added, removed or replaced.

    Reads names, sizes and times of change, no contents.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        status = path.stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _download(model_id: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(model_id, allow_patterns=patterns))
    except Exception as error:  # the Hub client raises many kinds; all mean the same here
        raise ModelLoadError(
            f"model: {model_id!r} is no directory, and the Hub could not give it: {error}"
        ) from error

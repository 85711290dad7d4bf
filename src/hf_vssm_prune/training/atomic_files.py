"""Files that are written completely or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(text: str, file: Path) -> None:
    """Writes a file atomically. If it cannot be written, nothing is left behind."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content: Any, file: Path) -> None:
    """Writes a JSON file atomically."""
    write_text(json.dumps(content, indent=2) + "\n", file)

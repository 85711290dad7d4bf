"""Files that are written completely or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(text: str, file: Path) -> None:
    """Writes a file atomically."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def write_json(content: Any, file: Path) -> None:
    """Writes a JSON file atomically."""
    write_text(json.dumps(content, indent=2) + "\n", file)

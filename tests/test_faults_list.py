"""The tests named in `docs/faults.md` exist."""

import ast
import re
from functools import cache
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("| ").split(" | ")]
    for line in (ROOT / "docs" / "faults.md").read_text().splitlines()
    if line.startswith("| ") and "`tests/" in line
]


def test_there_are_many_and_each_says_what_happened() -> None:
    assert len(ROWS) >= 100
    assert len({fault for fault, _, _ in ROWS}) == len(ROWS), "a fault stands there twice"
    assert all(len(happened) > 10 for _, happened, _ in ROWS)


@cache
def functions_in(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_is_named_exists() -> None:
    missing = []
    for _, _, cell in ROWS:
        file, name, case = re.fullmatch(r"`(tests/\w+\.py)::(test_\w+)(?:\[(.+)\])?`", cell).groups()
        if name not in functions_in(ROOT / file) or (case and f'"{case}"' not in (ROOT / file).read_text()):
            missing.append(cell)
    assert missing == []

"""What a part of the check found."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """Sentences, tables, and what is not as it should be."""

    lines: list[str] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(f"- {line}")

    def complain(self, line: str) -> None:
        print(f"WRONG: {line}", flush=True)
        self.wrong.append(line)

    def table(self, title: str, columns: Sequence[str]) -> list[list[Any]]:
        """Starts a table and gives its rows, to be appended to."""
        rows: list[list[Any]] = []
        self.tables.append({"title": title, "columns": list(columns), "rows": rows})
        return rows

    def as_dict(self) -> dict[str, Any]:
        return {"lines": self.lines, "tables": self.tables, "wrong": self.wrong}

"""The results of a part of the check."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_vssm_prune.training.atomic_files import write_json


@dataclass
class Report:
    """Sentences, tables and mistakes. All are written to `file` immediately, because a part may be killed."""

    file: Path
    lines: list[str] = field(default_factory=list)
    tables: list["Table"] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(f"- {line}")
        self.save()

    def complain(self, line: str) -> None:
        print(f"WRONG: {line}", flush=True)
        self.wrong.append(line)
        self.save()

    def table(self, title: str, *columns: str) -> "Table":
        """Starts a table."""
        table = Table(self, title, columns)
        self.tables.append(table)
        return table

    def save(self) -> None:
        tables = [{"title": each.title, "columns": each.columns, "rows": each.rows} for each in self.tables]
        write_json({"lines": self.lines, "tables": tables, "wrong": self.wrong}, self.file)


@dataclass
class Table:
    report: Report
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]] = field(default_factory=list)

    def add(self, *row: Any) -> None:
        print(*row, sep=" | ", flush=True)
        self.rows.append(row)
        self.report.save()

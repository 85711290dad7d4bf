"""Tables of paths and labels in CSV format, the usual format for lists of videos.

Each line has a path and a label, separated by a comma, semicolon, tab or space. There may be a header line; then, other
columns are ignored. Paths are relative to the table's folder, and may have backslashes, as on Windows. Labels are
names or numbers.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import ClassLabel, DatasetDict, Features

from hf_vssm_prune.training.data.media import Medium
from hf_vssm_prune.training.data.stored_files import stored_file, stored_splits
from hf_vssm_prune.training.paths import local_path


TABLE_SUFFIXES = (".csv", ".tsv")
SEPARATORS = "\t,; "
PATH_HEADINGS = ("path", "file", "file_name", "filename", "image", "video", "video_path")
LABEL_HEADINGS = ("label", "labels", "class", "category")


def read_tables(
    files_of_split: Mapping[str, Sequence[str | Path]],
    medium: Medium,
    path_column: str | None = None,
    label_column: str | None = None,
) -> DatasetDict:
    """The splits of a data set that is listed in tables, with one column for the files and one for the labels.

    Args:
        files_of_split: the tables of each split.
        medium: what is listed.
        path_column, label_column: headings of the two columns, which become their names. None: usual headings, or the
            first and the second column if there is no header; the columns are called "image" and "label".

    Raises:
        ValueError: a table cannot be read or does not have these columns, or a line does not consist of a path and a
            label.
    """
    rows = {
        split: [row for file in files for row in _read(Path(file), path_column, label_column)]
        for split, files in files_of_split.items()
    }
    names = {label for of_split in rows.values() for _, label in of_split}
    are_numbers = all(name.isdecimal() for name in names)
    image, label = path_column or "image", label_column or "label"
    kind = ClassLabel(names=sorted(names, key=int) if are_numbers else sorted(names))
    features = Features({image: medium.feature(decode=False), label: kind})
    columns = {
        split: {
            image: [stored_file(path) for path, _ in of_split],
            label: [kind.str2int(name) for _, name in of_split],
        }
        for split, of_split in rows.items()
    }
    return stored_splits(columns, features)


def _read(file: Path, path_column: str | None, label_column: str | None) -> list[tuple[str, str]]:
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"'{file}' cannot be read: {error}") from error
    if not lines:
        raise ValueError(f"'{file}' is empty: each line must have a path and a label.")
    try:
        cells = _split(lines)
    except csv.Error as error:
        raise ValueError(f"'{file}' cannot be read: {error}") from error
    path, label, first = _find_columns(file, cells[0], path_column, label_column)
    rows = []
    for number, row in enumerate(cells[first:], first + 1):
        if len(row) <= max(path, label) or not (row[path] and row[label]) or (not first and len(row) != 2):
            raise ValueError(
                f"Line {number} of '{file}' is {row}: it must have a path and a label.{NAMED if number == 1 else ''}"
            )
        rows.append((str(_place(file.parent, row[path])), row[label]))
    if not first and len(rows) > 1 and not Path(rows[0][0]).exists() and Path(rows[1][0]).exists():
        raise ValueError(f"Line 1 of '{file}' is {cells[0]}, and there is no file '{rows[0][0]}'.{NAMED}")
    return rows


def _place(folder: Path, path: str) -> Path:
    place = folder / local_path(path)
    return folder / path.replace("\\", "/") if "\\" in path and not place.exists() else place


def _split(lines: Sequence[str]) -> list[list[str]]:
    """The cells of each line. A label may contain commas, so the separator is the first that gives all lines the same
    number of cells; if there is none, the first that is in the first line."""
    found = [separator for separator in SEPARATORS if separator in lines[0]] or [","]
    for separator in (*found, found[0]):
        cells = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator)]
        if len({len(row) for row in cells}) == 1:
            break
    return cells


NAMED = " If it is a header, name the columns with --image_column_name and --label_column_name."


def _find_columns(
    file: Path, headings: Sequence[str], path_column: str | None, label_column: str | None
) -> tuple[int, int, int]:
    """The columns of paths and labels, and the number of header lines."""
    for name in (path_column, label_column):
        if name is not None and name not in headings:
            raise ValueError(f"There is no column '{name}' in '{file}'; its first line is {list(headings)}.")
    lower = [heading.lower() for heading in headings]
    paths, labels = (
        [i for i, heading in enumerate(lower) if heading in usual] if name is None else [headings.index(name)]
        for name, usual in ((path_column, PATH_HEADINGS), (label_column, LABEL_HEADINGS))
    )
    if (path_column or label_column) and not (paths and labels):
        raise ValueError(
            f"The first line of '{file}' is {list(headings)}: name its columns of paths and of labels with "
            "--image_column_name and --label_column_name."
        )
    return (paths[0], labels[0], 1) if paths and labels else (0, 1, 0)

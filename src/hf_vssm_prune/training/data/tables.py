"""Tables of paths and labels in CSV format, the usual format for lists of videos.

Each line has a path and a label, separated by a comma, semicolon, tab or space. There may be a header line. Paths are
relative to the table's folder. Labels are names or numbers.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, NamedSplit

from hf_vssm_prune.training.data.media import Medium
from hf_vssm_prune.training.data.paths import local_path


TABLE_SUFFIXES = (".csv", ".tsv")
SEPARATORS = ",;\t "
PATH_HEADINGS = ("path", "file", "file_name", "filename", "image", "video", "video_path")
LABEL_HEADINGS = ("label", "labels", "class", "category")


def read_tables(files_of_split: Mapping[str, Sequence[str | Path]], medium: Medium) -> DatasetDict:
    """The splits of a data set that is listed in tables, with the columns "image" and "label".

    Raises:
        ValueError: a table cannot be read, or a line does not consist of a path and a label.
    """
    rows = {split: [row for file in files for row in _read(Path(file))] for split, files in files_of_split.items()}
    names = {label for of_split in rows.values() for _, label in of_split}
    are_numbers = all(name.isdecimal() for name in names)
    features = Features(
        {
            "image": medium.feature(decode=False),
            "label": ClassLabel(names=sorted(names, key=int) if are_numbers else sorted(names)),
        }
    )
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {
                    "image": [{"bytes": None, "path": path} for path, _ in of_split],
                    "label": [features["label"].str2int(label) for _, label in of_split],
                },
                features=features,
                split=NamedSplit(split),
            )
            for split, of_split in rows.items()
        }
    )


def _read(file: Path) -> list[tuple[str, str]]:
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"'{file}' cannot be read: {error}") from error
    if not lines:
        raise ValueError(f"'{file}' is empty: each line must have a path and a label.")
    separator = next((each for each in SEPARATORS if each in lines[0]), ",")
    try:
        cells = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator)]
    except csv.Error as error:
        raise ValueError(f"'{file}' cannot be read: {error}") from error
    path, label, first = _find_columns(cells[0])
    rows = []
    for number, row in enumerate(cells[first:], first + 1):
        if len(row) <= max(path, label) or not (row[path] and row[label]) or (not first and len(row) != 2):
            raise ValueError(f"Line {number} of '{file}' is {row}: it must have a path and a label.")
        rows.append((str(file.parent / local_path(row[path])), row[label]))
    return rows


def _find_columns(headings: Sequence[str]) -> tuple[int, int, int]:
    """The columns of paths and labels, and the number of header lines."""
    lower = [heading.lower() for heading in headings]
    paths = [i for i, heading in enumerate(lower) if heading in PATH_HEADINGS]
    labels = [i for i, heading in enumerate(lower) if heading in LABEL_HEADINGS]
    return (paths[0], labels[0], 1) if paths and labels else (0, 1, 0)

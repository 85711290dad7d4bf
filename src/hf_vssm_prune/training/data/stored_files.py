"""Data sets of files, of which only the paths are stored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, NamedSplit


def stored_file(path: str | Path) -> dict[str, Any]:
    """A file as `datasets` stores it if it is not decoded: by its path.

    Raises:
        ValueError: its name is not UTF-8, as in some archives from Windows, and cannot be stored.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The name of the file {str(path)!a} is not valid UTF-8: rename it.") from error
    return {"bytes": None, "path": str(path)}


def stored_splits(columns: Mapping[str, dict[str, Any]], features: Features) -> DatasetDict:
    """The splits of a data set, each with its columns."""
    return DatasetDict(
        {
            split: Dataset.from_dict(of_split, features=features, split=NamedSplit(split))
            for split, of_split in columns.items()
        }
    )

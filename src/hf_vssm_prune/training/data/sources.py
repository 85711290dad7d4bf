"""Loads images and videos from folders, tables of paths, Parquet files, saved data sets and the Hub."""

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    IterableDatasetDict,
    NamedSplit,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from pyarrow.parquet import ParquetFile

from hf_vssm_prune.training.data.media import IMAGES, Medium
from hf_vssm_prune.training.data.stored_files import stored_file, stored_splits
from hf_vssm_prune.training.data.tables import TABLE_SUFFIXES, read_tables
from hf_vssm_prune.training.paths import local_path


logger = logging.getLogger(__name__)

PACKAGED_DATA = Path(__file__).resolve().parents[2] / "data"
PACKAGED_NAMES = ("trashnet",)
# From the name of a folder or file to its split.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
}
# Files that datasets' `save_to_disk` writes next to the images: for a data set, and for several splits.
SAVED_DATASET = ("dataset_info.json", "state.json")
SAVED_SPLITS = "dataset_dict.json"


# Headings of the columns of paths and labels in tables; None: the usual ones.
Headings: TypeAlias = tuple[str | None, str | None]


def load_splits(
    name_or_path: str | Path,
    config_name: str | None,
    streaming: bool = False,
    medium: Medium = IMAGES,
    headings: Headings = (None, None),
) -> DatasetDict | IterableDatasetDict:
    """The splits of a data set of images (or of another medium), with whatever columns it has.

    Raises:
        FileNotFoundError: `name_or_path` looks like a path, but does not exist.
        ValueError: the data set does not exist, cannot be read, or cannot be streamed.
    """
    path = local_path(name_or_path)
    if path.exists() or str(name_or_path) in PACKAGED_NAMES:
        refuse_configuration(name_or_path, config_name)
    if path.is_file():
        if path.suffix.lower() in TABLE_SUFFIXES:
            return _load_tables([path], streaming, medium, headings)
        if path.suffix != ".parquet":
            raise ValueError(
                f"'{path}' is a file of type '{path.suffix}': a data set must be a folder, a .parquet file or a .csv "
                "table of paths and labels."
            )
        return _load_parquet([path], streaming)
    if path.is_dir():
        return _load_folder(path, streaming, medium, headings)
    name = str(name_or_path)
    if name in PACKAGED_NAMES:
        return _load_parquet(sorted((PACKAGED_DATA / name).glob("*.parquet")), streaming)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix == ".parquet":
        raise FileNotFoundError(f"There is no file or folder '{name}'.")
    try:
        return load_dataset(name, config_name, streaming=streaming)
    # The Hub and the network raise OSErrors. An unknown configuration or a malformed name is a ValueError; a
    # data set that needs a loading script of its own, a RuntimeError.
    except (DatasetGenerationError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"'{name}' is not a local folder or Parquet file, and cannot be loaded from the Hub as a data set: {error}"
        ) from error


def refuse_configuration(name_or_path: str | Path, config_name: str | None) -> None:
    """Raises an error if a data set that is not on the Hub is given the name of a configuration."""
    if config_name is not None:
        raise ValueError(
            f"--dataset_config_name is {config_name!r}, but only data sets on the Hub have configurations, and "
            f"'{name_or_path}' is a local one."
        )


def refuse_streaming(streaming: bool, place: Path, medium: Medium = IMAGES) -> None:
    """Raises an error if files are to be streamed."""
    if streaming:
        raise ValueError(f"The {medium.name}s in '{place}' are read only when needed in any case: omit --streaming.")


def _load_folder(
    folder: Path, streaming: bool, medium: Medium, headings: Headings
) -> DatasetDict | IterableDatasetDict:
    saved = find_saved(folder)
    files, _ = find_files(folder)
    parquet_files = sorted(file for file in files if file.suffix == ".parquet")
    if parquet_files and not saved:
        if others := [file for file in files if file.suffix.lower() in medium.suffixes()]:
            logger.warning(
                "%d %ss in '%s' are left out, because there are Parquet files; the first is '%s'.",
                *(len(others), medium.name, folder, min(others)),
            )
        return _load_parquet(parquet_files, streaming)
    tables = sorted(file for file in files if file.suffix.lower() in TABLE_SUFFIXES and file.parent == folder)
    if tables and not saved:
        splits = _load_tables(tables, streaming, medium, headings)
        _warn_of_unlisted(folder, files, tables, splits, medium)
        return splits
    refuse_streaming(streaming, folder, medium)
    return _load_saved(saved) if saved else _load_class_folders(folder, medium)


# Data sets written by `save_to_disk`


def find_saved(folder: Path) -> dict[str, Path]:
    """The folders of saved data sets by split. A folder that is itself a data set, or a saved group of splits, is
    returned under an empty name."""
    if (folder / SAVED_SPLITS).is_file() or _is_saved(folder):
        return {"": folder}
    return _by_split(child for child in _subfolders(folder) if _is_saved(child))


def _by_split(folders: Iterable[Path]) -> dict[str, Path]:
    """Those of the folders that have the name of a split, by split. Links to another one of them are left out.

    Raises:
        ValueError: two of them belong to the same split.
    """
    found: dict[str, Path] = {}
    for folder in sorted(folders, key=Path.is_symlink):
        if (split := SPLIT_NAMES.get(folder.name.lower())) is None:
            continue
        if split in found:
            if folder.samefile(found[split]):
                continue
            raise ValueError(
                f"'{found[split]}' and '{folder}' both belong to split '{split}': put their contents in one of them, "
                "or remove the other one."
            )
        found[split] = folder
    return found


def _is_saved(folder: Path) -> bool:
    return all((folder / name).is_file() for name in SAVED_DATASET)


def _load_saved(saved: dict[str, Path]) -> DatasetDict:
    splits = DatasetDict()
    for name, path in saved.items():
        try:
            loaded = load_from_disk(str(path))
        # Raised by damaged JSON and Arrow files.
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"'{path}' was written by datasets' save_to_disk, and cannot be read: {error}") from error
        if not isinstance(loaded, DatasetDict):
            # Parts of a split have names such as "train[:50%]".
            loaded = {name or SPLIT_NAMES.get(str(loaded.split), "train"): loaded}
        for split, rows in loaded.items():
            # Without a saved format, which would turn values into tensors or leave out columns.
            splits[split] = Dataset(rows.data, rows.info, NamedSplit(split))
    return splits


# Parquet


def _load_parquet(files: Sequence[Path], streaming: bool) -> DatasetDict | IterableDatasetDict:
    """Loads Parquet files, each into the split with which its name or its folder's name begins, or into "train"."""
    _warn_of_unnamed(files)
    files_of_split = _files_of_splits(files)
    patterns = {split: [glob.escape(name) for name in names] for split, names in files_of_split.items()}
    try:
        return load_dataset("parquet", data_files=patterns, streaming=streaming)
    except (DatasetGenerationError, OSError, ValueError) as error:
        listed = ", ".join(f"'{file}'" for file in files)
        raise ValueError(f"Parquet cannot be read from {listed}: {error.__cause__ or error}") from error


def count_parquet_rows(name_or_path: str | Path, split: str) -> int | None:
    """The number of rows in a split's local Parquet files; None if there are none."""
    path = local_path(name_or_path)
    if not path.exists() and str(name_or_path) in PACKAGED_NAMES:
        path = PACKAGED_DATA / str(name_or_path)
    files = [path] if path.is_file() else sorted(find_files(path)[0]) if path.is_dir() else []
    found = _files_of_splits([file for file in files if file.suffix == ".parquet"]).get(split)
    return sum(ParquetFile(file).metadata.num_rows for file in found) if found else None


def _files_of_splits(files: Sequence[Path]) -> dict[str, list[str]]:
    files_of_split: dict[str, list[str]] = {}
    for file in files:
        files_of_split.setdefault(_split_of(file) or "train", []).append(str(file))
    return files_of_split


def _split_of(file: Path) -> str | None:
    """The split with which the name of a file or of its folder begins."""
    words = [re.split(r"[^a-z]", name.lower())[0] for name in (file.stem, file.parent.name)]
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)


def _warn_of_unnamed(files: Sequence[Path]) -> None:
    """Logs files that become training data although their names do not say so, unless all training data is in one file
    or in numbered parts of it."""
    splits = {file: _split_of(file) for file in files}
    unnamed = [file for file in files if splits[file] is None]
    names = {re.sub(r"\d+", "", file.stem) for file in unnamed}
    if len(names) + ("train" in splits.values()) > 1 and unnamed:
        logger.warning(
            "%s: these names begin with no split ('train', 'validation', 'test'), so the files are training data.",
            ", ".join(f"'{file}'" for file in unnamed),
        )


# Tables of paths and labels


def _load_tables(files: Sequence[Path], streaming: bool, medium: Medium, headings: Headings) -> DatasetDict:
    refuse_streaming(streaming, files[0], medium)
    _warn_of_unnamed(files)
    return read_tables(_files_of_splits(files), medium, *headings)


def _warn_of_unlisted(
    folder: Path, files: Sequence[Path], tables: Sequence[Path], splits: DatasetDict, medium: Medium
) -> None:
    """Logs which images of a folder are left out because its tables do not list them."""
    listed = {stored["path"] for rows in splits.values() for stored in rows[rows.column_names[0]]}
    suffixes = medium.suffixes()
    others = [file for file in files if file.suffix.lower() in suffixes and str(file) not in listed]
    if others:  # or listed by other names, such as absolute paths
        real = {os.path.realpath(path) for path in listed}
        others = [file for file in others if os.path.realpath(file) not in real]
    if others:
        logger.warning(
            "%d %ss in '%s' are left out, because they are not listed in %s; the first is '%s'. Without tables in the "
            "folder, its class folders are read.",
            *(len(others), medium.name, folder, " or ".join(f"'{table.name}'" for table in tables), min(others)),
        )


# Folders by class


def _load_class_folders(folder: Path, medium: Medium) -> DatasetDict:
    """Lists the contents of a folder. `datasets`' own "imagefolder" is not used because it also takes splits from file
    names: it would put cat/test_1.jpg into another split than cat/1.jpg."""
    split_folders = _by_split(child for child in _subfolders(folder) if _subfolders(child)) or {"train": folder}
    label_names = sorted({child.name for split in split_folders.values() for child in _subfolders(split)})
    if not label_names:
        raise ValueError(
            f"The folder '{folder}' contains neither Parquet files nor class folders (such as "
            f"'{folder}/cat/1{medium.example}'), and was not written by datasets' save_to_disk."
        )
    if "train" in split_folders:
        trained = {child.name for child in _subfolders(split_folders["train"])}
        if untrained := [name for name in label_names if name not in trained]:
            raise ValueError(
                f"'{folder}' has class folders {untrained} without training {medium.name}s: only the classes in "
                f"'{split_folders['train']}' can be evaluated."
            )
    found = {split: _find_labelled(child, label_names, medium) for split, child in split_folders.items()}
    _warn_of_others(folder, {path for paths, _ in found.values() for path in paths}, medium)
    features = Features({"image": medium.feature(decode=False), "label": ClassLabel(names=label_names)})
    columns = {
        split: {"image": [stored_file(path) for path in paths], "label": labels}
        for split, (paths, labels) in found.items()
    }
    return stored_splits(columns, features)


def _find_labelled(folder: Path, label_names: list[str], medium: Medium) -> tuple[list[str], list[int]]:
    """The paths of the files in the class folders, and their labels."""
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(label_names):
        class_folder = folder / name
        if not class_folder.is_dir():
            continue
        files, links = find_files(class_folder)
        found = sorted(str(file) for file in files if file.suffix.lower() in medium.suffixes())
        if not found:
            raise ValueError(f"The class folder '{class_folder}' contains no {medium.name}s.")
        if links:
            logger.warning(
                "%d links in '%s' are not followed, because they lead to a parent folder or to a folder that has "
                "already been read; the first is '%s'.",
                *(len(links), class_folder, links[0]),
            )
        paths += found
        labels += [label] * len(found)
    return paths, labels


def _warn_of_others(folder: Path, found: Collection[str], medium: Medium) -> None:
    """Logs which files of a folder are ignored, because their type is unknown or they are in another place."""
    files, _ = find_files(folder)
    if others := sorted(file for file in files if str(file) not in found):
        kinds = Counter(file.suffix.lower() or "without a suffix" for file in others)
        logger.warning(
            "%d files in '%s' are not among its %ss: %s; the first is '%s'. %ss must be in a format that %s can "
            "read, and in class folders (inside the split folders, if there are any).",
            *(len(others), folder, medium.name, ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())),
            *(others[0], medium.name.capitalize(), medium.reader),
        )


def find_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files in a folder and all its subfolders, and the links to folders that are not followed, because they lead
    to a parent folder or to a folder that is already included. Hidden folders, in which macOS, notebooks and trash cans
    leave images, are skipped.

    Broken links are included as files.
    """
    around = [Path(os.path.realpath(folder)), folder.absolute()]
    read = {Path(os.path.realpath(path)) for each in around for path in (each, *each.parents)}
    files: list[Path] = []
    not_followed: list[Path] = []
    for parent, subfolders, names in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        files += [Path(parent, name) for name in names if not name.startswith(".")]
        visible = sorted(Path(parent, name) for name in subfolders if not name.startswith("."))
        subfolders.clear()
        for child in sorted(visible, key=Path.is_symlink):
            target = Path(os.path.realpath(child))
            if target not in read:
                read.add(target)
                subfolders.append(child.name)
            elif child.is_symlink():
                not_followed.append(child)
    return files, not_followed


def _refuse_folder(error: OSError) -> None:
    raise ValueError(f"The folder '{error.filename}' cannot be read: {error.strerror}.") from error


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    except PermissionError as error:
        raise ValueError(f"The folder '{folder}' cannot be read: {error.strerror}.") from error

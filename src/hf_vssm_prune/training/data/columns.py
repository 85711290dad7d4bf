"""Converts any data set to one with the columns "image", "label" and "row"."""

import copy
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, IterableDataset, NamedSplit, Value, concatenate_datasets
from datasets.exceptions import DatasetGenerationError

from hf_vssm_prune.training.data.label_columns import read_labels, translate_labels
from hf_vssm_prune.training.data.media import Medium


@dataclass(frozen=True)
class ImageDatasets:
    """The two data sets of a training run. For classification, each has the columns "image" ({"bytes", "path"}, not
    decoded; videos in the case of a video data set), "label" (an index into `label_names`) and "row" (the row in the
    original split; not in a stream). The rows of other tasks are described in `detection` and `segmentation`."""

    train: "Dataset | ImageStream"
    evaluation: Dataset
    label_names: list[str]


@dataclass(frozen=True)
class ImageStream:
    """Training images that are read sequentially.

    Attributes:
        rows: rows with the columns "image" and "label" of `ImageDatasets`, in stored order.
        num_images: number of images.
        buffer_size: size of the buffer from which the next image is drawn.
        split: name of the split.
    """

    rows: IterableDataset
    num_images: int
    buffer_size: int
    split: str

    def __len__(self) -> int:
        return self.num_images

    def shuffled(self, seed: int, epoch: int) -> IterableDataset:
        """The rows in the order of an epoch: the files are shuffled, and so are their rows, with a buffer."""
        rows = self.rows.shuffle(seed=seed, buffer_size=self.buffer_size)
        rows.set_epoch(epoch)
        return rows


def standardize(
    dataset: Dataset,
    image_column: str | None,
    label_column: str | None,
    label_names: list[str] | None = None,
    *,
    medium: Medium,
) -> tuple[Dataset, list[str]]:
    """Returns the data set with the columns "image", "label" and "row", and the names of the labels. If `label_names`
    is given, these are the names, and the data set's own must be among them.

    Raises:
        ValueError: a column is missing or has another type; a row has no image or no label.
    """
    image_column, label_column = _find_columns(dataset, image_column, label_column, medium)
    dataset = take_columns(dataset, {image_column: "image", label_column: "label"})
    try:
        dataset = dataset.cast_column("image", medium.feature(decode=False))
    except (NotImplementedError, TypeError, ValueError) as error:
        kind = dataset.features["image"]
        raise ValueError(f"Column '{image_column}' contains no {medium.name}s; its type is {kind}.") from error
    _check_stored(dataset, image_column, medium)
    labels, own_names = read_labels(dataset, label_column, say_numbers=label_names is None)
    label_names = label_names or own_names
    if own_names != label_names:
        labels = translate_labels(labels, own_names, label_names)
    # Concatenated rather than cast: a cast would copy all images.
    columns = Dataset.from_dict(
        {"label": labels, "row": np.arange(len(labels))},
        features=Features({"label": ClassLabel(names=label_names), "row": Value("int64")}),
        split=dataset.split,
    )
    return concatenate_datasets([dataset.select_columns("image"), columns], split=dataset.split, axis=1), label_names


def standardize_stream(
    rows: IterableDataset, image_column: str | None, label_column: str | None, medium: Medium
) -> tuple[IterableDataset, list[str]]:
    """A stream with the columns "image" (not decoded) and "label", and the labels' names.

    Raises:
        ValueError: a column is missing, or the labels have no names.
    """
    image_column, label_column = _find_columns(rows, image_column, label_column, medium)
    kind = rows.features[label_column]
    if not isinstance(kind, ClassLabel):
        raise ValueError(
            f"Column '{label_column}' has the type {kind}: in a stream, labels need names (datasets.ClassLabel), "
            "because they cannot all be read beforehand. Omit --streaming."
        )
    rows = take_columns(rows, {image_column: "image", label_column: "label"})
    # Bytes and paths are not given a type: `datasets` would reject rows that have neither, without naming the row.
    if not isinstance(rows.features["image"], dict):
        rows = rows.cast_column("image", medium.feature(decode=False))
    return rows, list(kind.names)


def take_columns(rows: Any, names: Mapping[str, str]) -> Any:
    """Only these columns of stored or streamed rows, each under a new name. Images and videos remain as they were
    stored: a stream decodes the columns that it renames or stores, and a JPEG file that is encoded again has other
    pixels."""
    rows = rows.select_columns([*names])
    for column in names:
        kind = rows.features[column]
        if getattr(kind, "decode", False):
            rows = rows.cast_column(column, type(kind)(decode=False))
    renamed = {old: new for old, new in names.items() if old != new}
    return rows.rename_columns(renamed) if renamed else rows


def read_rows(rows: IterableDataset, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a stream.

    Raises:
        ValueError: `datasets` cannot read a row; the message says how many rows were read before.
    """
    count = 0
    try:
        for row in rows:
            yield row
            count += 1
    except ValueError as error:
        raise ValueError(f"After {count} rows of split '{split}', a row cannot be read: {error}") from error


def store_stream(rows: IterableDataset, split: str, name_or_path: str | Path) -> Dataset:
    """Reads a stream into the cache of `datasets`, where later runs and other processes find it.

    Args:
        rows: the stream, with known features; its images are not decoded, see `take_columns`.
        split: name of the split.
        name_or_path: name of the data set in error messages.

    Raises:
        ValueError: a row cannot be read; see `read_rows`.
    """
    cached = copy.copy(rows)
    # The cache is searched by a hash of all attributes. In newer versions of `datasets`, this one, which only keeps
    # connections to the Hub open, is different in each process.
    vars(cached).pop("_IterableDataset__hffs_cache", None)
    try:
        return Dataset.from_generator(
            read_rows, features=rows.features, gen_kwargs={"rows": cached, "split": split}, split=NamedSplit(split)
        )
    except DatasetGenerationError as error:
        raise ValueError(f"'{name_or_path}' cannot be read: {error.__cause__}") from error


def _find_columns(
    rows: Dataset | IterableDataset, image_column: str | None, label_column: str | None, medium: Medium
) -> tuple[str, str]:
    image_column = _find_column(rows, image_column, medium.feature, "image")
    label_column = _find_column(rows, label_column, ClassLabel, "label")
    if image_column == label_column:
        raise ValueError(f"image_column and label_column are both '{image_column}'.")
    return image_column, label_column


def _find_column(dataset: Dataset | IterableDataset, name: str | None, kind: type, meaning: str) -> str:
    if name is not None:
        if name not in dataset.column_names:
            raise ValueError(
                f"There is no column '{name}' in split '{dataset.split}'; the columns are "
                f"{', '.join(dataset.column_names)}."
            )
        return name
    found = [column for column, feature in dataset.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        raise ValueError(
            f"{len(found) or 'No'} columns have the type {kind.__name__} ({dataset.features}): "
            f"name the one to use with {meaning}_column."
        )
    return found[0]


def _check_stored(dataset: Dataset, column: str, medium: Medium) -> None:
    """Rejects rows that have nothing to decode. Whether the others can be decoded is found out when they are."""
    stored = dataset.data.column("image")
    lengths = pc.fill_null(pc.binary_length(pc.struct_field(stored, "bytes")), -1).to_numpy()
    paths = pc.struct_field(stored, "path")
    wrong = {int(row): "it is empty (0 bytes)" for row in np.flatnonzero(lengths == 0)}
    without_bytes = np.flatnonzero(lengths < 0)
    for row, path in zip(without_bytes, paths.take(pa.array(without_bytes)).to_pylist(), strict=True):
        if problem := _problem_of_file(path):
            wrong[int(row)] = problem
    if wrong:
        first = min(wrong)
        raise ValueError(
            f"{len(wrong)} of {len(dataset)} rows of split '{dataset.split}' have no {medium.name} in column "
            f"'{column}'; the first is row {first}: {wrong[first]}. Remove them from the data set, or complete them."
        )


def _problem_of_file(path: str | None) -> str | None:
    if not path:
        return "it has neither bytes nor a path"
    if "://" in path:  # files that `datasets` opens itself
        return None
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        return f"its file '{path}' cannot be opened ({getattr(error, 'strerror', None) or error})"
    if not stat.S_ISREG(status.st_mode):
        return f"'{path}' is not a file"
    return None if status.st_size else f"its file '{path}' is empty"

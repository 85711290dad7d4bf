"""Loads labelled images, or videos, for training and for evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from hf_vssm_prune.training.data.columns import (
    ImageDatasets,
    ImageStream,
    standardize,
    standardize_stream,
    store_stream,
)
from hf_vssm_prune.training.data.media import IMAGES, Medium
from hf_vssm_prune.training.data.sources import count_parquet_rows, load_splits


# Data sets on the Hub use any of these names. Validation comes first because test labels are often withheld.
EVALUATION_SPLITS = ("validation", "valid", "val", "dev", "test")


def load_image_dataset(
    name_or_path: str | Path,
    *,
    config_name: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_share: float = 0.1,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    medium: Medium = IMAGES,
) -> ImageDatasets:
    """Loads a labelled image data set for training.

    Args:
        name_or_path: A folder with one subfolder of images for each class, or with such folders for each split
            ("train", "validation" or "val", "test"); a Parquet file or a folder of them (train.parquet,
            test-00000-of-00001.parquet, …); a table of paths and labels or a folder of them (train.csv, test.csv); a
            folder written by datasets' `save_to_disk`; the name of a data set on the Hub; or "trashnet", the
            photographs that come with this package, unless there is a folder of that name.
        config_name: Configuration of a data set on the Hub.
        train_split: Split to train on.
        eval_split: Split to evaluate on; None: validation if it exists, otherwise test, otherwise a part of the
            training split.
        image_column: Column of the images, or of their paths in a table; None: the only one of type `datasets.Image`.
        label_column: Column of the labels; None: the only one of type `datasets.ClassLabel`. A named column may also
            contain integers or strings.
        validation_share: Fraction of the training split to evaluate on if there is no other split: drawn at random, the
            same fraction of each class.
        max_train_samples: Number of training images to draw at random; None: all.
        max_eval_samples: Number of evaluation images to draw at random; None: all.
        seed: Random seed.
        medium: Medium of the data set, by default images.

    Raises:
        FileNotFoundError: `name_or_path` looks like a path, but does not exist.
        ValueError: The data set cannot be found or read, or does not contain labelled images; a split or a column is
            missing; labels are missing, out of range or all the same; there are fewer images than requested.
    """
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share is {validation_share}: it must be greater than 0 and less than 1.")
    splits = load_splits(name_or_path, config_name, medium=medium, headings=(image_column, label_column))
    rows = choose_split(splits, train_split, name_or_path)
    train, label_names = standardize(rows, image_column, label_column, medium=medium)
    if len(np.unique(_labels_of(train))) < 2:
        raise ValueError(
            f"All {len(train)} {medium.name}s of split '{train_split}' of '{name_or_path}' have the same label."
        )
    eval_split = eval_split or find_evaluation_split(splits, excluded=train_split)
    if eval_split is None:
        train, evaluation = _split_by_label(train, validation_share, seed, medium)
    else:
        rows = choose_split(splits, eval_split, name_or_path)
        evaluation, _ = standardize(rows, image_column, label_column, label_names, medium=medium)
    return ImageDatasets(
        train=draw_samples(train, max_train_samples, "max_train_samples", seed, medium),
        evaluation=draw_samples(evaluation, max_eval_samples, "max_eval_samples", seed, medium),
        label_names=label_names,
    )


def load_image_stream(
    name_or_path: str | Path,
    *,
    config_name: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    shuffle_buffer_size: int = 10_000,
    seed: int = 0,
    medium: Medium = IMAGES,
) -> ImageDatasets:
    """Like `load_image_dataset`, but the training images are read from where they are stored only when they are needed.

    The evaluation split is read once into datasets' cache. `max_train_samples` takes the first images.

    Raises:
        ValueError: as for `load_image_dataset`; or the labels have no names, the number of images is unknown, there is
            no evaluation split, or the images are files in a folder.
    """
    splits = load_splits(name_or_path, config_name, streaming=True, medium=medium)
    rows = choose_split(splits, train_split, name_or_path)
    num_images = count_streamed(rows, name_or_path, train_split, max_train_samples, medium)
    if max_train_samples is not None:
        rows = rows.take(max_train_samples)
    rows, label_names = standardize_stream(rows, image_column, label_column, medium)
    eval_split = eval_split or find_evaluation_split(splits, excluded=train_split)
    if eval_split is None:
        raise ValueError(
            f"'{name_or_path}' has no split to evaluate on (it has {', '.join(splits)}), and none can be held out "
            "from a stream: name one with --eval_split, or omit --streaming."
        )
    stored = choose_split(splits, eval_split, name_or_path)
    stored, _ = standardize_stream(stored, image_column, label_column, medium)
    evaluation = store_stream(stored, eval_split, name_or_path)
    evaluation, _ = standardize(evaluation, "image", "label", label_names, medium=medium)
    return ImageDatasets(
        train=ImageStream(rows, num_images, shuffle_buffer_size, train_split),
        evaluation=draw_samples(evaluation, max_eval_samples, "max_eval_samples", seed, medium),
        label_names=label_names,
    )


def load_evaluation_dataset(
    name_or_path: str | Path,
    *,
    config_name: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    medium: Medium = IMAGES,
) -> tuple[Dataset, list[str]]:
    """Loads one split of a data set and the names of its labels: `split` if it is given, otherwise validation, test, or
    the only one.

    For arguments and errors, see `load_image_dataset`.
    """
    splits = load_splits(name_or_path, config_name, medium=medium, headings=(image_column, label_column))
    split = split or find_evaluation_split(splits, excluded=None) or next(iter(splits))
    rows = choose_split(splits, split, name_or_path)
    dataset, label_names = standardize(rows, image_column, label_column, medium=medium)
    return draw_samples(dataset, max_samples, "max_eval_samples", seed, medium), label_names


def choose_split(splits: DatasetDict | IterableDatasetDict, split: str, name_or_path: str | Path) -> Any:
    """The rows of a split. If they are streamed, their features are known."""
    if split not in splits:
        raise ValueError(f"'{name_or_path}' has no split '{split}'; it has {', '.join(splits)}.")
    rows = splits[split]
    if isinstance(rows, IterableDataset):
        return rows._resolve_features()
    if not len(rows):
        raise ValueError(f"Split '{split}' of '{name_or_path}' is empty.")
    return rows


def find_evaluation_split(splits: DatasetDict | IterableDatasetDict, excluded: str | None) -> str | None:
    return next((split for split in EVALUATION_SPLITS if split in splits and split != excluded), None)


def count_streamed(
    rows: IterableDataset, name_or_path: str | Path, split: str, max_samples: int | None, medium: Medium
) -> int:
    """The number of images to train on in a stream: `max_samples`, or that of its rows, from its description or its
    Parquet files.

    Raises:
        ValueError: there are fewer than `max_samples`, or neither says how many there are.
    """
    described = (rows.info.splits or {}).get(split)
    count = described.num_examples if described is not None else None
    count = count or count_parquet_rows(name_or_path, split)
    if max_samples is not None and count is not None and max_samples > count:
        raise ValueError(f"max_train_samples is {max_samples}: split '{split}' has {count} {medium.name}s.")
    if (count := max_samples or count) is None:
        raise ValueError(
            f"'{name_or_path}' does not say how many {medium.name}s split '{split}' has: give it with "
            "--max_train_samples."
        )
    return count


def _labels_of(dataset: Dataset) -> np.ndarray:
    return np.asarray(dataset.with_format("numpy")["label"][:])


def _split_by_label(dataset: Dataset, share: float, seed: int, medium: Medium) -> tuple[Dataset, Dataset]:
    """Holds out the fraction `share` of each class for evaluation: at least one image but not all, and none if the
    class has only one."""
    generator = np.random.default_rng(seed)
    labels = _labels_of(dataset)
    for_evaluation = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        for_evaluation[generator.choice(rows, count, replace=False)] = True
    if not for_evaluation.any():
        raise ValueError(
            f"None of the {len(labels)} training {medium.name}s can be held out for evaluation: no label has two of "
            "them."
        )
    return (
        dataset.select(np.flatnonzero(~for_evaluation), keep_in_memory=True),
        dataset.select(np.flatnonzero(for_evaluation), keep_in_memory=True),
    )


def draw_samples(dataset: Dataset, count: int | None, argument: str, seed: int, medium: Medium) -> Dataset:
    if count is None:
        return dataset
    if not 1 <= count <= len(dataset):
        raise ValueError(f"{argument} is {count}: it must be from 1 to {len(dataset)}, the number of {medium.name}s.")
    rows = np.random.default_rng(seed).choice(len(dataset), count, replace=False)
    return dataset.select(np.sort(rows), keep_in_memory=True)

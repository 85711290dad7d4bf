"""Labelled images for training and evaluation, from the Hub, an image folder or Parquet files."""

import glob
import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    NamedSplit,
    Value,
    concatenate_datasets,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError
from PIL import Image as PILImage
from pyarrow.parquet import ParquetFile
from transformers import BaseImageProcessor

from hf_vssm_prune.training.augmentation import (
    AugmentationConfig,
    randaugment,
    random_crop_with_padding,
    random_erasing,
    random_resized_crop,
)
from hf_vssm_prune.training.image_steps import ImageProcessorSteps, decode_image, readable_formats


logger = logging.getLogger(__name__)

PACKAGED_DATA = Path(__file__).resolve().parents[1] / "data"
PACKAGED_NAMES = ("fashion_mnist",)
# A folder's or a file's name, and the split that it stands for.
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
# Data sets on the Hub use any of these names. Validation comes first: the labels of a test split are often withheld.
EVALUATION_SPLITS = ("validation", "valid", "val", "dev", "test")


@dataclass(frozen=True)
class ImageDatasets:
    """The two sides of a training run. Each data set has the columns "image" ({"bytes", "path"}, not decoded), "label"
    (an index into `label_names`) and "row" (the row in the split that it came from; a stream has none)."""

    train: "Dataset | ImageStream"
    evaluation: Dataset
    label_names: list[str]


@dataclass(frozen=True)
class ImageStream:
    """Training images that are read one after the other.

    Attributes:
        rows: with the columns "image" and "label" of `ImageDatasets`, in the order in which they are stored.
        num_images: how many there are.
        buffer_size: images from which the next one is drawn.
        split: its name.
    """

    rows: IterableDataset
    num_images: int
    buffer_size: int
    split: str

    def __len__(self) -> int:
        return self.num_images

    def shuffled(self, seed: int, epoch: int) -> IterableDataset:
        """The rows in the order of an epoch: files change places, and a buffer mixes what they hold."""
        rows = self.rows.shuffle(seed=seed, buffer_size=self.buffer_size)
        rows.set_epoch(epoch)
        return rows


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
) -> ImageDatasets:
    """Loads a labelled image data set for training.

    Args:
        name_or_path: A folder with one subfolder of images for each class, or with such folders for each split
            ("train", "validation" or "val", "test"); a Parquet file or a folder of them (train.parquet,
            test-00000-of-00001.parquet, …); the name of a data set on the Hub; or "fashion_mnist", the subset that this
            package ships, where no folder of that name is present.
        config_name: Configuration of a data set on the Hub.
        train_split: Split to train on.
        eval_split: Split to evaluate on; None: validation, else test, else a part of the training split.
        image_column: Column of the images; None: the only one of type `datasets.Image`.
        label_column: Column of the labels; None: the only one of type `datasets.ClassLabel`. A named column may also
            hold integers or strings.
        validation_share: Share of the training split to evaluate on where there is no split for it: drawn at random,
            the same share of each class.
        max_train_samples: Number of training images to draw at random; None: all.
        max_eval_samples: Number of evaluation images to draw at random; None: all.
        seed: Of everything that is drawn.

    Raises:
        FileNotFoundError: `name_or_path` looks like a path, and nothing is there.
        ValueError: The data set cannot be found or read, or is none of labelled images; a split or a column is missing;
            labels are missing, out of range or all the same; there are fewer images than asked for.
    """
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share is {validation_share}: it must be between 0 and 1, both excluded.")
    splits = _load_splits(name_or_path, config_name)
    train, label_names = _standardize(_choose_split(splits, train_split, name_or_path), image_column, label_column)
    if len(np.unique(_labels_of(train))) < 2:
        raise ValueError(f"All {len(train)} images of split '{train_split}' of '{name_or_path}' have the same label.")
    eval_split = eval_split or _find_evaluation_split(splits, excluded=train_split)
    if eval_split is None:
        train, evaluation = _split_by_label(train, validation_share, seed)
    else:
        evaluation, _ = _standardize(
            _choose_split(splits, eval_split, name_or_path), image_column, label_column, label_names
        )
    return ImageDatasets(
        train=_draw_samples(train, max_train_samples, "max_train_samples", seed),
        evaluation=_draw_samples(evaluation, max_eval_samples, "max_eval_samples", seed),
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
) -> ImageDatasets:
    """As `load_image_dataset`, but the training images stay where they are and are read when they are needed.

    The evaluation split is read once, into datasets' cache. `max_train_samples` takes the first ones.

    Raises:
        ValueError: as in `load_image_dataset`; or the labels have no names, it is not known how many images there are,
            there is no evaluation split, or the images are files in a folder.
    """
    splits = _load_splits(name_or_path, config_name, streaming=True)
    rows = _choose_split(splits, train_split, name_or_path)
    num_images = _count_rows(rows, name_or_path, train_split)
    if max_train_samples is not None:
        if num_images is not None and max_train_samples > num_images:
            raise ValueError(
                f"max_train_samples is {max_train_samples}: split '{train_split}' has {num_images} images."
            )
        rows, num_images = rows.take(max_train_samples), max_train_samples
    if num_images is None:
        raise ValueError(
            f"'{name_or_path}' does not say how many images split '{train_split}' has: say it with --max_train_samples."
        )
    rows, label_names = _standardize_stream(rows, image_column, label_column)
    eval_split = eval_split or _find_evaluation_split(splits, excluded=train_split)
    if eval_split is None:
        raise ValueError(
            f"'{name_or_path}' has no split to evaluate on (it has {', '.join(splits)}), and none can be set apart "
            "from a stream: name one with --eval_split, or leave out --streaming."
        )
    stored = _choose_split(splits, eval_split, name_or_path)
    stored, _ = _standardize_stream(stored, image_column, label_column)
    try:
        evaluation = Dataset.from_generator(stored.__iter__, features=stored.features, split=NamedSplit(eval_split))
    except DatasetGenerationError as error:
        raise ValueError(f"Split '{eval_split}' of '{name_or_path}' cannot be read: {error.__cause__}") from error
    evaluation, _ = _standardize(evaluation, "image", "label", label_names)
    return ImageDatasets(
        train=ImageStream(rows, num_images, shuffle_buffer_size, train_split),
        evaluation=_draw_samples(evaluation, max_eval_samples, "max_eval_samples", seed),
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
) -> tuple[Dataset, list[str]]:
    """Loads one split of a data set, and the names of its labels: `split`, or validation, else test, else the only one.

    Arguments and errors are those of `load_image_dataset`.
    """
    splits = _load_splits(name_or_path, config_name)
    split = split or _find_evaluation_split(splits, excluded=None) or next(iter(splits))
    dataset, label_names = _standardize(_choose_split(splits, split, name_or_path), image_column, label_column)
    return _draw_samples(dataset, max_samples, "max_samples", seed), label_names


# Where the data comes from


def _load_splits(
    name_or_path: str | Path, config_name: str | None, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    path = Path(name_or_path).expanduser()
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"'{path}' is a file of type '{path.suffix}': a data set is a folder or a .parquet file.")
        return _load_parquet([path], streaming)
    if path.is_dir():
        parquet_files = sorted(path.rglob("*.parquet"))
        if parquet_files:
            return _load_parquet(parquet_files, streaming)
        if streaming:
            raise ValueError(f"The images in '{path}' are read as they are needed anyway: leave out --streaming.")
        return _load_image_folder(path)
    name = str(name_or_path)
    if name in PACKAGED_NAMES:
        return _load_parquet(sorted((PACKAGED_DATA / name).glob("*.parquet")), streaming)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix == ".parquet":
        raise FileNotFoundError(f"There is no file or folder '{name}'.")
    try:
        return load_dataset(name, config_name, streaming=streaming)
    # What the Hub and the network raise are OSErrors. An unknown configuration or a malformed name is a ValueError; a
    # data set that needs a loading script of its own, a RuntimeError.
    except (DatasetGenerationError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"'{name}' is no local folder or Parquet file, and cannot be loaded from the Hub as a data set: {error}"
        ) from error


def _load_parquet(files: Sequence[Path], streaming: bool) -> DatasetDict | IterableDatasetDict:
    """Loads Parquet files, each into the split that its name or its folder's name begins with, "train" without one."""
    files_of_split = _parquet_files_of_splits(files)
    patterns = {split: [glob.escape(name) for name in names] for split, names in files_of_split.items()}
    try:
        return load_dataset("parquet", data_files=patterns, streaming=streaming)
    except (DatasetGenerationError, OSError, ValueError) as error:
        listed = ", ".join(f"'{file}'" for file in files)
        raise ValueError(f"Parquet cannot be read from {listed}: {error.__cause__ or error}") from error


def _find_parquet_files(path: Path) -> list[Path]:
    return [path] if path.suffix == ".parquet" and path.is_file() else sorted(path.rglob("*.parquet"))


def _parquet_files_of_splits(files: Sequence[Path]) -> dict[str, list[str]]:
    files_of_split: dict[str, list[str]] = {}
    for file in files:
        words = [re.split(r"[^a-z]", name.lower())[0] for name in (file.stem, file.parent.name)]
        split = next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "train")
        files_of_split.setdefault(split, []).append(str(file))
    return files_of_split


def _load_image_folder(folder: Path) -> DatasetDict:
    """Lists the images of a folder. `datasets`' own "imagefolder" is not used because it takes splits from file names
    too: to it, cat/test_1.jpg is in another split than cat/1.jpg."""
    split_folders = {
        SPLIT_NAMES[child.name.lower()]: child
        for child in _subfolders(folder)
        if child.name.lower() in SPLIT_NAMES and _subfolders(child)
    }
    split_folders = split_folders or {"train": folder}
    label_names = sorted({child.name for split in split_folders.values() for child in _subfolders(split)})
    if not label_names:
        raise ValueError(
            f"The folder '{folder}' holds neither Parquet files nor class folders (such as '{folder}/cat/1.png')."
        )
    if "train" in split_folders:
        trained = {child.name for child in _subfolders(split_folders["train"])}
        if untrained := [name for name in label_names if name not in trained]:
            raise ValueError(
                f"'{folder}' has class folders {untrained} without training images: only the classes in "
                f"'{split_folders['train']}' can be evaluated."
            )
    images = {split: _find_images(split_folder, label_names) for split, split_folder in split_folders.items()}
    _warn_of_others(folder, {path for paths, _ in images.values() for path in paths})
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=label_names)})
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"image": [{"bytes": None, "path": path} for path in paths], "label": labels},
                features=features,
                split=NamedSplit(split),
            )
            for split, (paths, labels) in images.items()
        }
    )


def _warn_of_others(folder: Path, images: Collection[str]) -> None:
    """Says which files of a folder are not among its images: photos of an unknown kind, or in another place."""
    others = [file for file in sorted(folder.rglob("*")) if str(file) not in images and file.is_file()]
    others = [file for file in others if not _is_hidden(file.relative_to(folder))]
    if others:
        kinds = Counter(file.suffix.lower() or "without a suffix" for file in others)
        logger.warning(
            "%d files in '%s' are not among its images: %s; the first is '%s'. Images are files of a kind that Pillow "
            "reads, in class folders; where there are folders for train and test, in class folders in these.",
            *(len(others), folder, ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()), others[0]),
        )


def _is_hidden(file: Path) -> bool:
    """Whether it, or a folder that it is in, is: Macs, notebooks and waste bins leave images there."""
    return any(part.startswith(".") for part in file.parts)


def _find_images(folder: Path, label_names: list[str]) -> tuple[list[str], list[int]]:
    """The paths of the images in the class folders, and their labels."""
    formats = readable_formats()
    readable = {suffix for suffix, form in PILImage.registered_extensions().items() if form in formats}
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(label_names):
        class_folder = folder / name
        files = [file for file in class_folder.rglob("*") if file.suffix.lower() in readable and file.is_file()]
        found = sorted(str(file) for file in files if not _is_hidden(file.relative_to(class_folder)))
        if class_folder.is_dir() and not found:
            raise ValueError(f"The class folder '{class_folder}' holds no images.")
        paths += found
        labels += [label] * len(found)
    return paths, labels


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    except PermissionError as error:
        raise ValueError(f"The folder '{folder}' cannot be read: {error.strerror}.") from error


# From any data set to the columns "image", "label" and "row"


def _choose_split(splits: DatasetDict | IterableDatasetDict, split: str, name_or_path: str | Path) -> Any:
    if split not in splits:
        raise ValueError(f"'{name_or_path}' has no split '{split}'; it has {', '.join(splits)}.")
    if isinstance(splits[split], Dataset) and not len(splits[split]):
        raise ValueError(f"Split '{split}' of '{name_or_path}' is empty.")
    return splits[split]


def _find_evaluation_split(splits: DatasetDict | IterableDatasetDict, excluded: str | None) -> str | None:
    return next((split for split in EVALUATION_SPLITS if split in splits and split != excluded), None)


def _standardize(
    dataset: Dataset, image_column: str | None, label_column: str | None, label_names: list[str] | None = None
) -> tuple[Dataset, list[str]]:
    """Returns the data set with the columns "image", "label" and "row", and the names of the labels: `label_names`
    where given, and then the data set's own must be among them."""
    image_column = _find_column(dataset, image_column, Image, "image")
    label_column = _find_column(dataset, label_column, ClassLabel, "label")
    if image_column == label_column:
        raise ValueError(f"image_column and label_column are both '{image_column}'.")
    dataset = dataset.select_columns([image_column, label_column])
    dataset = dataset.rename_columns(
        {old: new for old, new in ((image_column, "image"), (label_column, "label")) if old != new}
    )
    try:
        dataset = dataset.cast_column("image", Image(decode=False))
    except (NotImplementedError, TypeError, ValueError) as error:
        kind = dataset.features["image"]
        raise ValueError(f"Column '{image_column}' holds no images; its type is {kind}.") from error
    labels, own_names = _read_labels(dataset, label_column)
    label_names = label_names or own_names
    if own_names != label_names:
        labels = _translate_labels(labels, own_names, label_names)
    # Joined and not cast: a cast would copy all images.
    columns = Dataset.from_dict(
        {"label": labels, "row": np.arange(len(labels))},
        features=Features({"label": ClassLabel(names=label_names), "row": Value("int64")}),
        split=dataset.split,
    )
    return concatenate_datasets([dataset.select_columns("image"), columns], split=dataset.split, axis=1), label_names


def _standardize_stream(
    rows: IterableDataset, image_column: str | None, label_column: str | None
) -> tuple[IterableDataset, list[str]]:
    """A stream with the columns "image" (not decoded) and "label", and the labels' names."""
    if rows.features is None:
        rows = rows._resolve_features()
    image_column = _find_column(rows, image_column, Image, "image")
    label_column = _find_column(rows, label_column, ClassLabel, "label")
    kind = rows.features[label_column]
    if not isinstance(kind, ClassLabel):
        raise ValueError(
            f"Column '{label_column}' has the type {kind}: a stream's labels need names (datasets.ClassLabel), because "
            "they cannot all be looked at beforehand. Leave out --streaming."
        )
    rows = rows.select_columns([image_column, label_column])
    rows = rows.rename_columns(
        {old: new for old, new in ((image_column, "image"), (label_column, "label")) if old != new}
    )
    return rows.cast_column("image", Image(decode=False)), list(kind.names)


def _count_rows(rows: IterableDataset, name_or_path: str | Path, split: str) -> int | None:
    """The number of a stream's rows, from its description or its Parquet files; None where neither says it."""
    described = (rows.info.splits or {}).get(split)
    if described is not None and described.num_examples:
        return described.num_examples
    if str(name_or_path) in PACKAGED_NAMES:
        name_or_path = PACKAGED_DATA / str(name_or_path)
    files = _parquet_files_of_splits(_find_parquet_files(Path(name_or_path).expanduser())).get(split)
    return sum(ParquetFile(file).metadata.num_rows for file in files) if files else None


def _find_column(dataset: Dataset | IterableDataset, name: str | None, kind: type, meaning: str) -> str:
    if name is not None:
        if name not in dataset.column_names:
            raise ValueError(
                f"There is no column '{name}' in split '{dataset.split}'; there are {', '.join(dataset.column_names)}."
            )
        return name
    found = [column for column, feature in dataset.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        raise ValueError(
            f"{len(found) or 'No'} columns have the type {kind.__name__} ({dataset.features}): "
            f"name the one to use with {meaning}_column."
        )
    return found[0]


def _read_labels(dataset: Dataset, column: str) -> tuple[np.ndarray, list[str]]:
    """Returns the labels as indices, int64 (rows,), and the names that they index."""
    feature = dataset.features["label"]
    values = dataset.data.column("label")
    if values.null_count:
        row = values.is_null().to_pylist().index(True)
        raise ValueError(f"Row {row} of split '{dataset.split}' has no label in column '{column}'.")
    kind = getattr(feature, "dtype", None)
    if kind in ("string", "large_string", "string_view"):
        found, indices = np.unique(values.to_numpy(), return_inverse=True)
        return indices.astype(np.int64), [str(name) for name in found]
    if not isinstance(kind, str) or not re.fullmatch(r"u?int\d+", kind):
        raise ValueError(f"Column '{column}' holds no labels (integers or strings); its type is {feature}.")
    labels = values.to_numpy().astype(np.int64)
    names = feature.names if isinstance(feature, ClassLabel) else [str(label) for label in range(labels.max() + 1)]
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if wrong.size:
        raise ValueError(
            f"Row {wrong[0]} of split '{dataset.split}' has the label {labels[wrong[0]]} in column '{column}': allowed "
            f"is 0 to {len(names) - 1}."
        )
    return labels, list(names)


def _translate_labels(labels: np.ndarray, names: list[str], target_names: list[str]) -> np.ndarray:
    unknown = [name for name in names if name not in target_names]
    if unknown:
        raise ValueError(
            f"The evaluation split has labels that the training split does not have: {', '.join(unknown)}."
        )
    return np.array([target_names.index(name) for name in names])[labels]


def _labels_of(dataset: Dataset) -> np.ndarray:
    return np.asarray(dataset.with_format("numpy")["label"][:])


def _split_by_label(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Sets `share` of each class apart for evaluation: at least one image and not all; none of a class with one."""
    generator = np.random.default_rng(seed)
    labels = _labels_of(dataset)
    for_evaluation = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        for_evaluation[generator.choice(rows, count, replace=False)] = True
    if not for_evaluation.any():
        raise ValueError(
            f"None of the {len(labels)} training images can be set apart for evaluation: no label has two of them."
        )
    return (
        dataset.select(np.flatnonzero(~for_evaluation), keep_in_memory=True),
        dataset.select(np.flatnonzero(for_evaluation), keep_in_memory=True),
    )


def _draw_samples(dataset: Dataset, count: int | None, argument: str, seed: int) -> Dataset:
    if count is None:
        return dataset
    if not 1 <= count <= len(dataset):
        raise ValueError(f"{argument} is {count}: it must be from 1 to {len(dataset)}, the number of images there are.")
    rows = np.random.default_rng(seed).choice(len(dataset), count, replace=False)
    return dataset.select(np.sort(rows), keep_in_memory=True)


# What a data loader reads


class _Images(torch.utils.data.Dataset[dict[str, Any]]):
    """Images of a data set that `load_image_dataset` gave, decoded when they are asked for."""

    def __init__(self, dataset: Any, image_processor: BaseImageProcessor) -> None:
        self._dataset = dataset
        self._steps = ImageProcessorSteps(image_processor)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no image {index}: there are {len(self)}.")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """What a data loader calls for a whole batch: one look-up in the table is faster than many."""
        rows = self._dataset[indices]
        return [
            self._item(index, stored, label, f"row {row}")
            for index, stored, label, row in zip(indices, rows["image"], rows["label"], rows["row"], strict=True)
        ]

    def _item(self, index: int, stored: Mapping[str, Any], label: int, place: str) -> dict[str, Any]:
        return {"pixel_values": self._pixel_values(self._decode(stored, place), index), "labels": label}

    def _decode(self, stored: Mapping[str, Any], place: str) -> PILImage.Image:
        name = f"The image in {place} of split '{self._dataset.split}'"
        if stored["path"] is not None:
            name += f" ('{stored['path']}')"
        return decode_image(stored, self._steps.mode, name)

    def _pixel_values(self, image: PILImage.Image, index: int) -> torch.Tensor:
        raise NotImplementedError


class EvaluationImages(_Images):
    """Images as the image processor gives them.

    Each item is {"pixel_values": float32 (channels, height, width), "labels": int}.

    Args:
        dataset: One that `load_image_dataset` or `load_evaluation_dataset` gave.
        image_processor: One of plain steps: see `ImageProcessorSteps`.
    """

    def _pixel_values(self, image: PILImage.Image, index: int) -> torch.Tensor:
        return self._steps(image)


class TrainingImages(_Images):
    """Augmented images. What is random in an image depends on the seed, the epoch and the index alone: not on the
    number of workers or processes, nor on what was read before.

    Each item is {"pixel_values": float32 (channels, height, width), "labels": int}.

    Args:
        dataset: One that `load_image_dataset` gave.
        image_processor: One of plain steps: see `ImageProcessorSteps`.
        augmentation: What to do to the images.
        seed: Not negative.
    """

    def __init__(
        self,
        dataset: Dataset | ImageStream,
        image_processor: BaseImageProcessor,
        augmentation: AugmentationConfig,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, image_processor)
        if seed < 0:
            raise ValueError(f"seed is {seed}: it must not be negative.")
        self._augmentation = augmentation
        self._seed = seed
        # In shared memory, so that the persistent workers of a data loader see the new epoch as well.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Call it before the data loader's iterator is made: workers read ahead."""
        self._epoch.fill_(epoch)

    def _pixel_values(self, image: PILImage.Image, index: int) -> torch.Tensor:
        generator = np.random.default_rng((self._seed, int(self._epoch), index))
        augmentation, steps = self._augmentation, self._steps
        if augmentation.random_resized_crop_scale is not None:
            image = random_resized_crop(
                image, steps.size, augmentation.random_resized_crop_scale, steps.resample, generator
            )
        else:
            image = random_crop_with_padding(steps.resize_and_crop(image), augmentation.random_crop_padding, generator)
        if generator.random() < augmentation.horizontal_flip:
            image = image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
        image = randaugment(image, augmentation, steps.resample, steps.fill, generator)
        return random_erasing(steps.normalize(image), augmentation.random_erasing, generator)


class StreamedTrainingImages(TrainingImages):
    """Augmented images of an `ImageStream`.

    An "index" is the place in the epoch's order together with the row itself, as `sampling.StreamSampler` gives them:
    the process that trains reads the rows, and its workers decode and augment them.
    """

    def __getitem__(self, numbered_row: tuple[int, dict[str, Any]]) -> dict[str, Any]:  # type: ignore[override]
        return self.__getitems__([numbered_row])[0]

    def __getitems__(self, numbered_rows: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:  # type: ignore[override]
        return [
            self._item(place, row["image"], row["label"], f"place {place} of epoch {int(self._epoch)}")
            for place, row in numbered_rows
        ]


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Stacks samples into {"pixel_values": (batch, channels, height, width), "labels": (batch,) int64}."""
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }

"""Images with masks, which have a class id for each pixel: converts any data set to one with the columns "image",
"mask" and "row"."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, Value, concatenate_datasets
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from hf_vssm_prune.training.arguments import DataArguments, EvaluationDataArguments
from hf_vssm_prune.training.data.columns import ImageDatasets, ImageStream, store_stream
from hf_vssm_prune.training.data.loading import choose_split, count_streamed, draw_samples, find_evaluation_split
from hf_vssm_prune.training.data.masks import IGNORED_AFTER_REDUCTION, decode_mask, reduced
from hf_vssm_prune.training.data.media import IMAGES
from hf_vssm_prune.training.data.pairs import holds_pairs, load_pair_folder
from hf_vssm_prune.training.data.paths import local_path
from hf_vssm_prune.training.data.sources import load_splits
from hf_vssm_prune.training.labels import read_label_file


# Names of mask columns in data sets on the Hub.
MASK_COLUMNS = ("mask", "annotation", "annotations", "label", "labels", "segmentation", "semantic", "masks")
# Files with the names of the classes, in a data set's folder or repository.
NAME_FILES = ("id2label.json", "classes.txt", "label_names.txt")


@dataclass(frozen=True)
class Pairs:
    """Stored rows with the columns "image" and "mask" (not decoded) and "row", and the number of classes."""

    rows: Dataset
    num_labels: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def split(self) -> str:
        return str(self.rows.split)


@dataclass(frozen=True)
class PairStream(ImageStream):
    """The same for rows that are read sequentially."""

    num_labels: int


def load_segmentation_datasets(
    data: DataArguments, label_file: str | None, ignore_index: int, reduce_labels: bool, seed: int
) -> ImageDatasets:
    """Both data sets of a training run.

    Args:
        data: which data, splits, columns and samples.
        label_file: file with the class names; None: `id2label.json` or a similar file next to the data, otherwise the
            ids in the training masks.
        ignore_index: id of pixels that belong to no class.
        reduce_labels: whether 0 means no class and classes are counted from 1.
        seed: random seed.

    Raises:
        FileNotFoundError, ValueError: the data set does not exist, or a column, a split or the names are missing.
    """
    name = data.dataset_name
    splits = _load_splits(data, data.streaming)
    train = choose_split(splits, data.train_split, name)
    train_rows = standardize_pairs(train, data.image_column_name, data.label_column_name)
    label_names = read_label_names(name, label_file)
    if label_names is None:
        if data.streaming:
            raise ValueError(
                f"'{name}' does not name its classes, and the masks are streamed: name them with --label_file."
            )
        label_names = _names_of_ids(train_rows, ignore_index, reduce_labels)
    eval_split = data.eval_split or find_evaluation_split(splits, excluded=data.train_split)
    if eval_split is not None:
        evaluation = choose_split(splits, eval_split, name)
        evaluation_rows = standardize_pairs(evaluation, data.image_column_name, data.label_column_name)
        if data.streaming:
            evaluation_rows = standardize_pairs(store_stream(evaluation_rows, eval_split, name), "image", "mask")
    elif data.streaming:
        raise ValueError(f"'{name}' has no split to evaluate on, which --streaming needs: name one with --eval_split.")
    else:
        train_rows, evaluation_rows = set_apart(train_rows, data.train_val_split, seed)
    if data.streaming:
        count = count_streamed(train, name, data.train_split, data.max_train_samples, IMAGES)
        taken = train_rows if data.max_train_samples is None else train_rows.take(count)
        pairs: Pairs | PairStream = PairStream(
            taken, count, data.shuffle_buffer_size, data.train_split, len(label_names)
        )
    else:
        train_rows = draw_samples(train_rows, data.max_train_samples, "max_train_samples", seed, IMAGES)
        pairs = Pairs(train_rows, len(label_names))
    evaluation_rows = draw_samples(evaluation_rows, data.max_eval_samples, "max_eval_samples", seed, IMAGES)
    return ImageDatasets(pairs, Pairs(evaluation_rows, len(label_names)), label_names)


def load_segmentation_evaluation(
    data: EvaluationDataArguments, label_file: str | None, ignore_index: int, reduce_labels: bool, seed: int
) -> tuple[Pairs, list[str]]:
    """The rows to evaluate, and the classes' names; see `load_segmentation_datasets`."""
    splits = _load_splits(data, streaming=False)
    split = data.eval_split or find_evaluation_split(splits, excluded=None) or next(iter(splits))
    rows = choose_split(splits, split, data.dataset_name)
    rows = standardize_pairs(rows, data.image_column_name, data.label_column_name)
    names = read_label_names(data.dataset_name, label_file) or _names_of_ids(rows, ignore_index, reduce_labels)
    rows = draw_samples(rows, data.max_eval_samples, "max_eval_samples", seed, IMAGES)
    return Pairs(rows, len(names)), names


def _load_splits(data: EvaluationDataArguments, streaming: bool) -> Any:
    folder = local_path(data.dataset_name)
    if not holds_pairs(folder):
        return load_splits(data.dataset_name, data.dataset_config_name, streaming)
    if streaming:
        raise ValueError(f"The images in '{folder}' are read only when needed in any case: omit --streaming.")
    return load_pair_folder(folder)


def standardize_pairs(rows: Any, image_column: str | None, mask_column: str | None) -> Any:
    """Rows, stored or streamed, with the columns "image" and "mask", neither of them decoded; stored rows also have
    "row".

    Raises:
        ValueError: a column is missing, or cannot be identified.
    """
    if rows.features is None:
        rows = rows._resolve_features()
    found = [name for name, kind in rows.features.items() if isinstance(kind, Image)]
    for name in (image_column, mask_column):
        if name is not None and name not in rows.column_names:
            raise ValueError(
                f"There is no column '{name}' in split '{rows.split}'; the columns are {', '.join(rows.column_names)}."
            )
    if mask_column is None:
        mask_column = next((name for name in MASK_COLUMNS if name in found and name != image_column), None)
    if image_column is None:
        others = [name for name in found if name != mask_column]
        image_column = others[0] if len(others) == 1 else next((name for name in others if name == "image"), None)
    if image_column is None or mask_column is None or image_column == mask_column:
        raise ValueError(
            f"Split '{rows.split}' has the columns {dict(rows.features)}: a column of images and a column of masks "
            "are needed; name them with --image_column_name and --label_column_name."
        )
    rows = rows.select_columns([image_column, mask_column])
    rows = rows.rename_columns(
        {old: new for old, new in ((image_column, "image"), (mask_column, "mask")) if old != new}
    )
    for column in ("image", "mask"):
        rows = rows.cast_column(column, Image(decode=False))
    if isinstance(rows, IterableDataset):
        return rows
    numbers = Dataset.from_dict(
        {"row": np.arange(len(rows))}, features=Features({"row": Value("int64")}), split=rows.split
    )
    return concatenate_datasets([rows, numbers], split=rows.split, axis=1)


def set_apart(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Holds out a fraction of the rows for evaluation: at least one, but not all."""
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} training images cannot be split into training and evaluation images.")
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    order = np.random.default_rng(seed).permutation(len(rows))
    parts = (np.sort(order[count:]), np.sort(order[:count]))
    return tuple(rows.select(part, keep_in_memory=True) for part in parts)


# Names of the classes


def read_label_names(name_or_path: str, label_file: str | None) -> list[str] | None:
    """The names of the classes in the order of their ids, from a given file or one next to the data; None if there is
    none.

    Raises:
        FileNotFoundError, ValueError: the given file does not exist, or does not contain names.
    """
    if label_file is not None:
        return _read_names(Path(label_file))
    path = local_path(name_or_path)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        found = next((folder / name for name in NAME_FILES if (folder / name).is_file()), None)
        return None if found is None else _read_names(found)
    try:
        return _read_names(Path(hf_hub_download(name_or_path, NAME_FILES[0], repo_type="dataset")))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        return None


def _read_names(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"There is no file '{file}' of class names.")
    return read_label_file(file)


def _names_of_ids(rows: Dataset, ignore_index: int, reduce_labels: bool) -> list[str]:
    """The names "class 0" up to the highest id in the masks, all of which are read."""
    highest = -1
    for row in rows.select_columns(["mask", "row"]):
        ids = reduced(decode_mask(row["mask"], f"The mask in row {row['row']} of split '{rows.split}'"), reduce_labels)
        ids = ids[ids != (IGNORED_AFTER_REDUCTION if reduce_labels else ignore_index)]
        highest = max(highest, int(ids.max(initial=-1)))
    if highest < 1:
        raise ValueError(
            f"The masks of split '{rows.split}' have no class id above {max(highest, 0)}: at least two classes are "
            "needed."
        )
    return [f"class {label}" for label in range(highest + 1)]

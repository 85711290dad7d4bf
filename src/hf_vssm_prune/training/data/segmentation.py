"""Images with masks, which have a class id for each pixel: converts any data set to one with the columns "image",
"mask" and "row"."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, Value, concatenate_datasets

from hf_vssm_prune.training.arguments import DataArguments, EvaluationDataArguments
from hf_vssm_prune.training.data.columns import ImageDatasets, ImageStream, take_columns
from hf_vssm_prune.training.data.dense_splits import DenseSplits, read_label_names, set_apart
from hf_vssm_prune.training.data.loading import count_streamed, draw_samples
from hf_vssm_prune.training.data.masks import decode_mask, reduced
from hf_vssm_prune.training.data.media import IMAGES
from hf_vssm_prune.training.data.pairs import holds_pairs, load_pair_folder


# Names of mask columns in data sets on the Hub.
MASK_COLUMNS = ("mask", "annotation", "annotations", "label", "labels", "segmentation", "semantic", "masks")


@dataclass(frozen=True)
class MaskOptions:
    """The format of masks.

    Attributes:
        label_file: file with the class names. None: `id2label.json` or a similar file next to the data, otherwise the
            ids in the training masks.
        ignore_index: id of pixels that belong to no class; 255 with `reduce_labels`.
        reduce_labels: whether 0 means no class and classes are counted from 1.
    """

    label_file: str | None = None
    ignore_index: int = 255
    reduce_labels: bool = False


@dataclass(frozen=True)
class Pairs:
    """Stored rows with the columns "image" and "mask" (not decoded) and "row", and the number of classes."""

    rows: Dataset
    num_labels: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    @property
    def split(self) -> str:
        return str(self.rows.split)


@dataclass(frozen=True)
class PairStream(ImageStream):
    """The same for rows that are read sequentially."""

    num_labels: int


def load_segmentation_datasets(data: DataArguments, options: MaskOptions, seed: int) -> ImageDatasets:
    """Both data sets of a training run.

    Args:
        data: which data, splits, columns and samples.
        options: format of the masks.
        seed: random seed.

    Raises:
        FileNotFoundError, ValueError: the data set does not exist, or a column, a split or the names are missing.
    """
    name = data.dataset_name
    splits = SPLITS.load(data, data.streaming)
    train = SPLITS.choose(splits, data.train_split, data)
    train_rows = _standardize(train)
    label_names = read_label_names(name, options.label_file)
    if label_names is None:
        if data.streaming:
            raise ValueError(
                f"'{name}' does not name its classes, and the masks are streamed: name them with --label_file."
            )
        label_names = _names_of_ids(train_rows, options)
    if (evaluation := SPLITS.choose_evaluation(splits, data)) is not None:
        evaluation_rows = _standardize(evaluation)
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
    data: EvaluationDataArguments, options: MaskOptions, seed: int
) -> tuple[Pairs, list[str]]:
    """The rows to evaluate, and the classes' names; see `load_segmentation_datasets`."""
    rows = _standardize(SPLITS.load_evaluation(data))
    names = read_label_names(data.dataset_name, options.label_file) or _names_of_ids(rows, options)
    rows = draw_samples(rows, data.max_eval_samples, "max_eval_samples", seed, IMAGES)
    return Pairs(rows, len(names)), names


def _find_columns(
    features: Mapping[str, Any], image_column: str | None, mask_column: str | None
) -> tuple[str | None, str | None]:
    found = [name for name, kind in features.items() if isinstance(kind, Image)]
    if mask_column is None:
        mask_column = next((name for name in MASK_COLUMNS if name in found and name != image_column), None)
    if image_column is None:
        others = [name for name in found if name != mask_column]
        image_column = others[0] if len(others) == 1 else next((name for name in others if name == "image"), None)
    return image_column, mask_column


SPLITS = DenseSplits(holds_pairs, load_pair_folder, "masks", _find_columns)


def _standardize(rows: Any) -> Any:
    """Rows of `SPLITS`, stored or streamed, with the columns "image" and "mask"; stored rows also have "row"."""
    rows = take_columns(rows, dict(zip(rows.column_names, ("image", "mask"), strict=True)))
    for column in ("image", "mask"):
        rows = rows.cast_column(column, Image(decode=False))
    if isinstance(rows, IterableDataset):
        return rows
    numbers = Dataset.from_dict(
        {"row": np.arange(len(rows))}, features=Features({"row": Value("int64")}), split=rows.split
    )
    return concatenate_datasets([rows, numbers], split=rows.split, axis=1)


def _names_of_ids(rows: Dataset, options: MaskOptions) -> list[str]:
    """The names "class 0" up to the highest id in the masks, all of which are read."""
    highest = -1
    for row in rows.select_columns(["mask", "row"]):
        ids = decode_mask(row["mask"], f"The mask in row {row['row']} of split '{rows.split}'")
        ids = reduced(ids, options.reduce_labels)
        highest = max(highest, int(ids[ids != options.ignore_index].max(initial=-1)))
    if highest < 1:
        raise ValueError(
            f"The masks of split '{rows.split}' have no class id above {max(highest, 0)}: at least two classes are "
            "needed."
        )
    return [f"class {label}" for label in range(highest + 1)]

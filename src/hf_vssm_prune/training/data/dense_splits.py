"""What the data sets of segmentation and detection have in common: the choice of their splits and columns, and files
with the names of the classes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from hf_vssm_prune.training.arguments import DataArguments, EvaluationDataArguments
from hf_vssm_prune.training.data.columns import store_stream, take_columns
from hf_vssm_prune.training.data.loading import choose_split, find_evaluation_split
from hf_vssm_prune.training.data.sources import load_splits, refuse_configuration, refuse_streaming
from hf_vssm_prune.training.labels import read_label_file
from hf_vssm_prune.training.paths import local_path


# Files with the names of the classes, in a data set's folder or repository.
NAME_FILES = ("id2label.json", "classes.txt", "label_names.txt")


@dataclass(frozen=True)
class DenseSplits:
    """Reads the splits of a task's data sets. Rows have two columns, that of the images and that of the labels, under
    their stored names; images and masks are not decoded.

    Attributes:
        holds: whether a path is a folder in a format of the task's own.
        load_folder: loads such a folder.
        labels: what the column of labels contains, for error messages.
        find_columns: the two columns, from a split's features and their given names; None: not found.
    """

    holds: Callable[[Path], bool]
    load_folder: Callable[[Path], DatasetDict]
    labels: str
    find_columns: Callable[[Mapping[str, Any], str | None, str | None], tuple[str | None, str | None]]

    def load(self, data: EvaluationDataArguments, streaming: bool) -> Any:
        """All splits, with whatever columns they have."""
        folder = local_path(data.dataset_name)
        if not self.holds(folder):
            return load_splits(data.dataset_name, data.dataset_config_name, streaming)
        refuse_configuration(folder, data.dataset_config_name)
        refuse_streaming(streaming, folder)
        return self.load_folder(folder)

    def choose(self, splits: Any, split: str, data: EvaluationDataArguments) -> Any:
        """The rows of a split, stored or streamed.

        Raises:
            ValueError: there is no such split, or a column is missing or cannot be identified.
        """
        rows = choose_split(splits, split, data.dataset_name)
        for name in (data.image_column_name, data.label_column_name):
            if name is not None and name not in rows.features:
                raise ValueError(
                    f"There is no column '{name}' in split '{split}'; the columns are {', '.join(rows.features)}."
                )
        images, labels = self.find_columns(rows.features, data.image_column_name, data.label_column_name)
        if images is None or labels is None or images == labels:
            raise ValueError(
                f"Split '{split}' has the columns {dict(rows.features)}: a column of images and a column of "
                f"{self.labels} are needed; name them with --image_column_name and --label_column_name."
            )
        return take_columns(rows, {images: images, labels: labels})

    def choose_evaluation(self, splits: Any, data: DataArguments) -> Dataset | None:
        """The stored rows that a training run is evaluated on. None: they must be held out from the training rows."""
        split = data.eval_split or find_evaluation_split(splits, excluded=data.train_split)
        if split is not None:
            rows = self.choose(splits, split, data)
            return store_stream(rows, split, data.dataset_name) if data.streaming else rows
        if data.streaming:
            raise ValueError(
                f"'{data.dataset_name}' has no split to evaluate on, which --streaming needs: name one with "
                "--eval_split."
            )
        return None

    def load_evaluation(self, data: EvaluationDataArguments) -> Dataset:
        """The stored rows to evaluate a model on."""
        splits = self.load(data, streaming=False)
        split = data.eval_split or find_evaluation_split(splits, excluded=None) or next(iter(splits))
        return self.choose(splits, split, data)


def set_apart(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Holds out a fraction of the rows for evaluation: at least one, but not all."""
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} training images cannot be split into training and evaluation images.")
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    order = np.random.default_rng(seed).permutation(len(rows))
    parts = (np.sort(order[count:]), np.sort(order[:count]))
    return tuple(rows.select(part, keep_in_memory=True) for part in parts)


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

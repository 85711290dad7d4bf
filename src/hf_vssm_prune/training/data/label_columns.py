"""Converts labels of any type to indices into their names."""

import logging
import re
from collections.abc import Sequence

import numpy as np
from datasets import ClassLabel, Dataset

from hf_vssm_prune.training.labels import Match, match_labels


logger = logging.getLogger(__name__)


def read_labels(dataset: Dataset, column: str, say_numbers: bool) -> tuple[np.ndarray, list[str]]:
    """Returns the labels as indices, int64 (rows,), and the names that they index.

    A `ClassLabel` has names. For strings, numbers and booleans, each value that occurs becomes a class, in sorted
    order, with the value as its name.

    Args:
        dataset: data set with labels in the column "label".
        column: name of the column in error messages.
        say_numbers: whether to log the numbers if they are not 0, 1, 2, ...

    Raises:
        ValueError: a row has no label, or one that is not allowed; or the column has another type.
    """
    feature = dataset.features["label"]
    values = dataset.data.column("label")
    if values.null_count:
        _refuse_rows(dataset, column, np.asarray(values.is_null()))
    if isinstance(feature, ClassLabel):
        return _check_named_labels(dataset, column, feature.names), list(feature.names)
    kind = getattr(feature, "dtype", None)
    if not isinstance(kind, str) or not re.fullmatch(r"u?int\d+|bool|string|large_string|string_view", kind):
        raise ValueError(f"Column '{column}' contains no labels (integers or strings); its type is {feature}.")
    found, indices = np.unique(values.to_numpy(), return_inverse=True)
    names = [str(name) for name in found]
    if not all(name.strip() for name in names):
        blank = [i for i, name in enumerate(names) if not name.strip()]
        _refuse_rows(dataset, column, np.isin(indices, blank))
    if say_numbers and "int" in kind and names != [str(i) for i in range(len(names))]:
        logger.warning(
            "Column '%s' of split '%s' has the numbers %s as labels: they become %d classes, named by these numbers. "
            "Numbers in between get no class.",
            *(column, dataset.split, _shown(names), len(names)),
        )
    return indices.astype(np.int64), names


def _check_named_labels(dataset: Dataset, column: str, names: Sequence[str]) -> np.ndarray:
    labels = dataset.data.column("label").to_numpy().astype(np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if wrong.size:
        others = f" ({len(wrong)} of {len(labels)} rows have a label that is not allowed)" if wrong.size > 1 else ""
        raise ValueError(
            f"Row {wrong[0]} of split '{dataset.split}' has the label {labels[wrong[0]]} in column '{column}'{others}: "
            f"allowed labels are 0 to {len(names) - 1}."
        )
    return labels


def _refuse_rows(dataset: Dataset, column: str, wrong: np.ndarray) -> None:
    rows = np.flatnonzero(wrong)
    others = f" ({len(rows)} of {len(wrong)} rows have none)" if len(rows) > 1 else ""
    raise ValueError(f"Row {rows[0]} of split '{dataset.split}' has no label in column '{column}'{others}.")


def translate_labels(labels: np.ndarray, names: list[str], target_names: list[str]) -> np.ndarray:
    """Converts indices into `names` to indices into the training split's names.

    Raises:
        ValueError: some labels are not in the training split.
    """
    match = match_labels(target_names, names, some=True)
    if match.kind is Match.DIFFERENT:
        unknown = [name for name in names if name not in target_names] or names
        raise ValueError(f"The evaluation split has labels that the training split does not have: {_shown(unknown)}.")
    return np.array(match.ids)[labels]


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 10 else f"{', '.join(names[:5])}, ..., {names[-1]}"

"""Mean intersection over union as an `evaluate` module, with the same names as Hugging Face's own `mean_iou`.

The metric is computed in two steps, the first of which processes one image at a time: `label_areas` counts pixels, and
`iou_from_areas` computes the metrics from the summed counts. To evaluate on several processes, gather the counts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np


DESCRIPTION = """\
Mean intersection over union: for each label the pixels that prediction and reference share, over those that either has;
mean over the labels that occur. Pixels of all images count together.
"""

INPUTS_DESCRIPTION = """\
Args:
    predictions, references: for each image a map (height, width) of label ids.
    num_labels: how many labels there are; their ids are 0 to num_labels - 1.
    ignore_index: the id of pixels in the references that do not count.
    nan_to_num: stands in for the metrics of labels that occur in no map; NaN by default.
    label_map: ids of the references to be replaced, by the ids that replace them.
    reduce_labels: whether 0 is the background, which does not count, and the labels are one lower than in the maps.

Returns:
    mean_iou, mean_accuracy, overall_accuracy: floats.
    per_category_iou, per_category_accuracy: arrays (num_labels,).

Examples:
    >>> metric = evaluate.load(METRICS["mean_iou"])
    >>> metric.compute(predictions=[[[0, 1], [1, 1]]], references=[[[0, 1], [0, 255]]], num_labels=2, ignore_index=255)
"""


def label_areas(prediction: np.ndarray, reference: np.ndarray, num_labels: int, ignore_index: int) -> np.ndarray:
    """Counts the pixels of each label in one image: correctly predicted pixels, predicted pixels, and pixels in the
    reference.

    Args:
        prediction, reference: label ids, both (height, width).
        num_labels: number of labels.
        ignore_index: id of pixels in the reference that are not counted.

    Returns:
        int64 (3, num_labels).

    Raises:
        ValueError: the maps differ in size, or contain an id that is not a label.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"A prediction is {prediction.shape} and its reference {reference.shape}: sizes must match.")
    counts = reference != ignore_index
    prediction, reference = prediction[counts], reference[counts]
    for name, values in (("prediction", prediction), ("reference", reference)):
        if values.size and not 0 <= values.min() <= values.max() < num_labels:
            raise ValueError(
                f"A {name} has label ids from {values.min()} to {values.max()}; with num_labels {num_labels} they "
                f"must be from 0 to {num_labels - 1}, or in a reference ignore_index {ignore_index}."
            )
    maps = (prediction[prediction == reference], prediction, reference)
    return np.stack([np.bincount(each, minlength=num_labels) for each in maps])


def iou_from_areas(areas: np.ndarray, nan_to_num: float | None = None) -> dict[str, Any]:
    """Computes the metrics from pixel counts.

    Args:
        areas: sums of `label_areas` over images, (3, num_labels).
        nan_to_num: value for labels that do not occur, instead of NaN.
    """
    right, predicted, labelled = areas.astype(np.float64)
    with np.errstate(invalid="ignore"):
        iou, accuracy = right / (predicted + labelled - right), right / labelled
        overall = right.sum() / labelled.sum()
    metrics = {
        "mean_iou": _mean(iou),
        "mean_accuracy": _mean(accuracy),
        "overall_accuracy": float(overall),
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }
    if nan_to_num is None:
        return metrics
    return {name: np.nan_to_num(value, nan=nan_to_num) for name, value in metrics.items()}


def _mean(values: np.ndarray) -> float:
    """The mean over labels that occur; NaN if there are none."""
    occurring = values[~np.isnan(values)]
    return float(occurring.mean()) if occurring.size else float("nan")


class MeanIoU(evaluate.Metric):
    """See `INPUTS_DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("int32")))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": label_map, "references": label_map}),
        )

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[Any],
        num_labels: int,
        ignore_index: int,
        nan_to_num: float | None = None,
        label_map: Mapping[int, int] | None = None,
        reduce_labels: bool = False,
    ) -> dict[str, Any]:
        total = np.zeros((3, num_labels), np.int64)
        for prediction, reference in zip(predictions, references, strict=True):
            renamed = _rename(np.asarray(reference), ignore_index, label_map or {}, reduce_labels)
            total += label_areas(np.asarray(prediction), renamed, num_labels, ignore_index)
        return iou_from_areas(total, nan_to_num)


def _rename(reference: np.ndarray, ignore_index: int, label_map: Mapping[int, int], reduce_labels: bool) -> np.ndarray:
    renamed = reference.copy()
    for old, new in label_map.items():
        renamed[reference == old] = new
    if not reduce_labels:
        return renamed
    kept = (renamed != 0) & (renamed != ignore_index)
    return np.where(kept, renamed - 1, ignore_index)

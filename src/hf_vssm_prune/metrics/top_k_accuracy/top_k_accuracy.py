"""Top-k accuracy as an `evaluate` module: the fraction of images whose label is among the model's k best
predictions."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np


DESCRIPTION = """\
Top-k accuracy: the fraction of images whose label is among the model's k most likely predictions. Top-1 is accuracy.
"""

INPUTS_DESCRIPTION = """\
Args:
    predictions: for each image, the ids of the predicted labels, most likely first; or a single id. An id of -1 is
        padding, for models with few labels.
    references: the id of each image's label.
    k: the values of k to compute. Default: 1 and 5, as far as there are enough predictions.

Returns:
    {"top1": ..., "top5": ...}, fractions from 0 to 1.

Examples:
    >>> metric = evaluate.load(METRICS["top_k_accuracy"])
    >>> metric.compute(predictions=[[2, 0], [1, 2]], references=[0, 1], k=[1, 2])
    {'top1': 0.5, 'top2': 1.0}
"""

DEFAULT_K = (1, 5)


def top_k_accuracy(predictions: np.ndarray, references: np.ndarray, k: Sequence[int]) -> dict[str, float]:
    """The fraction of images whose label is among the first k predictions, for several values of k.

    Args:
        predictions: ids (images, predictions), most likely first.
        references: ids (images,).
        k: values of k.

    Raises:
        ValueError: a k is not positive, or there are fewer predictions than that.
    """
    if wrong := [each for each in k if not 1 <= each <= predictions.shape[1]]:
        raise ValueError(f"k has {wrong}: each must be from 1 to {predictions.shape[1]}, the guesses of each image.")
    hits = predictions == references[:, None]
    return {f"top{each}": float(hits[:, :each].any(axis=1).mean()) for each in k}


class TopKAccuracy(evaluate.Metric):
    """See `INPUTS_DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": label, "references": label}),
                datasets.Features({"predictions": datasets.Sequence(label), "references": label}),
            ],
        )

    def _compute(
        self,
        predictions: Sequence[int] | Sequence[Sequence[int]],
        references: Sequence[int],
        k: int | Sequence[int] | None = None,
    ) -> dict[str, float]:
        guesses = np.asarray(predictions).reshape(len(predictions), -1)
        if k is None:
            k = [each for each in DEFAULT_K if each <= guesses.shape[1]]
        return top_k_accuracy(guesses, np.asarray(references), np.atleast_1d(k).tolist())

"""Metrics as modules of Hugging Face's `evaluate`, which come with the package: loading one needs no network.

import evaluate
from hf_vssm_prune.metrics import METRICS

metric = evaluate.load(METRICS["top_k_accuracy"])
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any


_FOLDER = Path(__file__).parent

# Where each metric is, as `evaluate.load` takes it.
METRICS = {name: str(_FOLDER / name) for name in ("mean_iou", "top_k_accuracy")}


@lru_cache
def load_metric(name: str) -> Any:
    """One of `METRICS`, an `evaluate.EvaluationModule` that keeps what it is given in memory.

    Raises:
        ValueError: there is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; the metrics are {', '.join(METRICS)}.")
    import evaluate  # takes a second, and only the training extra has it

    return evaluate.load(METRICS[name], keep_in_memory=True)


def save_results(path: str, results: Mapping[str, Any]) -> Path:
    """Writes results by name as `evaluate.save` does, with the date, the commit and the versions, and returns the file:
    a path without a suffix is a folder, in which each file is named by its date."""
    import evaluate

    return Path(evaluate.save(path, **results))


def evaluator(task: str) -> Any:
    """`evaluate.evaluator` for a task, which takes a pipeline too: that of evaluate 0.4.6 takes only names and folders
    with transformers 5, in which it looks for TensorFlow's models.

    Args:
        task: "image-classification", for instance.
    """
    import evaluate
    from transformers import Pipeline

    made = evaluate.evaluator(task)
    prepare = made.prepare_pipeline

    def prepare_pipeline(model_or_pipeline: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(model_or_pipeline, Pipeline):
            return model_or_pipeline
        return prepare(model_or_pipeline, *arguments, **options)

    made.prepare_pipeline = prepare_pipeline
    return made

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

# The path of each metric, for `evaluate.load`.
METRICS = {name: str(_FOLDER / name) for name in ("mean_iou", "top_k_accuracy")}


@lru_cache
def load_metric(name: str) -> Any:
    """Loads one of `METRICS` as an `evaluate.EvaluationModule` that keeps its inputs in memory.

    Raises:
        ValueError: there is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; the metrics are {', '.join(METRICS)}.")
    import evaluate  # takes a second, and is installed only with the training extra

    return evaluate.load(METRICS[name], keep_in_memory=True)


def save_results(path: str, results: Mapping[str, Any]) -> Path:
    """Saves results by name like `evaluate.save`, with date, commit and versions, and returns the file. If the path has
    no suffix, it is a folder in which files are named by date."""
    import evaluate

    return Path(evaluate.save(path, **results))


def evaluator(task: str) -> Any:
    """`evaluate.evaluator` for a task, which also accepts a pipeline. With transformers 5, the one in evaluate 0.4.6
    accepts only names and folders, because it looks for TensorFlow's model classes.

    Args:
        task: for instance "image-classification".
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

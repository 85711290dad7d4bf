"""Average precision of detections as defined by COCO, computed by pycocotools.

torchmetrics, which wraps pycocotools, needs torchvision.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np


# Positions in pycocotools' summary: at IoU 0.5 to 0.95, at 0.5, at 0.75; by size; recall with 100 boxes.
METRICS = {"map": 0, "map_50": 1, "map_75": 2, "map_small": 3, "map_medium": 4, "map_large": 5, "mar_100": 8}


def coco() -> Any:
    """pycocotools' classes.

    Raises:
        ValueError: pycocotools is not installed.
    """
    try:
        from pycocotools import coco, cocoeval
    except ImportError as error:
        raise ValueError("Average precision needs pycocotools: pip install pycocotools.") from error
    return coco.COCO, cocoeval.COCOeval


def average_precision(
    detections: Sequence[np.ndarray], objects: Sequence[np.ndarray], num_labels: int
) -> dict[str, float]:
    """COCO's metrics by name, from 0 to 1. Metrics for object sizes that do not occur are left out. An object's size is
    the area of its box; in COCO's own evaluation, it is that of its mask.

    Args:
        detections: for each image, (n, 6): left, top, right and bottom in pixels, score, class id.
        objects: for each image, (n, 6): left, top, right and bottom in pixels, class id, whether it is a crowd.
        num_labels: number of classes.

    Raises:
        ValueError: pycocotools is not installed.
    """
    dataset_class, evaluation_class = coco()
    categories = [{"id": label, "name": str(label)} for label in range(num_labels)]
    images = [{"id": number} for number in range(len(objects))]
    labelled = [
        _annotation(number, row, {"category_id": int(row[4]), "iscrowd": int(row[5])})
        for number, rows in enumerate(objects)
        for row in rows
    ]
    found = [
        _annotation(number, row, {"category_id": int(row[5]), "score": float(row[4]), "iscrowd": 0})
        for number, rows in enumerate(detections)
        for row in rows
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth, predicted = (_dataset(dataset_class, images, categories, rows) for rows in (labelled, found))
        evaluation = evaluation_class(truth, predicted, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = evaluation.stats
    return {name: float(stats[place]) for name, place in METRICS.items() if stats[place] >= 0}


def _annotation(image: int, row: np.ndarray, more: dict[str, Any]) -> dict[str, Any]:
    left, top, right, bottom = (float(value) for value in row[:4])
    width, height = right - left, bottom - top
    return {"image_id": image, "bbox": [left, top, width, height], "area": width * height, **more}


def _dataset(kind: Any, images: list[Any], categories: list[Any], annotations: list[Any]) -> Any:
    # Ids start at 1, because 0 means "not matched" to pycocotools.
    numbered = [{**each, "id": number} for number, each in enumerate(annotations, start=1)]
    made = kind()
    made.dataset = {"images": images, "categories": categories, "annotations": numbered, "info": {}}
    made.createIndex()
    return made

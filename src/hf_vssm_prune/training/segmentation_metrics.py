"""How well pixels are classified: the numbers of `evaluate`'s mean_iou, which would be downloaded at run time."""

import torch
from torch import Tensor


def areas_of_classes(predicted: Tensor, labels: Tensor, num_labels: int, ignore_index: int) -> Tensor:
    """Of one image, for each class the pixels that are rightly of it, those predicted to be, and those labelled so.

    Args:
        predicted: class ids, of the labels' shape.
        labels: class ids; pixels of `ignore_index` do not count.
        num_labels: how many classes there are.
        ignore_index: the id of no class.

    Returns:
        int64 (3, classes).
    """
    counted = labels != ignore_index
    predicted, labels = predicted[counted], labels[counted]
    areas = (predicted[predicted == labels], predicted, labels)
    return torch.stack([torch.bincount(area, minlength=num_labels)[:num_labels] for area in areas])


def segmentation_metrics(areas: Tensor) -> dict[str, float]:
    """Mean intersection over union and mean accuracy, over the classes that there are any pixels of, and the accuracy
    of all pixels.

    Args:
        areas: of all images together, (3, classes), see `areas_of_classes`.
    """
    right, predicted, labelled = areas.double()
    iou = right / (predicted + labelled - right)
    accuracy = right / labelled
    return {
        "mean_iou": float(iou.nanmean()),
        "mean_accuracy": float(accuracy.nanmean()),
        "overall_accuracy": float(right.sum() / labelled.sum()),
    }


def iou_of_classes(areas: Tensor) -> list[float]:
    """Intersection over union of each class; NaN where there is none of it."""
    right, predicted, labelled = areas.double()
    return (right / (predicted + labelled - right)).tolist()

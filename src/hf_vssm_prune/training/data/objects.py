"""Reads and checks the objects of one image, each with a box and a class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from hf_vssm_prune.training.image_steps import ImageError


# An image's file, and its objects as dicts of "bbox" (left, top, width, height), "category" and "iscrowd".
ImageObjects: TypeAlias = tuple[str, list[dict[str, Any]]]

# Names of the fields in data sets on the Hub.
BOX_FIELDS = ("bbox", "boxes", "box", "bboxes")
CLASS_FIELDS = ("category", "categories", "category_id", "label", "labels", "class", "classes", "class_labels")
CROWD_FIELDS = ("iscrowd", "is_crowd", "crowd", "ignore", "difficult", "is_difficult")
# The fraction of a box that must be inside the image: if it is smaller, the box is most likely in another format.
LEAST_INSIDE = 0.5


class Fields(NamedTuple):
    """The fields of a data set's objects: their names and the box format."""

    box: str
    label: str
    crowd: str | None
    corners: bool


@dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Attributes:
        boxes: float32 (n, 4), left, top, width and height in pixels.
        classes: their classes as stored, ids or names.
        crowd: bool (n,): a box around many objects, or one that is too difficult: it is not used for training, and
            detections in it are not counted.
        without_area: number of boxes that were left out because they have zero area.
    """

    boxes: np.ndarray
    classes: list[Any]
    crowd: np.ndarray
    without_area: int = 0


def read_objects(stored: Any, fields: Fields, name: str) -> Objects:
    """The objects of an image.

    Args:
        stored: a dict of lists, or a list of dicts. None: there are no objects.
        fields: fields of the objects.
        name: name of the objects in error messages.

    Raises:
        ImageError: the numbers of classes, crowd flags and boxes differ, or a box is not four numbers or has a negative
            size.
    """
    if not isinstance(stored, Mapping):
        rows = list(stored or ())
        stored = {field: [row.get(field) for row in rows] for field in fields[:3] if field}
    boxes, classes = (list(stored.get(field) or ()) for field in (fields.box, fields.label))
    flags = list((stored.get(fields.crowd) if fields.crowd else None) or [False] * len(boxes))
    for values, what in ((classes, "classes"), (flags, f"values of '{fields.crowd}'")):
        if len(values) != len(boxes):
            raise ImageError(f"{name}: there are {len(boxes)} boxes and {len(values)} {what}.")
    for number, box in enumerate(boxes):
        if box is None or len(box) != 4 or not np.isfinite(np.asarray(box, np.float64)).all():
            raise ImageError(f"{name}: box {number} is {box}; it must be four numbers.")
    array = np.asarray(boxes, np.float32).reshape(-1, 4)
    if fields.corners:
        array = np.concatenate([array[:, :2], array[:, 2:] - array[:, :2]], axis=1)
    for number in np.flatnonzero((array[:, 2:] < 0).any(axis=1))[:1]:
        given = "left, top, right, bottom" if fields.corners else "left, top, width, height"
        raise ImageError(
            f"{name}: box {number} is {boxes[number]}, which has a negative size; boxes are [{given}] in pixels."
        )
    has_area = (array[:, 2:] > 0).all(axis=1)
    kept = np.flatnonzero(has_area)
    own = [classes[number] for number in kept]
    return Objects(array[kept], own, np.array(flags, bool)[kept], int(len(boxes) - len(kept)))


def fit_boxes(boxes: np.ndarray, image_size: tuple[int, int], name: str) -> np.ndarray:
    """Converts boxes to left, top, right and bottom as fractions of the image's sides, clipped to the image.

    Args:
        boxes: (n, 4), left, top, width and height in pixels.
        image_size: (width, height).
        name: name of the image's objects in error messages.

    Raises:
        ImageError: less than half of a box is inside the image.
    """
    sides = np.array(image_size, np.float64)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).astype(np.float64)
    cut = np.clip(corners, 0, np.tile(sides, 2))
    inside = np.prod(cut[:, 2:] - cut[:, :2], axis=1) / np.prod(corners[:, 2:] - corners[:, :2], axis=1)
    for number in np.flatnonzero(~(inside >= LEAST_INSIDE))[:1]:
        raise ImageError(
            f"{name}: box {number} is {boxes[number].tolist()} (left, top, width, height), of which "
            f"{max(0.0, inside[number]):.0%} are inside the image of {image_size[0]} x {image_size[1]} pixels. Are "
            "boxes given as corners (--box_format corners), or for another image size?"
        )
    return cut / np.tile(sides, 2)


def find_fields(names: Sequence[str], corners: bool, column: str) -> Fields:
    """Finds the fields of an objects column for boxes, classes and crowd flags.

    Raises:
        ValueError: there is no field for boxes or for classes.
    """
    found = [next((each for each in known if each in names), None) for known in (BOX_FIELDS, CLASS_FIELDS)]
    if None in found:
        raise ValueError(
            f"Column '{column}' has the fields {', '.join(names)}: one of boxes ({', '.join(BOX_FIELDS)}) and one of "
            f"classes ({', '.join(CLASS_FIELDS)}) are needed."
        )
    crowd = next((each for each in CROWD_FIELDS if each in names), None)
    return Fields(str(found[0]), str(found[1]), crowd, corners)

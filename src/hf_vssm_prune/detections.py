"""Converts the outputs of a detector to detected objects."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


MOST_DETECTIONS = 100  # per image, as in COCO's metrics


class Detections(NamedTuple):
    """The detections in one image, most confident first: boxes (n, 4), left, top, right and bottom in pixels; scores
    (n,) from 0 to 1; class ids (n,)."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def rows(self) -> Tensor:
        """(n, 6): box, score, label."""
        return torch.cat([self.boxes, self.scores[:, None], self.labels[:, None]], dim=1)


def to_corners(boxes: Tensor) -> Tensor:
    """Converts boxes (..., 4) from centre, width and height to left, top, right and bottom."""
    middle, sides = boxes.split(2, dim=-1)
    return torch.cat([middle - sides / 2, middle + sides / 2], dim=-1)


@torch.no_grad()
def find_objects(outputs: Any, sizes: Tensor) -> list[Detections]:
    """The detected objects: in each image, the `MOST_DETECTIONS` pairs of a query and a class with the highest scores.

    Args:
        outputs: outputs with `logits` (batch, queries, classes), whose sigmoid gives probabilities, and `pred_boxes`
            (batch, queries, 4), centre, width and height as fractions of the image's sides.
        sizes: (batch, 2), height and width of the images.
    """
    scores = outputs.logits.float().sigmoid().flatten(1)
    num_labels = outputs.logits.shape[-1]
    scores, places = scores.topk(min(MOST_DETECTIONS, scores.shape[1]))
    sides = sizes.to(scores.device, scores.dtype).flip(1).repeat(1, 2)
    boxes = to_corners(outputs.pred_boxes.float()) * sides[:, None]
    boxes = boxes.gather(1, places.div(num_labels, rounding_mode="floor").unsqueeze(-1).expand(-1, -1, 4))
    return [Detections(*each) for each in zip(boxes, scores, places % num_labels, strict=True)]

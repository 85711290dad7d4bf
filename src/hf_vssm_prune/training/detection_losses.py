"""Losses for detectors in addition to their own loss over matched boxes, as pure functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from torch.utils._pytree import tree_map

from hf_vssm_prune.detections import to_corners
from hf_vssm_prune.precision import at_least_float32


# The weights used by DETR and its successors.
BOX_WEIGHT, GIOU_WEIGHT, CLASS_WEIGHT = 5.0, 2.0, 2.0


@dataclass(frozen=True)
class FiniteLoss:
    """Wraps a detector's own loss, which raises an error if boxes are not finite. Here the loss is then not finite
    either, so that the loop can report where this began.

    Attributes:
        loss_function: transformers' loss.
    """

    loss_function: Callable[..., Any]

    def __call__(self, logits: Tensor, labels: Any, device: Any, pred_boxes: Tensor, *more: Any, **options: Any) -> Any:
        if pred_boxes.isfinite().all():
            return self.loss_function(logits, labels, device, pred_boxes, *more, **options)
        # The losses of some detectors exchange their numbers of boxes, and other processes wait for this one's.
        outputs = tree_map(_replaced, (logits, pred_boxes, more, options))
        self.loss_function(outputs[0], labels, device, outputs[1], *outputs[2], **outputs[3])
        return logits.sum() + pred_boxes.sum(), {}, None


def _replaced(value: Any) -> Any:
    """Other values in the place of a detector's outputs, for which its loss is defined."""
    is_output = isinstance(value, Tensor) and value.is_floating_point()
    return torch.full_like(value, 0.5) if is_output else value


def loss_per_box(outputs: Any, labels: list[dict[str, Tensor]]) -> Tensor:
    """A detector's own loss, averaged over the labelled boxes in the batches of all processes together.

    In transformers, RT-DETR and related models average over the boxes of each process, which gives more weight to boxes
    on processes that have few of them. Deformable DETR already averages as this function does.
    """
    loss = at_least_float32(outputs.loss)
    if not hasattr(outputs, "denoising_meta_values") or PartialState._shared_state == {}:
        return loss
    own = torch.tensor([float(sum(len(each["class_labels"]) for each in labels))], device=loss.device)
    mean = reduce(own.clone(), reduction="mean")
    return loss * (own.clamp(min=1) / mean.clamp(min=1)).squeeze()


def predictions_of(outputs: Any) -> tuple[Tensor, Tensor]:
    """A detector's logits (batch, queries, classes) and boxes (batch, queries, 4), without RT-DETR's denoising queries,
    which come first in training."""
    denoising = getattr(outputs, "denoising_meta_values", None)
    if denoising is None:
        return outputs.logits, outputs.pred_boxes
    count = denoising["dn_num_split"][1]
    return outputs.logits[:, -count:], outputs.pred_boxes[:, -count:]


def detection_distillation(student: Any, teacher: Any, temperature: float = 1.0) -> Tensor:
    """The distance between the detections of two models, averaged over the batch. No gradient flows into the teacher.

    Queries have no common order, so those of student and teacher are matched one to one by class and box, as
    predictions are matched to labels. If one has more queries, those without a partner do not count. Classes are
    compared by T² KL of each class's probability, and boxes by L1 and GIoU. Each query is weighted by the teacher's
    confidence in it, and each image contributes the weighted mean of its queries.

    Args:
        student, teacher: outputs with `logits` and `pred_boxes`, with the same number of classes.
        temperature: T > 0.
    """
    logits, boxes = map(at_least_float32, predictions_of(student))
    own_logits, own_boxes = (at_least_float32(each.detach()) for each in predictions_of(teacher))
    images = []
    for index in range(len(logits)):
        own, order = _match(logits[index].detach(), boxes[index].detach(), own_logits[index], own_boxes[index])
        images.append(
            _distance(
                *(logits[index][order], boxes[index][order]),
                *(own_logits[index][own], own_boxes[index][own]),
                temperature,
            )
        )
    return torch.stack(images).mean()


def _match(logits: Tensor, boxes: Tensor, own_logits: Tensor, own_boxes: Tensor) -> Tensor:
    """Indices (2, matches) of the teacher's queries, ascending, and of the student's queries that match them."""
    from scipy.optimize import linear_sum_assignment  # installed only with the training extra

    classes = torch.cdist(own_logits.sigmoid(), logits.sigmoid(), p=1)
    cost = CLASS_WEIGHT * classes + BOX_WEIGHT * torch.cdist(own_boxes, boxes, p=1)
    finite = torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=1e6)
    return torch.as_tensor(np.stack(linear_sum_assignment(finite.cpu().numpy())), device=logits.device)


def _distance(logits: Tensor, boxes: Tensor, own_logits: Tensor, own_boxes: Tensor, temperature: float) -> Tensor:
    sure = own_logits.sigmoid().amax(dim=1)
    weights = sure / sure.sum()
    target = (own_logits / temperature).sigmoid()
    cross = F.binary_cross_entropy_with_logits(logits / temperature, target, reduction="none")
    least = F.binary_cross_entropy(target, target, reduction="none")
    classes = temperature**2 * (cross - least).sum(dim=1)
    overlap = generalized_overlap(to_corners(boxes), to_corners(own_boxes))
    places = BOX_WEIGHT * (boxes - own_boxes).abs().sum(dim=1) + GIOU_WEIGHT * (1 - overlap)
    return (weights * (CLASS_WEIGHT * classes + places)).sum()


def generalized_overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised intersection over union (arXiv 1902.09630) of each box with the box at the same index.

    Args:
        boxes, others: (n, 4), left, top, right and bottom.
    """
    areas = [(each[:, 2:] - each[:, :2]).prod(dim=1) for each in (boxes, others)]
    corners = torch.maximum(boxes[:, :2], others[:, :2]), torch.minimum(boxes[:, 2:], others[:, 2:])
    shared = (corners[1] - corners[0]).clamp(min=0).prod(dim=1)
    around = torch.maximum(boxes[:, 2:], others[:, 2:]) - torch.minimum(boxes[:, :2], others[:, :2])
    hull, union = around.prod(dim=1), areas[0] + areas[1] - shared
    least = torch.finfo(boxes.dtype).eps
    return shared / union.clamp(min=least) - (hull - union) / hull.clamp(min=least)

"""Loads checkpoints as models for a data set's labels: for training, as teachers, and for evaluation."""

import logging
from collections.abc import Sequence

from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.documentation import see
from hf_vssm_prune.families import ImageClassifier
from hf_vssm_prune.hub.loading import load_classifier, load_config
from hf_vssm_prune.training.image_size import config_at_size, resize_model
from hf_vssm_prune.training.labels import (
    LabelMatch,
    Match,
    match_labels,
    renew_classifier,
    reorder_labels,
    say_difference,
    say_labels,
)
from hf_vssm_prune.training.losses import LossWeights


logger = logging.getLogger(__name__)


def load_model(
    name_or_path: str,
    label_names: Sequence[str],
    drop_path_rate: float = 0.0,
    ignore_mismatched_sizes: bool = False,
    some_labels: bool = False,
    dtype: str = "float32",
) -> ImageClassifier:
    """Loads a checkpoint as a classifier for the data set's labels, in the data set's order.

    Labels are compared by name: see `labels.match_labels`. If the checkpoint has them in another order, the rows of its
    classifier are reordered.

    Args:
        name_or_path: the checkpoint.
        label_names: names of the data set's labels, in the order of their ids.
        drop_path_rate: drop path rate of the model.
        ignore_mismatched_sizes: a checkpoint with other labels gets a new classifier, even if their number is the same.
        some_labels: the data set may have only some of the checkpoint's labels; the others come last.
        dtype: data type of the weights.

    Raises:
        ValueError: it classifies other labels, and `ignore_mismatched_sizes` is not set.
    """
    own_names = load_config(name_or_path).label_names
    match = match_labels(own_names, label_names, some_labels)
    # Names that are just ids do not prevent a requested new classifier.
    renew = match.kind is Match.DIFFERENT or (ignore_mismatched_sizes and match.kind is Match.ADOPTED)
    if renew and not ignore_mismatched_sizes:
        raise ValueError(
            f"{name_or_path} classifies {say_labels(own_names)}, but the data set has {say_labels(label_names)}: "
            f"{say_difference(own_names, label_names)}. For a new classifier, add --ignore_mismatched_sizes, and "
            f"first train the dense model with `hf-vssm-prune train`. {see('other-labels-than-the-data-set')}"
        )
    model = load_classifier(name_or_path, ignore_mismatched_sizes, dtype=dtype, drop_path_rate=drop_path_rate)
    if renew:
        logger.info("%s gets a new classifier for the data set's %s.", name_or_path, say_labels(label_names))
        renew_classifier(model, label_names)
    else:
        _take_labels(model, match, name_or_path, label_names)
    return model


def _take_labels(model: ImageClassifier, match: LabelMatch, name_or_path: str, label_names: Sequence[str]) -> None:
    own_names = model.config.label_names
    reorder_labels(model, match)
    if match.kind is Match.REORDERED:
        logger.info(
            "The classifier of %s has been reordered by name to match the labels of the data set.", name_or_path
        )
    elif match.kind is Match.ADOPTED:
        logger.warning(
            "The labels of %s or of the data set are numbers without names: %r of the data set is treated as %r, and "
            "all other labels are also matched by id.",
            *(name_or_path, label_names[0], own_names[match.ids[0]]),
        )


def load_teacher(
    name_or_path: str,
    student: VisionMambaConfig,
    losses: LossWeights,
    dtype: str = "float32",
    image_size: int | None = None,
) -> ImageClassifier:
    """Loads the dense, frozen model from which a student learns, with weights in `dtype` and, if its logits are used,
    with its labels in the student's order.

    Args:
        name_or_path: the checkpoint.
        student: configuration of the student.
        losses: weights of the losses, which determine what is compared.
        dtype: data type of the teacher's weights.
        image_size: image size of the student, if it is not that of the checkpoint.

    Raises:
        ValueError: its labels, tokens or hidden states are not those of the student, and the losses compare them.
    """
    config = load_config(name_or_path)
    if image_size is not None:
        config = config_at_size(config, image_size)
    match = match_labels(config.label_names, student.label_names) if losses.kd_weight > 0 else None
    if match is not None and match.kind is Match.DIFFERENT:
        raise ValueError(
            f"The teacher {name_or_path} has {say_labels(config.label_names)}, but the model has "
            f"{say_labels(student.label_names)}: {say_difference(config.label_names, student.label_names)}. "
            "Set --kd_weight 0, or name a --teacher_name_or_path with these labels."
        )
    compared = ["model_type", "hidden_size", "num_hidden_layers", "grid_size"]
    for name in compared if losses.alignment_weight > 0 else []:
        if getattr(config, name) != getattr(student, name):
            raise ValueError(
                f"The teacher {name_or_path} has {name} {getattr(config, name)}, but the model has "
                f"{getattr(student, name)}: they cannot be compared."
            )
    teacher = load_classifier(name_or_path, dtype=dtype)
    if image_size is not None:
        resize_model(teacher, image_size)
    teacher.set_token_pruning(None)
    if match is not None:
        _take_labels(teacher, match, name_or_path, student.label_names)
    return teacher

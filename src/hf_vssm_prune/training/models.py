"""Loads checkpoints as models for a data set's labels: for training, as teachers, and for evaluation."""

import logging
from collections.abc import Sequence
from typing import Any

from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.families import ImageClassifier
from hf_vssm_prune.hub.loading import load_classifier, load_config
from hf_vssm_prune.training.image_size import config_at_size, resize_model
from hf_vssm_prune.training.labels import (
    LabelMatch,
    Match,
    match_labels,
    match_or_renew,
    renew_classifier,
    say_difference,
    say_labels,
    take_labels,
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
    match = match_or_renew(name_or_path, own_names, label_names, ignore_mismatched_sizes, some_labels)
    model: Any = load_classifier(name_or_path, ignore_mismatched_sizes, dtype=dtype, drop_path_rate=drop_path_rate)
    if match is None:
        logger.info("%s gets a new classifier for the data set's %s.", name_or_path, say_labels(label_names))
        renew_classifier(model, label_names)
    else:
        take_labels(model, match, name_or_path, label_names, model.classifier.parameters())
    return model


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
    match = match_teacher(name_or_path, config.label_names, student.label_names, losses)
    check_states(name_or_path, config, student, losses, "grid_size")
    teacher: Any = load_classifier(name_or_path, dtype=dtype)
    if image_size is not None:
        resize_model(teacher, image_size)
    teacher.set_token_pruning(None)
    if match is not None:
        take_labels(teacher, match, name_or_path, student.label_names, teacher.classifier.parameters())
    return teacher


def match_teacher(
    name_or_path: str, own_names: Sequence[str], names: Sequence[str], losses: LossWeights
) -> LabelMatch | None:
    """How the student's labels match those of a teacher, given the names of both; None: its logits are not used.

    Raises:
        ValueError: the labels are different.
    """
    if losses.kd_weight == 0:
        return None
    match = match_labels(own_names, names)
    if match.kind is Match.DIFFERENT:
        raise ValueError(
            f"The teacher {name_or_path} has {say_labels(own_names)}, but the model has {say_labels(names)}: "
            f"{say_difference(own_names, names)}. Give a teacher with the model's labels; where there is alignment, a "
            "`kd_weight` of 0 compares only hidden states."
        )
    return match


def check_states(
    name_or_path: str, config: VisionMambaConfig, student: VisionMambaConfig, losses: LossWeights, tokens: str
) -> None:
    """Checks that the hidden states of a teacher can be compared with the student's, if they are.

    Args:
        tokens: the property of both configurations that says where the tokens are.

    Raises:
        ValueError: they cannot.
    """
    for name in ("model_type", "hidden_size", "num_hidden_layers", tokens) if losses.alignment_weight > 0 else ():
        if getattr(config, name) != getattr(student, name):
            raise ValueError(
                f"The teacher {name_or_path} has {name} {getattr(config, name)}, but the model has "
                f"{getattr(student, name)}: they cannot be compared."
            )

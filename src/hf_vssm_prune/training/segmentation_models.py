"""UPerNet on backbones of this package, for a data set's classes: new, on a classifier's weights, or gone on from."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSemanticSegmentation, BaseImageProcessor, UperNetConfig

from hf_vssm_prune.configuration_common import VisionMambaConfig, pruned_config
from hf_vssm_prune.heads import new_dense_model, put_pretrained_backbone
from hf_vssm_prune.hub.loading import load_classifier, load_config, load_dense_model
from hf_vssm_prune.pruned_heads import prunable
from hf_vssm_prune.training.image_size import resize_model
from hf_vssm_prune.training.labels import (
    LabelMatch,
    Match,
    match_labels,
    name_labels,
    say_difference,
    say_labels,
)
from hf_vssm_prune.training.losses import LossWeights


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeadOptions:
    """What a new head is.

    Attributes:
        channels, auxiliary_channels: of the decode head, and of the auxiliary one.
        levels: the layers, counted from 1, whose outputs it takes; None: at each quarter of the depth.
        feature_norm, feature_pyramid: of the backbone.
        ignore_index: the id of pixels that count in no class.
        image_size: (height, width) for which a classifier's position embeddings are laid out anew; None: they stay.
    """

    channels: int = 512
    auxiliary_channels: int = 256
    levels: tuple[int, ...] | None = None
    feature_norm: str = "per_level"
    feature_pyramid: str | None = None
    ignore_index: int = 255
    image_size: tuple[int, int] | None = None

    def config(self, backbone: VisionMambaConfig) -> UperNetConfig:
        """UPerNet for the labels of a classifier's configuration, on a backbone that is otherwise like it."""
        depth = backbone.num_hidden_layers
        levels = self.levels or sorted({max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3, 4)})
        options = {name: value for name, value in backbone.to_dict().items() if name not in OF_CLASSIFIERS}
        options |= {
            "out_features": [f"stage{level}" for level in levels],
            "feature_norm": self.feature_norm,
            "feature_pyramid": self.feature_pyramid,
        }
        return UperNetConfig(
            backbone_config=type(backbone).from_dict(options),
            hidden_size=self.channels,
            auxiliary_channels=self.auxiliary_channels,
            use_auxiliary_head=len(levels) > 2,  # the level that it reads
            loss_ignore_index=self.ignore_index,
            id2label=dict(enumerate(backbone.label_names)),
            label2id={name: label for label, name in enumerate(backbone.label_names)},
        )


# Of a classifier's configuration, what is not a backbone's.
OF_CLASSIFIERS = ("id2label", "label2id", "stage_names", "out_features", "out_indices", "architectures", "problem_type")


@dataclass(frozen=True)
class SegmentationModels:
    """As an Auto class: models that `pruned_heads.prunable` made, from a configuration of UPerNet or of a classifier,
    which gets a head by the options."""

    head: HeadOptions = HeadOptions()

    def from_config(self, config: Any, **options: Any) -> Any:
        """A new model."""
        if pruned_config(config) is config:
            config = self.head.config(config)
        return new_dense_model(config, **options)

    def from_pretrained(self, name_or_path: str, **options: Any) -> Any:
        """A saved model."""
        return prunable(AutoModelForSemanticSegmentation.from_pretrained(name_or_path, **options))


def load_model(
    models: SegmentationModels,
    name_or_path: str,
    label_names: Sequence[str],
    drop_path_rate: float = 0.0,
    ignore_mismatched_sizes: bool = False,
    some_labels: bool = False,
) -> Any:
    """A checkpoint as a model that segments by the data set's classes, in the data set's order, in float32.

    A classifier becomes the backbone under a new head. Of a segmentation model the classes are compared by name, as
    `models.load_model` compares labels.

    Raises:
        ValueError: it segments other classes, and must not get new classifiers; or it is a classifier, and is to be
            evaluated.
    """
    config = load_config(name_or_path)
    if pruned_config(config) is config:
        if some_labels:
            raise ValueError(
                f"{name_or_path} is an image classifier: train it with --task semantic-segmentation before it segments."
            )
        return _on_classifier(models, name_or_path, label_names, drop_path_rate)
    names = names_of(config)
    match = match_labels(names, label_names, some_labels)
    renew = match.kind is Match.DIFFERENT or (ignore_mismatched_sizes and match.kind is Match.ADOPTED)
    if renew and not ignore_mismatched_sizes:
        raise ValueError(
            f"{name_or_path} segments {say_labels(names)}, the data set has {say_labels(label_names)}: "
            f"{say_difference(names, label_names)}. For new classifiers give --ignore_mismatched_sizes, and first "
            "train the dense model with `hf-vssm-prune train`."
        )
    config.backbone_config.drop_path_rate = drop_path_rate
    model = prunable(load_dense_model(name_or_path, config=config, dtype="float32"))
    if renew:
        _renew_classifiers(model, label_names)
    else:
        _take_labels(model, match, name_or_path)
    return model


def names_of(config: Any) -> list[str]:
    """The classes' names in the order of their ids."""
    return [config.id2label[label] for label in range(config.num_labels)]


def _on_classifier(
    models: SegmentationModels, name_or_path: str, label_names: Sequence[str], drop_path_rate: float
) -> Any:
    classifier = load_classifier(name_or_path, dtype="float32")
    config = copy.deepcopy(classifier.config)
    config.token_pruning, config.drop_path_rate = None, drop_path_rate
    name_labels(config, label_names)
    logger.info("%s becomes the backbone under a new head for %s.", name_or_path, say_labels(label_names))
    model = put_pretrained_backbone(models.from_config(config), classifier).eval()
    if models.head.image_size is not None:
        resize_model(model, models.head.image_size)
    return model


def classifiers_of(model: Any) -> list[nn.Conv2d]:
    """The convolutions that put out a channel for each class."""
    heads = (model.decode_head, model.auxiliary_head)
    return [head.classifier for head in heads if head is not None]


@torch.no_grad()
def _take_labels(model: Any, match: LabelMatch, name_or_path: str) -> None:
    own = names_of(model.config)
    rest = [label for label in range(len(own)) if label not in set(match.ids)]
    order = [*match.ids, *rest]
    if order != list(range(len(own))):
        for classifier in classifiers_of(model):
            for parameter in classifier.parameters():
                parameter.copy_(parameter[order].clone())
        logger.info("The classes of %s have been reordered to the data set's, by name.", name_or_path)
    name_labels(model.config, [*match.names, *(own[label] for label in rest)])


def _renew_classifiers(model: Any, label_names: Sequence[str]) -> None:
    name_labels(model.config, label_names)
    for head in (model.decode_head, model.auxiliary_head):
        if head is not None:
            head.classifier = nn.Conv2d(head.channels, len(label_names), kernel_size=1)
            head.classifier.apply(model._init_weights)


def load_teacher(
    name_or_path: str,
    student: Any,
    losses: LossWeights,
    dtype: str = "float32",
) -> Any:
    """The dense, frozen model from which a student learns; see `models.load_teacher`.

    Raises:
        ValueError: its classes, tokens or hidden states are not those of the student, and the losses compare them.
    """
    config = load_config(name_or_path)
    if pruned_config(config) is config:
        raise ValueError(f"The teacher {name_or_path} is an image classifier; a segmentation model is needed.")
    names, wanted = names_of(config), names_of(student)
    match = match_labels(names, wanted)
    if losses.kd_weight > 0 and match.kind is Match.DIFFERENT:
        raise ValueError(
            f"The teacher {name_or_path} has {say_labels(names)}, the model {say_labels(wanted)}: "
            f"{say_difference(names, wanted)}. Set --kd_weight 0, or name a --teacher_name_or_path with these classes."
        )
    own, students = config.backbone_config, student.backbone_config
    compared = ("model_type", "hidden_size", "num_hidden_layers", "patch_spacing")
    for name in compared if losses.alignment_weight > 0 else ():
        if getattr(own, name) != getattr(students, name):
            raise ValueError(
                f"The teacher {name_or_path} has {name} {getattr(own, name)}, the model {getattr(students, name)}: "
                "they cannot be compared."
            )
    teacher = prunable(load_dense_model(name_or_path, config=config, dtype=dtype))
    teacher.set_token_pruning(None)
    if match.kind is not Match.DIFFERENT:
        _take_labels(teacher, match, name_or_path)
    return teacher


def segmentation_processor(image_processor: BaseImageProcessor, short_side: int | None) -> BaseImageProcessor:
    """An image processor whose outputs transformers' pipeline for segmentation understands, with the statistics of
    another; one that is of this kind already stays as it is unless a size is given.

    Args:
        image_processor: of a classifier, or of a segmentation model.
        short_side: pixels to which images are resized, the longer side at most four times as many; None: images of a
            classifier's data stay as large as they are.
    """
    segments = hasattr(image_processor, "post_process_semantic_segmentation")
    if segments and short_side is None:
        return image_processor
    # Without torchvision transformers warns as soon as this is imported.
    from transformers import SegformerImageProcessor

    values = image_processor.to_dict()
    kept = ("do_normalize", "image_mean", "image_std", "do_rescale", "rescale_factor")
    options = {name: values[name] for name in kept if values.get(name) is not None}
    if short_side is None:
        return SegformerImageProcessor(do_resize=False, **options)
    size = {"shortest_edge": short_side, "longest_edge": 4 * short_side}
    return SegformerImageProcessor(do_resize=True, size=size, **options)

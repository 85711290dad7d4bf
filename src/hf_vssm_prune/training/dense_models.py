"""transformers' segmentation and detection models on this package's backbones, for a data set's classes. They are
created from a configuration, from a classifier's weights, or from a saved model of the same kind."""

import copy
import logging
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from torch import nn

from hf_vssm_prune.configuration_common import VisionMambaConfig, has_head
from hf_vssm_prune.heads import new_dense_model, put_pretrained_backbone
from hf_vssm_prune.hub.loading import load_classifier, load_config, load_dense_model
from hf_vssm_prune.label_maps import names_by_id
from hf_vssm_prune.pruned_heads import prunable
from hf_vssm_prune.training.image_size import resize_model
from hf_vssm_prune.training.image_steps import NORMALIZATION
from hf_vssm_prune.training.labels import match_or_renew, name_labels, say_labels, take_labels
from hf_vssm_prune.training.losses import LossWeights
from hf_vssm_prune.training.models import check_states, match_teacher


logger = logging.getLogger(__name__)

# Entries of a classifier's configuration that a backbone does not have.
OF_CLASSIFIERS = ("id2label", "label2id", "stage_names", "out_features", "out_indices", "architectures", "problem_type")


class NewHead(Protocol):
    """Options of a new head.

    Attributes:
        image_size: (height, width) of a new model's images, to which a classifier's position embeddings are resized;
            None: those of the classifier.
    """

    @property
    def image_size(self) -> tuple[int, int] | None: ...

    def config(self, backbone: VisionMambaConfig) -> Any:
        """The configuration of a complete model with the labels of a classifier's configuration and an otherwise equal
        backbone."""


class DenseModels:
    """Like an Auto class: models created by `pruned_heads.prunable`, from the configuration of such a model or of a
    classifier. A classifier gets a head according to the options.

    Attributes:
        task: name of the task that trains the models.
        kind, verb: what error messages call such a model, and what it does.
        auto_class: transformers' Auto class.
        class_layers: pattern for the names of the parameters with one row per class.
        head: options of a new head.
    """

    task: ClassVar[str]
    kind: ClassVar[str]
    verb: ClassVar[str]
    auto_class: ClassVar[Any]
    class_layers: ClassVar[re.Pattern[str]]
    head: NewHead

    def from_config(self, config: Any, **options: Any) -> Any:
        """A new model. For a classifier's configuration, its images have the size of the head's."""
        if not has_head(config):
            config = self.head.config(config)
            if self.head.image_size is not None:
                config.backbone_config.image_size = self.head.image_size
        return self.prepare(new_dense_model(config, **options))

    def from_pretrained(self, name_or_path: str, **options: Any) -> Any:
        """A saved model."""
        return self.prepare(self.auto_class.from_pretrained(name_or_path, **options))

    def prepare(self, model: Any) -> Any:
        """Prepares one of transformers' models for training and evaluation."""
        return prunable(model)

    def class_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that have one row per class, by name."""
        return {name: each for name, each in model.named_parameters() if self.class_layers.search(name)}


def backbone_of_levels(
    backbone: VisionMambaConfig, levels: Sequence[int], feature_norm: str, feature_pyramid: str | None
) -> VisionMambaConfig:
    """A backbone's configuration from a classifier's. The outputs of the given layers, counted from 1, are its feature
    maps.

    Raises:
        ValueError: there are not that many layers.
    """
    if max(levels) > backbone.num_hidden_layers:
        raise ValueError(
            f"`levels` are {list(levels)}, but the backbone has {backbone.num_hidden_layers} layers, counted from 1."
        )
    options = {name: value for name, value in backbone.to_dict().items() if name not in OF_CLASSIFIERS}
    options |= {
        "out_features": [f"stage{level}" for level in levels],
        "feature_norm": feature_norm,
        "feature_pyramid": feature_pyramid,
    }
    return type(backbone).from_dict(options)


def quarters(depth: int, count: int = 4) -> list[int]:
    """The layers, counted from 1, at the ends of the last `count` quarters of the depth; fewer if there are not enough
    layers."""
    return sorted({max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3, 4)})[-count:]


def load_model(
    models: DenseModels,
    name_or_path: str,
    label_names: Sequence[str],
    drop_path_rate: float = 0.0,
    ignore_mismatched_sizes: bool = False,
    some_labels: bool = False,
    dtype: str = "float32",
) -> Any:
    """Loads a checkpoint as a model of the data set's classes, in the data set's order, with weights in `dtype`.

    A classifier becomes the backbone, in float32, under a new head. If the checkpoint has a head, its classes are
    compared by name, as `models.load_model` compares labels.

    Raises:
        ValueError: it has other classes and `ignore_mismatched_sizes` is not set; it is a classifier and is to be
            evaluated; it is a model for another task; or its head is unknown.
    """
    config = load_config(name_or_path)
    if not has_head(config):
        if some_labels:
            raise ValueError(
                f"{name_or_path} is an image classifier: train it with --task {models.task} before it {models.verb}."
            )
        return _on_classifier(models, name_or_path, label_names, drop_path_rate)
    check_kind(models, config, name_or_path)
    own_names = names_by_id(config.id2label)
    match = match_or_renew(name_or_path, own_names, label_names, ignore_mismatched_sizes, some_labels)
    config.backbone_config.drop_path_rate = drop_path_rate
    model = _load_prepared(models, name_or_path, config, dtype)
    if match is None:
        logger.info("%s gets new layers for the data set's classes, %s.", name_or_path, say_labels(label_names))
        return _with_new_classes(models, model, label_names)
    take_labels(model, match, name_or_path, label_names, models.class_parameters(model).values())
    return model


def _load_prepared(models: DenseModels, name_or_path: str, config: Any, dtype: str) -> Any:
    model = models.prepare(load_dense_model(name_or_path, config=config, dtype=dtype))
    # A head with other layers may also have other outputs, such as a class for "no object".
    if not models.class_parameters(model):
        raise ValueError(
            f"{name_or_path} is a {config.model_type!r} model, which --task {models.task} cannot train or evaluate: "
            "its layers with one row per class are unknown."
        )
    return model


def check_kind(models: DenseModels, config: Any, name_or_path: str) -> None:
    """Raises an error for a model of another task.

    Raises:
        ValueError: it is one.
    """
    if type(config) not in models.auto_class._model_mapping:
        raise ValueError(f"{name_or_path} is a {config.model_type!r} model; it must be a {models.kind}.")


def _on_classifier(models: DenseModels, name_or_path: str, label_names: Sequence[str], drop_path_rate: float) -> Any:
    classifier = load_classifier(name_or_path, dtype="float32")
    config = copy.deepcopy(classifier.config)
    config.token_pruning, config.drop_path_rate = None, drop_path_rate
    name_labels(config, label_names)
    logger.info("%s becomes the backbone under a new head for %s.", name_or_path, say_labels(label_names))
    model = put_pretrained_backbone(models.from_config(models.head.config(config)), classifier).eval()
    if models.head.image_size is not None:
        resize_model(model, models.head.image_size)
    return model


def _with_new_classes(models: DenseModels, model: Any, label_names: Sequence[str]) -> Any:
    """A new model for other classes, with all weights of the given model except those with one row per class."""
    config = copy.deepcopy(model.config)
    name_labels(config, label_names)
    new = models.from_config(config).eval()
    # The same tensor may have several names.
    left_out = {each.data_ptr() for each in models.class_parameters(model).values()}
    kept = {name: each for name, each in model.state_dict().items() if each.data_ptr() not in left_out}
    new.load_state_dict(kept, strict=False)
    return new


def load_teacher(
    models: DenseModels,
    name_or_path: str,
    student: Any,
    losses: LossWeights,
    dtype: str = "float32",
) -> Any:
    """Loads the dense, frozen model from which a student learns; see `models.load_teacher`.

    Raises:
        ValueError: its classes, tokens or hidden states differ from the student's, and the losses compare them.
    """
    config = load_config(name_or_path)
    if not has_head(config):
        raise ValueError(f"The teacher {name_or_path} is an image classifier; it must be a {models.kind}.")
    check_kind(models, config, f"The teacher {name_or_path}")
    label_names = names_by_id(student.id2label)
    match = match_teacher(name_or_path, names_by_id(config.id2label), label_names, losses)
    check_states(name_or_path, config.backbone_config, student.backbone_config, losses, "patch_spacing")
    teacher = _load_prepared(models, name_or_path, config, dtype)
    teacher.set_token_pruning(None)
    if match is not None:
        take_labels(teacher, match, name_or_path, label_names, models.class_parameters(teacher).values())
    return teacher


def statistics_of(image_processor: Any) -> dict[str, Any]:
    """How an image processor rescales and normalises, to be copied to another one."""
    values = image_processor.to_dict()
    return {name: values[name] for name in NORMALIZATION if values.get(name) is not None}

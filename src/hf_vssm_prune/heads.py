"""transformers' dense prediction models with backbones of this package: creating and loading them, and giving them
pretrained weights."""

import math
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    PreTrainedConfig,
)

from .modeling_common import TokenPruningMixin, is_pruning_parameter
from .pruned_heads import backbone_of, prunable
from .token_pruning import split_token


# In the order in which they are tried for a configuration. DETR is first of all a detector.
DENSE_AUTO_CLASSES: tuple[Any, ...] = (
    AutoModelForSemanticSegmentation,
    AutoModelForObjectDetection,
    AutoModelForUniversalSegmentation,
)
# Parts that a backbone has and a classifier does not.
OF_BACKBONES = ("hidden_states_norms.", "feature_pyramid.")


def auto_class_of(config: PreTrainedConfig) -> Any:
    """transformers' Auto class for dense prediction models of a configuration.

    Raises:
        ValueError: there is none.
    """
    found = next((each for each in DENSE_AUTO_CLASSES if type(config) in each._model_mapping), None)
    if found is None:
        raise ValueError(f"transformers has no model for segmentation or detection of type {config.model_type!r}.")
    return found


def new_dense_model(config: PreTrainedConfig, **options: Any) -> Any:
    """A new model with a head and random weights, passed through `pruned_heads.prunable`.

    Args:
        config: a transformers configuration such as `UperNetConfig`, with a configuration of this package as
            `backbone_config`.
        options: options of transformers' `from_config`, such as `dtype`.

    Raises:
        ValueError: there is no such model, or its backbone is not of this package.
    """
    return prunable(auto_class_of(config).from_config(config, **options))


def check_image_size(config: PreTrainedConfig, height: int, width: int) -> None:
    """Raises an error for images of which a detector like RT-DETR cannot make its feature maps, or not enough cells for
    its queries.

    Args:
        config: configuration of a model with a head.
        height, width: size of the images in pixels.

    Raises:
        ValueError: a side is not a multiple of the largest stride, or there are more queries than cells.
    """
    strides = getattr(config, "feat_strides", None)
    if strides is None:
        return
    if height % max(strides) or width % max(strides):
        raise ValueError(
            f"The images are {height} x {width} pixels: {config.model_type} needs multiples of {max(strides)}."
        )
    cells = sum((height // stride) * (width // stride) for stride in strides)
    if cells < config.num_queries:
        raise ValueError(
            f"The images are {height} x {width} pixels, for which the feature maps have {cells} cells. They are too "
            f"small for the {config.num_queries} queries of this {config.model_type}, each of which starts at a cell."
        )


@torch.no_grad()
def put_pretrained_backbone(model: nn.Module, pretrained: TokenPruningMixin) -> Any:
    """Puts the weights of a classifier, or of another model of this package, into the backbone of a model with a head,
    which transformers creates with random weights.

    Norms of levels and a pyramid, which a classifier does not have, are unchanged, and so are parameters of pruning
    that it does not have. If the backbone has no class token, that of the classifier is left out, with its position
    embedding.

    Returns:
        The model.

    Raises:
        ValueError: the two are of different types, shapes or image sizes; the first tensors that differ are named.
    """
    backbone, weights = backbone_of(model), pretrained.base_model.state_dict()
    if getattr(backbone.config, "use_cls_token", True) is False:
        _leave_out_class_token(weights, pretrained.config)
    own = {
        name: tensor
        for name, tensor in backbone.state_dict().items()
        if not name.startswith(OF_BACKBONES) and (name in weights or not is_pruning_parameter(name))
    }
    if pretrained.base_model_prefix != backbone.base_model_prefix:
        raise ValueError(
            f"the pretrained model is of type {pretrained.config.model_type!r}, but the backbone is of type "
            f"{backbone.config.model_type!r}."
        )
    differing = [
        f"{name} is {list(weights[name].shape) if name in weights else 'missing'} in the pretrained model and "
        f"{list(tensor.shape)} in the backbone"
        for name, tensor in own.items()
        if name not in weights or weights[name].shape != tensor.shape
    ]
    if differing:
        raise ValueError(f"the pretrained model does not fit the backbone: {'; '.join(differing[:3])}.")
    backbone.load_state_dict({name: weights[name] for name in own}, strict=False)
    return model


def _leave_out_class_token(weights: dict[str, torch.Tensor], config: Any) -> None:
    """Removes from a base model's tensors those of its class token, if it has one."""
    if weights.pop("embeddings.class_token", None) is not None:
        name, place = "embeddings.position_embeddings", config.cls_token_id(math.prod(config.grid_size))
        weights[name], _ = split_token(weights[name], place)

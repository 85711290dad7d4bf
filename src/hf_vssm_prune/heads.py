"""transformers' models of dense prediction on backbones of this package: made, opened, given pretrained weights."""

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

from .modeling_common import TokenPruningMixin
from .pruned_heads import backbone_of, prunable
from .token_pruning import split_token


# In the order in which they are asked for a model of a configuration.
DENSE_AUTO_CLASSES: tuple[Any, ...] = (
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    AutoModelForObjectDetection,
)
# What a backbone has and a classifier has not.
OF_BACKBONES = ("hidden_states_norms.", "feature_pyramid.")


def auto_class_of(config: PreTrainedConfig) -> Any:
    """transformers' Auto class of dense prediction that has models of a configuration.

    Raises:
        ValueError: there is none.
    """
    found = next((each for each in DENSE_AUTO_CLASSES if type(config) in each._model_mapping), None)
    if found is None:
        raise ValueError(f"transformers has no model for segmentation or detection of type {config.model_type!r}.")
    return found


def new_dense_model(config: PreTrainedConfig, **options: Any) -> Any:
    """A new model with a head, of random weights, as `pruned_heads.prunable` makes it.

    Args:
        config: of transformers, such as `UperNetConfig`, with a configuration of this package as `backbone_config`.
        options: of transformers' `from_config`, such as `dtype`.

    Raises:
        ValueError: there is no such model, or its backbone is another.
    """
    return prunable(auto_class_of(config).from_config(config, **options))


@torch.no_grad()
def put_pretrained_backbone(model: nn.Module, pretrained: TokenPruningMixin) -> Any:
    """Puts the weights of a classifier, or of another model of this package, into the backbone of a model with a head:
    transformers makes it with random ones.

    Norms of levels and a pyramid, which a classifier has not, stay as they are. A class token that the backbone is
    without is left out, with the embedding of its place.

    Returns:
        The model.

    Raises:
        ValueError: the two are of different shapes, or laid out for another image size; the first tensors that differ
            are named.
    """
    backbone, weights = backbone_of(model), pretrained.base_model.state_dict()
    if getattr(backbone.config, "use_cls_token", True) is False:
        _leave_out_class_token(weights, pretrained.config)
    own = {name: tensor for name, tensor in backbone.state_dict().items() if not name.startswith(OF_BACKBONES)}
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
    """Takes from a base model's tensors what belongs to its class token, if it has one."""
    if weights.pop("embeddings.class_token", None) is not None:
        name, place = "embeddings.position_embeddings", config.cls_token_id(math.prod(config.grid_size))
        weights[name], _ = split_token(weights[name], place)

"""Vim with token pruning.

The model is from "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model"
(arXiv 2401.09417), pruned as in "Exploring Token Pruning in Vision State Space Models" (ToP, arXiv 2409.18962).
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .configuration_vim import VimConfig
from .modeling_backbone import FeatureMaps
from .modeling_bidirectional import (
    BidirectionalMixer,
    BidirectionalModel,
    BidirectionalPreTrainedModel,
    DirectedScan,
)
from .modeling_common import Classifier, image_classifier, init_as_in_torch


logger = logging.getLogger(__name__)


class VimPreTrainedModel(BidirectionalPreTrainedModel):
    config: VimConfig
    config_class = VimConfig
    base_model_prefix = "vim"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As in the official code, the projections of patches and in the mixers differ from VideoMamba's."""
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.lecun_normal_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, BidirectionalMixer):
            init_as_in_torch(module.in_proj.weight)
        elif isinstance(module, DirectedScan):
            init_as_in_torch(module.x_proj.weight)

    @classmethod
    def options_of_official(cls, official: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
        _, num_channels, _, patch_size = official.shape("patch_embed.proj.weight", 4)
        overlap = {"patch_stride": cls._stride_of_official(official, overrides, patch_size)}
        layout = cls._layout_of_official(official, {**overlap, **overrides}, num_channels, patch_size)
        return layout | {"num_labels": official.shape("head.weight", 2)[0]}

    @staticmethod
    def _stride_of_official(official: Any, overrides: Mapping[str, Any], patch_size: int) -> int:
        """The distance between patches, unless it is given: less than `patch_size` if the position embeddings then fit
        images of the given size, or of 224 pixels, the size of all published models. This is logged."""
        num_patches, given = official.shape("pos_embed", 3)[1] - 1, overrides.get("image_size")
        size, side = VimConfig.image_size if given is None else given, math.isqrt(num_patches)
        if "patch_stride" not in overrides and isinstance(size, int) and side * side == num_patches:
            for stride in range(1, patch_size):
                if patch_size % stride == 0 and (side - 1) * stride + patch_size == size:
                    apart = side * patch_size
                    logger.warning(
                        "The checkpoint has %d x %d patches. They are taken to overlap, with one every %d pixels in "
                        "images of %d x %d, as in the published models of finer granularity. If they lie next to each "
                        "other in images of %d x %d, give `patch_stride` %d.",
                        *(side, side, stride, size, size, apart, apart, patch_size),
                    )
                    return stride
        return patch_size


class VimModel(VimPreTrainedModel, BidirectionalModel):
    """Vim without a head: `last_hidden_state` is normalised, and `pooler_output` is its class token, or the mean of the
    remaining tokens if there is none."""


class VimForImageClassification(VimPreTrainedModel, Classifier):
    """Vim with a linear classifier on the class token, or on the mean of the remaining tokens if there is none."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vim = VimModel(config)
        self.classifier = image_classifier(config)
        self.post_init()


class VimBackbone(FeatureMaps, VimModel):
    """Vim as a feature extractor: see `FeatureMaps`."""


__all__ = ["VimBackbone", "VimForImageClassification", "VimModel", "VimPreTrainedModel"]

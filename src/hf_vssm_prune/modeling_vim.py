"""Vim with token pruning.

The model is from "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model"
(arXiv 2401.09417), pruned as in "Exploring Token Pruning in Vision State Space Models" (ToP, arXiv 2409.18962).
"""

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
        official.shape("pos_embed", 3)  # needed for any image size
        layout = cls._layout_of_official(official, overrides, num_channels, patch_size)
        return layout | {"num_labels": official.shape("head.weight", 2)[0]}


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

"""Toy's models, built from parts of other families, and the format of its published files."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_vssm_prune.modeling_bidirectional import (
    BidirectionalEmbeddings,
    BidirectionalModel,
    BidirectionalPreTrainedModel,
)
from hf_vssm_prune.modeling_common import Classifier, image_classifier

from .configuration_toy import ToyConfig


class ToyEmbeddings(BidirectionalEmbeddings):
    """Like Vim's, for videos of the configured size: patches of all frames, frame by frame."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.position_embeddings = nn.Parameter(torch.zeros(1, math.prod(config.grid_size) + 1, config.hidden_size))

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        """Embeds `pixel_values` (batch, frames, channels, height, width)."""
        size = self.config.input_size_of(pixel_values.shape)
        if pixel_values.ndim != 5 or size != self.config.input_size:
            raise ValueError(f"`pixel_values` has shape {tuple(pixel_values.shape)}: not {self.config.input_size}.")
        frames = self.projection(pixel_values.flatten(0, 1).to(self.projection.weight.dtype))
        patches = frames.flatten(2).transpose(1, 2).unflatten(0, pixel_values.shape[:2]).flatten(1, 2)
        return torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1) + self.position_embeddings


class ToyPreTrainedModel(BidirectionalPreTrainedModel):
    config: ToyConfig
    config_class = ToyConfig
    base_model_prefix = "toy"
    input_modalities = ["video"]
    embeddings_class = ToyEmbeddings
    # The format of the authors' files, which use our names except for the prefixes.
    official_names = [(r"toy\.(.+)", r"body.\1"), (r"classifier\.(.+)", r"top.\1")]
    official_marks = ("body.embeddings.class_token", "top.weight")
    official_weight_keys = ("toy",)
    official_prefixes = ("encoder.",)
    official_ignored = ("distill_head.",)

    @classmethod
    def official_weight_key(cls, config: ToyConfig) -> str:
        return "toy"

    @classmethod
    def options_of_official(cls, official: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
        hidden_size, num_channels, patch_size, _ = official.shape("body.embeddings.projection.weight", 4)
        _, num_tokens, _ = official.shape("body.embeddings.position_embeddings", 3)
        scan = "body.layers.0.mixer.forward_scan"
        width, state_size = official.shape(f"{scan}.A_log", 2)
        num_frames = overrides.get("num_frames", 3)
        layers = {name.split(".")[2] for name in official if name.startswith("body.layers.")}
        return {
            "image_size": official.square_side((num_tokens - 1) // num_frames) * patch_size,
            "num_frames": num_frames,
            "patch_size": patch_size,
            "num_channels": num_channels,
            "hidden_size": hidden_size,
            "num_hidden_layers": len(layers),
            "state_size": state_size,
            "expand": width // hidden_size,
            "num_labels": official.shape("top.weight", 2)[0],
        }

    @classmethod
    def complete_official(
        cls, config: ToyConfig, official: dict[str, Tensor], expected: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """In old files, the class token lacks the batch and token axes."""
        return {
            name: tensor.view(1, 1, -1) if name == "body.embeddings.class_token" else tensor
            for name, tensor in official.items()
        }


class ToyModel(ToyPreTrainedModel, BidirectionalModel):
    """Without a head."""


class ToyForVideoClassification(ToyPreTrainedModel, Classifier):
    """With a linear classifier on the class token."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.toy = ToyModel(config)
        self.classifier = image_classifier(config)
        self.post_init()


__all__ = ["ToyForVideoClassification", "ToyModel", "ToyPreTrainedModel"]

"""VideoMamba with token pruning.

The models for videos and for images are from "VideoMamba: State Space Model for Efficient Video Understanding" (arXiv
2403.06977), pruned as in "Exploring Token Pruning in Vision State Space Models" (ToP, arXiv 2409.18962).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_videomamba import VideoMambaConfig
from .modeling_backbone import FeatureMaps
from .modeling_bidirectional import BidirectionalEmbeddings, BidirectionalModel, BidirectionalPreTrainedModel
from .modeling_common import Classifier, image_classifier, resize_position_embeddings


class VideoMambaEmbeddings(BidirectionalEmbeddings):
    """Converts pixel values to tokens: a projection of patches or tubelets, a class token before all of them, and
    embeddings of their positions in the frame and, for videos, in time."""

    config: VideoMambaConfig

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__(config)
        if config.num_frames is not None:
            self.temporal_embeddings = nn.Parameter(torch.zeros(1, config.grid_size[0], config.hidden_size))

    def _make_projection(self, config: VideoMambaConfig) -> nn.Conv2d | nn.Conv3d:  # type: ignore[override]
        if config.num_frames is None:
            return super()._make_projection(config)
        tubelet = config.tubelet_size, config.patch_size, config.patch_size
        return nn.Conv3d(config.num_channels, config.hidden_size, tubelet, tubelet)

    @property
    def _one_patch(self) -> str:
        frames = "" if self.config.num_frames is None else f"{self.config.tubelet_size} frames of "
        return f"one patch of {frames}{self.config.patch_size} x {self.config.patch_size} pixels"

    def _project(self, pixel_values: Tensor) -> Tensor:
        return self.projection(pixel_values if self.config.num_frames is None else pixel_values.transpose(1, 2))

    def _positions_on_grid(self, positions: Tensor) -> Tensor:
        if self.config.num_frames is None:
            return positions
        return (positions.unsqueeze(1) + self.temporal_embeddings.unsqueeze(2)).flatten(1, 2)


class VideoMambaPreTrainedModel(BidirectionalPreTrainedModel):
    config: VideoMambaConfig
    config_class = VideoMambaConfig
    base_model_prefix = "videomamba"
    embeddings_class = VideoMambaEmbeddings
    input_modalities = ["video", "image"]
    _no_split_modules = ["VideoMambaEmbeddings", "BidirectionalLayer"]

    # The format of published weights, see `conversion.OfficialFormat`.
    official_names = [
        (r"videomamba\.embeddings\.temporal_embeddings", r"temporal_pos_embedding"),
        *BidirectionalPreTrainedModel.official_names,
    ]
    official_signs = ("temporal_pos_embedding",)
    official_weight_keys = ("model", "module")
    official_prefixes = ("backbone.", "encoder.")
    # From self-distillation, and from masked pretraining.
    official_ignored = ("distill_head.", "clip_decoder.")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As in the official code, temporal embeddings start at 0."""
        super()._init_weights(module)
        if isinstance(module, VideoMambaEmbeddings) and module.config.num_frames is not None:
            init.zeros_(module.temporal_embeddings)

    @classmethod
    def official_weight_key(cls, config: VideoMambaConfig) -> str | None:  # type: ignore[override]
        return "model" if config.num_frames is None else None

    @classmethod
    def options_of_official(cls, official: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """For an image model's tensors and a number of frames, the options of a video model; see
        `complete_official`."""
        projection = official.get("patch_embed.proj.weight")
        is_video = projection is not None and projection.ndim == 5
        _, num_channels, *tubelet, _, patch_size = official.shape("patch_embed.proj.weight", 5 if is_video else 4)
        options = {"tubelet_size": tubelet[0] if is_video else 1, "num_frames": None}
        if is_video:
            options["num_frames"] = official.shape("temporal_pos_embedding", 3)[1] * options["tubelet_size"]
        if "head.weight" in official:
            options["num_labels"] = official.shape("head.weight", 2)[0]
        return cls._layout_of_official(official, overrides, num_channels, patch_size) | options

    @classmethod
    def complete_official(  # type: ignore[override]
        cls, config: VideoMambaConfig, official: Any, expected: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Published tensors, adapted to the configuration.

        The weights of an image model are converted to those of a video model as in the official code: the image's
        projection is used for the middle frame of a tubelet, the temporal embeddings are 0, and the head is new, as it
        is if a file has none. Position embeddings are resized to the configuration's image size, temporal ones to its
        number of frames.
        """
        official = type(official)(official)
        if "norm.weight" in official:  # from masked pretraining
            official.setdefault("norm_f.weight", official.pop("norm.weight"))
        projection = official.get("patch_embed.proj.weight")
        if projection is not None and projection.ndim == 4 and config.num_frames is not None:
            official["patch_embed.proj.weight"] = _in_middle_frame(projection, config.tubelet_size)
            official["temporal_pos_embedding"] = projection.new_zeros(expected["temporal_pos_embedding"].shape)
            for name in ("head.weight", "head.bias"):
                official.pop(name, None)
        if not {"head.weight", "head.bias"} & official.keys() and config.num_labels:
            official |= _new_head(config, official.get("norm_f.weight"))
        if (positions := official.get("pos_embed")) is not None and positions.ndim == 3:
            official["pos_embed"] = cls._resized_positions(config, official, positions)
        if (times := official.get("temporal_pos_embedding")) is not None and times.ndim == 3 and config.num_frames:
            laid_out, wanted = (times.shape[1], 1, 1), (config.grid_size[0], 1, 1)
            official["temporal_pos_embedding"] = resize_position_embeddings(times, laid_out, wanted, True)
        return official

    @staticmethod
    def _resized_positions(config: VideoMambaConfig, official: Any, positions: Tensor) -> Tensor:
        grid = config.grid_size[-2:]
        cls_token, patches = positions.tensor_split([1], dim=1)
        if patches.shape[1] == math.prod(grid):
            return positions
        side = official.square_side(patches.shape[1])
        return torch.cat([cls_token, resize_position_embeddings(patches, (side, side), grid, True)], dim=1)

    def _check_modality(self, expected: str) -> None:
        """Rejects a configuration for another kind of input."""
        if self.config.modality != expected:
            says = "a number of frames" if expected == "video" else "None"
            raise ValueError(
                f"`num_frames` is {self.config.num_frames}: {type(self).__name__} is a model for {expected}s and "
                f"needs {says}."
            )


def _in_middle_frame(weight: Tensor, tubelet_size: int) -> Tensor:
    """Converts a projection of images, (hidden, channels, height, width), to a projection of tubelets that sees only
    their middle frame."""
    weights = [torch.zeros_like(weight) for _ in range(tubelet_size)]
    weights[tubelet_size // 2] = weight
    return torch.stack(weights, dim=2)


def _new_head(config: VideoMambaConfig, like: Tensor | None) -> dict[str, Tensor]:
    """A classifier with the precision of the tensor whose output it reads. None: there is none, which is an error."""
    head = nn.Linear(config.hidden_size, config.num_labels or 0, dtype=None if like is None else like.dtype)
    nn.init.trunc_normal_(head.weight, std=config.initializer_range)
    return {"head.weight": head.weight.detach(), "head.bias": torch.zeros_like(head.bias)}


class VideoMambaModel(VideoMambaPreTrainedModel, BidirectionalModel):
    """VideoMamba without a head: `last_hidden_state` is normalised, and `pooler_output` is its class token."""


class VideoMambaForVideoClassification(VideoMambaPreTrainedModel, Classifier):
    """VideoMamba with a linear classifier on the class token, for videos."""

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__(config)
        self._check_modality("video")
        self.num_labels = config.num_labels
        self.videomamba = VideoMambaModel(config)
        self.classifier = image_classifier(config)
        self.post_init()


class VideoMambaForImageClassification(VideoMambaPreTrainedModel, Classifier):
    """VideoMamba with a linear classifier on the class token, for images; its configuration has `num_frames=None`."""

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__(config)
        self._check_modality("image")
        self.num_labels = config.num_labels
        self.videomamba = VideoMambaModel(config)
        self.classifier = image_classifier(config)
        self.post_init()


class VideoMambaBackbone(FeatureMaps, VideoMambaModel):
    """VideoMamba as a feature extractor for images: see `FeatureMaps`."""

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__(config)
        self._check_modality("image")


__all__ = [
    "VideoMambaBackbone",
    "VideoMambaForImageClassification",
    "VideoMambaForVideoClassification",
    "VideoMambaModel",
    "VideoMambaPreTrainedModel",
]

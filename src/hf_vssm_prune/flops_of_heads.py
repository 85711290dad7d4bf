"""Counts how much a model with a head on its backbone computes: `flops.count_flops` plus the head's convolutions and
matrix products, as counted by PyTorch when the head runs on meta tensors."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from . import flops
from .configuration_common import has_head, pruned_config
from .flops import FlopCount, ModelFlops
from .heads import auto_class_of, check_image_size
from .pruned_heads import backbone_of
from .pruned_outputs import PrunedBackboneOutput


def count_flops(
    config: PreTrainedConfig, image_size: int | tuple[int, ...] | None = None, block_fraction: float | None = None
) -> ModelFlops:
    """Counts the FLOPs of one image, or of one clip, for a model of this package or for a transformers model with a
    backbone of this package. The part of such a head is called "dense_head" (including the pyramid, if there is one).

    Args:
        config: configuration of the model.
        image_size: pixels, (height, width), or for videos (frames, height, width); None for the configuration's
            `image_size`.
        block_fraction: see `flops.count_flops`.

    Raises:
        ValueError: the inputs are smaller than a patch, or the head cannot process them, see `heads.check_image_size`.
    """
    backbone = pruned_config(config)
    count = flops.count_flops(backbone, image_size, block_fraction)
    if not has_head(config):
        return count
    size = backbone.input_size if image_size is None else backbone.input_size_for(image_size)
    head = count_head(config, size)
    return ModelFlops(_with_head(count.dense, head), _with_head(count.pruned, head))


def _with_head(count: FlopCount, head: int) -> FlopCount:
    """Replaces the classifier, which a backbone does not have, by a head."""
    parts = dict(count.breakdown)
    more = head - parts.pop("head", 0)
    return FlopCount(count.total + more, count.published + more, parts | {"dense_head": head})


def count_head(config: PreTrainedConfig, image_size: tuple[int, int]) -> int:
    """Multiply-adds of the linear layers, convolutions and matrix products of a head, and of the backbone's pyramid.

    Raises:
        ValueError: the head cannot process images of this size.
    """
    check_image_size(config, *image_size)
    try:
        return _count_head(config, image_size, "meta")
    except (RuntimeError, NotImplementedError):  # a head may look at values, or make tensors on the CPU
        return _count_head(config, image_size, "cpu")


def _count_head(config: PreTrainedConfig, image_size: tuple[int, int], device: str) -> int:
    with torch.device(device), torch.no_grad(), torch.random.fork_rng(devices=[]):
        # The maps are float32, whatever precision the configuration names.
        model = auto_class_of(config).from_config(copy.deepcopy(config), dtype=torch.float32)
        model.eval().requires_grad_(False)
        _put_maps_in_place_of_layers(backbone_of(model))
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, pruned_config(config).num_channels, *image_size, dtype=torch.float32))
    return counter.get_total_flops() // 2


def _put_maps_in_place_of_layers(backbone: Any) -> None:
    config = backbone.config

    def forward(pixel_values: Tensor, **options: Any) -> PrunedBackboneOutput:
        grid = config.grid_size_for(*pixel_values.shape[-2:])
        maps = [pixel_values.new_zeros(len(pixel_values), config.hidden_size, *grid) for _ in backbone.out_features]
        return PrunedBackboneOutput(feature_maps=tuple(backbone.with_pyramid(maps)))

    backbone.forward = forward

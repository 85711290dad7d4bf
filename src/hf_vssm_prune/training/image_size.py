"""Continues training at another image size than that of the checkpoint: model, configuration and image processor."""

import math
from typing import Any

import torch
from torch import nn
from transformers import BaseImageProcessor

from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.modeling_common import resize_position_embeddings
from hf_vssm_prune.pruned_heads import backbone_of
from hf_vssm_prune.token_pruning import split_token


def config_at_size(config: VisionMambaConfig, image_size: int | tuple[int, int]) -> VisionMambaConfig:
    """A configuration for another image size, in pixels or (height, width): budgets and grids then refer to this size.

    Raises:
        ValueError: it is too small for a patch.
    """
    return type(config).from_dict({**config.to_dict(), "image_size": image_size})


def resize_model(model: nn.Module, image_size: int | tuple[int, int]) -> None:
    """Adapts a model to another image size, in pixels or (height, width). Position embeddings are resized bicubically,
    as in a forward pass at that size; that of the class token is unchanged.

    Raises:
        ValueError: it is too small for a patch.
    """
    network: Any = backbone_of(model)
    config, embeddings = network.config, network.base_model.embeddings
    grid, new_grid = config.grid_size, config_at_size(config, image_size).grid_size
    positions = embeddings.position_embeddings.detach()
    if positions.shape[1] < math.prod(grid):  # shared by all frames of a video
        grid, new_grid = grid[-2:], new_grid[-2:]
    place, new_place = (config.cls_token_id(math.prod(each)) for each in (grid, new_grid))
    if place is None:
        resized = resize_position_embeddings(positions, grid, new_grid, interpolate=True)
    else:
        patches, cls_token = split_token(positions, place)
        patches = resize_position_embeddings(patches, grid, new_grid, interpolate=True)
        resized = torch.cat([patches[:, :new_place], cls_token, patches[:, new_place:]], dim=1)
    embeddings.position_embeddings = nn.Parameter(resized)
    config.image_size = image_size


def output_size(image_processor: BaseImageProcessor) -> tuple[int, int] | None:
    """(height, width) of an image processor's images; None: they differ in size."""
    options = image_processor.to_dict()
    resized = options.get("size") if options.get("do_resize") else None
    size = (options.get("crop_size") if options.get("do_center_crop") else resized) or {}
    return (size["height"], size["width"]) if size.get("height") and size.get("width") else None


def resize_image_processor(image_processor: BaseImageProcessor, image_size: int) -> BaseImageProcessor:
    """An image processor that crops to `image_size` × `image_size` pixels, or resizes to this size if it does not crop,
    and is otherwise like the given one. The crop is the same fraction of the image as before.

    Raises:
        ValueError: it does not specify the size to which it crops or resizes.
    """
    options = image_processor.to_dict()
    size, crop = options.get("size") or {}, options.get("crop_size") or {}
    cropped = options.get("do_center_crop") and crop
    target = crop if cropped else size
    if not ({"height", "width"} <= target.keys() or "shortest_edge" in target):
        raise ValueError(f"The image processor's size {target} is not (height, width) or a shortest edge.")
    factors = {side: image_size / (target.get(side) or target["shortest_edge"]) for side in ("height", "width")}
    factors["shortest_edge"] = max(factors.values())
    new_size = {name: round(pixels * factors[name]) for name, pixels in size.items() if name in factors}
    changed = {"size": new_size} | ({"crop_size": {"height": image_size, "width": image_size}} if cropped else {})
    return type(image_processor).from_dict({**options, **changed})

"""Pictures of which tokens a model keeps: each image, next to what is left of it after each pruning stage.

visualize(model, image_processor, images).save("kept_tokens.png")

An input is drawn frame by frame: an image is the single frame of a grid (height, width). If a grid has more dimensions
before these, each position in them has its own frame, and a panel is a sheet of frames.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor

from .configuration_common import VisionMambaConfig, pruned_config
from .families import ImageClassifier
from .panels import (
    PANEL_SIZE,
    SHEET_SIZE,
    draw_mask,
    fit,
    headings,
    kept_mask,
    lay_out,
    num_columns,
    sheet,
)


# What a model saw: an image, or one frame for each position in the grid's dimensions before height and width, in order.
Frames: TypeAlias = Image.Image | Sequence[Image.Image]

# Colours of importance, from low to high: Matplotlib's viridis. Tokens that an earlier stage dropped have no colour.
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
NO_IMPORTANCE = (225, 225, 225)


def visualize(
    model: ImageClassifier,
    image_processor: BaseImageProcessor,
    images: Frames | Sequence[Frames],
    importance: bool = False,
) -> Image.Image:
    """Draws what a pruned classifier keeps of each image, stage by stage, with the predicted label.

    Args:
        model: a pruned model.
        image_processor: the model's image processor, which resizes all images to the same size.
        images: one or more images of any size; each gets a row. For a video model, one or more lists of frames.
        importance: also draw, below each row, the importance by which each stage selected tokens.

    Raises:
        ValueError: the model is dense, there is no image, or the videos have different numbers of frames.
    """
    samples: list = [images] if isinstance(images, Image.Image) else list(images)
    if not samples:
        raise ValueError("`images` is empty; at least one image is needed.")
    if model.config.modality == "video":
        videos = [samples] if isinstance(samples[0], Image.Image) else samples
        if len(lengths := {len(video) for video in videos}) > 1:
            raise ValueError(
                f"the videos have {sorted(lengths)} frames; only videos of one length can be drawn together."
            )
        pixel_values = torch.stack([clip_pixel_values(image_processor, video) for video in videos])
    else:
        pixel_values = image_processor(samples, return_tensors="pt")["pixel_values"]
    mean, std = image_statistics(image_processor)
    return draw_classification(model, pixel_values, mean, std, importance)


def clip_pixel_values(image_processor: BaseImageProcessor, frames: Sequence[Image.Image]) -> Tensor:
    """Frames prepared by an image processor, for videos or for images: (frames, channels, height, width)."""
    return image_processor(list(frames), return_tensors="pt")["pixel_values"].flatten(0, -4)


def image_statistics(image_processor: BaseImageProcessor) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation used by an image processor to normalise; 0 and 1 if it does not normalise."""
    values = image_processor.to_dict()
    return (values["image_mean"], values["image_std"]) if values["do_normalize"] else ([0.0], [1.0])


def kept_patches(
    kept_tokens: Sequence[Tensor], config: VisionMambaConfig, input_size: tuple[int, ...] | None = None
) -> list[Tensor]:
    """The patches among the tokens that a model kept. (A model's tokens include the class token, if there is one.)

    Args:
        kept_tokens: `kept_tokens` of a model's output, for each stage ids of shape (batch, n).
        config: the model's configuration.
        input_size: (height, width) of the pixel values, or (frames, height, width). None: the size in the
            configuration.

    Returns:
        For each stage, ids of patches in raster order, shape (batch, n), or (batch, n - 1) if there was a class token.
    """
    grid = config.grid_size_for(*(config.input_size if input_size is None else input_size))
    cls_token_id = config.cls_token_id(math.prod(grid))
    if cls_token_id is None:
        return list(kept_tokens)
    without_class = [kept[kept != cls_token_id].view(kept.shape[0], kept.shape[1] - 1) for kept in kept_tokens]
    return [ids - (ids > cls_token_id).long() for ids in without_class]


def merged_patches(
    merged_tokens: Sequence[Tensor], config: VisionMambaConfig, input_size: tuple[int, ...] | None = None
) -> list[Tensor]:
    """For each patch, the patch that it was merged into, from a model's output.

    Args:
        merged_tokens: `merged_tokens` of the output, for each stage ids of shape (batch, tokens).
        config, input_size: as in `kept_patches`.

    Returns:
        For each stage, ids of patches, shape (batch, patches): a patch's own id if it was kept or dropped.
    """
    # The class token is never merged, and nothing is merged into it.
    return kept_patches(merged_tokens, config, input_size)


def frames_from_pixel_values(
    pixel_values: Tensor, mean: Sequence[float], std: Sequence[float], config: VisionMambaConfig
) -> list[Image.Image]:
    """What the model saw of one input (the part covered by its patches): one frame for each position in the grid's
    dimensions before height and width. If a position combines several frames, the first of them.

    Args:
        pixel_values: normalised, shape (channels, height, width), or (frames, channels, height, width) for a video.
        mean, std: those of the image processor, for each channel.
        config: the model's configuration.
    """
    leading = config.grid_size_for(*config.input_size_of((1, *pixel_values.shape)))[:-2]
    images = pixel_values.flatten(0, -4) if leading else pixel_values.unsqueeze(0)
    return [
        patched_area(image_from_pixel_values(images[position * config.frame_spacing], mean, std), config)
        for position in range(math.prod(leading))
    ]


def image_from_pixel_values(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """What the model saw, after the image processor's resizing and cropping.

    Args:
        pixel_values: one image, normalised, shape (channels, height, width), with 1 or 3 channels.
        mean: the image processor's mean for each channel.
        std: its standard deviation for each channel.
    """
    if pixel_values.ndim != 3 or pixel_values.shape[0] not in (1, 3):
        raise ValueError(f"`pixel_values` has shape {tuple(pixel_values.shape)}; it must be (1 or 3, height, width).")
    pixels = pixel_values.detach().cpu().float()
    pixels = pixels * pixels.new_tensor(std).view(-1, 1, 1) + pixels.new_tensor(mean).view(-1, 1, 1)
    pixels = (pixels * 255).round().clamp(0, 255).byte().expand(3, -1, -1)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def draw_classification(
    model: ImageClassifier,
    pixel_values: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    importance: bool = False,
) -> Image.Image:
    """Draws what a classifier keeps of each image, with the predicted label below it.

    Args:
        model: a pruned model. It runs in evaluation mode, and is left in its previous mode.
        pixel_values: outputs of the image processor, shape (batch, channels, height, width), or (batch, frames,
            channels, height, width) for videos.
        mean: the image processor's mean for each channel.
        std: its standard deviation for each channel.
        importance: also draw, below each row, the importance by which each stage selected tokens.

    Raises:
        ValueError: the model is dense.
    """
    config, output = model.config, run_pruned(model, pixel_values)
    input_size, labels = config.input_size_of(pixel_values.shape), config.label_names
    return draw_kept_tokens(
        [frames_from_pixel_values(sample, mean, std, config) for sample in pixel_values],
        kept_patches(output.kept_tokens, config, input_size),
        config.grid_size_for(*input_size),
        captions=[labels[index] for index in output.logits.argmax(-1).tolist()],
        layers=config.token_pruning["layers"],  # type: ignore[index]
        token_scores=output.token_scores if importance else None,
        merged=None if output.merged_tokens is None else merged_patches(output.merged_tokens, config, input_size),
    )


@torch.no_grad()
def run_pruned(model: ImageClassifier, pixel_values: Tensor) -> Any:
    """The output of a pruned model in evaluation mode; the model is left in its previous mode.

    Raises:
        ValueError: the model is dense.
    """
    if pruned_config(model.config).token_pruning is None:
        raise ValueError(
            "The model is dense, so there is nothing to show: give it a schedule with `set_token_pruning`."
        )
    was_training = model.training
    model.eval()
    try:
        return model(pixel_values.to(model.device, model.dtype))
    finally:
        model.train(was_training)


def patched_area(image: Image.Image, config: VisionMambaConfig) -> Image.Image:
    """The part of an image that its patches cover evenly.

    If the size of the image is not a multiple of the patch size, some families pad the image, and the padding is black;
    others ignore the rest of the image, which is cropped here. If patches overlap, each stands for its centre.

    Args:
        image: what the model saw, or one frame of it.
        config: the model's configuration.
    """
    rows, columns = config.grid_size_for(*config.input_size[:-2], image.height, image.width)[-2:]
    spacing = config.patch_spacing
    margin = (config.patch_size - spacing) // 2
    return image.crop((margin, margin, margin + columns * spacing, margin + rows * spacing))


def draw_kept_tokens(
    images: Sequence[Frames],
    kept_tokens: Sequence[Tensor],
    grid: tuple[int, ...],
    captions: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    token_scores: Sequence[Tensor] | None = None,
    merged: Sequence[Tensor] | None = None,
) -> Image.Image:
    """Draws one row for each image: the image, then the patches that are left after each stage.

    Dropped patches are covered in blue, with a yellow border between them and the remaining ones. If tokens were
    merged, a second row shows all patches of one token in the same colour, their mean.

    Args:
        images: what the model saw, any size; small ones are enlarged without blurring.
        kept_tokens: for each stage, the ids of the remaining patches, in raster order, shape (len(images), n); see
            `kept_patches`.
        grid: (height, width) in patches, which cover the image evenly, see `patched_area`; for videos, with other
            dimensions before these.
        captions: texts below the images, for instance label and prediction.
        layers: layers of the stages, for the column headings (`config.token_pruning["layers"]`).
        token_scores: for each stage, the importance of the patches before it, in raster order, shape (len(images),
            patches), as in a model's output. It is drawn below the stage: brighter patches are more important, and each
            panel has its own scale; patches that were dropped before are grey.
        merged: for each stage, the patch that each patch was merged into, shape (len(images), patches); see
            `merged_patches`.

    Raises:
        ValueError: images, tokens, captions, layers and scores do not match, or an id is not on the grid.
    """
    _check(images, kept_tokens, grid, captions, layers)
    total = math.prod(grid)
    maps = None if token_scores is None else importance_maps(kept_tokens, token_scores, total)
    counts = [f"{kept.shape[1]} / {total} tokens" for kept in kept_tokens]
    rows: list[list[Image.Image | None]] = []
    texts: list[list[str]] = []
    for index, image in enumerate(images):
        rows.append([*draw_stages(image, [kept[index] for kept in kept_tokens], grid)])
        texts.append([captions[index] if captions else "", *counts])
        if merged is not None:
            stages = zip(merged, kept_tokens, strict=True)
            rows.append([None, *(draw_merges(image, into[index], kept[index], grid) for into, kept in stages)])
            texts.append(["", *("merged" for _ in kept_tokens)])
        if maps is not None:
            of_image = [scores[index].view(grid) for scores in maps]
            rows.append([None, *(_draw_importance_of_frames(scores, image) for scores in of_image)])
            texts.append(["", *(_range_of_importance(scores) for scores in of_image)])
    return lay_out(rows, ["input", *headings(len(kept_tokens), layers)], texts)


def draw_stages(image: Frames, kept_tokens: Sequence[Tensor], grid: tuple[int, ...]) -> list[Image.Image]:
    """Panels of one image: the image itself, then one panel per stage with dropped patches covered.

    Args:
        image: what the model saw.
        kept_tokens: for each stage, the ids of the remaining patches, shape (n,).
        grid: (height, width) in patches, with other dimensions before these.

    Raises:
        ValueError: the number of frames is not that of the grid's positions before height and width.
    """
    frames = _fit_frames(image)
    if len(frames) != math.prod(grid[:-2]):
        raise ValueError(f"there are {len(frames)} frames; a grid of {_times(grid)} needs {math.prod(grid[:-2])}.")
    masks = [kept_mask(kept, grid).view(-1, *grid[-2:]) for kept in kept_tokens]
    return [sheet(frames), *(sheet([*map(draw_mask, frames, mask)]) for mask in masks)]


def draw_merges(image: Frames, into: Tensor, kept: Tensor, grid: tuple[int, ...]) -> Image.Image:
    """A panel of one image in which all patches of a token have the same colour, their mean, with yellow borders;
    dropped patches are covered in blue.

    Args:
        image: what the model saw.
        into: for each patch, the patch that it was merged into, shape (patches,).
        kept: the remaining patches, shape (n,).
        grid: as in `draw_stages`.
    """
    frames, into = _fit_frames(image), into.cpu()
    patches = [np.asarray(frame.resize((grid[-1], grid[-2]), Image.Resampling.BOX), np.float64) for frame in frames]
    colours = torch.from_numpy(np.stack(patches)).view(-1, 3)
    sums = torch.zeros_like(colours).index_add(0, into, colours)
    counts = colours.new_zeros(len(colours)).index_add(0, into, colours.new_ones(len(colours)))
    means = (sums / counts.clamp(min=1).unsqueeze(1))[into].round().byte().view(-1, *grid[-2:], 3)
    groups, is_left = into.view(-1, *grid[-2:]), kept_mask(kept, grid).flatten()[into].view(-1, *grid[-2:])
    painted = [
        Image.fromarray(colour.numpy()).resize(frame.size, Image.Resampling.NEAREST)
        for colour, frame in zip(means, frames, strict=True)
    ]
    return sheet([draw_mask(*panel) for panel in zip(painted, is_left, groups, strict=True)])


def _fit_frames(image: Frames) -> list[Image.Image]:
    """Resizes the frames to fit into one panel."""
    frames = [image] if isinstance(image, Image.Image) else list(image)
    size = PANEL_SIZE if len(frames) == 1 else SHEET_SIZE // num_columns(len(frames))
    return [fit(frame.convert("RGB"), size) for frame in frames]


def importance_maps(kept_tokens: Sequence[Tensor], token_scores: Sequence[Tensor], num_patches: int) -> list[Tensor]:
    """Puts the scores of each stage at their positions on the grid.

    Args:
        kept_tokens: for each stage, ids of patches, shape (batch, n).
        token_scores: for each stage, scores of the patches before it, in the order of their ids.
        num_patches: number of patches on the whole grid.

    Returns:
        For each stage, scores of shape (batch, num_patches), NaN at patches that an earlier stage dropped.

    Raises:
        ValueError: there is not one score for each patch.
    """
    everything = torch.arange(num_patches, device="cpu").expand(kept_tokens[0].shape[0], -1)
    candidates = [everything, *(kept.cpu() for kept in kept_tokens[:-1])]
    shapes = [tuple(scores.shape) for scores in token_scores]
    if shapes != [tuple(ids.shape) for ids in candidates]:
        raise ValueError(
            f"`token_scores` has shapes {shapes}; {[tuple(ids.shape) for ids in candidates]} are expected, one score "
            "for each patch that is left before the stage."
        )
    maps = []
    for ids, scores in zip(candidates, token_scores, strict=True):
        scores = scores.detach().cpu().float()
        maps.append(scores.new_full((ids.shape[0], num_patches), math.nan).scatter(1, ids, scores))
    return maps


def draw_importance(scores: Tensor, size: tuple[int, int], extremes: tuple[float, float] | None = None) -> Image.Image:
    """A map of importance, from the lowest (dark violet) to the highest (yellow).

    Args:
        scores: shape (height, width) in patches, NaN where there is no score.
        size: (width, height) of the picture in pixels.
        extremes: the lowest and the highest importance. None: those of these scores.
    """
    low, high = _extremes(scores) if extremes is None else extremes
    levels = ((scores - low) / max(high - low, 1e-12)).numpy()
    anchors = np.linspace(0, 1, len(VIRIDIS))
    channels = [np.interp(levels, anchors, values) for values in zip(*VIRIDIS, strict=True)]
    pixels = np.stack(channels, axis=-1)
    pixels[np.isnan(levels)] = NO_IMPORTANCE
    return Image.fromarray(pixels.round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def _draw_importance_of_frames(scores: Tensor, image: Frames) -> Image.Image:
    """A map of importance (…, height, width), laid out like the image, with the same colour scale in all frames."""
    of_frames = zip(scores.view(-1, *scores.shape[-2:]), _fit_frames(image), strict=True)
    extremes = _extremes(scores)
    return sheet([draw_importance(of_frame, frame.size, extremes) for of_frame, frame in of_frames])


def _range_of_importance(scores: Tensor) -> str:
    low, high = _extremes(scores)
    return f"importance {low:.2g} to {high:.2g}"


def _extremes(scores: Tensor) -> tuple[float, float]:
    there = scores[~scores.isnan()]
    return float(there.min()), float(there.max())


def _check(
    images: Sequence[Frames],
    kept_tokens: Sequence[Tensor],
    grid: tuple[int, ...],
    captions: Sequence[str] | None,
    layers: Sequence[int] | None,
) -> None:
    if not images:
        raise ValueError("`images` is empty; at least one image is needed.")
    if not kept_tokens:
        raise ValueError("`kept_tokens` is empty; a dense model keeps every token, so there is nothing to show.")
    if len(grid) < 2 or min(grid) < 1:
        raise ValueError(
            f"`grid` is {grid}; it must be (height, width) in patches, optionally with dimensions before them."
        )
    for stage, kept in enumerate(kept_tokens):
        if kept.ndim != 2 or kept.shape[0] != len(images):
            raise ValueError(
                f"`kept_tokens[{stage}]` has shape {tuple(kept.shape)}; it must be ({len(images)}, tokens) for "
                f"{len(images)} images."
            )
        if kept.numel() and (kept.min() < 0 or kept.max() >= math.prod(grid)):
            raise ValueError(
                f"`kept_tokens[{stage}]` has ids from {kept.min()} to {kept.max()}; a grid of {_times(grid)} "
                f"patches has 0 to {math.prod(grid) - 1}."
            )
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"`captions` has {len(captions)} entries for {len(images)} images.")
    if layers is not None and len(layers) != len(kept_tokens):
        raise ValueError(f"`layers` has {len(layers)} entries for {len(kept_tokens)} stages.")


def _times(grid: tuple[int, ...]) -> str:
    return " x ".join(map(str, grid))

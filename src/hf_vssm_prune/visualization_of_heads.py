"""Pictures of what pruned models with heads make of images: label maps over them, beside the tokens that are kept."""

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import BaseImageProcessor

from .configuration_common import pruned_config
from .panels import BACKGROUND, FONT_SIZE, MARGIN, PANEL_SIZE, TEXT, fit, headings, lay_out
from .visualization import (
    draw_stages,
    image_from_pixel_values,
    image_statistics,
    kept_patches,
    patched_area,
    run_pruned,
)


LABEL_OPACITY = 0.6
LEGEND_LINES = 10
# Of a circle: hues of successive ids lie far apart, however many there are.
GOLDEN_SECTION = 0.618034


def class_colour(label: int) -> tuple[int, int, int]:
    """A colour for a class id."""
    brightness = (1.0, 0.7, 0.85)[label % 3]
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN_SECTION % 1.0, 0.75, brightness)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_label_map(image: Image.Image, labels: Tensor) -> Image.Image:
    """An image under the colours of its pixels' classes.

    Args:
        image: of any size.
        labels: class ids (height, width), resized to the image where they differ; an id without a name, 255 for
            instance, has a colour like any other.
    """
    palette = np.array([class_colour(label) for label in range(int(labels.max()) + 1)], np.uint8)
    colours = Image.fromarray(palette[labels.cpu().numpy()]).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image.convert("RGB"), colours, LABEL_OPACITY)


def draw_legend(labels: Tensor, names: Sequence[str]) -> Image.Image:
    """The names of the classes that a label map has, the largest first, each by its colour."""
    counts = torch.bincount(labels.flatten().cpu(), minlength=len(names))
    present = [label for label in counts.argsort(descending=True).tolist() if counts[label] > 0][:LEGEND_LINES]
    line = PANEL_SIZE // LEGEND_LINES
    panel = Image.new("RGB", (PANEL_SIZE, line * len(present)), "white")
    draw = ImageDraw.Draw(panel)
    for number, label in enumerate(present):
        top = number * line
        draw.rectangle((0, top + 3, line - 6, top + line - 4), fill=class_colour(label))
        share = f"{100 * int(counts[label]) / labels.numel():.0f}%"
        draw.text(
            (line + MARGIN / 2, top), f"{names[label]}  {share}", fill=TEXT, font=ImageFont.load_default(FONT_SIZE)
        )
    return panel


def visualize_segmentation(
    model: Any, image_processor: BaseImageProcessor, images: Sequence[Image.Image], importance: bool = False
) -> Image.Image:
    """Draws how a pruned model segments images of any size, one below the other; see `draw_segmentation`.

    Raises:
        ValueError: the model is dense, there is no image, or the importance of tokens is asked for.
    """
    if not images:
        raise ValueError("`images` is empty; at least one image is needed.")
    if importance:
        raise ValueError("The importance of tokens is drawn for classifiers only.")
    sheets = []
    for image in images:
        pixel_values = image_processor(image, return_tensors="pt")["pixel_values"]
        sheets.append(draw_segmentation(model, pixel_values, *image_statistics(image_processor)))
    whole = Image.new("RGB", (max(each.width for each in sheets), sum(each.height for each in sheets)), BACKGROUND)
    top = 0
    for each in sheets:
        whole.paste(each, (0, top))
        top += each.height
    return whole


def draw_segmentation(model: Any, pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Draws how a pruned model segments each image, and which tokens its backbone keeps for it, stage by stage.

    Args:
        model: that `pruned_heads.prunable` made, pruned. It is run in evaluation mode, and left in the mode that it was
            in.
        pixel_values: as the image processor gives them, shape (batch, channels, height, width).
        mean, std: of the image processor, for each channel.

    Raises:
        ValueError: the model is dense.
    """
    config, output = pruned_config(model.config), run_pruned(model, pixel_values)
    input_size = config.input_size_of(pixel_values.shape)
    grid = config.grid_size_for(*input_size)
    kept = kept_patches(output.kept_tokens, config, input_size)
    names = [model.config.id2label[label] for label in range(model.config.num_labels)]
    counts = [f"{tokens.shape[1]} / {grid[0] * grid[1]} tokens" for tokens in kept]
    rows: list[list[Image.Image | None]] = []
    captions: list[list[str]] = []
    for index, labels in enumerate(output.logits.float().argmax(dim=1)):
        image = image_from_pixel_values(pixel_values[index], mean, std)
        panels = draw_stages(patched_area(image, config), [tokens[index] for tokens in kept], grid)
        rows.append([fit(draw_label_map(image, labels), PANEL_SIZE), *panels])
        captions.append(["", "", *counts])
        rows.append([draw_legend(labels, names), *(None for _ in panels)])
        captions.append(["" for _ in rows[-1]])
    return lay_out(rows, ["classes", "input", *headings(len(kept), config.token_pruning["layers"])], captions)

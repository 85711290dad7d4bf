"""Pictures of the results of pruned models with heads: label maps or boxes over the images, next to the kept tokens."""

import colorsys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import AutoModelForObjectDetection, BaseImageProcessor

from .configuration_common import pruned_config
from .detections import Detections, find_objects
from .label_maps import names_by_id
from .panels import BACKGROUND, FONT_SIZE, MARGIN, PANEL_SIZE, TEXT, fit, headings, lay_out, shorten
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
LEAST_SCORE = 0.5  # minimum score of a box that is drawn, as in transformers' pipeline
# As a fraction of a circle: the hues of successive ids are far apart, however many there are.
GOLDEN_SECTION = 0.618034


def class_colour(label: int) -> tuple[int, int, int]:
    """A colour for a class id."""
    brightness = (1.0, 0.7, 0.85)[label % 3]
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN_SECTION % 1.0, 0.75, brightness)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_label_map(image: Image.Image, labels: Tensor) -> Image.Image:
    """An image overlaid with the colours of its pixels' classes.

    Args:
        image: an image of any size.
        labels: class ids (height, width), resized to the image if necessary; an id without a name, 255 for instance,
            has a colour like any other.
    """
    palette = np.array([class_colour(label) for label in range(int(labels.max()) + 1)], np.uint8)
    colours = Image.fromarray(palette[labels.cpu().numpy()]).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image.convert("RGB"), colours, LABEL_OPACITY)


def draw_legend(entries: Sequence[tuple[int, str]]) -> Image.Image:
    """Names of classes next to their colours, at most `LEGEND_LINES`."""
    entries = entries[:LEGEND_LINES]
    line = PANEL_SIZE // LEGEND_LINES
    panel = Image.new("RGB", (PANEL_SIZE, line * max(1, len(entries))), "white")
    draw = ImageDraw.Draw(panel)
    for number, (label, text) in enumerate(entries):
        top = number * line
        draw.rectangle((0, top + 3, line - 6, top + line - 4), fill=class_colour(label))
        left = line + MARGIN / 2
        text = shorten(text, PANEL_SIZE - left)
        draw.text((left, top), text, fill=TEXT, font=ImageFont.load_default(FONT_SIZE))
    return panel


def shares_of_classes(labels: Tensor, names: Sequence[str]) -> list[tuple[int, str]]:
    """For the legend of a label map: its classes, the largest first, with the fractions that they cover."""
    counts = torch.bincount(labels.flatten().cpu(), minlength=len(names))
    present = [label for label in counts.argsort(descending=True).tolist() if counts[label] > 0]
    # The number comes first: in a legend, long names are cut.
    return [(label, f"{100 * int(counts[label]) / labels.numel():.0f}% {names[label]}") for label in present]


def draw_boxes(image: Image.Image, found: Detections) -> Image.Image:
    """An image at a panel's size, with the boxes whose score is at least `LEAST_SCORE`.

    Args:
        image: an image of any size.
        found: boxes, in pixels of the image.
    """
    panel = fit(image.convert("RGB"), PANEL_SIZE)
    factor = panel.width / image.width
    draw = ImageDraw.Draw(panel)
    # The most confident boxes are drawn last, over the others.
    for box, score, label in reversed(list(zip(*(each.tolist() for each in found), strict=True))):
        if score >= LEAST_SCORE:
            draw.rectangle([factor * side for side in box], outline=class_colour(label), width=2)
    return panel


def counts_of_classes(found: Detections, names: Sequence[str]) -> list[tuple[int, str]]:
    """For the legend of a picture with boxes: its classes, with the number of boxes of each."""
    counts = torch.bincount(found.labels[found.scores >= LEAST_SCORE].cpu(), minlength=len(names)).tolist()
    return [(label, f"{count} {names[label]}") for label, count in enumerate(counts) if count]


def visualize_dense(
    model: Any, image_processor: BaseImageProcessor, images: Sequence[Image.Image], importance: bool = False
) -> Image.Image:
    """Draws how a pruned model segments images of any size, or what it detects in them, one image below the other; see
    `draw_segmentation` and `draw_detection`.

    Raises:
        ValueError: the model is dense, there is no image, or the importance of tokens is asked for.
    """
    if not images:
        raise ValueError("`images` is empty; at least one image is needed.")
    if importance:
        raise ValueError("The importance of tokens is drawn for classifiers only.")
    detects = type(model.config) in AutoModelForObjectDetection._model_mapping
    draw = draw_detection if detects else draw_segmentation
    sheets = []
    for image in images:
        pixel_values = image_processor(image, return_tensors="pt")["pixel_values"]
        sheets.append(draw(model, pixel_values, *image_statistics(image_processor)))
    whole = Image.new("RGB", (max(each.width for each in sheets), sum(each.height for each in sheets)), BACKGROUND)
    top = 0
    for each in sheets:
        whole.paste(each, (0, top))
        top += each.height
    return whole


# A panel with a model's result for an image, and the entries of its legend.
Answer = tuple[Image.Image, list[tuple[int, str]]]


def pixel_scores(output: Any, index: int) -> Tensor:
    """The scores of each class at each pixel of an image, (classes, height, width), in an output of a segmentation
    model: its logits or, if it has queries with a class and a mask each, the sums that transformers'
    `post_process_semantic_segmentation` computes from them."""
    if "logits" in output:
        return output.logits[index].float()
    classes = output.class_queries_logits[index].float().softmax(dim=-1)[..., :-1]  # the last one: no object
    return torch.einsum("qc,qhw->chw", classes, output.masks_queries_logits[index].float().sigmoid())


def draw_segmentation(model: Any, pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Draws how a pruned model segments each image, and which tokens its backbone keeps for it, stage by stage.

    Args:
        model: a pruned model from `pruned_heads.prunable`. It runs in evaluation mode, and is left in its previous
            mode.
        pixel_values: outputs of the image processor, shape (batch, channels, height, width).
        mean, std: those of the image processor, for each channel.

    Raises:
        ValueError: the model is dense.
    """
    names = names_by_id(model.config.id2label)

    def answer(output: Any, index: int, image: Image.Image) -> Answer:
        labels = pixel_scores(output, index).argmax(dim=0)
        return fit(draw_label_map(image, labels), PANEL_SIZE), shares_of_classes(labels, names)

    return _draw_answers(model, pixel_values, mean, std, "classes", answer)


def draw_detection(model: Any, pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Draws what a pruned model detects in each image, and which tokens its backbone keeps for it, stage by stage.
    Arguments and errors are those of `draw_segmentation`."""
    names = names_by_id(model.config.id2label)

    def answer(output: Any, index: int, image: Image.Image) -> Answer:
        found = find_objects(output, torch.tensor([[image.height, image.width]] * len(output.logits)))[index]
        return draw_boxes(image, found), counts_of_classes(found, names)

    return _draw_answers(model, pixel_values, mean, std, "objects", answer)


def _draw_answers(
    model: Any,
    pixel_values: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    heading: str,
    answer: Callable[[Any, int, Image.Image], Answer],
) -> Image.Image:
    config, output = pruned_config(model.config), run_pruned(model, pixel_values)
    input_size = config.input_size_of(pixel_values.shape)
    grid = config.grid_size_for(*input_size)
    kept = kept_patches(output.kept_tokens, config, input_size)
    counts = [f"{tokens.shape[1]} / {grid[0] * grid[1]} tokens" for tokens in kept]
    rows: list[list[Image.Image | None]] = []
    captions: list[list[str]] = []
    for index in range(len(pixel_values)):
        image = image_from_pixel_values(pixel_values[index], mean, std)
        panels = draw_stages(patched_area(image, config), [tokens[index] for tokens in kept], grid)
        panel, entries = answer(output, index, image)
        rows.append([panel, *panels])
        captions.append(["", "", *counts])
        rows.append([draw_legend(entries), *(None for _ in panels)])
        captions.append(["" for _ in rows[-1]])
    return lay_out(rows, [heading, "input", *headings(len(kept), config.token_pruning["layers"])], captions)

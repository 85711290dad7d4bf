"""Animations of what a model keeps of a video: each frame, next to what is left of it after each stage.

animate(model, image_processor, frames, "kept_tokens.webp")
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from transformers import BaseImageProcessor

from .families import ImageClassifier
from .panels import draw_mask, fit, headings, kept_mask, lay_out
from .visualization import (
    clip_pixel_values,
    frames_from_pixel_values,
    image_statistics,
    kept_patches,
    run_pruned,
)


FORMATS = (".gif", ".webp")
PANEL_SIZE = 160  # pixels along the longer side of a panel
SECONDS = 0.25  # duration of each picture


def animate(
    model: ImageClassifier, image_processor: BaseImageProcessor, frames: Sequence[Image.Image], file: str | Path
) -> None:
    """Writes a looping GIF or WebP animation of what a pruned classifier keeps of a clip.

    Args:
        model: a pruned video model.
        image_processor: the model's image processor.
        frames: frames of the clip, of any size.
        file: the output file, whose name ends in .gif or .webp.

    Raises:
        ValueError: the model is dense or an image model; there is no frame; or the file name has another suffix.
    """
    if Path(file).suffix.lower() not in FORMATS:
        raise ValueError(f"{file} does not end in {' or '.join(FORMATS)}, the formats of animations.")
    first, *others = animated_frames(model, image_processor, frames)
    first.save(file, save_all=True, append_images=others, duration=round(1000 * SECONDS), loop=0)


def animated_frames(
    model: ImageClassifier, image_processor: BaseImageProcessor, frames: Sequence[Image.Image]
) -> list[Image.Image]:
    """The pictures of such an animation, all of the same size: one for each position in time of the model's grid.

    Args and errors: as for `animate`.
    """
    config = model.config
    if config.modality != "video":
        raise ValueError("This is an image model: use `visualize` to draw what it keeps.")
    if not frames:
        raise ValueError("`frames` is empty; at least one frame is needed.")
    pixel_values = clip_pixel_values(image_processor, frames)
    output = run_pruned(model, pixel_values.unsqueeze(0))
    input_size = config.input_size_of((1, *pixel_values.shape))
    grid = config.grid_size_for(*input_size)
    kept = [tokens[0] for tokens in kept_patches(output.kept_tokens, config, input_size)]
    masks = [kept_mask(tokens, grid).flatten(0, -3) for tokens in kept]
    seen = frames_from_pixel_values(pixel_values, *image_statistics(image_processor), config)
    titles = ["input", *headings(len(kept), config.token_pruning["layers"])]  # type: ignore[index]
    counts = [f"{len(tokens)} / {masks[0].numel()} tokens" for tokens in kept]
    captions = [[config.label_names[output.logits[0].argmax()], *counts]]
    pictures = []
    for time, frame in enumerate(seen):
        panel = fit(frame, PANEL_SIZE)
        pictures.append(lay_out([[panel, *(draw_mask(panel, mask[time]) for mask in masks)]], titles, captions))
    return pictures

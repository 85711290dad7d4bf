"""Layout of pictures of kept tokens: panels of images whose dropped patches are covered, in rows and columns with
headings and captions."""

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


PANEL_SIZE = 224  # pixels along the longer side of a panel
SHEET_SIZE = 448  # the same for a sheet of frames
MARGIN = 12
FRAME_GAP = 4  # pixels between the frames of a sheet
FONT_SIZE = 15
BACKGROUND, TEXT = (255, 255, 255), (38, 38, 38)
# The blue of Okabe and Ito's palette: unlike grey and black, it is visible in images of any brightness and for any kind
# of colour vision.
DROPPED = (0, 114, 178)
DROPPED_OPACITY = 0.72
OUTLINE = (240, 228, 66)  # the palette's yellow


def num_columns(num_frames: int) -> int:
    return max(1, math.ceil(math.sqrt(num_frames)))


def sheet(frames: Sequence[Image.Image]) -> Image.Image:
    """Arranges frames of the same size in a roughly square sheet; a single frame is returned unchanged."""
    if len(frames) == 1:
        return frames[0]
    columns = num_columns(len(frames))
    width, height = frames[0].width + FRAME_GAP, frames[0].height + FRAME_GAP
    rows = math.ceil(len(frames) / columns)
    whole = Image.new("RGB", (columns * width - FRAME_GAP, rows * height - FRAME_GAP), BACKGROUND)
    for index, frame in enumerate(frames):
        whole.paste(frame, (index % columns * width, index // columns * height))
    return whole


def headings(num_stages: int, layers: Sequence[int] | None) -> list[str]:
    if layers is None:
        return [f"stage {stage}" for stage in range(1, num_stages + 1)]
    return [f"from layer {layer} on" for layer in layers]


def kept_mask(kept: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The remaining patches as a bool mask of shape `grid`."""
    mask = torch.zeros(math.prod(grid), dtype=torch.bool, device="cpu")
    return mask.scatter(0, kept.cpu(), True).view(grid)


def fit(image: Image.Image, panel_size: int) -> Image.Image:
    """Resizes the image to a panel: enlarges it by a whole factor, so that pixels stay crisp, or shrinks it."""
    longer = max(image.size)
    if longer <= panel_size:
        factor = panel_size // longer
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = [max(1, round(side * panel_size / longer)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def draw_mask(panel: Image.Image, mask: Tensor, groups: Tensor | None = None) -> Image.Image:
    """Covers the patches outside the mask; borders are drawn around it, or between groups."""
    dropped = Image.fromarray((~mask).byte().numpy() * 255)
    opacity = dropped.resize(panel.size, Image.Resampling.NEAREST).point(lambda value: round(value * DROPPED_OPACITY))
    covered = Image.composite(Image.new("RGB", panel.size, DROPPED), panel, opacity)
    draw = ImageDraw.Draw(covered)
    for line in _borders(mask if groups is None else groups, panel.size):
        draw.line(line, fill=OUTLINE, width=2)
    return covered


def _borders(values: Tensor, size: tuple[int, int]) -> list[tuple[float, float, float, float]]:
    """The borders between patches of different values, as lines (x0, y0, x1, y1) in pixels."""
    height, width = size[1] / values.shape[0], size[0] / values.shape[1]
    beside = (values[:, 1:] != values[:, :-1]).nonzero().tolist()
    below = (values[1:] != values[:-1]).nonzero().tolist()
    lines = [((x + 1) * width, y * height, (x + 1) * width, (y + 1) * height) for y, x in beside]
    return lines + [(x * width, (y + 1) * height, (x + 1) * width, (y + 1) * height) for y, x in below]


def wrap(text: str, width: float) -> str:
    """The text with line breaks at spaces, so that a line is at most so many pixels wide unless it is a single word."""
    font, lines = ImageFont.load_default(FONT_SIZE), []
    for line in text.split("\n"):
        words = line.split(" ")
        lines.append(words[0])
        for word in words[1:]:
            if font.getlength(longer := f"{lines[-1]} {word}") <= width:
                lines[-1] = longer
            else:
                lines.append(word)
    return "\n".join(lines)


def shorten(text: str, width: float) -> str:
    """The text, without its end if it is wider than so many pixels."""
    font = ImageFont.load_default(FONT_SIZE)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def lay_out(rows: list[list[Image.Image | None]], headings: list[str], captions: list[list[str]]) -> Image.Image:
    """Panels in rows and columns, some places empty, a heading above each column and a caption below each panel.
    Captions wider than all panels continue on another line."""
    font = ImageFont.load_default(FONT_SIZE)
    widest = max(PANEL_SIZE, *(panel.width for row in rows for panel in row if panel))
    captions = [[wrap(text, widest) for text in row] for row in captions]
    texts = [*headings, *(text for row in captions for text in row)]
    line_height = round(1.6 * FONT_SIZE)
    text_heights = [line_height * max(text.count("\n") + 1 for text in row) for row in captions]
    text_width = math.ceil(max(font.getlength(line) for text in texts for line in text.split("\n")))
    column_width = max(text_width, *(panel.width for row in rows for panel in row if panel))
    panel_heights = [max(panel.height for panel in row if panel) for row in rows]
    row_heights = [sum(heights) for heights in zip(panel_heights, text_heights, strict=True)]

    width = MARGIN + (column_width + MARGIN) * len(headings)
    height = MARGIN + line_height + sum(row_heights) + MARGIN * len(rows)
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    centres = [MARGIN + column_width // 2 + column * (column_width + MARGIN) for column in range(len(headings))]
    for centre, heading in zip(centres, headings, strict=True):
        draw.text((centre, MARGIN), heading, TEXT, font, anchor="ma")

    top = MARGIN + line_height
    for panels, row_captions, row_height in zip(rows, captions, row_heights, strict=True):
        for centre, panel, caption in zip(centres, panels, row_captions, strict=True):
            if panel is None:
                continue
            canvas.paste(panel, (centre - panel.width // 2, top))
            draw.multiline_text((centre, top + panel.height + 4), caption, TEXT, font, anchor="ma", align="center")
        top += row_height + MARGIN
    return canvas

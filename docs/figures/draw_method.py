"""Draws the figure of the method page, from numbers computed by the package itself.

python docs/figures/draw_method.py          # writes method.svg next to this file
"""

from html import escape
from pathlib import Path

import torch
from torch import Tensor

from hf_vssm_prune.selective_scan_torch import decay_steps
from hf_vssm_prune.token_pruning import path_gaps, select_tokens


# Eight tokens of one scan, of which five are kept. The values were chosen to keep the curves apart.
IMPORTANCE = [0.55, 0.90, 0.20, 0.12, 0.70, 0.25, 0.60, 0.45]
TIME_STEPS = [0.40, 0.30, 0.36, 0.50, 0.26, 0.40, 0.30, 0.28]
KEPT_COUNT = 5
HOLE_TIME_STEP = 0.55  # of a token with zero input
WATCHED = 2  # the token whose trace in the state is followed, counted from 1

WIDTH, HEIGHT = 520, 640
LEFT, CELL = 20, 60  # the first token's left edge, the distance between tokens
INK, GREY, PALE = "#262626", "#767676", "#e4e4e4"
# Okabe and Ito's palette, which is distinguishable with any kind of colour vision.
BLUE, GREEN, RED = "#0072b2", "#00795a", "#b34700"


def main() -> None:
    Path(__file__).with_name("method.svg").write_text(draw(), encoding="utf-8")


def draw() -> str:
    kept = select_tokens(torch.tensor([IMPORTANCE]), KEPT_COUNT)[0]
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        *importance(kept),
        *tokens_and_gaps(kept),
        *decay(kept),
    ]
    title = "Which tokens are dropped, and how the state decays across the holes"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="14">\n<title>{title}</title>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def importance(kept: Tensor) -> list[str]:
    """One bar for each token; dropped tokens are grey."""
    bottom, tallest = 128, 80
    parts = [heading(24, "1. Importance: the most important tokens stay")]
    for index, value in enumerate(IMPORTANCE):
        height = tallest * value
        colour = BLUE if index in kept else GREY
        parts.append(
            f'<rect x="{centre(index) - 14}" y="{bottom - height:g}" width="28" height="{height:g}" fill="{colour}"/>'
        )
    parts.append(line(LEFT, bottom, WIDTH - LEFT, bottom, INK))
    return parts


def tokens_and_gaps(kept: Tensor) -> list[str]:
    """The scan path with its holes, and the gap before each kept token."""
    top, size = 176, 36
    parts = [heading(160, "2. Holes and gaps: how far apart the others are")]
    for index in range(len(IMPORTANCE)):
        stays = index in kept
        style = f'fill="{BLUE}"' if stays else f'fill="#ffffff" stroke="{GREY}" stroke-dasharray="4 3"'
        parts += [
            f'<rect x="{centre(index) - size / 2:g}" y="{top}" width="{size}" height="{size}" rx="4" {style}/>',
            text(centre(index), top + 23, str(index + 1), "#ffffff" if stays else GREY, "middle"),
        ]
    bottom = top + size + 6
    for token, gap in zip(kept.tolist()[1:], path_gaps(kept).tolist()[1:], strict=True):
        start, end = centre(token - gap), centre(token)
        parts += [
            f'<path d="M {start + 3} {bottom} V {bottom + 10} H {end - 3} V {bottom}" fill="none" stroke="{INK}"/>',
            text((start + end) / 2, bottom + 26, f"g={gap}", INK, "middle"),
        ]
    return parts


def decay(kept: Tensor) -> list[str]:
    """The remaining trace of the watched token in the state after each later token."""
    top, bottom = 318, 508
    scale = bottom - top
    parts = [
        heading(280, f"3. Decay: what is left of token {WATCHED} in the state"),
        *(
            line(LEFT + 18, bottom - scale * share, WIDTH - LEFT, bottom - scale * share, PALE)
            for share in (0.25, 0.5, 0.75, 1)
        ),
        line(LEFT + 18, bottom, WIDTH - LEFT, bottom, INK),
        text(LEFT + 12, top + 5, "1", GREY, "end"),
        text(LEFT + 12, bottom + 5, "0", GREY, "end"),
    ]
    for index in range(len(IMPORTANCE)):
        parts.append(text(centre(index), bottom + 20, str(index + 1), INK if index in kept else GREY, "middle"))
    for curve, (name, colour, dashes, explanation) in enumerate(CURVES):
        positions, left = trace(name, kept)
        points = [(centre(p), bottom - scale * share) for p, share in zip(positions, left, strict=True)]
        path = " L ".join(f"{x:g} {y:.1f}" for x, y in points)
        parts.append(f'<path d="M {path}" fill="none" stroke="{colour}" stroke-width="2.5"{dashes}/>')
        parts += [f'<circle cx="{x:g}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points]
        y = bottom + 50 + 22 * curve
        parts.append(
            f'<path d="M {LEFT} {y - 5} h 30" fill="none" stroke="{colour}" stroke-width="2.5"{dashes}/>'
            f"{text(LEFT + 40, y, f'{name}: {explanation}', INK)}"
        )
    return parts


CURVES = (
    ("dense", INK, ' stroke-dasharray="2 4"', "nothing is dropped"),
    ("none", RED, "", "the hole takes no time"),
    ("repeat", BLUE, "", "g − 1 further steps of the token behind the hole"),
    ("zero_input", GREEN, ' stroke-dasharray="8 4"', "g − 1 steps of an empty token"),
)


def trace(alignment: str, kept: Tensor) -> tuple[list[int], list[float]]:
    """Positions from the watched token on, and the fraction of it that remains in the state there, for A = -1."""
    everything = torch.arange(len(TIME_STEPS))
    positions = everything if alignment == "dense" else kept
    time_step = torch.tensor(TIME_STEPS, dtype=torch.float64)[positions].unsqueeze(-1)
    gaps = path_gaps(positions) if alignment in ("repeat", "zero_input") else None
    hole_time_step = torch.tensor([HOLE_TIME_STEP]) if alignment == "zero_input" else None
    steps = decay_steps(time_step, gaps, hole_time_step)[:, 0]
    after = positions >= WATCHED - 1
    elapsed = steps[after].cumsum(0) - steps[after][0]
    return positions[after].tolist(), torch.exp(-elapsed).tolist()


def centre(index: int) -> int:
    return LEFT + CELL * index + CELL // 2


def heading(y: float, words: str) -> str:
    return f'<text x="{LEFT}" y="{y:g}" font-size="16" font-weight="600" fill="{INK}">{escape(words)}</text>'


def text(x: float, y: float, words: str, colour: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<path d="M {x1:g} {y1:g} L {x2:g} {y2:g}" stroke="{colour}"/>'


if __name__ == "__main__":
    main()

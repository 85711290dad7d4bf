"""Small windows of the grid, for choosing tokens so that every part of the input keeps some."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_float32
from .token_pruning import gather_tokens


def default_window(grid: tuple[int, ...]) -> tuple[int, ...]:
    """The sides of a window in cells: two along each axis of the grid.

    On clips, tokens merged in windows of 2 x 2 x 2 were more similar to their neighbour than in 1 x 2 x 2 at every keep
    ratio that was tried. Accuracy on real clips does not decide between them; study/videos/README.md has both.
    """
    return (2,) * len(grid)


def score_in_turns(importance: Tensor, cells: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Scores that select the most important token of every window (`default_window`) first, then the second of every
    window, and so on. If there are not enough for the next token of every window, the windows with the more important
    tokens come first.

    Args:
        importance: shape (batch, n).
        cells: cells of the tokens, ascending, shape (batch, n).
        grid: shape of the full grid, any number of axes.

    Returns:
        Shape (batch, n).
    """
    return _relative(importance) - _rank_in_window(importance, cells, grid, default_window(grid))


def distance_in_window(features: Tensor, cells: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The distance of each token from the others in its window: the mean square of the differences, after a layer norm
    without parameters. The token that is furthest from the others is also furthest from their mean; if there are only
    two, their distances are exactly equal.

    Args:
        features: shape (batch, n, channels).
        cells, grid: as in `score_in_turns`.

    Returns:
        float32 (float64 if the features are) of shape (batch, n); 0 for a token that is alone in its window.
    """
    features = F.layer_norm(at_least_float32(features), features.shape[-1:])
    window = default_window(grid)
    places = _window_places(cells, grid, window)
    size, rows = math.prod(window), torch.arange(places.shape[1], device=places.device).expand_as(places)
    empty = places.new_zeros(places.shape[0], _count_places(grid, window))
    # A place without a token has a copy of the first one, which does not count.
    tokens = gather_tokens(features, empty.scatter(1, places, rows)).unflatten(1, (-1, size))
    there = empty.to(features.dtype).scatter(1, places, 1).unflatten(1, (-1, size))
    distances = torch.zeros_like(there)
    for apart in range(1, size):  # pairs of places, each once
        difference = F.mse_loss(tokens[:, :, apart:], tokens[:, :, :-apart], reduction="none").mean(-1)
        distances = distances + F.pad(difference * there[..., :-apart], (apart, 0))
        distances = distances + F.pad(difference * there[..., apart:], (0, apart))
    others = (there.sum(-1, keepdim=True) - 1).clamp(min=1)
    return (distances / others).flatten(1).gather(1, places)


def _window_places(cells: Tensor, grid: tuple[int, ...], window: tuple[int, ...]) -> Tensor:
    """The positions of cells when the grid is read window by window."""
    of_window, within = torch.zeros_like(cells), torch.zeros_like(cells)
    strides = [*itertools.accumulate(grid[:0:-1], lambda a, b: a * b, initial=1)][::-1]
    for size, stride, side in zip(grid, strides, window, strict=True):
        along = cells // stride % size
        of_window = of_window * -(-size // side) + along // side
        within = within * side + along % side
    return of_window * math.prod(window) + within


def _count_places(grid: tuple[int, ...], window: tuple[int, ...]) -> int:
    """The number of these positions, with complete windows at the edges."""
    return math.prod([-(-size // side) * side for size, side in zip(grid, window, strict=True)])


def _rank_in_window(importance: Tensor, cells: Tensor, grid: tuple[int, ...], window: tuple[int, ...]) -> Tensor:
    """The number of tokens in the same window that come before each token: more important ones, or equally important
    ones in an earlier cell."""
    places = _window_places(cells, grid, window)
    empty = importance.new_full((importance.shape[0], _count_places(grid, window)), -torch.inf)
    in_window = empty.scatter(1, places, importance).unflatten(1, (-1, math.prod(window)))
    one, other = in_window.unsqueeze(-1), in_window.unsqueeze(-2)
    before = (other > one) | (other == one).tril(-1)
    return before.sum(-1).flatten(1).gather(1, places).to(importance.dtype)


def _relative(importance: Tensor) -> Tensor:
    """Importance rescaled to [0, 1), in the same order."""
    low, high = importance.amin(-1, keepdim=True), importance.amax(-1, keepdim=True)
    return (importance - low) / ((high - low) * 1.001).clamp(min=torch.finfo(importance.dtype).tiny)

"""The grid in small windows: choosing tokens so that every part of the input keeps some."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_float32


def default_window(grid: tuple[int, ...]) -> tuple[int, ...]:
    """The sides of a window in cells: two along each axis of the grid.

    On clips, windows of 2 x 2 x 2 beat those of 1 x 2 x 2: what goes into a neighbour was more like it, at every keep
    ratio that was tried, as neighbours in time are the most alike.
    """
    return (2,) * len(grid)


def score_in_turns(
    importance: Tensor, cells: Tensor, grid: tuple[int, ...], window: tuple[int, ...] | None = None
) -> Tensor:
    """Scores by which the most important token of every window is chosen first, then the second of every window, as far
    as the count allows; where not all windows get their next token, those with the more important one do.

    Args:
        importance: shape (batch, n).
        cells: of the tokens, ascending, shape (batch, n).
        grid: shape of the full grid, any number of axes.
        window: sides of a window in cells, one for each axis; None for `default_window`.

    Returns:
        Shape (batch, n).
    """
    return _relative(importance) - _rank_in_window(importance, cells, grid, window or default_window(grid))


def distance_in_window(
    features: Tensor, cells: Tensor, grid: tuple[int, ...], window: tuple[int, ...] | None = None
) -> Tensor:
    """How far each token is from the others of its window: the mean square of the differences, after a layer norm
    without parameters. In a window, the one that is furthest is also furthest from their mean; two alone are equally
    far, to the last bit.

    Args:
        features: shape (batch, n, channels).
        cells, grid, window: as in `score_in_turns`.

    Returns:
        float32 (float64 where the features are) of shape (batch, n); 0 for a token that is alone in its window.
    """
    features = F.layer_norm(at_least_float32(features), features.shape[-1:])
    window = window or default_window(grid)
    places = _window_places(cells, grid, window)
    batch, _, channels = features.shape
    size = math.prod(window)
    empty = features.new_zeros(batch, _count_places(grid, window), channels)
    tokens = empty.scatter(1, places.unsqueeze(-1).expand_as(features), features).unflatten(1, (-1, size))
    there = empty[..., 0].scatter(1, places, 1).unflatten(1, (-1, size))
    distances = torch.zeros_like(there)
    for turn in range(1, size):
        difference = (tokens - tokens.roll(turn, dims=2)).square().mean(-1)
        distances = distances + difference * there.roll(turn, dims=2)
    others = (there.sum(-1, keepdim=True) - 1).clamp(min=1)
    return (distances / others).flatten(1).gather(1, places)


def _window_places(cells: Tensor, grid: tuple[int, ...], window: tuple[int, ...]) -> Tensor:
    """The places of cells when the grid is read window by window."""
    of_window, within = torch.zeros_like(cells), torch.zeros_like(cells)
    strides = [*itertools.accumulate(grid[:0:-1], lambda a, b: a * b, initial=1)][::-1]
    for size, stride, side in zip(grid, strides, window, strict=True):
        along = cells // stride % size
        of_window = of_window * -(-size // side) + along // side
        within = within * side + along % side
    return of_window * math.prod(window) + within


def _count_places(grid: tuple[int, ...], window: tuple[int, ...]) -> int:
    """Those of all windows, whole ones at the edges too."""
    return math.prod([-(-size // side) * side for size, side in zip(grid, window, strict=True)])


def _rank_in_window(importance: Tensor, cells: Tensor, grid: tuple[int, ...], window: tuple[int, ...]) -> Tensor:
    """How many tokens of its window come before each token: more important ones, or equal ones in an earlier cell."""
    places = _window_places(cells, grid, window)
    empty = importance.new_full((importance.shape[0], _count_places(grid, window)), -torch.inf)
    in_window = empty.scatter(1, places, importance).unflatten(1, (-1, math.prod(window)))
    one, other = in_window.unsqueeze(-1), in_window.unsqueeze(-2)
    before = (other > one) | (other == one).tril(-1)
    return before.sum(-1).flatten(1).gather(1, places).to(importance.dtype)


def _relative(importance: Tensor) -> Tensor:
    """Importance from 0 to less than 1, in the same order."""
    low, high = importance.amin(-1, keepdim=True), importance.amax(-1, keepdim=True)
    return (importance - low) / ((high - low) * 1.001).clamp(min=torch.finfo(importance.dtype).tiny)

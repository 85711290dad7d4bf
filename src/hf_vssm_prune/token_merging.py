"""Merging tokens: matching them by similarity, and computing weighted means.

The matching is that of ToMe (arXiv 2210.09461, section 3): tokens are split into two groups, each token of the first is
matched with the most similar one of the second, and the most similar pairs are merged.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .function_transforms import is_exporting
from .precision import at_least_float32
from .token_pruning import gather_tokens, select_tokens


# From the rows of the remaining tokens (batch, m) to those of the two groups.
Split = Callable[[Tensor], tuple[Tensor, Tensor]]


def most_similar(features: Tensor, sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine similarity of each source to its most similar target, and the row of this target. If several are
    equally similar, the first one.

    Args:
        features: shape (batch, n, channels).
        sources, targets: rows of these n, shapes (batch, s) and (batch, t).

    Returns:
        Two tensors of shape (batch, s).
    """
    unit = F.normalize(at_least_float32(features), dim=-1)
    with torch.autocast(unit.device.type, enabled=False):
        similarity = gather_tokens(unit, sources) @ gather_tokens(unit, targets).transpose(1, 2)
    best, match = similarity.max(dim=-1)
    return best, targets.gather(1, match)


def match_tokens(features: Tensor, count: int, split: Split) -> tuple[Tensor, Tensor, Tensor]:
    """Merges the most similar pairs until `count` tokens are left.

    One round of matching removes at most half of the tokens. If more have to be removed, the remaining tokens are
    matched again, by their own features. This is our addition: the published methods never merge more than half at
    once.

    Args:
        features: tokens are matched by the cosine similarity of these, shape (batch, n, channels).
        count: how many tokens to keep, at most n.
        split: splits the tokens into two groups.

    Returns:
        The rows of the remaining tokens, ascending (batch, count); for each token, the row of the token that it was
        merged into, or its own if it is kept (batch, n); and scores (batch, n): minus the similarity with which the
        token was last considered for merging, or 1, the highest score, if it never was.
    """
    batch, num_tokens, _ = features.shape
    scores = unit_weights(features)
    everyone = torch.arange(num_tokens, device=features.device).expand(batch, -1)
    left = into = everyone
    while (there := left.shape[1]) > count:
        num_merged = min(there - count, there // 2)
        sources, targets = split(left)
        best, match = most_similar(features, sources, targets)
        scores = scores.scatter(1, sources, -best)
        chosen = select_tokens(best, num_merged)
        merged = sources.gather(1, chosen)
        into = everyone.scatter(1, merged, match.gather(1, chosen)).gather(1, into)
        stays = torch.ones_like(everyone).scatter(1, merged, 0).gather(1, left)
        left = left.gather(1, select_tokens(stays, there - num_merged))
    return left, into, scores


def count_matching(num_tokens: int, count: int, channels: int) -> int:
    """Multiply-adds of the similarities that `match_tokens` computes when its groups are halves."""
    flops = 0
    while num_tokens > count:
        targets = num_tokens // 2
        flops += (num_tokens - targets) * targets * channels
        num_tokens -= min(num_tokens - count, targets)
    return flops


def alternate(left: Tensor) -> tuple[Tensor, Tensor]:
    """ToMe's groups: every second token can be merged into one of the others."""
    return left[:, ::2], left[:, 1::2]


def merge_tokens(tokens: Tensor, weights: Tensor, into: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means of the tokens that are merged into the same token.

    Args:
        tokens: shape (batch, n, channels).
        weights: non-negative weights, positive for the tokens in `rows`, shape (batch, n).
        into: for each token, the row of the token that it is merged into, or its own if it is kept, shape (batch, n).
        rows: rows of the kept tokens, shape (batch, count).

    Returns:
        The means (batch, count, channels), in the dtype of `tokens`, and the sums of the weights (batch, count).
    """
    if is_exporting():
        # If several threads of onnxruntime add rows at the same index, some additions are lost.
        assignment = weights.unsqueeze(1) * (into.unsqueeze(1) == rows.unsqueeze(2))
        totals = assignment.sum(-1)
        return (assignment @ at_least_float32(tokens) / totals.unsqueeze(-1)).to(tokens.dtype), totals
    weighted = at_least_float32(tokens) * weights.unsqueeze(-1)
    sums = torch.zeros_like(weighted).scatter_add(1, into.unsqueeze(-1).expand_as(weighted), weighted)
    totals = torch.zeros_like(weights).scatter_add(1, into, weights).gather(1, rows)
    return (gather_tokens(sums, rows) / totals.unsqueeze(-1)).to(tokens.dtype), totals


def unit_weights(tokens: Tensor) -> Tensor:
    """A weight of 1 for each of the tokens (batch, n, channels): (batch, n), at least float32."""
    return torch.ones_like(at_least_float32(tokens[..., 0]))

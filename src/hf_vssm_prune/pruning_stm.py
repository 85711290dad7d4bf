"""`stm`: merges tokens into both of their neighbours in the sequence, but not around the class token."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .mixer_output import own_inputs
from .precision import at_least_float32
from .pruning_stage import Reduction, Stage
from .token_merging import unit_weights
from .token_pruning import gather_tokens, select_tokens


# The tokens on each side of the class token that its causal convolutions see (Vim's and VideoMamba's kernel is 4).
NUM_PROTECTED = 3
# Subtracted from the similarity to a protected token. Half of it is more than any difference between two cosines.
PENALTY = 8.0


def merge_into_both_neighbours(stage: Stage) -> Reduction:
    """The two ideas of "Sequential Token Merging: Revisiting Hidden States" (STM, arXiv 2509.22691), in a form of ours.

    The abstract names *bidirectional nearest neighbor merging*, by symmetric spatial aggregation, and *hidden states
    protection* around the class token. No code has been published, and of the paper only the abstract and other
    people's summaries were available to us. What follows is our reading of them. Every second token can be merged, into
    both of its neighbours in the sequence, half into each. This way its input reaches the state of each scan direction
    one step early in one half and one step late in the other. The tokens that are most similar to both neighbours are
    merged. A token is merged with one of the `NUM_PROTECTED` tokens on each side of the class token only if there are
    no others.

    Our choices, where the abstract says nothing: which tokens can be merged (every second one, as in ToMe); the
    similarity (the cosine of the previous layer's B, as in our `tome`: the summaries mention that B, and on 250
    training images of Imagenette, without fine-tuning, this lost less than hidden states); how many tokens are
    protected; and that every token of a stage counts once. If more than half of the tokens have to be removed, the rest
    is merged in another round. The paper is about Vim. PlainMamba has no class token and several paths; its neighbours
    are those in raster order.
    """
    B = stage.of_patches(own_inputs(stage.mixer.scans)[1].transpose(1, 2).flatten(2))
    unit, protected = F.normalize(B, dim=-1), _is_protected(stage)
    everyone = torch.arange(B.shape[1], device=B.device).expand(B.shape[0], -1)
    left = _Remaining(everyone, at_least_float32(stage.hidden_states), unit_weights(stage.hidden_states))
    into, scores = everyone, torch.full_like(left.weights, 1 + PENALTY)
    while (there := left.rows.shape[1]) > stage.num_kept:
        num_merged = min(there - stage.num_kept, there // 2)
        before, after = _similarities(gather_tokens(unit, left.rows), protected.gather(1, left.rows))
        both = before.isfinite() & after.isfinite()
        similarity = torch.where(both, (before + after) / 2, torch.maximum(before, after))
        scores = scores.scatter(1, left.rows[:, ::2], -similarity)
        merged = 2 * select_tokens(similarity, num_merged)
        nearest = merged + torch.where(after > before, 1, -1).gather(1, merged // 2)
        moves = everyone.scatter(1, left.rows.gather(1, merged), left.rows.gather(1, nearest))
        into = moves.gather(1, into)
        left = left.without(merged)
    return Reduction(left.rows, left.tokens.to(stage.hidden_states.dtype), scores, into)


class _Remaining(NamedTuple):
    """What is left of a stage's tokens.

    Attributes:
        rows: their rows in the stage, ascending, shape (batch, m).
        tokens: shape (batch, m, hidden).
        weights: how many of the stage's tokens are in each, shape (batch, m).
    """

    rows: Tensor
    tokens: Tensor
    weights: Tensor

    def without(self, merged: Tensor) -> "_Remaining":
        """The tokens at the places `merged` (batch, k), no two of which are neighbours, go into both neighbours."""
        num_tokens = self.rows.shape[1]
        is_merged = torch.zeros_like(self.rows).scatter(1, merged, 1)
        # The first and the last have only one neighbour, which gets all of them.
        ends = F.pad(torch.zeros_like(self.weights[:, 2:]), (1, 1), value=1.0)
        shares = self.weights * is_merged * (1 + ends) / 2
        weights = self.weights + _to_neighbours(shares.unsqueeze(-1)).squeeze(-1)
        sums = self.tokens * self.weights.unsqueeze(-1) + _to_neighbours(self.tokens * shares.unsqueeze(-1))
        stay = select_tokens(1 - is_merged, num_tokens - merged.shape[1])
        weights = weights.gather(1, stay)
        return _Remaining(self.rows.gather(1, stay), gather_tokens(sums, stay) / weights.unsqueeze(-1), weights)


def _to_neighbours(values: Tensor) -> Tensor:
    """For each token the sum of its neighbours' values (batch, m, channels)."""
    return F.pad(values[:, 1:], (0, 0, 0, 1)) + F.pad(values[:, :-1], (0, 0, 1, 0))


def _similarities(unit: Tensor, protected: Tensor) -> tuple[Tensor, Tensor]:
    """Of every second token the similarity to the token before it and after it, each of shape (batch, sources); minus
    infinity where there is none.

    Args:
        unit: features of length 1, shape (batch, m, channels).
        protected: whether each token is, shape (batch, m).
    """
    similarity = (unit[:, 1:] * unit[:, :-1]).sum(-1) - PENALTY * (protected[:, 1:] | protected[:, :-1])
    beside = F.pad(similarity, (1, 1), value=-torch.inf)
    return beside[:, :-1:2], beside[:, 1::2]


def _is_protected(stage: Stage) -> Tensor:
    """Whether tokens are next to the class token, shape (batch, n)."""
    if stage.cls_row is None or stage.patch_rows is None:
        return torch.zeros_like(stage.cells, dtype=torch.bool)
    return (stage.patch_rows - stage.cls_row).abs() <= NUM_PROTECTED

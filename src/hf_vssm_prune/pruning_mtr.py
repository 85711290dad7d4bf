"""`mtr`: merges the tokens with the smallest time steps into those with the next larger ones."""

import torch
from transformers import PreTrainedConfig

from .mixer_output import own_inputs
from .pruning_stage import Reduction, Stage
from .token_merging import merge_tokens, most_similar, unit_weights
from .token_pruning import rank_tokens, select_tokens


def merge_small_steps(stage: Stage) -> Reduction:
    """Mamba token reduction of "Training-free Token Reduction for Vision Mamba" (MTR, arXiv 2507.14042).

    A token's score is the time step that the scans computed from it (the scan's input gate), averaged over channels and
    summed over the scans. Each of the tokens with the lowest scores (the paper's *source*) is merged into the most
    similar of the tokens that rank next (*target*), which becomes the mean of all tokens merged into it; the tokens
    with the highest scores (*keep*) are unchanged. Two choices are ours rather than the paper's: there are as many
    targets as sources (or as many as there are tokens left), and similarity is the cosine of the hidden states. In
    PlainMamba, which the paper does not cover, a path reads a token with the time step of another one; the sum of these
    over the four paths would be the same for point-symmetric tokens.
    """
    scores = stage.of_patches(own_inputs(stage.mixer.scans)[0].sum(dim=1))
    num_sources, num_targets = _group_sizes(scores.shape[1], stage.num_kept)
    ranking = rank_tokens(scores)
    rows = select_tokens(scores, stage.num_kept)
    into = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    if num_sources == 0:
        return Reduction(rows, stage.hidden_states, scores, into)
    sources = ranking[:, stage.num_kept :]
    targets = ranking[:, stage.num_kept - num_targets : stage.num_kept].sort(dim=1).values
    _, match = most_similar(stage.hidden_states.detach(), sources, targets)
    into = into.scatter(1, sources, match)
    tokens, _ = merge_tokens(stage.hidden_states, unit_weights(stage.hidden_states), into, rows)
    return Reduction(rows, tokens, scores, into)


def _group_sizes(num_tokens: int, count: int) -> tuple[int, int]:
    """How many tokens are sources and how many are targets."""
    num_sources = num_tokens - count
    return num_sources, min(num_sources, count)


def count_flops(num_tokens: int, count: int, config: PreTrainedConfig) -> int:
    """Multiply-adds of the similarities."""
    num_sources, num_targets = _group_sizes(num_tokens, count)
    return num_sources * num_targets * config.hidden_size

"""`state_merge`: what a dropped token would have put into the scan's state goes in with its neighbour. Ours."""

import torch
from torch import Tensor

from .mixer_output import own_inputs
from .pruning_stage import Reduction, Stage
from .token_merging import merge_tokens
from .token_pruning import select_tokens


def merge_into_state(stage: Stage) -> Reduction:
    """The most important tokens stay; each dropped token is merged into the kept token nearest to it in raster order,
    of two equally near ones the earlier.

    A token i puts Δ_i B_i u_i into the state. The sum of two such products is no product, and a scan takes one for each
    token, so that the dropped token's share w of the merged input u_i + w u_j is the best in the sense of least
    squares: Δ_i B_i w = Δ_j B_j in the direction of B_i gives w = (Δ_j B_j · B_i) / (Δ_i B_i · B_i). Δ and B are those
    of the layer before, Δ the mean over channels, w the mean over Vim's two scans, and 0 where it would be negative.
    The merged token is (x_i + Σ w x_j) / (1 + Σ w), a mean, because a norm comes before the scan. The decay between the
    two neighbours is left out.
    """
    scores = stage.scores()
    rows = select_tokens(scores, stage.num_kept)
    into = _nearest(stage.cells, rows).scatter(1, rows, rows)
    weights = _input_shares(stage, into).scatter(1, rows, torch.ones_like(rows, dtype=scores.dtype))
    tokens, _ = merge_tokens(stage.hidden_states, weights, into, rows)
    return Reduction(rows, tokens, scores, into)


def _nearest(cells: Tensor, rows: Tensor) -> Tensor:
    """For each of the cells (batch, n) the row of the nearest one among those in `rows` (batch, count)."""
    distance = (cells.unsqueeze(-1) - cells.gather(1, rows).unsqueeze(1)).abs()
    return rows.gather(1, distance.argmin(dim=-1))


def _input_shares(stage: Stage, into: Tensor) -> Tensor:
    """w of each token with respect to the one that it is merged into, shape (batch, n)."""
    steps, B = own_inputs(stage.mixer.scans)
    shares = []
    for step, b in zip(steps.unbind(1), B.unbind(1), strict=True):
        step, b = stage.of_patches(step), stage.of_patches(b)
        own_step, own_b = step.gather(1, into), b.gather(1, into.unsqueeze(-1).expand_as(b))
        norm = own_step * own_b.square().sum(-1)
        shares.append(step * (b * own_b).sum(-1) / norm.clamp(min=torch.finfo(norm.dtype).tiny))
    return torch.stack(shares).mean(0).clamp(min=0)

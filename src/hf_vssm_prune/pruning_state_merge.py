"""`state_merge`: adds the input of a dropped token to the scan's state together with that of its neighbour. Ours."""

import torch
from torch import Tensor

from .mixer_output import own_inputs
from .pruning_stage import Reduction, Stage
from .token_merging import merge_tokens
from .token_pruning import select_tokens


def merge_into_state(stage: Stage) -> Reduction:
    """Keeps the most important tokens; each dropped token is merged into the kept token nearest to it in raster order
    (the earlier one if two are equally near).

    A token i adds Δ_i B_i u_i to the state. The sum of two such products is not such a product, but a scan takes one
    product per token. The share w of the dropped token in the merged input u_i + w u_j is therefore the least-squares
    solution: projecting Δ_i B_i w = Δ_j B_j onto B_i gives w = (Δ_j B_j · B_i) / (Δ_i B_i · B_i). Δ and B are those of
    the previous layer; Δ is averaged over channels, and w over Vim's two scans; negative values of w are set to 0.
    Since a norm comes before the scan, the merged token is a mean, (x_i + Σ w x_j) / (1 + Σ w). The decay between the
    two neighbours is neglected.
    """
    scores = stage.scores()
    rows = select_tokens(scores, stage.num_kept)
    into = _nearest(stage.cells, rows)
    weights = _input_shares(stage, into).scatter(1, rows, torch.ones_like(rows, dtype=scores.dtype))
    tokens, _ = merge_tokens(stage.hidden_states, weights, into, rows)
    return Reduction(rows, tokens, scores, into)


def _nearest(cells: Tensor, rows: Tensor) -> Tensor:
    """For each of the ascending cells (batch, n) the row of the nearest one among those in `rows` (batch, count)."""
    is_kept = torch.zeros_like(cells, dtype=torch.bool).scatter(1, rows, 1)
    passed = is_kept.cumsum(1)  # how many rows are not after each cell
    before = rows.gather(1, (passed - 1).clamp(min=0))
    after = rows.gather(1, passed.clamp(max=rows.shape[1] - 1))
    is_before = (cells - cells.gather(1, before)).abs() <= (cells - cells.gather(1, after)).abs()
    return torch.where(is_before, before, after)


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

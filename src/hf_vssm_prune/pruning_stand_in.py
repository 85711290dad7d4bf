"""`stand_in`: the most important tokens stay, and where one was dropped the convolutions see its neighbour. Ours."""

from .pruning_stage import Reduction, Stage
from .pruning_top import keep_most_important


def keep_with_stand_ins(stage: Stage) -> Reduction:
    """Chooses as `top` does. PlainMamba's convolutions over the grid then see, in a dropped token's cell, the nearest
    token that is left (`token_pruning.nearest_tokens`) in place of zero, which no dense model ever showed them.

    To fill a hole with the nearest token is what the scan does anyway, whose state goes on, and what Vim's causal
    convolution does along its sequence, so that Vim has no more to do.
    """
    return keep_most_important(stage)

"""`top`: the paper's method. Keeps the most important tokens unchanged."""

from .pruning_stage import Reduction, Stage
from .token_pruning import gather_tokens, select_tokens


def keep_most_important(stage: Stage) -> Reduction:
    """Token pruning of "Exploring Token Pruning in Vision State Space Models" (ToP, arXiv 2409.18962, section 4).

    The paper's importance is `clip`; `random` gives random pruning. The paper accounts for the gaps by alignment, see
    `token_pruning`. The authors' published code, which is for Vim only, has no alignment and another importance (see
    `pruning_importances.mirrored_backward`), rounds the number of kept patches down to an even one, and moves the class
    token to their middle; here the class token stays between its former neighbours.
    """
    scores = stage.scores()
    rows = select_tokens(scores, stage.num_kept)
    return Reduction(rows, gather_tokens(stage.hidden_states, rows), scores)

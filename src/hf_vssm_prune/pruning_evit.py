"""`evit`: the important tokens stay, all others are fused into one token."""

from .pruning_stage import Reduction, Stage
from .token_merging import merge_tokens
from .token_pruning import rank_tokens, select_tokens


# So small that it decides where no token of the fused ones has any importance, and nowhere else.
LEAST_WEIGHT = 1e-12


def fuse_unimportant(stage: Stage) -> Reduction:
    """Token reorganisation of "Not All Patches Are What You Need" (EViT, arXiv 2202.07800, section 3.2).

    EViT fuses the tokens that it does not keep into one more token, their sum weighted by the class token's attention.
    A Mamba has no attention. Here the weights are the importance (below 0 it counts as 0), and add up to 1, as
    attention over these tokens would. EViT appends the fused token to the k kept ones; here it is one of the
    `num_kept`, so that every method leaves as many tokens, and it lies where the most important of the fused tokens
    lay, because a Mamba's tokens have an order.
    """
    scores = stage.scores()
    ranking = rank_tokens(scores)
    fused = ranking[:, stage.num_kept - 1 : stage.num_kept]
    rows = select_tokens(scores, stage.num_kept)
    into = fused.expand_as(scores).scatter(1, rows, rows)
    tokens, _ = merge_tokens(stage.hidden_states, scores.clamp(min=0) + LEAST_WEIGHT, into, rows)
    return Reduction(rows, tokens, scores, into)

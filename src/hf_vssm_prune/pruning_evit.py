"""`evit`: keeps the important tokens, and fuses all others into one token."""

from .pruning_stage import Reduction, Stage
from .token_merging import merge_tokens
from .token_pruning import rank_tokens, select_tokens


# So small that it only matters if none of the fused tokens has any importance.
LEAST_WEIGHT = 1e-12


def fuse_unimportant(stage: Stage) -> Reduction:
    """Token reorganisation of "Not All Patches Are What You Need" (EViT, arXiv 2202.07800, section 3.2).

    EViT fuses the tokens that it does not keep into one additional token, their sum weighted by the attention of the
    class token. These weights sum to less than 1, because they are a part of the attention over all tokens. A Mamba has
    no attention; here the weights are the importance (negative values count as 0), normalised to sum to 1, so that the
    fused token is a mean. EViT appends the fused token to the k kept ones, which it orders by attention. Here it is one
    of the `num_kept` tokens, so that every method leaves the same number of tokens; the kept tokens stay in their
    order, and the fused one takes the position of the most important fused token, because a Mamba's tokens have an
    order. EViT is trained with a keep ratio that decreases slowly; here it is the same throughout.
    """
    scores = stage.scores()
    ranking = rank_tokens(scores)
    fused = ranking[:, stage.num_kept - 1 : stage.num_kept]
    rows = select_tokens(scores, stage.num_kept)
    into = fused.expand_as(scores).scatter(1, rows, rows)
    tokens, _ = merge_tokens(stage.hidden_states, scores.clamp(min=0) + LEAST_WEIGHT, into, rows)
    return Reduction(rows, tokens, scores, into)

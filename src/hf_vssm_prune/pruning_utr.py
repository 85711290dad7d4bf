"""`utr`: merges the unimportant tokens that are most similar to an important one into it."""

from torch import Tensor
from transformers import PreTrainedConfig

from .pruning_stage import Reduction, Stage
from .token_merging import count_matching, match_tokens, merge_tokens, unit_weights
from .token_pruning import rank_tokens


def merge_unimportant(stage: Stage) -> Reduction:
    """Unified token reduction of "Rethinking Token Reduction for State Space Models" (UTR, arXiv 2410.14725, section
    4).

    The paper's importance is `clip`. The less important half of the tokens is matched with the more important half by
    similarity, and the most similar pairs are merged to their mean. The paper does not say which features are compared;
    here it is the mixer's gated outputs. The authors reduce the mixer's branch and the residual stream separately, and
    in the former they drop half of the matched tokens instead of merging them; these models have a single stream
    between their layers, and all of it is merged. If more than half of the tokens have to be removed, the rest is split
    and matched again.

    This follows the paper. In the authors' code, importance has no influence: it sorts each channel of the mixer's
    outputs separately, matches the results, and then merges every second token accordingly.
    """
    scores = stage.scores()

    def by_importance(left: Tensor) -> tuple[Tensor, Tensor]:
        num_important = left.shape[1] - left.shape[1] // 2
        of_left = scores.gather(1, left)
        ranking = rank_tokens(of_left)
        important, unimportant = ranking.tensor_split([num_important], dim=1)
        return left.gather(1, unimportant.sort(dim=1).values), left.gather(1, important.sort(dim=1).values)

    features = stage.of_patches(stage.mixer.gated)
    rows, into, _ = match_tokens(features, stage.num_kept, by_importance)
    tokens, _ = merge_tokens(stage.hidden_states, unit_weights(stage.hidden_states), into, rows)
    return Reduction(rows, tokens, scores, into)


def count_flops(num_tokens: int, count: int, config: PreTrainedConfig) -> int:
    """Multiply-adds of the similarities."""
    return count_matching(num_tokens, count, config.intermediate_size)

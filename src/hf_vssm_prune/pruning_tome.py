"""`tome`: merges similar tokens, which are matched by their keys."""

from torch import Tensor
from transformers import PreTrainedConfig

from .mixer_output import own_inputs
from .pruning_stage import Reduction, Stage
from .token_merging import alternate, count_matching, match_tokens, merge_tokens, unit_weights


def merge_similar_keys(stage: Stage) -> Reduction:
    """Bipartite soft matching of "Token Merging: Your ViT But Faster" (ToMe, arXiv 2210.09461, section 3).

    ToMe merges tokens between the attention and the MLP of every layer, and matches them by their attention keys,
    averaged over the heads. In a state space model, B plays the role of the key (Dao and Gu, "Transformers are
    SSMs", arXiv 2405.21060). Here the key of a token is the B that the scans of the previous layer computed from
    it; for Vim, the B of both scans are concatenated. A merged token is the mean of its patches, for which the
    sizes of tokens are tracked. As in the authors' code, tokens are weighted by their sizes if a model's head takes
    their mean. ToMe's proportional attention has no counterpart. ToMe does not preserve the order of tokens; here a
    merged token takes the position of the token that others were merged into.
    """
    _, B = own_inputs(stage.mixer.scans)
    return merge_alternating(stage, stage.of_patches(B.transpose(1, 2).flatten(2)))


def merge_alternating(stage: Stage, features: Tensor) -> Reduction:
    """Merges tokens by the similarity of their features (batch, n, channels): every second token can be merged into one
    of the others."""
    rows, into, scores = match_tokens(features, stage.num_kept, alternate)
    sizes = unit_weights(stage.hidden_states) if stage.sizes is None else stage.sizes
    tokens, sizes = merge_tokens(stage.hidden_states, sizes, into, rows)
    return Reduction(rows, tokens, scores, into, sizes)


def count_flops(num_tokens: int, count: int, config: PreTrainedConfig) -> int:
    """Multiply-adds of the similarities."""
    return count_matching(num_tokens, count, config.num_scans * config.state_size)

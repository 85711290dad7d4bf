"""`stm`: merges similar neighbours in the sequence, but not around the class token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_float32
from .pruning_stage import Reduction, Stage
from .token_merging import merge_best_pairs, merge_tokens, unit_weights
from .token_pruning import gather_tokens


# The tokens on each side of the class token that its causal convolutions see (Vim's and VideoMamba's kernel is 4).
NUM_PROTECTED = 3
# More than any difference between two cosines: pairs with a protected token come after all others.
PENALTY = 4.0


def merge_neighbours(stage: Stage) -> Reduction:
    """The two ideas of "Sequential Token Merging: Revisiting Hidden States" (STM, arXiv 2509.22691), in a form of ours.

    Its abstract names *bidirectional nearest neighbor merging*, which aggregates tokens symmetrically and so preserves
    the sequence, and *hidden states protection* around the class token. There is no published code, and only the
    abstract and summaries of the paper were available to us, so that the following is our reading of them. Every second
    token can be merged into the token before or after it in the sequence, whichever is more similar, and the most
    similar pairs are merged to their mean. So no token moves further than one place, and the most similar neighbour is
    looked for in both scan directions. Pairs with one of the `NUM_PROTECTED` tokens on each side of the class token are
    merged only if there are no others.

    Our choices, where the abstract says nothing: which tokens can be merged (as in ToMe), the similarity (the cosine of
    the hidden states), the number of protected tokens, and the weights (every token counts once; summaries of the paper
    mention weights estimated from the previous layer's B, as in our `state_merge`). The paper is about Vim. PlainMamba
    has no class token and several paths; its neighbours are those in raster order.
    """
    unit = F.normalize(at_least_float32(stage.hidden_states.detach()), dim=-1)
    protected = _is_protected(stage)

    def pair(left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, lifted = gather_tokens(unit, left), protected.gather(1, left)
        similarity = (tokens[:, 1:] * tokens[:, :-1]).sum(-1) - PENALTY * (lifted[:, 1:] | lifted[:, :-1])
        beside = F.pad(similarity, (1, 1), value=-torch.inf)
        before, after = beside[:, :-1:2], beside[:, 1::2]
        places = torch.arange(0, left.shape[1], 2, device=left.device)
        match = left.gather(1, torch.where(after > before, places + 1, places - 1))
        return left[:, ::2], torch.maximum(before, after), match

    weights = unit_weights(stage.hidden_states)
    rows, into, scores = merge_best_pairs(weights, stage.num_kept, pair)
    tokens, _ = merge_tokens(stage.hidden_states, weights, into, rows)
    return Reduction(rows, tokens, scores, into)


def _is_protected(stage: Stage) -> Tensor:
    """Whether tokens are next to the class token, shape (batch, n)."""
    if stage.cls_row is None or stage.patch_rows is None:
        return torch.zeros_like(stage.cells, dtype=torch.bool)
    return (stage.patch_rows - stage.cls_row).abs() <= NUM_PROTECTED

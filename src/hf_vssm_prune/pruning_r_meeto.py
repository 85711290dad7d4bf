"""`r_meeto`: similar tokens are merged in the Mamba's order; made for re-training."""

from transformers import PreTrainedConfig

from .pruning_stage import Reduction, Stage
from .pruning_tome import merge_alternating
from .token_merging import count_matching


def merge_similar_outputs(stage: Stage) -> Reduction:
    """The merging of "Faster Vision Mamba is Rebuilt in Minutes via Merged Token Re-training" (R-MeeTo, arXiv
    2412.12496).

    ToMe's matching and means over patches (`pruning_tome`), by the similarity of what the mixer before put out, and
    with the tokens put back into the order of the scan. Its other half is re-training: `hf-vssm-prune finetune`. The
    authors' code merges before every second layer and moves the class token in proportion to the tokens that are gone;
    here the schedule says where, and the class token stays between the tokens that were its neighbours.
    """
    return merge_alternating(stage, stage.of_patches(stage.mixer.projected))


def count_flops(num_tokens: int, count: int, config: PreTrainedConfig) -> int:
    """Multiply-adds of the similarities."""
    return count_matching(num_tokens, count, config.hidden_size)

"""`r_meeto`: merges similar tokens, keeping their order in the sequence; meant to be followed by re-training."""

from transformers import PreTrainedConfig

from .pruning_stage import Reduction, Stage
from .pruning_tome import merge_alternating
from .token_merging import count_matching


def merge_similar_outputs(stage: Stage) -> Reduction:
    """The merging of "Faster Vision Mamba is Rebuilt in Minutes via Merged Token Re-training" (R-MeeTo, arXiv
    2412.12496).

    Uses ToMe's matching and means over patches (`pruning_tome`), with the similarity of the previous mixer's outputs,
    and restores the scan order of the tokens. The second half of the method is re-training: `hf-vssm-prune finetune`.
    The authors' code merges before every second layer, and moves the class token in proportion to the number of removed
    tokens. Here the schedule says where to merge, and the class token stays between its former neighbours.
    """
    return merge_alternating(stage, stage.of_patches(stage.mixer.projected))


def count_flops(num_tokens: int, count: int, config: PreTrainedConfig) -> int:
    """Multiply-adds of the similarities."""
    return count_matching(num_tokens, count, config.hidden_size)

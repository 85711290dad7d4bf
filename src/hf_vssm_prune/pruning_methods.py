"""The pruning methods, by name: each is one file and one table entry. `method` in `token_pruning` selects one."""

from collections.abc import Callable
from typing import NamedTuple

from transformers import PreTrainedConfig

from .pruning_dyvm import TokenPredictor, keep_predicted
from .pruning_dyvm import count_flops as count_dyvm
from .pruning_evit import fuse_unimportant
from .pruning_local_merge import merge_into_nearest
from .pruning_local_top import keep_locally_important
from .pruning_mtr import count_flops as count_mtr
from .pruning_mtr import merge_small_steps
from .pruning_r_meeto import count_flops as count_r_meeto
from .pruning_r_meeto import merge_similar_outputs
from .pruning_stage import Reduction, Stage, StageModule
from .pruning_stand_in import keep_with_stand_ins
from .pruning_state_merge import merge_into_state
from .pruning_stm import merge_into_both_neighbours
from .pruning_tome import count_flops as count_tome
from .pruning_tome import merge_similar_keys
from .pruning_top import keep_most_important
from .pruning_uniform import keep_evenly_spread
from .pruning_utr import count_flops as count_utr
from .pruning_utr import merge_unimportant
from .publication import (
    DYVM_PAPER,
    EVIT_PAPER,
    MTR_PAPER,
    R_MEETO_PAPER,
    STM_PAPER,
    TOME_PAPER,
    TOP_PAPER,
    UTR_PAPER,
    Paper,
)


def _no_flops(num_tokens: int, count: int, config: PreTrainedConfig) -> int:
    return 0


class PruningMethod(NamedTuple):
    """A way to reduce the number of tokens.

    Attributes:
        reduce: reduces a stage to the number of tokens that it asks for.
        alignment: the default alignment: that of the method's paper, and none for methods from other papers than ToP.
        importance: the default measure of importance, if the schedule can choose one. None: it cannot.
        count_flops: from the number of tokens before and after, and the model's configuration, to the multiply-adds of
            its matrix products. Scores, sorting and means are not counted, just as norms and activations are not.
        module: from the hidden size to the module with the method's parameters at each stage. None: it has no
            parameters.
        reads_mixer: whether the method reads the results of the previous layer's mixer (`Stage.mixer`).
        paper: the method's paper, for model cards. None: it is ours.
    """

    reduce: Callable[[Stage], Reduction]
    alignment: str
    importance: str | None = None
    count_flops: Callable[[int, int, PreTrainedConfig], int] = _no_flops
    module: Callable[[int], StageModule] | None = None
    reads_mixer: bool = True
    paper: Paper | None = None


METHODS = {
    "top": PruningMethod(keep_most_important, "repeat", importance="clip", paper=TOP_PAPER),
    "evit": PruningMethod(fuse_unimportant, "none", importance="clip", paper=EVIT_PAPER),
    "tome": PruningMethod(merge_similar_keys, "none", count_flops=count_tome, paper=TOME_PAPER),
    "r_meeto": PruningMethod(merge_similar_outputs, "none", count_flops=count_r_meeto, paper=R_MEETO_PAPER),
    "utr": PruningMethod(merge_unimportant, "none", importance="clip", count_flops=count_utr, paper=UTR_PAPER),
    "mtr": PruningMethod(merge_small_steps, "none", count_flops=count_mtr, paper=MTR_PAPER),
    "stm": PruningMethod(merge_into_both_neighbours, "none", paper=STM_PAPER),
    "dyvm": PruningMethod(
        keep_predicted, "none", count_flops=count_dyvm, module=TokenPredictor, reads_mixer=False, paper=DYVM_PAPER
    ),
    "uniform": PruningMethod(keep_evenly_spread, "repeat", reads_mixer=False),
    "state_merge": PruningMethod(merge_into_state, "repeat", importance="clip"),
    "stand_in": PruningMethod(keep_with_stand_ins, "repeat", importance="clip"),
    "local_top": PruningMethod(keep_locally_important, "repeat", importance="l1"),
    "local_merge": PruningMethod(merge_into_nearest, "none", reads_mixer=False),
}

# The method of a schedule that names none: the one that lost least in this project's studies, see
# study/photos/STUDY.md and STUDY.md.
RECOMMENDED_METHOD = "local_merge"
PAPERS_METHOD = "top"

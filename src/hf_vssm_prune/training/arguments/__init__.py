"""The options of the training commands, as dataclasses for transformers' `HfArgumentParser`.

Names follow transformers' `run_image_classification_no_trainer.py` if it has the option, otherwise timm's `train.py`.
The dataclasses check their values when they are created, before anything is loaded. The options of a task are in its
own file; see `training.tasks`.
"""

from hf_vssm_prune.training.arguments.data import DataArguments, EvaluationDataArguments
from hf_vssm_prune.training.arguments.evaluation import BesideArguments, EstimateArguments, EvaluationArguments
from hf_vssm_prune.training.arguments.help import OptionParser
from hf_vssm_prune.training.arguments.model import (
    DenseModelArguments,
    FinetuneArguments,
    LossArguments,
    TeacherArguments,
)
from hf_vssm_prune.training.arguments.optimization import OptimizationArguments, ScratchOptimizationArguments
from hf_vssm_prune.training.arguments.parsing import parse_arguments
from hf_vssm_prune.training.arguments.pruning import ElasticArguments, PruningArguments
from hf_vssm_prune.training.arguments.run import RunArguments, ScaleArguments


__all__ = [
    "BesideArguments",
    "DataArguments",
    "DenseModelArguments",
    "ElasticArguments",
    "EstimateArguments",
    "EvaluationArguments",
    "EvaluationDataArguments",
    "FinetuneArguments",
    "LossArguments",
    "OptimizationArguments",
    "OptionParser",
    "PruningArguments",
    "RunArguments",
    "ScaleArguments",
    "ScratchOptimizationArguments",
    "TeacherArguments",
    "parse_arguments",
]

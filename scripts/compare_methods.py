"""Prunes a model to one budget by every method there is, without training it, and evaluates each beside the dense one.

    python scripts/compare_methods.py --model_name_or_path <checkpoint> --dataset_name <Hub data set or folder>

`dyvm` has a part of its own that nothing has trained yet, so that it chooses at random here.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hf_vssm_prune.training import jobs
from hf_vssm_prune.training.arguments import EvaluationArguments, EvaluationDataArguments, parse_arguments
from hf_vssm_prune.training.checkpoints import write_json
from hf_vssm_prune.training.evaluation import comparison_table


@dataclass
class BudgetArguments:
    """How much of the model's computation is to go."""

    flops_reduction: float = field(default=0.416, metadata={"help": "the share of FLOPs to remove"})


def main(arguments: Sequence[str] | None = None) -> int:
    types = [EvaluationDataArguments, EvaluationArguments, BudgetArguments]
    data, options, budget = parse_arguments(types, arguments, __doc__)
    try:
        evaluations = jobs.compare_methods(data, options, budget.flops_reduction)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(comparison_table(evaluations))
    if options.json is not None:
        write_json({name: asdict(evaluation) for name, evaluation in evaluations.items()}, Path(options.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())

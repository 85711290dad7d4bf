"""Evaluates a model dense beside pruned: top-1, top-5, FLOPs and images per second.

    python scripts/evaluate.py --model_name_or_path <checkpoint> --dataset_name <Hub data set or folder> --json out.json

Every batch goes through both, one after the other, so that their speeds compare on a machine that is not quiet.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hf_vssm_prune.training import jobs
from hf_vssm_prune.training.arguments import (
    EvaluationArguments,
    EvaluationDataArguments,
    PruningArguments,
    parse_arguments,
)
from hf_vssm_prune.training.checkpoints import write_json
from hf_vssm_prune.training.evaluation import comparison_table


def main(arguments: Sequence[str] | None = None) -> int:
    types = [EvaluationDataArguments, EvaluationArguments, PruningArguments]
    data, options, pruning = parse_arguments(types, arguments, __doc__)
    try:
        evaluations = jobs.evaluate(data, options, pruning)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(comparison_table(evaluations))
    if options.json is not None:
        write_json({name: asdict(evaluation) for name, evaluation in evaluations.items()}, Path(options.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())

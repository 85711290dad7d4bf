"""Evaluates a model dense beside pruned: top-1, top-5, FLOPs and images per second.

    python scripts/evaluate.py --model_name_or_path <checkpoint> --dataset_name <Hub data set or folder> --json out.json

Every batch goes through both, one after the other, so that their speeds compare on a machine that is not quiet.
"""

import sys
from collections.abc import Sequence

from hf_vssm_prune.training import jobs
from hf_vssm_prune.training.arguments import (
    BesideArguments,
    EvaluationArguments,
    EvaluationDataArguments,
    PruningArguments,
    parse_arguments,
)


def main(arguments: Sequence[str] | None = None) -> int:
    types = [EvaluationDataArguments, EvaluationArguments, BesideArguments, PruningArguments]
    data, options, beside, pruning = parse_arguments(types, arguments, __doc__)
    return jobs.report(lambda: jobs.evaluate(data, options, beside, pruning), options)


if __name__ == "__main__":
    sys.exit(main())

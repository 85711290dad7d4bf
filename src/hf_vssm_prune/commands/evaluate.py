"""Compares a model with its pruned version: metrics (such as top-1 and top-5), FLOPs and images per second.

    hf-vssm-prune evaluate --model_name_or_path <checkpoint> --dataset_name <Hub data set or folder> --json out.json

Each batch goes through both models in turn, so that the speeds are comparable even on a busy machine.
"""

from collections.abc import Sequence
from typing import Any

from hf_vssm_prune.training import jobs
from hf_vssm_prune.training.arguments import (
    BesideArguments,
    EvaluationArguments,
    EvaluationDataArguments,
    OptionParser,
    PruningArguments,
    parse_arguments,
)
from hf_vssm_prune.training.tasks import Task, TaskArguments, choose_task


def option_types(task: type[Task]) -> list[Any]:
    return [
        TaskArguments,
        EvaluationDataArguments,
        EvaluationArguments,
        BesideArguments,
        PruningArguments,
        task.evaluation_arguments,
    ]


def make_parser(prog: str | None = None) -> OptionParser:
    return OptionParser(option_types(choose_task([])), __doc__, prog)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    chosen = choose_task(arguments)
    _, data, options, beside, pruning, of_task = parse_arguments(option_types(chosen), arguments, __doc__, prog)
    task = chosen(of_task)
    return jobs.report(lambda: jobs.evaluate(data, options, beside, pruning, task), options, task)

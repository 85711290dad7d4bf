"""Trains a dense model from scratch, or continues from a checkpoint.

    hf-vssm-prune train --dataset_name <Hub data set or folder> --family plainmamba --preset L1 --output_dir runs/l1

On several devices: `accelerate launch -m hf_vssm_prune train ...`.
"""

from collections.abc import Sequence
from typing import Any

from hf_vssm_prune.training import jobs
from hf_vssm_prune.training.arguments import (
    DataArguments,
    DenseModelArguments,
    ElasticArguments,
    OptionParser,
    RunArguments,
    ScaleArguments,
    ScratchOptimizationArguments,
    TeacherArguments,
    parse_arguments,
)
from hf_vssm_prune.training.loop import Recipe
from hf_vssm_prune.training.tasks import Task, TaskArguments, choose_task


def option_types(task: type[Task]) -> list[Any]:
    return [
        TaskArguments,
        DataArguments,
        DenseModelArguments,
        TeacherArguments,
        ScratchOptimizationArguments,
        task.training_arguments,
        ElasticArguments,
        ScaleArguments,
        RunArguments,
    ]


def make_parser(prog: str | None = None) -> OptionParser:
    return OptionParser(option_types(choose_task([])), __doc__, prog)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    task = choose_task(arguments)
    _, data, model, teacher, optimization, options, elastic, scale, run = parse_arguments(
        option_types(task), arguments, __doc__, prog
    )
    losses = teacher.loss_weights()
    recipe = Recipe(optimization, task(options), run, losses, elastic, scale, data.dataloader_num_workers)
    return jobs.run(lambda: jobs.prepare_dense_training(data, model, teacher, recipe))

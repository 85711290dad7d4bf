"""Prunes a dense model and fine-tunes it, with the dense model as its teacher.

    hf-vssm-prune finetune --model_name_or_path <checkpoint> --dataset_name <Hub data set or folder> \\
        --flops_reduction 0.416 --output_dir runs/pruned

On several devices: `accelerate launch -m hf_vssm_prune finetune ...`. The defaults are the paper's recipe (arXiv
2409.18962) plus this project's distillation and alignment losses; the method for a dense checkpoint is this project's
`local_merge`. The paper's is `--prune_method top`.
"""

from collections.abc import Sequence
from typing import Any

from hf_vssm_prune.training import jobs
from hf_vssm_prune.training.arguments import (
    DataArguments,
    ElasticArguments,
    FinetuneArguments,
    OptimizationArguments,
    OptionParser,
    PruningArguments,
    RunArguments,
    ScaleArguments,
    parse_arguments,
)
from hf_vssm_prune.training.loop import Recipe
from hf_vssm_prune.training.tasks import Task, TaskArguments, choose_task


def option_types(task: type[Task]) -> list[Any]:
    return [
        TaskArguments,
        DataArguments,
        FinetuneArguments,
        PruningArguments,
        OptimizationArguments,
        task.training_arguments,
        ElasticArguments,
        ScaleArguments,
        RunArguments,
    ]


def make_parser(prog: str | None = None) -> OptionParser:
    return OptionParser(option_types(choose_task([])), __doc__, prog)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    task = choose_task(arguments)
    _, data, model, pruning, optimization, options, elastic, scale, run = parse_arguments(
        option_types(task), arguments, __doc__, prog
    )
    recipe = Recipe(optimization, task(options), run, model.loss_weights(), elastic, scale, data.dataloader_num_workers)
    return jobs.run(lambda: jobs.prepare_finetuning(data, model, pruning, recipe))

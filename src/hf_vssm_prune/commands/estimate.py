"""Estimates time and memory of a training run, without data and without a checkpoint.

    hf-vssm-prune estimate --recipe top_plainmamba_l3_imagenet --family plainmamba --preset L3

It takes the options of `finetune`, with the same defaults, and those of `train` for a new model; options of a recipe
that are about data and output are left out. It prints steps, FLOPs, memory and device-hours at the assumed speed
(`--device_tflops`), and measures the same model with synthetic images on this machine.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_vssm_prune.commands import one_line_errors
from hf_vssm_prune.configuration_common import pruned_config
from hf_vssm_prune.hub.loading import load_config
from hf_vssm_prune.label_maps import names_by_id
from hf_vssm_prune.training.arguments import (
    DataArguments,
    DenseModelArguments,
    ElasticArguments,
    EstimateArguments,
    LossArguments,
    OptimizationArguments,
    OptionParser,
    PruningArguments,
    RunArguments,
    ScaleArguments,
    parse_arguments,
)
from hf_vssm_prune.training.atomic_files import write_json
from hf_vssm_prune.training.estimate import estimate_run, estimate_text
from hf_vssm_prune.training.image_size import config_at_size
from hf_vssm_prune.training.labels import name_labels
from hf_vssm_prune.training.tasks import Task, TaskArguments, choose_task


NUM_CLASSES = 1000  # ImageNet-1k's


def label_names(count: int) -> list[str]:
    return [f"class {i}" for i in range(count)]


def option_types(task: type[Task]) -> list[Any]:
    return [
        TaskArguments,
        DenseModelArguments,
        LossArguments,
        PruningArguments,
        OptimizationArguments,
        task.training_arguments,
        ElasticArguments,
        ScaleArguments,
        EstimateArguments,
    ]


def make_parser(prog: str | None = None) -> OptionParser:
    return OptionParser(option_types(choose_task([])), __doc__, prog)


@one_line_errors()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    task = choose_task(arguments)
    parsed = parse_arguments(option_types(task), arguments, __doc__, prog, [DataArguments, RunArguments])
    _, model, losses, pruning, optimization, of_task, elastic, scale, options = parsed
    if model.model_name_or_path is None:
        config = model.config(label_names(options.num_classes or NUM_CLASSES), optimization.drop_path)
    else:
        config = load_config(model.model_name_or_path)
        if options.num_classes is not None:
            name_labels(config, label_names(options.num_classes))
    teacher = None
    if losses.teacher_name_or_path is not None:
        teacher = load_config(losses.teacher_name_or_path)
        name_labels(teacher, names_by_id(config.id2label))
    for each in (config, teacher):
        if model.image_size is not None and each is not None:  # a new model has this size already
            pruned_config(each).image_size = config_at_size(pruned_config(each), model.image_size).image_size
    pruned = pruned_config(config)
    pruned.token_pruning = pruning.schedule(pruned)
    losses.check_schedule(pruned.token_pruning)
    estimate = estimate_run(task(of_task), config, optimization, losses, elastic, scale, options, teacher)
    print(estimate_text(estimate, options.num_devices, optimization.per_device_train_batch_size))
    if options.json is not None:
        write_json(asdict(estimate), Path(options.json))
    return 0

"""Trains a dense Vim or PlainMamba from scratch, or goes on from a checkpoint.

    python scripts/train.py --dataset_name <Hub data set or folder> --family plainmamba --preset L1 --output_dir runs/l1

On several devices: `accelerate launch scripts/train.py ...`. `--help` lists all options.
"""

import sys
from collections.abc import Sequence

from hf_vssm_prune.training import jobs
from hf_vssm_prune.training.arguments import (
    AugmentationArguments,
    DataArguments,
    DenseModelArguments,
    ElasticArguments,
    RunArguments,
    ScaleArguments,
    ScratchOptimizationArguments,
    parse_arguments,
)
from hf_vssm_prune.training.loop import Recipe


def main(arguments: Sequence[str] | None = None) -> int:
    types = [
        DataArguments,
        DenseModelArguments,
        ScratchOptimizationArguments,
        AugmentationArguments,
        ElasticArguments,
        ScaleArguments,
        RunArguments,
    ]
    data, model, optimization, augmentation, elastic, scale, run = parse_arguments(types, arguments, __doc__)
    recipe = Recipe(
        optimization, augmentation, run, elastic=elastic, scale=scale, num_workers=data.dataloader_num_workers
    )
    return jobs.run(lambda: jobs.prepare_dense_training(data, model, recipe), run)


if __name__ == "__main__":
    sys.exit(main())

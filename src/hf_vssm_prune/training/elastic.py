"""Elastic budgets: each training step prunes by a schedule drawn for that step."""

from collections.abc import Sequence

import numpy as np

from hf_vssm_prune.configuration_common import pruned_config
from hf_vssm_prune.pruning_options import TokenPruning
from hf_vssm_prune.training.arguments import ElasticArguments
from hf_vssm_prune.training.tasks.task import PrunableModel


def add_schedules(model: PrunableModel, elastic: ElasticArguments) -> list[TokenPruning | None]:
    """The schedules of the budgets, for which the model gets new parameters if they need any.

    Parameters of pruning that neither these schedules nor the model's own use are frozen. They never get a gradient:
    DDP must not wait for them, and the optimizer needs no moments.
    """
    config = pruned_config(model.config)
    schedules = elastic.schedules(config)
    for schedule in schedules:
        model.add_pruning_parameters(schedule)
    model.freeze_pruning_parameters([config.token_pruning, *schedules])
    return schedules


def draw_schedule(schedules: Sequence[TokenPruning | None], seed: int, epoch: int, step: int) -> TokenPruning | None:
    """The schedule of a step. It is the same in all processes and for all batches of the step, and does not depend on
    earlier draws."""
    place = np.random.SeedSequence([seed, epoch, step], spawn_key=(1,))
    return schedules[int(np.random.default_rng(place).integers(len(schedules)))]


def what_is_pruned(schedule: TokenPruning | None) -> tuple[list[int], float | None]:
    """The layers that drop tokens, and the fraction of the scan directions that run (None: all), as `training_loss`
    takes them."""
    return ([], None) if schedule is None else (list(schedule.stages), schedule.get("block_keep_ratio"))

"""Elastic budgets: each training step prunes by a schedule drawn for that step."""

from collections.abc import Sequence

import numpy as np

from hf_vssm_prune.pruning_options import TokenPruning


def draw_schedule(schedules: Sequence[TokenPruning | None], seed: int, epoch: int, step: int) -> TokenPruning | None:
    """The schedule of a step. It is the same in all processes and for all batches of the step, and does not depend on
    earlier draws."""
    place = np.random.SeedSequence([seed, epoch, step], spawn_key=(1,))
    return schedules[int(np.random.default_rng(place).integers(len(schedules)))]


def what_is_pruned(schedule: TokenPruning | None) -> tuple[list[int], float | None]:
    """The layers that drop tokens, and the fraction of the scan directions that run (None: all), as `training_loss`
    takes them."""
    return ([], None) if schedule is None else (list(schedule.stages), schedule.get("block_keep_ratio"))

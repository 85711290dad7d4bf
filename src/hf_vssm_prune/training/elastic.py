"""Elastic budgets: each step of a run prunes by a schedule that is drawn for it."""

from collections.abc import Sequence

import numpy as np

from hf_vssm_prune.pruning_options import TokenPruning


def draw_schedule(schedules: Sequence[TokenPruning | None], seed: int, epoch: int, step: int) -> TokenPruning | None:
    """The schedule of a step: the same in every process and for all batches of the step, whatever was drawn before."""
    place = np.random.SeedSequence([seed, epoch, step], spawn_key=(1,))
    return schedules[int(np.random.default_rng(place).integers(len(schedules)))]


def pruned_layers(schedule: TokenPruning | None) -> list[int]:
    """The layers that drop tokens."""
    return [] if schedule is None else list(schedule.stages)

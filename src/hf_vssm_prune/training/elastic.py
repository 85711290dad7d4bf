"""Elastic budgets: each step of a run prunes by a schedule that is drawn for it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from transformers import PreTrainedModel


Schedule = dict[str, Any] | None  # complete `token_pruning` options, None for none


def draw_schedule(schedules: Sequence[Schedule], seed: int, epoch: int, step: int) -> Schedule:
    """The schedule of a step: the same in every process and for all batches of the step, whatever was drawn before."""
    place = np.random.SeedSequence([seed, epoch, step], spawn_key=(1,))
    return schedules[np.random.default_rng(place).integers(len(schedules))]


def pruned_layers(schedule: Schedule) -> list[int]:
    """The layers that drop tokens."""
    return [] if schedule is None else schedule["layers"]


@contextmanager
def pruned_by(model: PreTrainedModel, schedule: Schedule) -> Iterator[None]:
    """Within this context a model prunes by a schedule in place of its own."""
    own = model.config.token_pruning
    if schedule == own:
        yield
        return
    model.set_token_pruning(schedule)
    try:
        yield
    finally:
        model.set_token_pruning(own)

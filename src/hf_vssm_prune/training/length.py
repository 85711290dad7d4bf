"""The length of a run, and the learning rate at each step."""

import math
from dataclasses import dataclass

from hf_vssm_prune.training.arguments import OptimizationArguments
from hf_vssm_prune.training.optimization import LearningRateSchedule


@dataclass(frozen=True)
class RunLength:
    """The length of a run in optimizer steps.

    Args:
        batches_per_epoch: batches per epoch on each device. The last step of an epoch may have fewer batches than the
            others.
        gradient_accumulation_steps: batches per step.
        num_train_epochs: passes over the training images.
        max_train_steps: if given, replaces `num_train_epochs`.
    """

    batches_per_epoch: int
    gradient_accumulation_steps: int
    num_train_epochs: int
    max_train_steps: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.batches_per_epoch / self.gradient_accumulation_steps)

    @property
    def num_steps(self) -> int:
        return self.max_train_steps or self.num_train_epochs * self.steps_per_epoch

    @property
    def num_batches(self) -> int:
        """Number of batches of the whole run on each device."""
        epochs, steps = divmod(self.num_steps, self.steps_per_epoch)
        return epochs * self.batches_per_epoch + steps * self.gradient_accumulation_steps

    @property
    def num_epochs(self) -> int:
        """Number of epochs; the last one may end early."""
        return math.ceil(self.num_steps / self.steps_per_epoch)

    def batches_left(self, epoch: int) -> int:
        """Number of batches from the start of an epoch to the end of the run."""
        return (self.num_steps - epoch * self.steps_per_epoch) * self.gradient_accumulation_steps

    def batches_of_step(self, batch: int) -> int:
        """Number of batches in the step to which a batch of an epoch belongs."""
        accumulation = self.gradient_accumulation_steps
        return min(accumulation, self.batches_per_epoch - batch // accumulation * accumulation)


def plan_steps(options: OptimizationArguments, batches_per_epoch: int) -> tuple[RunLength, LearningRateSchedule]:
    """The length of a run, and the learning rate of each step.

    Raises:
        ValueError: the warm-up is as long as the run.
    """
    length = RunLength(
        batches_per_epoch,
        options.gradient_accumulation_steps,
        options.num_train_epochs,
        options.max_train_steps,
    )
    warmup_steps = options.num_warmup_steps
    if warmup_steps is None:
        epochs = options.warmup_epochs
        warmup_steps = round(length.num_steps / 30 if epochs is None else epochs * length.steps_per_epoch)
    if warmup_steps >= length.num_steps:
        raise ValueError(f"{warmup_steps} warm-up steps do not fit into a run of {length.num_steps} steps.")
    schedule = LearningRateSchedule(
        options.lr_scheduler_type,
        length.num_steps,
        warmup_steps,
        warmup_factor=options.warmup_lr / options.learning_rate,
        min_factor=options.min_lr / options.learning_rate,
    )
    return length, schedule

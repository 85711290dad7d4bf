"""The batches of a run. Which images a batch has depends on the seed, the epoch and its number alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor

from hf_vssm_prune.training.arguments import OptimizationArguments
from hf_vssm_prune.training.data import ImageDatasets, ImageStream
from hf_vssm_prune.training.interruption import leave_stopping_to_main_process
from hf_vssm_prune.training.sampling import EpochSampler, StreamSampler
from hf_vssm_prune.training.tasks.task import Batch, EvaluationItems, Task, TrainingItems


@dataclass(frozen=True)
class Loaders:
    """Both sides of a run, spread over its processes.

    Attributes:
        train_items, eval_items: what the loaders read.
        sampler: the order of the training items.
        train, eval: as Accelerate prepared them.
        batch_size: training images of one batch on all processes together.
        shuffle_buffer_size: of a stream; None for what is not streamed.
    """

    train_items: TrainingItems
    eval_items: EvaluationItems
    sampler: EpochSampler | StreamSampler
    train: Any
    eval: Any
    batch_size: int
    shuffle_buffer_size: int | None

    def batches(self, epoch: int, done: int) -> Iterator[tuple[int, Batch]]:
        """The training batches of an epoch that come after the first `done`, each with its number."""
        self.train_items.set_epoch(epoch)
        self.sampler.start_at(epoch, done * self.batch_size)
        self.train.set_epoch(epoch)
        yield from enumerate(self.train, start=done)


def make_loaders(
    accelerator: Accelerator,
    task: Task,
    datasets: ImageDatasets,
    image_processor: BaseImageProcessor,
    options: OptimizationArguments,
    seed: int,
    num_workers: int,
) -> Loaders:
    """Loaders of a task's items.

    Raises:
        ValueError: there is not one full batch.
    """
    rows = datasets.train
    sampler = StreamSampler(rows, seed) if isinstance(rows, ImageStream) else EpochSampler(len(rows), seed)
    train_items = task.training_items(rows, image_processor, seed)
    eval_items = task.evaluation_items(datasets.evaluation, image_processor)
    shared: dict[str, Any] = {
        "collate_fn": task.collate,
        "num_workers": num_workers,
        "worker_init_fn": leave_stopping_to_main_process,
        "pin_memory": accelerator.device.type == "cuda",
    }
    train, evaluation = accelerator.prepare(
        # The images of a smaller last batch would weigh more. Each epoch leaves out others.
        DataLoader(train_items, options.per_device_train_batch_size, sampler=sampler, drop_last=True, **shared),  # type: ignore[arg-type]
        DataLoader(eval_items, options.per_device_eval_batch_size, **shared),  # type: ignore[arg-type]
    )
    if len(train) == 0:
        raise ValueError(
            f"{len(train_items)} training images do not fill one batch of {options.per_device_train_batch_size} on "
            f"{accelerator.num_processes} device(s): lower --per_device_train_batch_size."
        )
    return Loaders(
        train_items=train_items,
        eval_items=eval_items,
        sampler=sampler,
        train=train,
        eval=evaluation,
        batch_size=options.per_device_train_batch_size * accelerator.num_processes,
        shuffle_buffer_size=rows.buffer_size if isinstance(rows, ImageStream) else None,
    )

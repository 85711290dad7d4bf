"""The batches of a run. The images in a batch depend only on the seed, the epoch and the batch's number."""

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
    """The loaders for training and evaluation, distributed over the processes.

    Attributes:
        train_items, eval_items: items that the loaders read.
        sampler: order of the training items.
        train, eval: loaders prepared by Accelerate.
        batch_size: number of training images in one batch of all processes together.
        shuffle_buffer_size: size of a stream's shuffling buffer; None if the data is not streamed.
    """

    train_items: TrainingItems
    eval_items: EvaluationItems
    sampler: EpochSampler | StreamSampler
    train: Any
    eval: Any
    batch_size: int
    shuffle_buffer_size: int | None

    def batches(self, epoch: int, done: int) -> Iterator[tuple[int, Batch]]:
        """The training batches of an epoch after the first `done`, each with its number."""
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
    """Creates the loaders for a task's items.

    Raises:
        ValueError: there are too few images for one full batch.
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
        # Images in a smaller last batch would have more weight. Each epoch leaves out different images.
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

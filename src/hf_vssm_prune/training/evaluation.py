"""Measures a model: the metrics of its task, FLOPs and images per second."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_vssm_prune.configuration_common import pruned_config
from hf_vssm_prune.flops import FlopCount
from hf_vssm_prune.flops_of_heads import count_flops
from hf_vssm_prune.pruning_block_selection import BlockSelector
from hf_vssm_prune.training.distribution import kept_whole
from hf_vssm_prune.training.tasks.task import Scores, Task, parts_of, predict


@torch.no_grad()
def evaluate_model(
    task: Task,
    model: nn.Module,
    loader: DataLoader,
    accelerator: Accelerator,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Evaluates a model on all processes, and restores its mode (training or evaluation) afterwards.

    Args:
        task: the task, which defines the metrics.
        model: a model of the task, on the accelerator's device.
        loader: batches of the task, prepared by the accelerator.
        accelerator: gathers the scores.
        should_stop: called after each batch; it must return the same value on all processes.

    Returns:
        The metrics by name, or None if the evaluation was stopped. If the model selects blocks, `block_fraction` is
        among them: the fraction of the scan directions that ran in the layers that select.
    """
    was_training = model.training
    model.eval()
    scores: list[Scores] = []
    blocks: list[Tensor] = []
    with recorded_gates(model) as gates, kept_whole(model):
        for batch in tqdm(loader, desc="evaluating", leave=False, disable=not accelerator.is_local_main_process):
            with accelerator.autocast():
                outputs = predict(task, model, batch)
            scores.append(_gathered(task.scores(outputs, batch), accelerator))
            if gates:
                blocks.append(_gathered(_count_blocks(gates, len(batch["pixel_values"])), accelerator))
                gates.clear()
            if should_stop():
                model.train(was_training)
                return None
    model.train(was_training)
    metrics = task.metrics(scores)
    if blocks:
        ran, whole = torch.cat(blocks).double().sum(dim=0).tolist()
        metrics = {**metrics, "block_fraction": ran / whole}
    # Processes on different machines may round differently, but must agree on which weights are the best.
    return broadcast_object_list([metrics])[0]


def _gathered(scores: Any, accelerator: Accelerator) -> Any:
    """The scores of a batch from all processes, on the CPU, without duplicates. Lists are gathered as they are, because
    tensors in them may differ in size."""
    if isinstance(scores, list):
        return accelerator.gather_for_metrics(_on_cpu(scores), use_gather_object=True)
    return _on_cpu(accelerator.gather_for_metrics(scores))


def _count_blocks(gates: list[Tensor], batch_size: int) -> Tensor:
    """For each image of a batch, the number of scan directions that ran, and that of all of them, shape (batch, 2).

    Args:
        gates: see `recorded_gates`. If the task calls the model for each image or window separately, the images of the
            batch share equally in all calls.
        batch_size: number of images.
    """
    if all(len(of_call) == batch_size for of_call in gates):
        ran = torch.cat(gates, dim=1).sum(dim=1)
    else:
        ran = (torch.cat(gates).sum() / batch_size).expand(batch_size)
    whole = sum(of_call.numel() for of_call in gates) / batch_size
    return torch.stack([ran, torch.full_like(ran, whole)], dim=1)


@contextmanager
def recorded_gates(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list to which the block selectors of a model add the gates of each of their calls, (batch, directions)."""
    gates: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda selector, inputs, of_call: gates.append(of_call))
        for module in model.modules()
        if isinstance(module, BlockSelector)
    ]
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


def _on_cpu(scores: Scores) -> Scores:
    return send_to_device(scores, "cpu")


@dataclass(frozen=True)
class ModelEvaluation:
    """The evaluation of one model in a comparison.

    Attributes:
        metrics: the task's metrics on the data set.
        num_images: number of images.
        gflops_total: all FLOPs of the first image, in all windows if there are any, or of one view of a video, in 1e9
            multiply-adds, with the block fraction below.
        gflops_published: the same, counted like the published figures.
        images_per_second: median over the batches, without a smaller last one.
        block_fraction: the fraction of the scan directions that ran in layers that select blocks. None: the model does
            not select any.
    """

    metrics: dict[str, float]
    num_images: int
    gflops_total: float
    gflops_published: float
    images_per_second: float
    block_fraction: float | None = None


@torch.no_grad()
def compare_models(
    task: Task,
    models: Mapping[str, PreTrainedModel],
    loader: DataLoader,
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, ModelEvaluation]:
    """Evaluates several models on the same data. Each batch goes through all models in turn, so that if the machine
    slows down during the evaluation, all models are affected equally.

    Args:
        task: the task, which defines the metrics.
        models: models of the task, by name.
        loader: batches of the task. The first batch is run once more beforehand to warm up, and the speed is measured
            with its batch size.
        device: device to compute on.
        autocast_dtype: data type for mixed precision; None: that of the weights.
    """
    scores: dict[str, list[Scores]] = {name: [] for name in models}
    speeds: dict[str, list[float]] = {name: [] for name in models}
    gates: dict[str, list[Tensor]] = {name: [] for name in models}
    num_images, full_batch, shape = 0, 0, None
    for model in models.values():
        nn.Module.to(model, device).eval()  # a decorator hides the type of PreTrainedModel.to
    for index, batch in enumerate(tqdm(loader, desc="evaluating")):
        batch = send_to_device(batch, device)
        batch_size = len(batch["pixel_values"])
        num_images += batch_size
        full_batch = full_batch or batch_size
        shape = shape or batch["pixel_values"][0].shape
        for name, model in models.items():
            with _autocast(device, autocast_dtype):
                if index == 0:
                    predict(task, model, batch)
                with recorded_gates(model) as of_batch:
                    seconds, outputs = timed(partial(predict, task, model, batch), device)
            gates[name] += of_batch
            scores[name].append(_on_cpu(task.scores(outputs, batch)))
            if batch_size == full_batch:
                speeds[name].append(batch_size / seconds)
    evaluations = {}
    for name, model in models.items():
        block_fraction = torch.cat(gates[name]).mean().item() if gates[name] else None
        flops = _count_parts(task, model.config, pruned_config(model.config).input_size_of(shape), block_fraction)
        evaluations[name] = ModelEvaluation(
            task.metrics(scores[name]),
            num_images,
            sum(each.total for each in flops) / 1e9,
            sum(each.published for each in flops) / 1e9,
            statistics.median(speeds[name]),
            block_fraction,
        )
    return evaluations


def _count_parts(task: Task, config: Any, input_size: tuple[int, ...], block_fraction: float | None) -> list[FlopCount]:
    """The FLOPs of each input for which a model runs in the evaluation of one image of this size."""
    sizes = Counter(parts_of(task, input_size))
    counts = {size: count_flops(config, size, block_fraction).pruned for size in sizes}
    return [counts[size] for size in sizes.elements()]


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def timed(compute: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """The seconds that a computation takes, and its result."""
    _wait_for(device)
    start = time.perf_counter()
    outputs = compute()
    _wait_for(device)
    return time.perf_counter() - start, outputs


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def comparison_table(task: Task, evaluations: Mapping[str, ModelEvaluation]) -> str:
    """A Markdown table with the metrics that the task shows."""
    titles = ["model", *(title for title, _ in task.shown_metrics.values()), "GFLOPs", "published GFLOPs", "images/s"]
    rows = [
        [
            name,
            *(format(evaluation.metrics[metric], form) for metric, (_, form) in task.shown_metrics.items()),
            f"{evaluation.gflops_total:.4g}",
            f"{evaluation.gflops_published:.4g}",
            f"{evaluation.images_per_second:.4g}",
        ]
        for name, evaluation in evaluations.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *rows])

"""How good a model is and how fast: top-1, top-5, FLOPs, images per second."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_vssm_prune.flops import count_flops


@dataclass(frozen=True)
class Accuracy:
    """Shares of the images, 0 to 1, whose label is the first guess or among the first five; mean cross-entropy."""

    top1: float
    top5: float
    loss: float
    num_images: int


def score_predictions(logits: Tensor, labels: Tensor) -> Tensor:
    """For each image whether the label is the first guess, whether it is among the first five, and its cross-entropy.

    Args:
        logits: (batch, labels).
        labels: class ids (batch,).

    Returns:
        float32 (batch, 3).
    """
    logits = logits.float()
    guesses = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels.unsqueeze(-1)
    loss = F.cross_entropy(logits, labels, reduction="none")
    return torch.stack([guesses[:, 0].float(), guesses.any(dim=-1).float(), loss], dim=-1)


def mean_accuracy(scores: Iterable[Tensor]) -> Accuracy:
    """Means over all images of what `score_predictions` returned for batches of them."""
    scores = torch.cat(list(scores)).double()
    top1, top5, loss = scores.mean(dim=0).tolist()
    return Accuracy(top1, top5, loss, len(scores))


@torch.no_grad()
def evaluate_accuracy(
    model: nn.Module, loader: DataLoader, accelerator: Accelerator, should_stop: Callable[[], bool] = lambda: False
) -> Accuracy | None:
    """Evaluates a model on all processes, and leaves it in the mode (training or evaluation) that it was in.

    Args:
        model: an image classifier on the accelerator's device.
        loader: prepared by the accelerator; batches of `pixel_values` and `labels`.
        accelerator: gathers the results.
        should_stop: asked after each batch; it has to answer the same on every process.

    Returns:
        The accuracy, or None where it was stopped.
    """
    was_training = model.training
    model.eval()
    scores = []
    for batch in tqdm(loader, desc="evaluating", leave=False, disable=not accelerator.is_local_main_process):
        with accelerator.autocast():
            logits = model(batch["pixel_values"]).logits
        scores.append(accelerator.gather_for_metrics(score_predictions(logits, batch["labels"])).cpu())
        if should_stop():
            break
    else:
        model.train(was_training)
        return mean_accuracy(scores)
    model.train(was_training)
    return None


@dataclass(frozen=True)
class ModelEvaluation:
    """One model in a comparison.

    Attributes:
        accuracy: on the data set.
        gflops_total: everything counted, in 1e9 multiply-adds.
        gflops_published: by the convention of the published figures.
        images_per_second: median over batches.
    """

    accuracy: Accuracy
    gflops_total: float
    gflops_published: float
    images_per_second: float


@torch.no_grad()
def compare_models(
    models: Mapping[str, PreTrainedModel],
    loader: DataLoader,
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, ModelEvaluation]:
    """Evaluates models side by side: every batch goes through all of them in turn, so that a machine that slows down
    meanwhile slows all of them.

    Args:
        models: image classifiers by name.
        loader: batches of `pixel_values` and `labels`. The first batch is run once more beforehand to warm up; its size
            and that of the images count for the speed.
        device: to compute on.
        autocast_dtype: of a mixed precision; None: the weights' own.
    """
    scores: dict[str, list[Tensor]] = {name: [] for name in models}
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        nn.Module.to(model, device).eval()  # the type of PreTrainedModel.to is lost in a decorator
    image_size = None
    for index, batch in enumerate(tqdm(loader, desc="evaluating")):
        pixel_values, labels = batch["pixel_values"].to(device), batch["labels"].to(device)
        image_size = image_size or tuple(pixel_values.shape[-2:])
        for name, model in models.items():
            with _autocast(device, autocast_dtype):
                if index == 0:
                    model(pixel_values)
                seconds, logits = _timed(model, pixel_values, device)
            scores[name].append(score_predictions(logits, labels).cpu())
            speeds[name].append(len(labels) / seconds)
    evaluations = {}
    for name, model in models.items():
        accuracy, speed = mean_accuracy(scores[name]), statistics.median(speeds[name])
        flops = count_flops(model.config, image_size).pruned
        evaluations[name] = ModelEvaluation(accuracy, flops.total / 1e9, flops.published / 1e9, speed)
    return evaluations


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _timed(model: nn.Module, pixel_values: Tensor, device: torch.device) -> tuple[float, Tensor]:
    """Seconds of one forward pass, and its logits."""
    _wait_for(device)
    start = time.perf_counter()
    logits = model(pixel_values).logits
    _wait_for(device)
    return time.perf_counter() - start, logits


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def comparison_table(evaluations: dict[str, ModelEvaluation]) -> str:
    """A Markdown table."""
    lines = ["| model | top-1 | top-5 | GFLOPs | published | images/s |", "| --- | --- | --- | --- | --- | --- |"]
    for name, evaluation in evaluations.items():
        accuracy = evaluation.accuracy
        lines.append(
            f"| {name} | {accuracy.top1:.2%} | {accuracy.top5:.2%} | {evaluation.gflops_total:.4g} "
            f"| {evaluation.gflops_published:.4g} | {evaluation.images_per_second:.4g} |"
        )
    return "\n".join(lines)

"""Trains a small VideoMamba on clips kept in memory, for a machine on which decoding them each epoch takes too long.

    python study/videos/train_cached.py <videos by class> <start> <target> --epochs 20
    python study/videos/train_cached.py <videos by class> <dense> <target> --epochs 5 --flops_reduction 0.416

The clips are those of an evaluation, one of each video. The augmentation is mixup, a shift and a change of brightness,
the same in all frames; losses, mixing and metrics are the package's. With a budget, the starting model is also the
teacher. The same command continues a run that was stopped, from its last whole epoch.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor

from hf_vssm_prune.flops import count_flops
from hf_vssm_prune.hub import save_for_hub
from hf_vssm_prune.hub.loading import load_classifier, load_image_processor
from hf_vssm_prune.training.arguments import DataArguments
from hf_vssm_prune.training.arguments.parsing import count
from hf_vssm_prune.training.atomic_files import write_json
from hf_vssm_prune.training.losses import LossWeights, run_teacher, training_loss
from hf_vssm_prune.training.tasks.task import Batch
from hf_vssm_prune.training.tasks.video_classification import VideoClassification, VideoTrainingArguments


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    task = VideoClassification(
        VideoTrainingArguments(frame_sampling="segments", mixup=options.mixup, cutmix=0.0, smoothing=0.1)
    )
    datasets = task.load_datasets(DataArguments(options.videos), seed=0)
    processor = load_image_processor(options.start)
    train = _all(task, datasets.train, _with_margin(processor, options.shift), options.device)
    test = _all(task, datasets.evaluation, processor, options.device)
    model, teacher = _load_models(options)
    run = _Run(
        model,
        torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05),
        np.random.default_rng(options.seed),
        vars(options),
    )
    target = Path(options.target)
    if not run.resume(target) and teacher:
        run.history.append(_evaluate(task, model, test))
    for result in _epochs(task, run, teacher, train, test, options):
        print(result, flush=True)
        save_for_hub(model, target, processor)
        reduction = count_flops(model.config).reduction
        results = {"options": run.options, "reduction": reduction, "history": run.history}
        write_json(results, target / "results.json")
        run.save(target)
    (target / _Run.FILE).unlink()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("videos", "start", "target"):
        parser.add_argument(name)
    parser.add_argument("--epochs", type=count, required=True)
    parser.add_argument("--batch_size", type=count, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--mixup", type=float, default=0.2)
    parser.add_argument("--shift", type=int, default=0, help="maximum shift of a clip in pixels, in either direction")
    parser.add_argument("--brightness", type=float, default=0.0, help="maximum relative change of brightness")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flops_reduction", type=float)
    parser.add_argument("--method")
    parser.add_argument("--alignment")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def _load_models(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its teacher: with a budget, a pruned model and the same one without pruning."""
    model = load_classifier(options.start).to(options.device)
    if options.flops_reduction is None:
        return model, None
    choices = {"method": options.method, "alignment": options.alignment}
    given = {name: value for name, value in choices.items() if value is not None}
    model.set_token_pruning({"flops_reduction": options.flops_reduction, **given})
    return model, load_classifier(options.start).to(options.device)


@dataclass
class _Run:
    """What a training changes, and what it was started with."""

    model: Any
    optimizer: torch.optim.Optimizer
    generator: np.random.Generator
    options: dict[str, Any]
    history: list[dict[str, float]] = field(default_factory=list)

    FILE: ClassVar[str] = "training_state.pt"

    @property
    def epochs(self) -> int:
        """The number of epochs that are done."""
        return sum("epoch" in result for result in self.history)

    def save(self, target: Path) -> None:
        """Saves the state; a kill leaves the file of this epoch or of the one before."""
        state = {
            "options": self.options,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": json.dumps(self.generator.bit_generator.state),
            "torch": torch.get_rng_state(),
        }
        torch.save(state, target / "training_state.new")
        os.replace(target / "training_state.new", target / self.FILE)

    def resume(self, target: Path) -> bool:
        """Whether the target folder holds a run that was stopped, which is then loaded.

        Raises:
            SystemExit: If that run was started with other options.
        """
        if not (target / self.FILE).exists():
            return False
        state = torch.load(target / self.FILE, weights_only=True)
        if state["options"] != self.options:
            raise SystemExit(
                f"{target} holds an unfinished run with other options: {state['options']}. Remove it first."
            )
        self.history = state["history"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.bit_generator.state = json.loads(state["generator"])
        torch.set_rng_state(state["torch"])
        print(f"Resumed after epoch {self.epochs}.", flush=True)
        return True


def _epochs(
    task: VideoClassification, run: _Run, teacher: Any, train: Batch, test: Batch, options: argparse.Namespace
) -> Iterator[dict[str, float]]:
    """Trains, and yields the results of every epoch on the test clips."""
    model, optimizer, generator = run.model, run.optimizer, run.generator
    compute_loss: Callable[[Tensor, Tensor], Tensor] = _Loss(task, model, teacher).train()
    steps = len(train["labels"]) // options.batch_size
    step, captured = run.epochs * steps, options.device != "cuda"
    seconds, start = run.history[-1].get("cpu_seconds", 0.0) if run.history else 0.0, time.process_time()
    for epoch in range(run.epochs, options.epochs):
        model.train()
        for ids in _batches(generator.permutation(len(train["labels"])), options):
            rate = min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / (options.epochs * steps)))
            optimizer.param_groups[0]["lr"], step = options.lr * rate, step + 1
            batch = {name: values[torch.from_numpy(ids).to(options.device)].float() for name, values in train.items()}
            if options.shift or options.brightness:  # otherwise nothing is drawn, so that earlier runs can be repeated
                batch["pixel_values"] = _augment(batch["pixel_values"], options, generator)
            batch = task.mix({**batch, "labels": batch["labels"].long()}, model.config, generator)
            if not captured:
                compute_loss, captured = _captured(compute_loss, batch), True
            compute_loss(batch["pixel_values"], batch["labels"]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        used = seconds + time.process_time() - start
        run.history.append({"epoch": epoch + 1, "cpu_seconds": used, **_evaluate(task, model, test)})
        yield run.history[-1]


def _with_margin(processor: BaseImageProcessor, margin: int) -> BaseImageProcessor:
    """An image processor that crops this many more pixels on each side, at the same scale."""
    options = processor.to_dict()
    options["crop_size"] = {side: pixels + 2 * margin for side, pixels in options["crop_size"].items()}
    if margin and options["crop_size"]["height"] > options["size"]["shortest_edge"]:
        raise SystemExit(f"--shift {margin} needs frames of {options['crop_size']}; they are of {options['size']}.")
    return type(processor)(**options)


def _augment(clips: Tensor, options: argparse.Namespace, generator: np.random.Generator) -> Tensor:
    """Crops the margins, which shifts each clip, and changes its brightness."""
    side = clips.shape[-1] - 2 * options.shift
    places = generator.integers(0, 2 * options.shift + 1, (len(clips), 2))
    moved = [clip[..., top : top + side, left : left + side] for clip, (top, left) in zip(clips, places, strict=True)]
    factors = 1 + options.brightness * generator.uniform(-1, 1, (len(clips), 1, 1, 1, 1))
    return torch.stack(moved) * torch.from_numpy(factors).float().to(clips.device)


def _all(task: VideoClassification, rows: Any, processor: BaseImageProcessor, device: str) -> dict[str, Tensor]:
    """Pixel values in half precision, and labels, on the device."""
    items = task.evaluation_items(rows, processor)
    each = [items[index] for index in range(len(items))]
    pixel_values = torch.stack([item["pixel_values"][0].half() for item in each])
    labels = torch.tensor([item["labels"] for item in each])
    return {"pixel_values": pixel_values.to(device), "labels": labels.to(device)}


class _Loss(nn.Module):
    """The loss of a batch."""

    def __init__(self, task: VideoClassification, model: Any, teacher: Any) -> None:
        super().__init__()
        self.model = model
        # In a tuple, so that the teacher's parameters are not among this module's.
        self.rest = task, None if teacher is None else teacher.requires_grad_(False)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        task, teacher = self.rest
        batch = {"pixel_values": pixel_values, "labels": labels}
        weights = LossWeights(kd_weight=1.0, alignment_weight=1.0) if teacher else LossWeights()
        inputs = task.inputs(batch) | {"output_hidden_states": teacher is not None}
        outputs = self.model(**inputs)
        targets = run_teacher(teacher, inputs) if teacher else None
        layers = self.model.config.token_pruning["layers"] if teacher else []
        return training_loss(task, outputs, targets, batch, weights, layers)["loss"]


def _captured(loss: Any, batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss and its gradients as CUDA graphs: launched operator by operator, such a small model waits for Python."""
    samples = (batch["pixel_values"].clone(), batch["labels"].clone())
    return torch.cuda.make_graphed_callables(loss, samples, allow_unused_input=True)


def _batches(ids: np.ndarray, options: argparse.Namespace) -> list[np.ndarray]:
    """All clips in batches of nearly the same size; for a CUDA graph, of the same size, without the remainder."""
    batches = len(ids) // options.batch_size
    return np.array_split(ids[: batches * options.batch_size] if options.device == "cuda" else ids, batches)


@torch.no_grad()
def _evaluate(task: VideoClassification, model: Any, test: Batch) -> dict[str, float]:
    model.eval()
    scores = []
    for pixel_values, labels in zip(test["pixel_values"].split(64), test["labels"].split(64), strict=True):
        batch = {"pixel_values": pixel_values.float(), "labels": labels}
        scores.append(task.scores(model(**task.inputs(batch)), batch).cpu())
    return task.metrics(scores)


if __name__ == "__main__":
    main()

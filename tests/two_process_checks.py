"""What `test_two_processes.py` checks on two processes that run this program together, one check after another.

    python tests/two_process_checks.py FOLDER     # in each process, with a launcher's environment

Each process prints the names of the checks that it passed, and the traceback of every other.
"""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import gather_object
from conftest import TOKEN_PRUNING, make_plainmamba_config, make_vim_config
from distributed_runs import reset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.pruned_heads import backbone_of
from hf_vssm_prune.pruning_block_selection import BlockSelector
from hf_vssm_prune.training import TokenPruningTrainer
from hf_vssm_prune.training.detection_models import DetectionHead, DetectionModels
from hf_vssm_prune.training.distribution import make_accelerator, reduce_unused_parameters, shard_by_layers
from hf_vssm_prune.training.divergence import ForwardWatch
from hf_vssm_prune.training.evaluation import evaluate_model
from hf_vssm_prune.training.losses import LossWeights
from hf_vssm_prune.training.tasks.object_detection import ObjectDetection


RANK = int(os.environ.get("RANK", "0"))


def accelerator(**changes: Any) -> Any:
    options = {"mixed_precision": None, "gradient_accumulation_steps": 1, "project_dir": ".", "log_with": None}
    options |= {"cpu": True, "fsdp": False, "timeout": 20.0, "find_unused_parameters": False}
    return make_accelerator(**{**options, **changes})


# transformers' Trainer


class NumberedImages(torch.utils.data.Dataset):
    """12 images, with the epoch in which each was read."""

    def __init__(self) -> None:
        self.epoch, self.read = 0, []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append((self.epoch, index))
        image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": image, "labels": index % 3}


def a_resumed_trainer_reads_the_rest_of_the_epoch(folder: Path) -> None:
    def trained(**options: Any) -> tuple[TokenPruningTrainer, list[tuple[int, int]]]:
        torch.manual_seed(0)
        model = FAMILIES["vim"].classifier(make_vim_config(token_pruning=dict(TOKEN_PRUNING), drop_path_rate=0.2))
        images = NumberedImages()
        arguments = TrainingArguments(
            str(folder / "trainer"),
            num_train_epochs=2,
            per_device_train_batch_size=2,
            save_steps=4,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = TokenPruningTrainer(model, arguments, train_dataset=images, elastic_budgets=[0.0, 0.2])
        trainer.train(**options)
        return trainer, images.read

    whole, read = trained()
    every = gather_object(read)
    assert sorted(every) == [(epoch, index) for epoch in (0, 1) for index in range(12)]
    resumed, read_again = trained(resume_from_checkpoint=str(folder / "trainer" / "checkpoint-4"))
    assert read_again == read[8:]
    weights, others = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def a_trainer_evaluates_the_statistics_that_it_saves(folder: Path) -> None:
    torch.manual_seed(0)
    model = FAMILIES["plainmamba"].classifier(make_plainmamba_config()).eval()
    images = NumberedImages()
    with torch.no_grad():
        expected = model(torch.stack([images[index]["pixel_values"] for index in range(len(images))])).logits
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer += RANK
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True)
    predicted = TokenPruningTrainer(model, arguments, losses=LossWeights()).predict(images).predictions
    torch.testing.assert_close(torch.tensor(predicted), expected)


# Detection


def labels(count: int) -> list[dict[str, Tensor]]:
    return [{"class_labels": torch.arange(count) % 3, "boxes": 0.2 + 0.1 * torch.rand(count, 4)}]


def detector(kind: str) -> nn.Module:
    torch.manual_seed(0)
    small = {"channels": 32, "ffn_channels": 16, "attention_heads": 2, "decoder_layers": 2, "encoder_layers": 1}
    models = DetectionModels(DetectionHead(kind=kind, num_queries=7, num_denoising=6, **small))
    return models.from_config(make_vim_config(image_size=64, patch_size=16, patch_stride=None)).train()


def sharded_detectors_learn_from_batches_without_boxes(folder: Path) -> None:
    run = accelerator(fsdp=True)
    model = detector("rt_detr")
    shard_by_layers(run, model)
    model, _ = run.prepare(model, torch.optim.AdamW(model.parameters()))
    outputs = model(torch.randn(1, 3, 64, 64), labels=labels(2 * (1 - RANK)))
    reduce_unused_parameters(model)
    run.backward(outputs.loss)
    gradients = {name: each.grad.full_tensor() for name, each in model.named_parameters() if each.grad is not None}
    assert any("denoising" in name and gradient.any() for name, gradient in gradients.items())


def boxes_that_are_not_finite_on_one_process(folder: Path) -> None:
    run = accelerator()
    model = detector("deformable_detr")
    if RANK == 1:
        backbone_of(model).norm.weight.data.fill_(float("nan"))
    batch = {"pixel_values": torch.randn(1, 3, 64, 64), "labels": labels(1)}
    task = ObjectDetection()
    loss = task.losses(model(**task.inputs(batch)), batch)["detection"].detach()
    assert run.reduce(loss, reduction="mean").isnan()
    assert run.reduce(torch.ones(3)).tolist() == [2.0] * 3


# Evaluation


def scores_of_several_sizes(folder: Path) -> None:
    run = accelerator()
    task = SimpleNamespace(
        inputs=lambda batch: {"input": batch["pixel_values"]},
        scores=lambda outputs, batch: [torch.zeros(int(each)) for each in batch["pixel_values"]],
        metrics=lambda scores: {"lengths": [len(each) for of_batch in scores for each in of_batch]},
    )
    items = [{"pixel_values": number} for number in range(5)]
    metrics = evaluate_model(task, nn.Identity(), run.prepare(DataLoader(items, batch_size=2)), run)
    assert metrics == {"lengths": [0, 1, 2, 3, 4]}


def the_block_fraction_counts_each_image_once(folder: Path) -> None:
    selector = BlockSelector(1, 2).eval()
    selector.weight.data.fill_(1.0)
    selector.bias.data = torch.tensor([0.5, -2.5])  # images 0 to 2 run one of two blocks, image 3 both
    task = SimpleNamespace(
        scores=lambda outputs, batch: outputs,
        metrics=lambda scores: {"images": sum(map(len, scores))},
    )
    run = accelerator()

    def check(count: int, fraction: float) -> None:
        items = [{"pixel_values": torch.tensor([float(number)])} for number in reversed(range(count))]
        metrics = evaluate_model(task, nn.Sequential(selector), run.prepare(DataLoader(items, batch_size=2)), run)
        assert metrics == {"images": count, "block_fraction": fraction}

    task.predict = lambda model, batch: model(batch["pixel_values"])
    check(1, 1 / 2)
    check(5, 7 / 10)
    # A task that calls the model for each image.
    task.predict = lambda model, batch: torch.cat([model(image[None]) for image in batch["pixel_values"]])
    check(4, 5 / 8)


def metrics_that_processes_round_differently(folder: Path) -> None:
    run = accelerator()
    task = SimpleNamespace(
        inputs=lambda batch: {"input": batch["pixel_values"]},
        scores=lambda outputs, batch: outputs,
        metrics=lambda scores: {"mean": 0.5 + RANK / 1024},
    )
    loader = run.prepare(DataLoader([{"pixel_values": torch.zeros(1)}] * 4, batch_size=2))
    assert evaluate_model(task, nn.Identity(), loader, run) == {"mean": 0.5}


# Errors


def modules_that_only_one_process_runs(folder: Path) -> None:
    run = accelerator()
    model = nn.ModuleDict({"first": nn.Identity(), "second": nn.Identity(), "third": nn.Identity()})
    watch = ForwardWatch(model)
    for name in ("first", "third") if RANK == 0 else ("first", "second", "third"):
        model[name](torch.full((2,), float("nan") if RANK == 1 and name != "first" else 1.0))
    assert watch.first_not_finite() == "second"
    assert run.reduce(torch.ones(3)).tolist() == [2.0] * 3


CHECKS: list[Callable[[Path], None]] = [
    a_resumed_trainer_reads_the_rest_of_the_epoch,
    a_trainer_evaluates_the_statistics_that_it_saves,
    scores_of_several_sizes,
    the_block_fraction_counts_each_image_once,
    metrics_that_processes_round_differently,
    modules_that_only_one_process_runs,
    sharded_detectors_learn_from_batches_without_boxes,
    boxes_that_are_not_finite_on_one_process,
]


def main(folder: Path) -> None:
    for check in CHECKS:
        if sys.argv[2:] and check.__name__ not in sys.argv[2:]:
            continue
        try:
            check(folder)
            print(check.__name__, flush=True)
        except Exception:
            traceback.print_exc()
        reset()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Training steps without a teacher, dense and pruned: images per second and memory."""

import argparse
from collections.abc import Callable

import torch
from benchmarking.measuring import take_turns
from torch import nn

from gpu_checking.models import make_models, peak_memory, times_as_fast
from gpu_checking.report import Report


MODELS = (("plainmamba", "L1"), ("plainmamba", "L3"), ("vim", "S"))


def time_training(options: argparse.Namespace, report: Report) -> None:
    """Measures forward and backward passes with autocast to bfloat16, without an optimizer."""
    columns = ("model", "batch", "images/s", "dense / this", "additional MiB")
    rows = report.table("Training step, bfloat16 by autocast", *columns)
    batch = batch_size(options)
    for which in MODELS[: 1 if options.small else None]:
        cases, memory = {}, {}
        steps = make_steps(*which, options)
        for name, case in steps.items():
            try:
                memory[name] = peak_memory(case, options.device)
                cases[name] = case
            except torch.OutOfMemoryError as error:
                report.complain(f"{name}, batch {batch}: {str(error)[:200]}")
        if not cases:
            continue
        options.seconds = 0.2 if options.small else 2
        seconds = {name: min(runs) for name, runs in take_turns("", cases, {}, options).seconds.items()}
        dense = seconds.get(next(iter(steps)))
        for name, fastest in seconds.items():
            rows.add(name, batch, f"{batch / fastest:.0f}", times_as_fast(dense, fastest), memory[name])


def compile_training(family: str, preset: str, options: argparse.Namespace, _: Report) -> None:
    """Runs every step that `time_training` measures once."""
    for case in make_steps(family, preset, options).values():
        case()


def batch_size(options: argparse.Namespace) -> int:
    return 2 if options.small else 64


def make_steps(family: str, preset: str, options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """A training step of each model."""
    batch, side = batch_size(options), 64 if options.small else 224
    images = torch.randn(batch, 3, side, side, device=options.device)
    labels = torch.randint(1000, (batch,), device=options.device)
    models = make_models(family, preset, options)
    return {name: step(model.to(options.device).train(), images, labels) for name, model in models.items()}


def step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = model(images, labels=labels).loss
        loss.backward()
        model.zero_grad()  # last, so that no gradients are in memory when the next model is measured

    return run

"""Models with weights and pixels in bfloat16, compared with float32 and with a ViT.

With one thread, CPU times are compared, which other programs on the machine affect less.
"""

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from benchmarking.measuring import Case, Group, take_turns
from benchmarking.models import make_models, random_inputs, random_labels
from benchmarking.profiling import converts, operators, profiled


PROFILES = 3


def bf16_section(options: argparse.Namespace) -> list[Group]:
    """Forward passes, a training step of the dense model at the largest batch size, and conversions of dtype."""
    models = make_models(options)
    models = {"dense": models["dense"], "pruned": models["pruned, aligned"]}
    halves = {name: copy.deepcopy(model).bfloat16() for name, model in models.items()}
    groups = []
    for batch in options.batch_sizes:
        groups.append(forward(models, halves, batch, options))
        groups.append(conversions(halves["pruned"], groups[-1].seconds["pruned, bfloat16"], batch, options))
    groups.append(step(models["dense"], options.batch_sizes[-1], options))
    return groups


@torch.no_grad()
def forward(
    models: dict[str, nn.Module], halves: dict[str, nn.Module], batch: int, options: argparse.Namespace
) -> Group:
    images = random_inputs(models["dense"], batch)
    vit = ViTForImageClassification(ViTConfig(num_labels=1000)).eval().bfloat16()  # ViT-B/16
    cases: dict[str, Case] = {f"{name}, float32": partial(model, images) for name, model in models.items()}
    cases |= {f"{name}, bfloat16": partial(model, images.bfloat16()) for name, model in halves.items()}
    cases["ViT-B/16, bfloat16"] = partial(vit, torch.randn(batch, 3, 224, 224).bfloat16())
    ratios = {
        f"{slower} / {faster}": (1.0, slower, faster)
        for slower, faster in (
            ("ViT-B/16, bfloat16", "pruned, bfloat16"),
            ("dense, float32", "pruned, bfloat16"),
            ("dense, bfloat16", "pruned, bfloat16"),
            ("dense, float32", "pruned, float32"),
        )
    }
    title = f"{options.family} {options.preset}, forward, batch {batch}"
    return take_turns(title, cases, ratios, options, images=batch, clock=clock(options))


@torch.no_grad()
def conversions(model: nn.Module, seconds: list[float], batch: int, options: argparse.Namespace) -> Group:
    """The time that a forward pass spends converting tensors to another dtype, by the profiler. It cannot measure CPU
    times, so the fastest of several runs counts for each conversion.

    Args:
        model: the pruned model in bfloat16.
        seconds: the times of forward passes without the profiler.
    """
    runs = profiled(partial(model, random_inputs(model, batch).bfloat16()), PROFILES)
    conversions_of_runs = zip(*([each for each in operators(run) if converts(each)] for run in runs), strict=True)
    fastest = [min(each.cpu_time_total for each in same) / 1e6 for same in conversions_of_runs]
    times = {"forward": [min(seconds)], "conversions of dtype": [sum(fastest)]}
    title = f"{options.family} {options.preset}, pruned, bfloat16, {len(fastest)} conversions of dtype, batch {batch}"
    group = Group(title, times, {"share of the time, %": (100.0, "conversions of dtype", "forward")})
    print(f"\n{group.tables()}", flush=True)
    return group


def step(model: nn.Module, batch: int, options: argparse.Namespace) -> Group:
    """Forward and backward of the dense model, in float32 and as `--mixed_precision bf16` trains."""
    images, labels = random_inputs(model, batch), random_labels(model, batch)
    model.train()
    cases: dict[str, Case] = {
        "float32": partial(train, model, images, labels, half=False),
        "bfloat16 by autocast": partial(train, model, images, labels, half=True),
    }
    ratios = {"float32 / bfloat16": (1.0, "float32", "bfloat16 by autocast")}
    title = f"{options.family} {options.preset}, dense, forward and backward, batch {batch}"
    return take_turns(title, cases, ratios, options, images=batch, clock=clock(options))


def train(model: nn.Module, images: Tensor, labels: Tensor, half: bool) -> None:
    model.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        loss = model(images, labels=labels).loss
    loss.backward()


def clock(options: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if options.threads == 1 else time.perf_counter

"""Estimates what a training run will need before it is started: steps, FLOPs, memory and hours.

Steps and FLOPs are counted. Memory and this machine's speed are measured on synthetic images with the real model. The
hours on other devices follow from an assumed speed.
"""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_vssm_prune.configuration_common import VisionMambaConfig, has_head, pruned_config
from hf_vssm_prune.flops_of_heads import count_flops
from hf_vssm_prune.training.arguments import (
    ElasticArguments,
    EstimateArguments,
    LossArguments,
    OptimizationArguments,
    ScaleArguments,
)
from hf_vssm_prune.training.batch_norm import freeze_batch_norm
from hf_vssm_prune.training.devices import find_device, launch_on_cores
from hf_vssm_prune.training.elastic import what_is_pruned
from hf_vssm_prune.training.evaluation import timed
from hf_vssm_prune.training.length import plan_steps
from hf_vssm_prune.training.losses import LossWeights, run_teacher, training_loss
from hf_vssm_prune.training.memory import enable_activation_checkpointing, peak_memory
from hf_vssm_prune.training.models import check_states
from hf_vssm_prune.training.tasks.task import Task, views_of


@dataclass(frozen=True)
class RunEstimate:
    """The estimate for one run. FLOPs are floating-point operations; a multiply-add counts as two.

    Attributes:
        images_per_step, steps_per_epoch, num_steps, num_epochs: size and length of the run.
        flops_per_image: FLOPs of training on one image, including the teacher.
        total_flops: FLOPs of the run, including evaluation.
        state_bytes: bytes per device for weights, gradients, Adam's moments, EMA weights and teacher.
        activation_bytes: peak bytes per device for activations, extrapolated from two measured batch sizes.
        measured_activation_bytes: the measured bytes, by batch size.
        assumed_tflops: assumed speed of a device.
        device_hours: total hours of all devices at that speed.
        hours: wall-clock hours at that speed.
        measured_on: this machine's device.
        measured_images_per_second: training speed on it with the model's own schedule and the larger of the two batch
            sizes, in float32.
        measured_tflops: the same in 1e12 FLOPs per second.
        hours_on_this_machine: hours of the whole run at that speed.
        faster_launch: command for a faster run on this machine. None: there is none.
    """

    images_per_step: int
    steps_per_epoch: int
    num_steps: int
    num_epochs: int
    flops_per_image: float
    total_flops: float
    state_bytes: float
    activation_bytes: float
    measured_activation_bytes: dict[int, int]
    assumed_tflops: float
    device_hours: float
    hours: float
    measured_on: str
    measured_images_per_second: float
    measured_tflops: float
    hours_on_this_machine: float
    faster_launch: str | None = None


def estimate_run(
    task: Task,
    config: VisionMambaConfig,
    optimization: OptimizationArguments,
    losses: LossArguments,
    elastic: ElasticArguments,
    scale: ScaleArguments,
    options: EstimateArguments,
    teacher: VisionMambaConfig | None = None,
) -> RunEstimate:
    """Estimates the training of a model, pruned as its configuration says.

    Args:
        config: configuration of a model for the task, or of a model that the task can convert to one.
        teacher: the same for the teacher, whose labels are those of the model. None: the teacher of a pruned model is
            the model without pruning, and a dense model has none.

    Raises:
        ValueError: there are too few images for one full batch, the warm-up is as long as the run, a layer to align
            does not exist, or the teacher's hidden states cannot be compared with the model's.
    """
    losses.loss_weights().check_layers(pruned_config(config).num_hidden_layers)
    given = config
    config = _converted(task, config)
    pruned, weights = pruned_config(config), losses.loss_weights()
    if pruned.token_pruning is None:
        weights = replace(weights, alignment_weight=0.0)  # `train` compares no hidden states
    if not weights.needs_teacher:
        teacher = None
    elif teacher is not None:
        teacher = _with_schedule(_converted(task, teacher), None)
        tokens = "patch_spacing" if has_head(config) else "grid_size"
        check_states(str(losses.teacher_name_or_path), pruned_config(teacher), pruned, weights, tokens)
    elif pruned.token_pruning is not None:
        teacher = _with_schedule(config, None)
    batches = options.num_images // (optimization.per_device_train_batch_size * options.num_devices)
    if batches == 0:
        raise ValueError(
            f"{options.num_images} images do not fill one batch of {optimization.per_device_train_batch_size} on each "
            f"of {options.num_devices} devices."
        )
    length, _ = plan_steps(optimization, batches)
    images_per_step = (
        optimization.per_device_train_batch_size * optimization.gradient_accumulation_steps * options.num_devices
    )
    size = tuple(task.example_batch(given, 1, torch.device("cpu"))["pixel_values"].shape[-2:])
    taught = 0 if teacher is None else 2 * count_flops(teacher, size).dense.total

    def trained(schedule: Mapping[str, Any] | None) -> float:
        # A backward pass counts as two forward passes; checkpointing repeats the forward pass.
        passes = 4 if scale.gradient_checkpointing else 3
        return passes * 2 * _multiply_adds(config, schedule, size) + taught

    flops_per_image = statistics.mean(map(trained, _schedules(pruned, elastic)))
    evaluations = options.num_eval_images * views_of(task) * (1 + optimization.model_ema)
    evaluated = 2 * count_flops(config, size).pruned.total * evaluations
    num_images = length.num_batches * optimization.per_device_train_batch_size * options.num_devices
    total = flops_per_image * num_images + evaluated * length.num_epochs

    device = find_device(None)
    teacher_dtype = getattr(torch, losses.teacher_dtype)
    student = task.auto_class.from_config(config, dtype=torch.float32).to(device)
    teaching = None if teacher is None else task.auto_class.from_config(teacher, dtype=teacher_dtype).to(device)
    step = _synthetic_step(task, given, student, teaching, weights, scale, device)
    memory, seconds = _measure(step, options.measured_batch_sizes, device)
    small, large = options.measured_batch_sizes
    slope = (memory[large] - memory[small]) / (large - small)
    activations = memory[large] + slope * (optimization.per_device_train_batch_size - large)
    speed = large / seconds
    measured_flops = speed * trained(pruned.token_pruning)
    hours = total / (options.device_tflops * 1e12 * options.num_devices) / 3600
    return RunEstimate(
        images_per_step=images_per_step,
        steps_per_epoch=length.steps_per_epoch,
        num_steps=length.num_steps,
        num_epochs=length.num_epochs,
        flops_per_image=flops_per_image,
        total_flops=total,
        state_bytes=_state_bytes(student, teaching, optimization, scale, options),
        activation_bytes=activations,
        measured_activation_bytes=memory,
        assumed_tflops=options.device_tflops,
        device_hours=hours * options.num_devices,
        hours=hours,
        measured_on=torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        measured_images_per_second=speed,
        measured_tflops=measured_flops / 1e12,
        hours_on_this_machine=total / measured_flops / 3600,
        faster_launch=launch_on_cores(device, 1, optimization.per_device_train_batch_size),
    )


def _converted(task: Task, config: Any) -> Any:
    """The configuration of the task's model: the given one, or the one to which the task converts it."""
    with torch.device("meta"):
        return task.auto_class.from_config(config).config


def _schedules(config: VisionMambaConfig, elastic: ElasticArguments) -> Sequence[Mapping[str, Any] | None]:
    return elastic.schedules(config) or [config.token_pruning]


def _multiply_adds(config: Any, schedule: Mapping[str, Any] | None, size: tuple[int, int]) -> int:
    """Those of a forward pass in training, in which every scan direction runs."""
    return count_flops(_with_schedule(config, schedule), size, block_fraction=1.0).pruned.total


def _with_schedule(config: Any, schedule: Mapping[str, Any] | None) -> Any:
    config = copy.deepcopy(config)
    pruned_config(config).token_pruning = schedule
    return config


def _state_bytes(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    optimization: OptimizationArguments,
    scale: ScaleArguments,
    options: EstimateArguments,
) -> float:
    """Bytes of the float32 weights, gradients and two moments, of the EMA weights, and of the teacher in its own
    precision."""
    whole = student.num_parameters() * 4 * (4 + optimization.model_ema)
    if teacher is not None:
        whole += teacher.num_parameters() * teacher.dtype.itemsize
    return whole / options.num_devices if scale.fsdp else whole


def _synthetic_step(
    task: Task,
    given: VisionMambaConfig,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    weights: LossWeights,
    scale: ScaleArguments,
    device: torch.device,
) -> Callable[[int], None]:
    """A function that runs one step without the optimizer on a batch of random images of a given size.

    Args:
        given: the configuration before the task converted it.
        student, teacher: the models, on the device.
        The rest: as for `estimate_run`.
    """
    student.train()
    freeze_batch_norm(student)  # batch norm in a head cannot compute statistics of a single image
    if scale.gradient_checkpointing:
        enable_activation_checkpointing(student)
    if teacher is not None:
        teacher.eval()
    layers, block_keep_ratio = what_is_pruned(pruned_config(student.config).token_pruning)
    with_states = weights.alignment_weight > 0 and teacher is not None

    def step(batch_size: int) -> None:
        batch = task.example_batch(given, batch_size, device)
        inputs = task.inputs(batch) | weights.model_options(block_keep_ratio) | {"output_hidden_states": with_states}
        outputs = student(**inputs)
        targets = None if teacher is None else run_teacher(teacher, inputs)
        training_loss(task, outputs, targets, batch, weights, layers, block_keep_ratio)["loss"].backward()

    return step


def _measure(step: Callable[[int], None], batch_sizes: list[int], device: torch.device) -> tuple[dict[int, int], float]:
    """Peak bytes for each batch size, without gradients, and the seconds that a step of the largest batch size
    takes."""
    step(batch_sizes[0])  # allocates the gradients and compiles the kernels
    memory = {size: peak_memory(lambda size=size: step(size), device) for size in batch_sizes}  # type: ignore[misc]
    seconds, _ = timed(lambda: step(batch_sizes[-1]), device)
    return memory, seconds


def estimate_text(estimate: RunEstimate, num_devices: int, batch_size: int) -> str:
    """An estimate as text."""
    gib = 2**30
    measured = ", ".join(f"{size}: {value / gib:.2f}" for size, value in estimate.measured_activation_bytes.items())
    lines = {
        "steps": f"{estimate.num_steps:,} of {estimate.images_per_step} images; {estimate.num_epochs} epochs of "
        f"{estimate.steps_per_epoch:,}",
        "FLOPs": f"{estimate.flops_per_image / 1e9:.4g} G to train on an image (teacher included), "
        f"{estimate.total_flops:.3g} for the run (evaluation included)",
        "memory": f"{estimate.state_bytes / gib:.2f} GiB of weights, gradients and optimizer and "
        f"{estimate.activation_bytes / gib:.1f} GiB of activations on a device, float32, batch {batch_size} "
        f"(extrapolated; measured in GiB by batch size: {measured})",
        "assumed": f"{estimate.assumed_tflops:g} TFLOP/s on each of {num_devices} devices: "
        f"{estimate.device_hours:.4g} device-hours, {estimate.hours:.3g} wall-clock hours",
        "measured": f"{estimate.measured_images_per_second:.3g} images/s, {estimate.measured_tflops:.3g} TFLOP/s on "
        f"this machine ({estimate.measured_on}): {estimate.hours_on_this_machine:,.0f} hours",
    }
    if estimate.faster_launch is not None:
        lines["faster"] = f"one single-threaded process per core: {estimate.faster_launch}"
    return "\n".join(f"{name:10}{line}" for name, line in lines.items())

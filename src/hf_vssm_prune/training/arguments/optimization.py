"""Options: optimizer, learning rate, length and precision of a run."""

import math
from dataclasses import dataclass, field

from hf_vssm_prune.training.arguments.parsing import check_range, describe, exclude
from hf_vssm_prune.training.optimization import LEARNING_RATE_SCHEDULES


@dataclass
class OptimizationArguments:
    """Optimizer, learning rate, length and precision. The defaults are those of the paper's fine-tuning; where the
    paper is silent (warm-up, lowest rate, batch size) they are ours."""

    _argument_group_name = "optimization"

    num_train_epochs: int = field(default=30, metadata=describe("passes over the training images", "--epochs"))
    max_train_steps: int | None = field(
        default=None, metadata=describe("stop after so many optimizer steps; sets the schedule's length too")
    )
    per_device_train_batch_size: int = field(
        default=64, metadata=describe("images on a device at a time", "--batch_size")
    )
    per_device_eval_batch_size: int = field(default=64, metadata=describe("the same in evaluation"))
    gradient_accumulation_steps: int = field(
        default=1, metadata=describe("batches for a step of the optimizer", "--grad_accum_steps")
    )
    learning_rate: float = field(default=1e-5, metadata=describe("highest rate, for the batch size as it is", "--lr"))
    weight_decay: float = field(default=1e-8, metadata=describe("AdamW's weight decay"))
    layer_decay: float | None = field(
        default=None, metadata=describe("factor of the learning rate from each layer to the one before")
    )
    adam_beta1: float = field(default=0.9, metadata=describe("AdamW's first beta"))
    adam_beta2: float = field(default=0.999, metadata=describe("AdamW's second beta"))
    adam_epsilon: float = field(default=1e-8, metadata=describe("AdamW's epsilon"))
    lr_scheduler_type: str = field(
        default="cosine",
        metadata=describe("how the rate falls after the warm-up", "--sched", choices=LEARNING_RATE_SCHEDULES),
    )
    num_warmup_steps: int | None = field(
        default=None, metadata=describe("steps of warm-up, in place of --warmup_epochs")
    )
    warmup_epochs: float | None = field(
        default=None, metadata=describe("epochs of warm-up; by default a thirtieth of the epochs")
    )
    warmup_lr: float = field(default=1e-7, metadata=describe("rate at which the warm-up begins"))
    min_lr: float = field(default=1e-6, metadata=describe("rate at which the run ends"))
    clip_grad: float | None = field(default=None, metadata=describe("largest norm of the gradient", "--max_grad_norm"))
    drop_path: float = field(default=0.0, metadata=describe("stochastic depth in the last layer"))
    model_ema: bool = field(
        default=True, metadata=describe("keep a moving average of the weights; evaluated and saved beside them")
    )
    model_ema_decay: float = field(default=0.99996, metadata=describe("its decay"))
    model_ema_warmup: bool = field(default=False, metadata=describe("let its decay rise: for short runs"))
    mixed_precision: str | None = field(
        default=None,
        metadata=describe(
            "of the computation; by default what `accelerate launch` says, else none", choices=("no", "fp16", "bf16")
        ),
    )

    def __post_init__(self) -> None:
        for name in (
            "num_train_epochs",
            "max_train_steps",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            check_range(name, getattr(self, name), 1, math.inf)
        for name in ("weight_decay", "num_warmup_steps", "warmup_epochs", "warmup_lr", "min_lr"):
            check_range(name, getattr(self, name), 0, math.inf, below=True)
        for name in ("adam_beta1", "adam_beta2", "drop_path", "model_ema_decay"):
            check_range(name, getattr(self, name), 0, 1, below=True)
        for name in ("learning_rate", "adam_epsilon", "clip_grad"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name} is {value}: it must be greater than 0.")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer_decay is {self.layer_decay}: it must be greater than 0 and at most 1.")
        for name in ("warmup_lr", "min_lr"):
            if getattr(self, name) > self.learning_rate:
                raise ValueError(
                    f"--{name} is {getattr(self, name)}, above --learning_rate {self.learning_rate}: "
                    "lower it, to 0 if need be."
                )
        exclude("num_warmup_steps", self.num_warmup_steps, "warmup_epochs", self.warmup_epochs)


@dataclass
class ScratchOptimizationArguments(OptimizationArguments):
    """The defaults for training from scratch are those that Vim and PlainMamba took over from DeiT and Swin."""

    num_train_epochs: int = field(default=300, metadata=describe("passes over the training images", "--epochs"))
    learning_rate: float = field(default=1e-3, metadata=describe("highest rate, for the batch size as it is", "--lr"))
    weight_decay: float = field(default=0.05, metadata=describe("AdamW's weight decay"))
    warmup_lr: float = field(default=1e-6, metadata=describe("rate at which the warm-up begins"))
    min_lr: float = field(default=1e-5, metadata=describe("rate at which the run ends"))
    clip_grad: float | None = field(default=5.0, metadata=describe("largest norm of the gradient", "--max_grad_norm"))
    drop_path: float = field(default=0.1, metadata=describe("stochastic depth in the last layer"))

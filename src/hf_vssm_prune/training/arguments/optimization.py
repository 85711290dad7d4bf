"""Options: optimizer, learning rate, length and precision of a run."""

import math
from dataclasses import dataclass, field

from hf_vssm_prune.training.arguments.parsing import check_range, describe, exclude
from hf_vssm_prune.training.devices import MIXED_PRECISIONS
from hf_vssm_prune.training.optimization import LEARNING_RATE_SCHEDULES


@dataclass
class OptimizationArguments:
    """Optimizer, learning rate, length and precision. The defaults are those of the paper's fine-tuning; values that
    the paper does not state (warm-up, minimum learning rate, batch size) are ours."""

    _argument_group_name = "optimization"

    num_train_epochs: int = field(default=30, metadata=describe("passes over the training images", "--epochs"))
    max_train_steps: int | None = field(
        default=None,
        metadata=describe("number of optimizer steps, instead of epochs; the learning rate schedule ends there"),
    )
    per_device_train_batch_size: int = field(
        default=64, metadata=describe("training batch size per device", "--batch_size")
    )
    per_device_eval_batch_size: int = field(default=64, metadata=describe("evaluation batch size per device"))
    gradient_accumulation_steps: int = field(
        default=1, metadata=describe("batches per optimizer step", "--grad_accum_steps")
    )
    learning_rate: float = field(
        default=1e-5, metadata=describe("peak learning rate (not scaled by batch size)", "--lr")
    )
    weight_decay: float = field(default=1e-8, metadata=describe("AdamW's weight decay"))
    layer_decay: float | None = field(
        default=None,
        metadata=describe("factor by which the learning rate decreases from each layer to the previous one"),
    )
    adam_beta1: float = field(default=0.9, metadata=describe("AdamW's first beta"))
    adam_beta2: float = field(default=0.999, metadata=describe("AdamW's second beta"))
    adam_epsilon: float = field(default=1e-8, metadata=describe("AdamW's epsilon"))
    lr_scheduler_type: str = field(
        default="cosine",
        metadata=describe("learning rate schedule after the warm-up", "--sched", choices=LEARNING_RATE_SCHEDULES),
    )
    num_warmup_steps: int | None = field(default=None, metadata=describe("warm-up steps, instead of --warmup_epochs"))
    warmup_epochs: float | None = field(
        default=None, metadata=describe("warm-up epochs; by default a thirtieth of the epochs")
    )
    warmup_lr: float = field(default=1e-7, metadata=describe("learning rate at the start of the warm-up"))
    min_lr: float = field(default=1e-6, metadata=describe("learning rate at the end of the run"))
    clip_grad: float | None = field(default=None, metadata=describe("maximum gradient norm", "--max_grad_norm"))
    drop_path: float = field(default=0.0, metadata=describe("drop path rate of the last layer (stochastic depth)"))
    model_ema: bool = field(
        default=True,
        metadata=describe("keep an exponential moving average (EMA) of the weights, evaluated and saved as well"),
    )
    model_ema_decay: float = field(default=0.99996, metadata=describe("decay of the EMA"))
    model_ema_warmup: bool = field(default=False, metadata=describe("warm up the decay of the EMA, for short runs"))
    mixed_precision: str | None = field(
        default=None,
        metadata=describe(
            "mixed precision; by default that of `accelerate launch`, or none", choices=tuple(MIXED_PRECISIONS)
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
            check_range(name, getattr(self, name), 0, math.inf, above=True, below=True)
        check_range("layer_decay", self.layer_decay, 0, 1, above=True)
        for name in ("warmup_lr", "min_lr"):
            if getattr(self, name) > self.learning_rate:
                raise ValueError(
                    f"--{name} is {getattr(self, name)}, above --learning_rate {self.learning_rate}: lower it, to 0 "
                    "if necessary."
                )
        exclude("num_warmup_steps", self.num_warmup_steps, "warmup_epochs", self.warmup_epochs)


@dataclass
class ScratchOptimizationArguments(OptimizationArguments):
    """Optimizer, learning rate and length; the defaults are mostly those of Vim and PlainMamba, from DeiT and Swin.

    The length of the warm-up is ours. Gradients are clipped as for Swin and PlainMamba-L1; L2 and L3 clip at 1, and Vim
    does not clip.
    """

    num_train_epochs: int = field(default=300, metadata=describe("passes over the training images", "--epochs"))
    learning_rate: float = field(
        default=1e-3, metadata=describe("peak learning rate (not scaled by batch size)", "--lr")
    )
    weight_decay: float = field(default=0.05, metadata=describe("AdamW's weight decay"))
    warmup_lr: float = field(default=1e-6, metadata=describe("learning rate at the start of the warm-up"))
    min_lr: float = field(default=1e-5, metadata=describe("learning rate at the end of the run"))
    clip_grad: float | None = field(default=5.0, metadata=describe("maximum gradient norm", "--max_grad_norm"))
    drop_path: float = field(default=0.1, metadata=describe("drop path rate of the last layer (stochastic depth)"))

"""The optimizer's parameter groups, and the learning rate at each step."""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_vssm_prune.configuration_common import pruned_config
from hf_vssm_prune.pruned_heads import backbone_of


# Biases, norms and D have one dimension, so they are not listed here.
NO_DECAY_NAMES = ("A_log", "D", "direction_B", "class_token")
NO_DECAY_ENDING = "_embeddings"  # of positions and times
LEARNING_RATE_SCHEDULES = ("cosine", "linear", "constant")


def parameter_groups(
    model: PreTrainedModel, learning_rate: float, weight_decay: float, layer_decay: float | None = None
) -> list[dict]:
    """Parameter groups with and without weight decay and, with `layer_decay`, for each depth.

    There is no weight decay on norms, biases, `A_log`, `D`, PlainMamba's `direction_B`, embeddings of positions and
    times, the class token and all other parameters with one dimension.

    Args:
        model: a model of this package, with any head.
        learning_rate: learning rate of the last norm and the head.
        weight_decay: weight decay of the other parameters.
        layer_decay: factor by which the learning rate decreases from each layer of the backbone to the previous one
            (timm's `--layer-decay`); None: the same learning rate everywhere.
    """
    depth = pruned_config(model.config).num_hidden_layers
    # A detector's encoder and decoder have layers, too.
    lowered = set() if layer_decay is None else {id(parameter) for parameter in backbone_of(model).parameters()}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            distance = depth + 1 - _depth_of(name, depth) if id(parameter) in lowered else 0
            groups[distance, decays(name, parameter)].append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * (layer_decay or 1.0) ** distance,
            "weight_decay": weight_decay if decay else 0.0,
        }
        for (distance, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter."""
    last = name.split(".")[-1]
    return parameter.ndim > 1 and last not in NO_DECAY_NAMES and not last.endswith(NO_DECAY_ENDING)


def _depth_of(name: str, num_hidden_layers: int) -> int:
    """0 for the embeddings, 1 + i for layer i, num_hidden_layers + 1 for the last norm and the head."""
    if ".embeddings." in name:
        return 0
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return num_hidden_layers + 1 if layer is None else int(layer[1]) + 1


def make_optimizer(
    model: PreTrainedModel,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW for `parameter_groups`. Each group stores its peak learning rate as `initial_lr`."""
    optimizer = torch.optim.AdamW(
        parameter_groups(model, learning_rate, weight_decay, layer_decay), betas=betas, eps=epsilon
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


@dataclass(frozen=True)
class LearningRateSchedule:
    """The learning rate at each step, as a factor of the peak learning rate: a linear warm-up, followed by a cosine,
    linear or constant schedule.

    It is a function of the step's number only, so a resumed run needs no state, and it counts optimizer steps rather
    than calls, regardless of the number of processes. `transformers.get_scheduler` supports a minimum learning rate and
    a warm-up that starts above 0 for the cosine schedule only, and its `LambdaLR` has a state that checkpoints would
    have to store.

    Attributes:
        shape: one of `LEARNING_RATE_SCHEDULES`.
        num_steps: number of steps of the whole run.
        warmup_steps: number of steps during which the learning rate rises.
        warmup_factor: factor at the start of the warm-up.
        min_factor: factor at the end of the run.
    """

    shape: str
    num_steps: int
    warmup_steps: int = 0
    warmup_factor: float = 0.0
    min_factor: float = 0.0

    def factor(self, step: int) -> float:
        """The factor at a step; the first step is 0."""
        if step < self.warmup_steps:
            return self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps))
        falling = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[
            self.shape
        ]
        return self.min_factor + (1 - self.min_factor) * falling

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Sets the learning rates for a step."""
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.factor(step)

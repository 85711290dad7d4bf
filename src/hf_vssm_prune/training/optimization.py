"""The optimizer's parameter groups and the learning rate at each step."""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_vssm_prune.configuration_common import pruned_config


# Biases, norms and D have one dimension and need no name here.
NO_DECAY_NAMES = ("A_log", "D", "position_embeddings", "class_token")
LEARNING_RATE_SCHEDULES = ("cosine", "linear", "constant")


def parameter_groups(
    model: PreTrainedModel, learning_rate: float, weight_decay: float, layer_decay: float | None = None
) -> list[dict]:
    """Parameters with and without weight decay, and by depth where the learning rate falls towards the input.

    No decay on norms, biases, `A_log`, `D`, position embeddings, the class token and whatever has one dimension only.

    Args:
        model: of this package, with any head.
        learning_rate: of the last layers.
        weight_decay: of the parameters that decay.
        layer_decay: factor of the learning rate from each layer to the one before (timm's `--layer-decay`); None: the
            same rate everywhere.
    """
    depth = pruned_config(model.config).num_hidden_layers
    groups: dict[tuple[int, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            distance = 0 if layer_decay is None else depth + 1 - _depth_of(name, depth)
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
    return parameter.ndim > 1 and name.split(".")[-1] not in NO_DECAY_NAMES


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
    """AdamW over `parameter_groups`. Each group remembers its highest rate as `initial_lr`."""
    optimizer = torch.optim.AdamW(
        parameter_groups(model, learning_rate, weight_decay, layer_decay), betas=betas, eps=epsilon
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


@dataclass(frozen=True)
class LearningRateSchedule:
    """The learning rate at each step, as a factor of the highest: a linear warm-up, then cosine, linear or constant.

    It is a function of the step's number alone, so that a resumed run needs no state of it, and it counts optimizer
    steps rather than calls, whatever the number of processes. `transformers.get_scheduler` has a lowest rate, and a
    warm-up that begins above 0, for the cosine only; its `LambdaLR` is a state that checkpoints would have to hold.

    Attributes:
        shape: one of `LEARNING_RATE_SCHEDULES`.
        num_steps: of the whole run.
        warmup_steps: during which the rate rises.
        warmup_factor: at which the rise begins.
        min_factor: at which the run ends.
    """

    shape: str
    num_steps: int
    warmup_steps: int = 0
    warmup_factor: float = 0.0
    min_factor: float = 0.0

    def factor(self, step: int) -> float:
        """The factor at a step, the first being 0."""
        if step < self.warmup_steps:
            return self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps))
        falling = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[
            self.shape
        ]
        return self.min_factor + (1 - self.min_factor) * falling

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Sets the rates for a step."""
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.factor(step)

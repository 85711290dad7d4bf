"""An exponential moving average of a model's weights."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

from hf_vssm_prune.training.distribution import local_part


Model = TypeVar("Model", bound=nn.Module)


class ExponentialMovingAverage(Generic[Model]):
    """Keeps a copy of a model whose weights follow those of the original: average += (1 - decay) * (weights - average).

    torch's `swa_utils.AveragedModel` does not support a rising decay, adds a counter and a prefix to the names of the
    saved weights, and cannot be sharded separately from the model.

    Floating-point buffers (batch norm statistics) are averaged like weights; other buffers are copied.

    If the model is sharded, the average must be sharded in the same way (`distribution.spread_frozen`), so that each
    process averages its own part.

    Args:
        model: the model to follow, before it is wrapped, sharded or compiled.
        decay: decay per step, in [0, 1).
        warmup: increase the decay from 0 as 1 - (1 + steps)^(-2/3) until it reaches `decay`, like timm's `ModelEmaV3`.
            The average then forgets the initial weights sooner, which matters in short runs.

    Attributes:
        model: the average, in evaluation mode, without gradients.
    """

    def __init__(self, model: Model, decay: float, warmup: bool = False) -> None:
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.warmup = warmup

    def decay_at(self, step: int) -> float:
        """The decay at a step; the first step is 1."""
        return min(self.decay, 1 - step ** (-2 / 3)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Updates the average with the model's weights after a step."""
        weight = 1 - self.decay_at(step)
        averages = {name: local_part(value) for name, value in self.model.state_dict().items()}
        values = {name: local_part(value) for name, value in model.state_dict().items()}
        floating = [name for name, average in averages.items() if average.is_floating_point()]
        torch._foreach_lerp_(
            [averages[name] for name in floating], [values[name].to(averages[name].dtype) for name in floating], weight
        )
        for name in averages.keys() - set(floating):
            averages[name].copy_(values[name])

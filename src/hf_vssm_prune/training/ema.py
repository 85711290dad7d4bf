"""An exponential moving average of a model's weights."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

from hf_vssm_prune.training.distribution import local_part


Model = TypeVar("Model", bound=nn.Module)


class ExponentialMovingAverage(Generic[Model]):
    """Keeps a second model whose weights follow those of the first: average += (1 - decay) * (weights - average).

    torch's `swa_utils.AveragedModel` has no decay that rises, puts a counter and other names into the weights that are
    saved, and cannot be sharded apart from the model that it follows.

    Floating-point buffers (the statistics of batch norm) are averaged like weights; other buffers are copied.

    Where the followed model is sharded, its average has to be sharded alike (`distribution.spread_frozen`): each
    process then averages its own part.

    Args:
        model: the model to follow, not yet wrapped, sharded or compiled.
        decay: of the average with each step, in [0, 1).
        warmup: let the decay rise from 0 as 1 - (1 + steps)^(-2/3) until it reaches `decay`, as timm's
            `ModelEmaV3` does: the average forgets the first weights sooner, which matters in short runs.

    Attributes:
        model: the average, in evaluation mode, without gradients.
    """

    def __init__(self, model: Model, decay: float, warmup: bool = False) -> None:
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.warmup = warmup

    def decay_at(self, step: int) -> float:
        """The decay of a step, the first being 1."""
        return min(self.decay, 1 - step ** (-2 / 3)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the model's weights after a step."""
        weight = 1 - self.decay_at(step)
        averages = {name: local_part(value) for name, value in self.model.state_dict().items()}
        values = {name: local_part(value) for name, value in model.state_dict().items()}
        floating = [name for name, average in averages.items() if average.is_floating_point()]
        torch._foreach_lerp_(
            [averages[name] for name in floating], [values[name].to(averages[name].dtype) for name in floating], weight
        )
        for name in averages.keys() - set(floating):
            averages[name].copy_(values[name])

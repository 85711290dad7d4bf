"""Finds where a value stopped being finite: the layer, in the forward or backward pass."""

from itertools import chain

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_vssm_prune.documentation import see
from hf_vssm_prune.training.arguments import OptimizationArguments
from hf_vssm_prune.training.distribution import local_part


class TrainingDivergedError(RuntimeError):
    """The loss, its gradient or a weight became NaN or infinite."""


class ForwardWatch:
    """Watches the outputs of a model's layers, and of the parts of each layer, in training.

    A hook sums each output: the sum is finite exactly if all values are (unless the sum of very large values
    overflows). Nothing waits for the device until `first_not_finite` is called.

    Args:
        model: model with a backbone of this package. Its embeddings, layers, last norm and head are watched while it is
            in training mode.
        teacher: the teacher, if there is one. Only its head is watched, in either mode.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None = None) -> None:
        self._sums: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if _is_watched(name):
                module.register_forward_hook(self._hook(name, in_training=True))
        heads = [] if teacher is None else [(name, each) for name, each in teacher.named_children() if _is_head(each)]
        for name, head in heads:
            head.register_forward_hook(self._hook(f"teacher.{name}", in_training=False))

    def _hook(self, name: str, in_training: bool):  # type: ignore[no-untyped-def]
        def add_up(module: nn.Module, inputs: object, output: object) -> None:
            values = output[0] if isinstance(output, tuple) else output
            if (module.training or not in_training) and isinstance(values, Tensor):
                total = values.detach().sum(dtype=torch.float32)
                self._sums[name] = self._sums[name] + total if name in self._sums else total

        return add_up

    def clear(self) -> None:
        """Clears the recorded outputs: call it after each step."""
        self._sums.clear()

    def first_not_finite(self) -> str | None:
        """The first module, in the order in which they ran, whose output was not finite on some process; None if there
        is none. All processes call it."""
        return next(iter(_not_finite(self._sums)), None)


def _is_watched(name: str) -> bool:
    """Watches layers and their direct parts, and the direct parts of the model and its backbone, but nothing inside
    those. (The outputs of the model and the backbone themselves are not tensors, so they are not summed.)"""
    parts = name.split(".")
    if parts[-1] == "layers":
        return False
    return len(parts) - parts.index("layers") <= 3 if "layers" in parts else len(parts) <= 2


def _is_head(child: nn.Module) -> bool:
    return not isinstance(child, PreTrainedModel)


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """The norm of each parameter's gradient (this process's part of it).

    Compute it before clipping, which multiplies all gradients by NaN if one of them is not finite.
    """
    named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    norms = torch._foreach_norm([local_part(gradient) for gradient in named.values()])
    return dict(zip(named, norms, strict=True))


def last_not_finite(named: dict[str, Tensor]) -> str | None:
    """The last name whose tensor is not finite on some process; None if there is none. All processes call it.

    For gradients, this is the parameter closest to the output, which is the first in the backward pass.
    """
    return next(reversed(_not_finite(named)), None)


def _not_finite(named: dict[str, Tensor]) -> list[str]:
    """The names in their order. Processes may have different ones: batches without boxes skip a part of a detector."""
    checks = [local_part(value).detach().isfinite().all() for value in named.values()]
    own = list(zip(named, torch.stack(checks).tolist() if checks else [], strict=True))
    of_processes: list[list[tuple[str, bool]]] = sorted(gather_object([own]), key=len, reverse=True)
    finite: dict[str, bool] = {}
    for name, is_finite in chain.from_iterable(of_processes):
        finite[name] = finite.get(name, True) and is_finite
    return [name for name, is_finite in finite.items() if not is_finite]


def weight_not_finite(model: nn.Module) -> str | None:
    """A weight or buffer that is not finite; None if there is none. All processes call it."""
    state = model.state_dict()
    return last_not_finite({name: value for name, value in state.items() if value.is_floating_point()})


def describe_divergence(
    watch: ForwardWatch,
    accelerator: Accelerator,
    values: dict[str, float],
    norms: dict[str, Tensor],
    step: int,
    num_steps: int,
    options: OptimizationArguments,
    last_checkpoint: str,
) -> str:
    """What stopped being finite at a step, and what to try. All processes call it.

    Args:
        watch: the watch over the step's forward passes.
        values: loss terms and the gradient's norm.
        norms: norm of each gradient, before clipping.
        step, num_steps: the first is 1, the last `num_steps`.
        options: options of the run.
        last_checkpoint: a sentence that names the last checkpoint.
    """
    terms = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    if layer := watch.first_not_finite():
        place = f"the first output that is not finite is that of {layer}"
    elif parameter := last_not_finite(norms):
        place = f"all layers' outputs are finite, and the first gradient that is not is that of {parameter}"
    else:
        place = "all layers' outputs and all gradients are finite, one by one"
    return (
        f"The loss or its gradient is not finite at step {step} of {num_steps}: {terms}; {place}. Try a smaller "
        f"--learning_rate (it is {options.learning_rate:g}), a longer warm-up, --clip_grad (it is {options.clip_grad}) "
        f"or --mixed_precision no (it is {accelerator.mixed_precision}). {last_checkpoint} {see('loss-not-finite')}"
    )

"""Where a number stopped being finite: the layer, in the forward or in the backward pass."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_vssm_prune.training.distribution import local_part


class TrainingDivergedError(RuntimeError):
    """The loss, its gradient or a weight became NaN or infinite."""


class ForwardWatch:
    """Watches the outputs of a model's layers, and of the parts of each layer, in training.

    A hook adds up each output: the sum is finite exactly if its values are (unless they are so large that they overflow
    together). Nothing waits for the device before `first_not_finite` asks.

    Args:
        model: of this package; with its embeddings, layers, last norm and classifier.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sums: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if _is_watched(name):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def add_up(module: nn.Module, inputs: object, output: object) -> None:
            values = output[0] if isinstance(output, tuple) else output
            if module.training and isinstance(values, Tensor):
                total = values.detach().sum(dtype=torch.float32)
                self._sums[name] = self._sums[name] + total if name in self._sums else total

        return add_up

    def clear(self) -> None:
        """Forgets what was seen: call it after each update."""
        self._sums.clear()

    def first_not_finite(self, accelerator: Accelerator) -> str | None:
        """The first module, in the order in which they ran, whose output was not finite on some process; None if there
        is none. All processes call it."""
        names = list(self._sums)
        if not names:
            return None
        finite = torch.stack([total.isfinite() for total in self._sums.values()]).float()
        finite = accelerator.reduce(finite, reduction="mean")  # 1 where it is finite on all processes
        bad = (finite < 1).nonzero().flatten().tolist()
        return names[bad[0]] if bad else None


def _is_watched(name: str) -> bool:
    parts = name.split(".")
    in_layer = "layers" in parts and len(parts) - parts.index("layers") <= 3
    return (in_layer and parts[-1] != "layers") or parts[-1] in ("embeddings", "norm", "classifier")


def last_gradient_not_finite(model: nn.Module, accelerator: Accelerator) -> str | None:
    """The parameter nearest to the output whose gradient is not finite: in the backward pass it was the first. None if
    there is none. All processes call it."""
    named = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    return _last_not_finite(named, accelerator)


def weight_not_finite(model: nn.Module, accelerator: Accelerator) -> str | None:
    """A weight or buffer that is not finite; None if there is none. All processes call it."""
    named = [(name, value) for name, value in model.state_dict().items() if value.is_floating_point()]
    return _last_not_finite(named, accelerator)


def _last_not_finite(named: list[tuple[str, Tensor]], accelerator: Accelerator) -> str | None:
    finite = torch.stack([local_part(value).detach().isfinite().all() for _, value in named]).float()
    finite = accelerator.reduce(finite, reduction="mean")
    bad = (finite < 1).nonzero().flatten().tolist()
    return named[bad[-1]][0].removeprefix("module.") if bad else None

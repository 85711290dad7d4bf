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
        model: of this package; with its embeddings, layers, last norm and classifier. Watched while it is in training.
        teacher: if there is one, its classifier alone, always.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None = None) -> None:
        self._sums: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if _is_watched(name):
                module.register_forward_hook(self._hook(name, in_training=True))
        if teacher is not None:
            teacher.get_submodule("classifier").register_forward_hook(self._hook("teacher.classifier", False))

    def _hook(self, name: str, in_training: bool):  # type: ignore[no-untyped-def]
        def add_up(module: nn.Module, inputs: object, output: object) -> None:
            values = output[0] if isinstance(output, tuple) else output
            if (module.training or not in_training) and isinstance(values, Tensor):
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


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """The norm of each parameter's gradient, of this process's part of it.

    To be taken before clipping, which multiplies all gradients by NaN if one of them is not finite.
    """
    named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    norms = torch._foreach_norm([local_part(gradient) for gradient in named.values()])
    return dict(zip(named, norms, strict=True))


def last_not_finite(named: dict[str, Tensor], accelerator: Accelerator) -> str | None:
    """The last name whose tensor is not finite on some process; None if there is none. All processes call it.

    Of gradients it is the parameter nearest to the output: the first in the backward pass.
    """
    finite = torch.stack([local_part(value).detach().isfinite().all() for value in named.values()]).float()
    finite = accelerator.reduce(finite, reduction="mean")
    bad = (finite < 1).nonzero().flatten().tolist()
    return list(named)[bad[-1]] if bad else None


def weight_not_finite(model: nn.Module, accelerator: Accelerator) -> str | None:
    """A weight or buffer that is not finite; None if there is none. All processes call it."""
    state = model.state_dict()
    return last_not_finite({name: value for name, value in state.items() if value.is_floating_point()}, accelerator)

"""Chooses between the kernels for an operator. For what a kernel is, see `hf_vssm_prune.kernels`."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from .documentation import see


# Kernels tried on a GPU, in this order.
ON_GPU = ("triton", "mamba_ssm")


def choose_name(
    kernels: Mapping[str, Any], auto: Mapping[str, Sequence[str]], operation: str, backend: str, device_type: str
) -> str:
    """The name of the kernel that computes `operation` on `device_type`, or `torch` for plain PyTorch.

    Args:
        kernels: kernels by name.
        auto: for each device type, the kernels tried by the backend `auto`, in this order.
        operation, backend, device_type: as in `hf_vssm_prune.kernels.choose_kernel`.
    """
    if backend == "torch":
        return "torch"
    if backend != "auto":
        if backend not in kernels:
            raise ValueError(
                f"unknown backend {backend!r}; known backends are 'auto', 'torch', {', '.join(map(repr, kernels))}."
            )
        if reason := kernels[backend].unavailable(device_type):
            raise ImportError(
                f"backend {backend!r} cannot be used on {device_type}: {reason}. {see('backend-cannot-be-used')}"
            )
        return backend if hasattr(kernels[backend], operation) else "torch"
    reasons = {}
    for name in auto.get(device_type, ()):
        if not hasattr(kernels[name], operation):
            continue
        reason = kernels[name].unavailable(device_type)
        if reason is None:
            return name
        reasons[name] = reason
    # On a GPU, PyTorch's own convolutions are fast enough not to warn; meta tensors are not computed at all.
    is_scan = operation == "selective_scan"
    if device_type not in (*auto, "meta"):
        _warn_once(device_type, f"there are kernels for {', '.join(auto)} only")
    elif reasons and (is_scan or device_type != "cuda"):
        _warn_once(device_type, "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    return "torch"


_WARNED: set[str] = set()


def _warn_once(device_type: str, reasons: str) -> None:
    if device_type not in _WARNED:
        _WARNED.add(device_type)
        warnings.warn(
            f"no fast kernel for {device_type}: falling back to plain PyTorch, which is slower ({reasons}). "
            f"{see('no-fast-kernel')}",
            stacklevel=5,
        )

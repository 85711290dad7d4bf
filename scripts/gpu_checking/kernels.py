"""The scan and convolution kernels: whether they agree with plain PyTorch in float64, and how fast they are."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarking.measuring import Case, take_turns
from torch import Tensor

from gpu_checking.machine import find_mamba_ssm
from gpu_checking.report import Report
from hf_vssm_prune.causal_convolution import causal_conv1d
from hf_vssm_prune.convolution_torch import causal_conv1d_torch, depthwise_conv2d_torch
from hf_vssm_prune.grid_convolution import depthwise_conv2d
from hf_vssm_prune.kernels import KERNELS
from hf_vssm_prune.selective_scan import selective_scan
from hf_vssm_prune.selective_scan_torch import selective_scan_torch


sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from kernel_arguments import CONVOLUTIONS, SCANS, Arguments, convolution, run, scan_arguments


Function = Callable[..., Tensor]
# A computation: the operation's name, its tensors, and its other arguments.
Call = tuple[str, Arguments, dict[str, Any]]

# Layers of PlainMamba-L3, of Vim-S with holes, and of VideoMamba-Ti for eight frames.
SIZES_OF_MODELS = {
    "PlainMamba-L3": {"batch": 2, "length": 196, "channels": 896, "states": 16, "paths": 4, "direction_B": True},
    "Vim-S, repeat": {"batch": 2, "length": 158, "channels": 768, "states": 16, "largest_gap": 9},
    "VideoMamba-Ti": {"batch": 1, "length": 1569, "channels": 384, "states": 16},
}
CONVOLUTIONS_OF_MODELS = {
    "PlainMamba-L3's": {"grid": (14, 14), "channels": 896, "kernel": 7},
    "PlainMamba-L3's, 60% of cells": {"grid": (14, 14), "channels": 896, "kernel": 7, "keep_ratio": 0.6},
    "Vim-S's": {"length": 197, "channels": 768, "taps": 4},
    "VideoMamba-Ti's": {"length": 1569, "channels": 384, "taps": 4, "reverse": True},
}
# For each operation, the function that uses a backend, and its reference.
OPERATIONS: dict[str, tuple[Function, Function]] = {
    "selective_scan": (selective_scan, selective_scan_torch),
    "depthwise_conv2d": (depthwise_conv2d, depthwise_conv2d_torch),
    "causal_conv1d": (causal_conv1d, causal_conv1d_torch),
}
# Allowed errors relative to the largest value: those of sums in float32, and twice those of rounding in half precision.
ALLOWED = {torch.float32: (2e-6, 1e-5), torch.bfloat16: (1.6e-2, 3.2e-2), torch.float16: (2e-3, 4e-3)}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def is_there(name: str, options: argparse.Namespace, report: Report) -> bool:
    """Whether a kernel can be used. If not, the reason is reported, as a mistake unless the kernel is mamba-ssm's."""
    reason = find_mamba_ssm(options) if name == "mamba_ssm" else None
    reason = reason or KERNELS[name].unavailable(options.device)
    if reason is not None:
        (report.say if name == "mamba_ssm" else report.complain)(f"{name} is not used: {reason}")
    return reason is None


def check_kernel(name: str, dtype: torch.dtype, options: argparse.Namespace, report: Report) -> None:
    """Checks values and gradients; errors are relative to the largest value."""
    if not is_there(name, options, report):
        return
    rows = report.table(f"Largest errors of {name} in {NAMES[dtype]} against float64", "case", "values", "gradients")
    for case, (operation, arguments, settings) in calls_to_check(name, options.small):
        arguments = rounded(arguments, dtype)
        reference = run(OPERATIONS[operation][1], arguments, torch.float64, **settings)
        found = run(partial(compute_on, options.device, name, operation), arguments, dtype, **settings)
        errors = {key: relative_error(found[key], expected) for key, expected in reference.items()}
        value = errors.pop("output")
        gradient, of = max((error, key) for key, error in errors.items())
        rows.add(case, f"{value:.1e}", f"{gradient:.1e} ({of})")
        allowed_value, allowed_gradient = ALLOWED[dtype]
        if not (value <= allowed_value and gradient <= allowed_gradient):
            report.complain(f"{name}, {case}, {NAMES[dtype]}: {value:.1e}, {gradient:.1e} in {of}")


def calls_to_check(name: str, small: bool) -> Iterator[tuple[str, Call]]:
    scans, convolutions = {**SCANS, **SIZES_OF_MODELS}, {**CONVOLUTIONS, **CONVOLUTIONS_OF_MODELS}
    for case in list(scans)[:3] if small else scans:
        yield case, ("selective_scan", scan_arguments(**scans[case]), {})
    for case in ("3 x 3, one stand-in", "causal, one token") if small else convolutions:
        call = convolution(**convolutions[case])
        if hasattr(KERNELS[name], call.operation):
            yield f"convolution, {case}", call


def compute_on(device: str, name: str, operation: str, **arguments: Any) -> Tensor:
    there = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    return OPERATIONS[operation][0](**there, backend=name).cpu()


def rounded(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """Arguments rounded to a precision, so that only the kernel's own error is measured."""
    return {name: t.to(dtype).float() if t.is_floating_point() else t for name, t in arguments.items()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def scans_to_time(small: bool) -> dict[str, Callable[[int], Call]]:
    """The scan of a layer, as functions of the batch size."""
    sizes_of_cases = sizes_to_time(SIZES_OF_MODELS, {"length": 9, "channels": 32}, small)
    return {
        case: lambda batch, sizes=sizes: ("selective_scan", scan_arguments(**{**sizes, "batch": batch}), {})
        for case, sizes in sizes_of_cases.items()
    }


def convolutions_to_time(small: bool) -> dict[str, Callable[[int], Call]]:
    """The convolution of a layer, as functions of the batch size."""
    sizes_of_cases = sizes_to_time(CONVOLUTIONS_OF_MODELS, {"grid": (2, 2), "channels": 8, "kernel": 3}, small)
    return {
        case: lambda batch, sizes=sizes: convolution(**{**sizes, "batch": batch})
        for case, sizes in sizes_of_cases.items()
    }


def sizes_to_time(sizes: dict[str, Any], smaller: dict[str, Any], small: bool) -> dict[str, Any]:
    """All sizes, or only the first, made smaller."""
    first = next(iter(sizes))
    return {first: {**sizes[first], **smaller}} if small else sizes


# The timed operations and kernels. PyTorch's convolution fills dropped cells with zeros, uses cuDNN, and gathers.
TIMED = {"scans": (scans_to_time, ("triton", "mamba_ssm")), "convolutions": (convolutions_to_time, ("triton", "torch"))}


class TimedCall(NamedTuple):
    """A call, without and with its gradients, and the start of its row in the table."""

    row: tuple[str, str, int, str]
    forward: Case
    both: Case


def calls_to_time(what: str, names: Sequence[str], options: argparse.Namespace) -> Iterator[TimedCall]:
    """The calls for each batch size, precision and kernel."""
    for case, make in TIMED[what][0](options.small).items():
        for batch in (1,) if options.small else (1, 8, 64):
            for dtype in (torch.float32, torch.bfloat16):
                with torch.device("cpu"):  # random arguments are drawn on the CPU
                    operation, arguments, settings = make(batch)
                arguments = {
                    name: tensor.to(options.device, dtype if tensor.is_floating_point() else tensor.dtype)
                    for name, tensor in arguments.items()
                }
                for name in names:
                    compute = partial(OPERATIONS[operation][0], **settings, backend=name)
                    cases = (partial(each, compute, arguments) for each in (without_gradient, with_gradient))
                    yield TimedCall((case, NAMES[dtype], batch, name), *cases)


def time_kernels(what: str, options: argparse.Namespace, report: Report) -> None:
    """Measures calls in milliseconds, forward, and with the backward pass."""
    names = [name for name in TIMED[what][1] if name == "torch" or is_there(name, options, report)]
    rows = report.table("Milliseconds", "case", "dtype", "batch", "kernel", "forward", "forward and backward")
    options.seconds = 0.2
    for call in calls_to_time(what, names, options):
        rows.add(*call.row, *(f"{milliseconds(case, options):.3f}" for case in (call.forward, call.both)))


def compile_kernels(what: str, options: argparse.Namespace, _: Report) -> None:
    """Runs every timed call of a Triton kernel once."""
    for call in calls_to_time(what, ["triton"], options):
        call.forward()
        call.both()


def without_gradient(compute: Function, arguments: Arguments) -> None:
    with torch.no_grad():
        compute(**arguments)


def with_gradient(compute: Function, arguments: Arguments) -> None:
    inputs = {name: t.detach().requires_grad_() if t.is_floating_point() else t for name, t in arguments.items()}
    compute(**inputs).sum().backward()


def milliseconds(case: Case, options: argparse.Namespace) -> float:
    group = take_turns("", {"": case}, {}, options)
    return 1e3 * min(group.seconds[""])

"""The scan's kernels: whether they compute what plain PyTorch does in float64, and how fast they are."""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from benchmarking.measuring import Case, take_turns
from torch import Tensor

from gpu_checking.machine import find_mamba_ssm
from gpu_checking.report import Report
from hf_vssm_prune.kernels import KERNELS
from hf_vssm_prune.selective_scan import selective_scan
from hf_vssm_prune.selective_scan_torch import selective_scan_torch


sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from kernel_arguments import SCANS, Arguments, run, scan_arguments


# Of a layer of PlainMamba-L3, of Vim-S's with holes, and of VideoMamba-Ti on eight frames.
SIZES_OF_MODELS = {
    "PlainMamba-L3": {"batch": 2, "length": 196, "channels": 896, "states": 16, "paths": 4, "direction_B": True},
    "Vim-S, repeat": {"batch": 2, "length": 158, "channels": 768, "states": 16, "largest_gap": 9},
    "VideoMamba-Ti": {"batch": 1, "length": 1569, "channels": 384, "states": 16},
}
# Of the largest entry: what the sums in float32 may lose; in half precision what rounding the results costs, twice.
ALLOWED = {torch.float32: (2e-6, 1e-5), torch.bfloat16: (1.6e-2, 3.2e-2), torch.float16: (2e-3, 4e-3)}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def is_there(name: str, options: argparse.Namespace, report: Report) -> bool:
    """Whether a kernel can be used; why it cannot is wrong of ours, and said of mamba-ssm's."""
    reason = find_mamba_ssm(options) if name == "mamba_ssm" else None
    reason = reason or KERNELS[name].unavailable(options.device)
    if reason is not None:
        (report.say if name == "mamba_ssm" else report.complain)(f"{name} is not used: {reason}")
    return reason is None


def check_kernel(name: str, dtype: torch.dtype, options: argparse.Namespace, report: Report) -> None:
    """Values and gradients, relative to the largest entry."""
    if not is_there(name, options, report):
        return
    rows = report.table(f"Largest errors of {name} in {NAMES[dtype]} against float64", "case", "values", "gradients")
    cases = {**SCANS, **SIZES_OF_MODELS}
    for case in list(cases)[:3] if options.small else cases:
        arguments = rounded(scan_arguments(**cases[case]), dtype)
        reference = run(selective_scan_torch, arguments, torch.float64)
        found = run(partial(scan_on, options.device, name), arguments, dtype)
        errors = {key: relative_error(found[key], expected) for key, expected in reference.items()}
        value = errors.pop("output")
        gradient, of = max((error, key) for key, error in errors.items())
        rows.add(case, f"{value:.1e}", f"{gradient:.1e} ({of})")
        allowed_value, allowed_gradient = ALLOWED[dtype]
        if not (value <= allowed_value and gradient <= allowed_gradient):
            report.complain(f"{name}, {case}, {NAMES[dtype]}: {value:.1e}, {gradient:.1e} in {of}")


def scan_on(device: str, name: str, **arguments: Tensor) -> Tensor:
    there = {key: tensor.to(device) for key, tensor in arguments.items()}
    return selective_scan(**there, backend=name).cpu()


def rounded(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """With values that the precision has, so that only the kernel's own error is seen."""
    return {name: t.to(dtype).float() if t.is_floating_point() else t for name, t in arguments.items()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def time_kernels(options: argparse.Namespace, report: Report) -> None:
    """A layer's scan, forward and with its backward, by kernel."""
    names = [name for name in ("triton", "mamba_ssm") if is_there(name, options, report)]
    rows = report.table("Milliseconds", "case", "dtype", "batch", "kernel", "forward", "forward and backward")
    options.seconds = 0.2 if options.small else 0.5
    for case, sizes in list(SIZES_OF_MODELS.items())[: 1 if options.small else None]:
        for batch in (1,) if options.small else (1, 8, 64):
            shape = {**sizes, "batch": batch} | ({"length": 9, "channels": 32} if options.small else {})
            for dtype in (torch.float32, torch.bfloat16):
                torch.set_default_device(None)  # the arguments' random numbers are the CPU's
                arguments = {
                    name: tensor.to(options.device, dtype if tensor.is_floating_point() else tensor.dtype)
                    for name, tensor in scan_arguments(**shape).items()
                }
                for name in names:
                    forward = milliseconds(partial(without_gradient, arguments, name), options)
                    both = milliseconds(partial(with_gradient, arguments, name), options)
                    rows.add(case, NAMES[dtype], batch, name, f"{forward:.3f}", f"{both:.3f}")


def without_gradient(arguments: Arguments, backend: str) -> None:
    with torch.no_grad():
        selective_scan(**arguments, backend=backend)


def with_gradient(arguments: Arguments, backend: str) -> None:
    inputs = {name: t.detach().requires_grad_() if t.is_floating_point() else t for name, t in arguments.items()}
    selective_scan(**inputs, backend=backend).sum().backward()


def milliseconds(case: Case, options: argparse.Namespace) -> float:
    group = take_turns("", {"": case}, {}, options)
    return 1e3 * min(group.seconds[""])

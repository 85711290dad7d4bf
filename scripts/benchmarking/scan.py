"""The selective scan and the depthwise convolution on their own."""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarking.baselines import reference_scan, time_major_scan
from benchmarking.measuring import Case, Group, take_turns, with_threads
from hf_vssm_prune.grid_convolution import depthwise_conv2d, depthwise_conv2d_torch
from hf_vssm_prune.kernels import AUTO, KERNELS
from hf_vssm_prune.selective_scan import selective_scan
from hf_vssm_prune.token_pruning import prune_paths, snake_paths


CHANNELS, STATES, GRID = 896, 16, (14, 14)  # those of PlainMamba-L3
LENGTH = GRID[0] * GRID[1]


def scan_inputs(batch: int, keep_ratio: float | None = None, alignment: str = "repeat") -> dict[str, Tensor]:
    """Arguments of `selective_scan` as in a block of PlainMamba-L3."""
    kept = None
    length = LENGTH
    if keep_ratio is not None:
        length = round(keep_ratio * LENGTH)
        kept = torch.rand(batch, LENGTH).argsort(-1)[:, :length].sort(-1).values
    paths = snake_paths(GRID) if kept is None else prune_paths(snake_paths(GRID), kept, alignment)
    inputs = {
        "hidden_states": torch.randn(batch, length, CHANNELS),
        "time_step": torch.randn(batch, length, CHANNELS),
        "A": -torch.arange(1, STATES + 1).float().repeat(CHANNELS, 1),
        "B": torch.randn(batch, length, STATES),
        "C": torch.randn(batch, length, STATES),
        "D": torch.ones(CHANNELS),
        "time_step_bias": torch.randn(CHANNELS) - 4,
        "gate": torch.randn(batch, length, CHANNELS),
        "order": paths.order,
        "direction_B": torch.randn(5, STATES),
        "moves": paths.moves,
    }
    return inputs if paths.gaps is None else inputs | {"gaps": paths.gaps}


def one_direction(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in inputs.items() if name not in ("order", "direction_B", "moves", "gaps")}


def in_layout(inputs: dict[str, Tensor], *axes: int) -> list[Tensor]:
    """The inputs of the baselines, with the axes (batch, length, channels) of sequences permuted."""
    sequences = {
        name: inputs[name].permute(axes).contiguous() for name in ("hidden_states", "time_step", "B", "C", "gate")
    }
    values = {**inputs, **sequences}
    return [values[name] for name in ("hidden_states", "time_step", "A", "B", "C", "D", "time_step_bias", "gate")]


def scan_section(options: argparse.Namespace) -> list[Group]:
    groups = []
    for batch in options.batch_sizes:
        inputs = scan_inputs(batch)
        single = one_direction(inputs)
        by_channel, by_time = in_layout(single, 0, 2, 1), in_layout(single, 1, 0, 2)
        square = torch.randn(1024, 1024)
        cases: dict[str, Case] = {
            "mamba-ssm's reference, one direction": partial(reference_scan, *by_channel),
            "time-major loop, one direction": partial(time_major_scan, *by_time),
            "ours, one direction": partial(selective_scan, **single),
            "ours, four directions": partial(selective_scan, **inputs),
            "ours, four directions, one thread": with_threads(1, partial(selective_scan, **inputs)),
            "matrix product": partial(torch.matmul, square, square),
            "matrix product, one thread": with_threads(1, partial(torch.matmul, square, square)),
        }
        ratios = {
            "4 × mamba-ssm's reference / ours": (4.0, "mamba-ssm's reference, one direction", "ours, four directions"),
            "4 × time-major loop / ours": (4.0, "time-major loop, one direction", "ours, four directions"),
            "4 × ours alone / ours fused": (4.0, "ours, one direction", "ours, four directions"),
            f"one thread / {options.threads}": (1.0, "ours, four directions, one thread", "ours, four directions"),
            f"matrix product, 1024³: one thread / {options.threads}": (
                1.0,
                "matrix product, one thread",
                "matrix product",
            ),
        }
        for name in other_kernels(options.device):
            cases[f"{name}, one direction"] = partial(selective_scan, **single, backend=name)
            ratios[f"{name} / ours, one direction"] = (1.0, f"{name}, one direction", "ours, one direction")
        with torch.no_grad():
            groups.append(take_turns(f"Scan, forward, batch {batch}, {LENGTH} tokens", cases, ratios, options))
    groups.append(scan_gradients(options))
    groups.append(scan_with_holes(options))
    return groups


def other_kernels(device: str) -> list[str]:
    """The kernels that work on a device, except the one that is chosen automatically."""
    device_type = torch.device(device).type
    working = [name for name in AUTO.get(device_type, ()) if KERNELS[name].unavailable(device_type) is None]
    return working[1:]


def scan_gradients(options: argparse.Namespace) -> Group:
    inputs = scan_inputs(1)
    for tensor in inputs.values():
        tensor.requires_grad_(tensor.is_floating_point())
    single = one_direction(inputs)
    by_channel = [tensor.detach().requires_grad_() for tensor in in_layout(single, 0, 2, 1)]

    def differentiate(scan: Callable[[], Tensor]) -> Case:
        return lambda: scan().sum().backward()

    cases = {
        "mamba-ssm's reference, one direction": differentiate(lambda: reference_scan(*by_channel)),
        "ours, one direction": differentiate(lambda: selective_scan(**single)),
        "ours, four directions": differentiate(lambda: selective_scan(**inputs)),
    }
    ratios = {
        "reference / ours, one direction": (1.0, "mamba-ssm's reference, one direction", "ours, one direction"),
        "4 × reference / ours, four": (4.0, "mamba-ssm's reference, one direction", "ours, four directions"),
    }
    return take_turns("Scan, forward and backward, batch 1", cases, ratios, options)


@torch.no_grad()
def scan_with_holes(options: argparse.Namespace) -> Group:
    seed = torch.get_rng_state()
    cases: dict[str, Case] = {}
    for alignment in ("none", "repeat", "zero_input"):
        torch.set_rng_state(seed)
        inputs = scan_inputs(8, 0.5, alignment)
        if alignment == "zero_input":
            inputs["hole_time_step"] = F.softplus(inputs["time_step_bias"])
        cases[alignment] = partial(selective_scan, **inputs)
    ratios = {
        "repeat / none": (1.0, "repeat", "none"),
        "zero_input / none": (1.0, "zero_input", "none"),
    }
    return take_turns(
        "Scan across holes, forward, batch 8, half of the tokens, four directions", cases, ratios, options
    )


@torch.no_grad()
def convolution_section(options: argparse.Namespace) -> list[Group]:
    batch, kernel = options.batch_sizes[0], 7
    weight, bias = torch.randn(CHANNELS, 1, kernel, kernel), torch.randn(CHANNELS)
    image = torch.randn(batch, CHANNELS, *GRID)
    tokens = image.flatten(2).transpose(1, 2).contiguous()
    cases: dict[str, Case] = {
        "torch, all cells": lambda: F.silu(F.conv2d(image, weight, bias, padding=kernel // 2, groups=CHANNELS)),
        "ours, all cells": lambda: depthwise_conv2d(tokens, weight, bias, GRID, silu=True),
    }
    ratios = {"torch / ours, all cells": (1.0, "torch, all cells", "ours, all cells")}
    for share in (0.7, 0.5, 0.35):
        kept = torch.rand(batch, LENGTH).argsort(-1)[:, : round(share * LENGTH)].sort(-1).values
        left = tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, CHANNELS))
        arguments = (left, weight, bias, GRID, kept, True)
        cases[f"zeros, torch, gather, {share:.0%} of cells"] = partial(depthwise_conv2d_torch, *arguments)
        cases[f"ours, {share:.0%} of cells"] = partial(depthwise_conv2d, *arguments)
        ratios[f"zeros, torch, gather / ours, {share:.0%}"] = (
            1.0,
            f"zeros, torch, gather, {share:.0%} of cells",
            f"ours, {share:.0%} of cells",
        )
    return [take_turns(f"Depthwise {kernel}×{kernel} with SiLU, batch {batch}", cases, ratios, options)]

"""Random arguments for the kernels, and checks of their results."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_vssm_prune.token_pruning import nearest_tokens


Arguments = dict[str, Tensor]

# Small: without a GPU, Triton interprets each program of each step.
SCANS = {
    "one path": {"batch": 3, "length": 17, "channels": 13, "states": 8},
    "no gate": {"batch": 2, "length": 9, "channels": 8, "states": 16, "gate": False},
    "four paths": {"batch": 1, "length": 13, "channels": 24, "states": 16, "paths": 4, "direction_B": True},
    "shared order": {"batch": 2, "length": 7, "channels": 12, "states": 8, "paths": 4, "shared_paths": True},
    "repeat": {
        "batch": 2, "length": 9, "channels": 12, "states": 16, "paths": 4, "largest_gap": 4, "direction_B": True,
    },
    "zero_input": {
        "batch": 1, "length": 13, "channels": 24, "states": 16, "paths": 4, "largest_gap": 4, "hole_time_step": True,
        "direction_B": True,
    },
    "one path, gaps of up to 195": {"batch": 2, "length": 12, "channels": 16, "states": 16, "largest_gap": 195},
    "zero_input, gaps of up to 195": {
        "batch": 2, "length": 12, "channels": 16, "states": 16, "largest_gap": 195, "hole_time_step": True,
    },
    "one token": {"batch": 2, "length": 1, "channels": 3, "states": 1, "paths": 4, "largest_gap": 2},
    "odd sizes": {
        "batch": 1, "length": 11, "channels": 37, "states": 23, "paths": 3, "largest_gap": 9, "direction_B": True,
    },
}  # fmt: skip


def scan_arguments(
    batch: int,
    length: int,
    channels: int,
    states: int,
    paths: int | None = None,
    largest_gap: int | None = None,
    hole_time_step: bool = False,
    direction_B: bool = False,
    gate: bool = True,
    shared_paths: bool = False,
    seed: int = 0,
) -> Arguments:
    """Random float32 arguments of `selective_scan` by name."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    arguments = {
        "hidden_states": normal(batch, length, channels),
        "time_step": normal(batch, length, channels) - 1,
        "A": -torch.rand(channels, states, generator=generator) * 4 - 0.1,
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(channels),
        "time_step_bias": normal(channels) - 1,
    }
    if gate:
        arguments["gate"] = normal(batch, length, channels)
    index_shape = (1 if shared_paths else batch, paths or 1, length)
    if paths is not None:
        arguments["order"] = torch.rand(index_shape, generator=generator).argsort(-1)
    if largest_gap is not None:
        arguments["gaps"] = torch.randint(1, largest_gap + 1, index_shape, generator=generator)
        arguments["gaps"][0, 0, -1] = largest_gap
    if hole_time_step:
        arguments["hole_time_step"] = torch.rand(channels, generator=generator) * 0.2
    if direction_B:
        arguments["direction_B"] = normal(5, states)
        arguments["moves"] = torch.randint(5, index_shape, generator=generator)
    return arguments


def convolution_arguments(
    batch: int, grid: tuple[int, int], channels: int, kernel: int, keep_ratio: float | None, seed: int = 0
) -> Arguments:
    generator = torch.Generator().manual_seed(seed)
    cells = grid[0] * grid[1]
    tokens = cells if keep_ratio is None else max(1, int(keep_ratio * cells))
    arguments = {
        "hidden_states": torch.randn(batch, tokens, channels, generator=generator),
        "weight": torch.randn(channels, 1, kernel, kernel, generator=generator),
        "bias": torch.randn(channels, generator=generator),
    }
    if keep_ratio is not None:
        scores = torch.rand(batch, cells, generator=generator)
        arguments["kept"] = scores.argsort(-1)[:, :tokens].sort(-1).values
    return arguments


class Convolution(NamedTuple):
    """A call of a convolution.

    Attributes:
        operation: `depthwise_conv2d` or `causal_conv1d`.
        arguments: its tensors.
        options: its other arguments.
    """

    operation: str
    arguments: Arguments
    options: dict[str, Any]


CONVOLUTIONS = {
    "7 x 7": {"grid": (2, 5), "channels": 35, "kernel": 7},
    "7 x 7, kept cells": {"grid": (3, 4), "channels": 19, "kernel": 7, "keep_ratio": 0.6, "bias": False},
    "3 x 3, without SiLU": {"grid": (3, 5), "channels": 35, "kernel": 3, "silu": False},
    "3 x 3, kept cells": {"grid": (4, 3), "channels": 40, "kernel": 3, "keep_ratio": 0.6},
    "3 x 3, stand-ins": {"grid": (4, 3), "channels": 35, "kernel": 3, "keep_ratio": 0.4, "stand_ins": True},
    "3 x 3, one stand-in": {"grid": (2, 2), "channels": 8, "kernel": 3, "keep_ratio": 0.01, "stand_ins": True},
    "1 x 1": {"grid": (2, 5), "channels": 24, "kernel": 1, "keep_ratio": 0.6},
    "causal": {"length": 13, "channels": 35, "taps": 4},
    "causal, reversed": {"length": 13, "channels": 35, "taps": 4, "reverse": True},
    "causal, three taps, reversed": {"length": 2, "channels": 19, "taps": 3, "reverse": True},
    "causal, five taps": {"length": 7, "channels": 24, "taps": 5},
    "causal, one token": {"length": 1, "channels": 8, "taps": 4},
    "causal, one tap": {"length": 5, "channels": 8, "taps": 1},
    "causal, stand-ins": {"length": 15, "channels": 24, "taps": 4, "keep_ratio": 0.4},
    "causal, stand-ins, reversed": {"length": 15, "channels": 24, "taps": 4, "keep_ratio": 0.4, "reverse": True},
}  # fmt: skip


def convolution(**sizes: Any) -> Convolution:
    """One of `CONVOLUTIONS`."""
    return (sequence_convolution if "taps" in sizes else grid_convolution)(**sizes)


def grid_convolution(
    grid: tuple[int, int],
    channels: int,
    kernel: int,
    keep_ratio: float | None = None,
    stand_ins: bool = False,
    bias: bool = True,
    silu: bool = True,
    batch: int = 2,
) -> Convolution:
    arguments = convolution_arguments(batch, grid, channels, kernel, keep_ratio)
    options: dict[str, Any] = {"grid": grid, "silu": silu}
    if stand_ins:
        arguments["stand_ins"] = nearest_tokens(arguments["kept"], grid)
    if not bias:
        del arguments["bias"]
        options["bias"] = None
    return Convolution("depthwise_conv2d", arguments, options)


def sequence_convolution(
    length: int, channels: int, taps: int, reverse: bool = False, keep_ratio: float | None = None, batch: int = 2
) -> Convolution:
    """A causal convolution; with a keep ratio, dropped tokens have stand-ins."""
    arguments = convolution_arguments(batch, (1, length), channels, taps, keep_ratio)
    arguments["weight"] = arguments["weight"][:, :, 0].contiguous()
    if keep_ratio is not None:
        arguments["stand_ins"] = nearest_tokens(arguments["kept"], (1, length))
    return Convolution("causal_conv1d", arguments, {"reverse": reverse})


def run(function, arguments: Arguments, dtype: torch.dtype = torch.float32, **options) -> dict[str, Tensor]:
    """Calls `function`. Returns its result, and the gradients of a randomly weighted sum of it by argument."""
    inputs = {
        name: tensor.to(dtype, copy=True).requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in arguments.items()
    }
    output = function(**inputs, **options)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    output.backward(weights)
    gradients = {name: tensor.grad for name, tensor in inputs.items() if tensor.is_floating_point()}
    return {"output": output.detach(), **gradients}


def assert_close_to_reference(ours: dict[str, Tensor], reference: dict[str, Tensor], value: float, gradient: float):
    """Checks the largest error relative to the largest value."""
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        assert ours[name].shape == expected.shape
        error = (ours[name].double() - expected).abs().max()
        limit = value if name == "output" else gradient
        assert error <= limit * expected.abs().max(), f"{name}: {error / expected.abs().max():.1e}"


def assert_rounded_once(
    kernel: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    arguments: Arguments,
    options: Mapping[str, Any],
    half_units: Mapping[torch.dtype, int] = MappingProxyType({}),
) -> None:
    """Checks that values and gradients are those of `plain` in float64, rounded to the type of their tensor.

    Args:
        half_units: allowed error of a result by its dtype, in half units in the last place; 1 by default.
    """
    inputs = {name: t.clone().requires_grad_() if t.is_floating_point() else t for name, t in arguments.items()}
    doubles = {name: t.double().requires_grad_() if t.is_floating_point() else t for name, t in arguments.items()}
    dtype = inputs["hidden_states"].dtype
    output, expected = kernel(**inputs, **options), plain(**doubles, **options)
    weighting = torch.randn(output.shape).to(dtype)
    output.backward(weighting)
    expected.backward(weighting.double())
    pairs = [(output, expected)]
    pairs += [(inputs[name].grad, doubles[name].grad) for name in inputs if inputs[name].requires_grad]
    for ours, reference in pairs:
        unit = half_units.get(ours.dtype, 1) * torch.finfo(ours.dtype).eps / 2
        limit = unit * reference.abs() * 1.01 + 2e-6 * reference.abs().max()
        assert ((ours.double() - reference).abs() <= limit).all()
    assert output.dtype == dtype
    assert all(tensor.grad.dtype == tensor.dtype for tensor in inputs.values() if tensor.requires_grad)

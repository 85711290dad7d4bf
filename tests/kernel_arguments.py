"""Random arguments for the kernels, and how their results are compared."""

import torch
from torch import Tensor


Arguments = dict[str, Tensor]

SCANS = {
    "one path": {"batch": 3, "length": 17, "channels": 13, "states": 8},
    "no gate": {"batch": 2, "length": 9, "channels": 8, "states": 16, "gate": False},
    "four paths": {"batch": 1, "length": 25, "channels": 40, "states": 16, "paths": 4, "direction_B": True},
    "shared order": {"batch": 3, "length": 9, "channels": 24, "states": 8, "paths": 4, "shared_paths": True},
    "repeat": {
        "batch": 2, "length": 13, "channels": 24, "states": 16, "paths": 4, "largest_gap": 4, "direction_B": True,
    },
    "zero_input": {
        "batch": 2, "length": 13, "channels": 24, "states": 16, "paths": 4, "largest_gap": 4, "hole_time_step": True,
        "direction_B": True,
    },
    "one path, gaps of up to 195": {"batch": 2, "length": 12, "channels": 16, "states": 16, "largest_gap": 195},
    "zero_input, gaps of up to 195": {
        "batch": 2, "length": 12, "channels": 16, "states": 16, "largest_gap": 195, "hole_time_step": True,
    },
    "one token": {"batch": 2, "length": 1, "channels": 3, "states": 1, "paths": 4, "largest_gap": 2},
    "odd sizes": {
        "batch": 1, "length": 21, "channels": 77, "states": 23, "paths": 3, "largest_gap": 9, "direction_B": True,
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
    """Random arguments of `selective_scan`, float32, by name."""
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


def run(function, arguments: Arguments, dtype: torch.dtype = torch.float32, **options) -> dict[str, Tensor]:
    """What `function` returns, and the gradients of a random weighting of it, by argument."""
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
    """Largest error relative to the largest entry."""
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        assert ours[name].shape == expected.shape
        error = (ours[name].double() - expected).abs().max()
        limit = value if name == "output" else gradient
        assert error <= limit * expected.abs().max(), f"{name}: {error / expected.abs().max():.1e}"

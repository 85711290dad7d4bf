"""The C++ kernels against the plain PyTorch functions, in float64."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_vssm_prune.grid_convolution import depthwise_conv2d_torch
from hf_vssm_prune.kernels import build, choose_kernel, cpu
from hf_vssm_prune.selective_scan import selective_scan_torch


NO_KERNEL = cpu.unavailable("cpu")
needs_kernel = pytest.mark.skipif(NO_KERNEL is not None, reason=NO_KERNEL or "")

Arguments = dict[str, Tensor]


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


SCANS = {
    "one path": {"batch": 3, "length": 17, "channels": 13, "states": 8},
    "no gate": {"batch": 2, "length": 9, "channels": 8, "states": 16, "gate": False},
    "four paths": {"batch": 2, "length": 49, "channels": 40, "states": 16, "paths": 4, "direction_B": True},
    "shared order": {"batch": 3, "length": 25, "channels": 24, "states": 8, "paths": 4, "shared_paths": True},
    "repeat": {
        "batch": 2, "length": 30, "channels": 24, "states": 16, "paths": 4, "largest_gap": 4, "direction_B": True,
    },
    "zero_input": {
        "batch": 2, "length": 30, "channels": 24, "states": 16, "paths": 4, "largest_gap": 4, "hole_time_step": True,
        "direction_B": True,
    },
    "one path, gaps of up to 195": {"batch": 2, "length": 12, "channels": 16, "states": 16, "largest_gap": 195},
    "zero_input, gaps of up to 195": {
        "batch": 2, "length": 12, "channels": 16, "states": 16, "largest_gap": 195, "hole_time_step": True,
    },
    "one token": {"batch": 2, "length": 1, "channels": 3, "states": 1, "paths": 4, "largest_gap": 2},
    "odd sizes": {
        "batch": 1, "length": 21, "channels": 77, "states": 23, "paths": 5, "largest_gap": 9, "direction_B": True,
    },
    "training shape": {"batch": 2, "length": 196, "channels": 96, "states": 16, "paths": 4, "direction_B": True},
}  # fmt: skip


@needs_kernel
@pytest.mark.parametrize("case", SCANS)
def test_scan_equals_reference(case: str):
    arguments = scan_arguments(**SCANS[case])
    reference = run(selective_scan_torch, arguments, torch.float64)
    assert_close_to_reference(run(cpu.selective_scan, arguments), reference, value=1e-6, gradient=2e-6)


@needs_kernel
@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("keep_ratio", [None, 0.6, 0.01])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("silu", [True, False])
def test_convolution_equals_reference(kernel: int, keep_ratio: float | None, bias: bool, silu: bool):
    arguments = convolution_arguments(2, (7, 9), 77, kernel, keep_ratio)
    options = {"grid": (7, 9), "silu": silu}
    if not bias:
        del arguments["bias"]
        options["bias"] = None
    reference = run(depthwise_conv2d_torch, arguments, torch.float64, **options)
    assert_close_to_reference(run(cpu.depthwise_conv2d, arguments, **options), reference, value=1e-6, gradient=2e-6)


@needs_kernel
def test_convolution_of_many_channels():
    arguments = convolution_arguments(1, (5, 5), 600, 3, 0.5)
    reference = run(depthwise_conv2d_torch, arguments, torch.float64, grid=(5, 5))
    assert_close_to_reference(run(cpu.depthwise_conv2d, arguments, grid=(5, 5)), reference, 1e-6, 2e-6)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype):
    arguments = scan_arguments(2, 12, 24, 16, paths=4)
    rounded = {name: t.to(dtype) if t.is_floating_point() else t for name, t in arguments.items()}
    output = cpu.selective_scan(**rounded)
    exact = selective_scan_torch(**{name: t.double() if t.is_floating_point() else t for name, t in rounded.items()})
    assert output.dtype == dtype
    torch.testing.assert_close(output, exact.to(dtype))


@needs_kernel
def test_float64_keeps_its_precision():
    arguments = scan_arguments(1, 6, 4, 4)
    doubles = {name: tensor.double() for name, tensor in arguments.items()}
    assert torch.equal(cpu.selective_scan(**doubles), selective_scan_torch(**doubles))
    doubles = {name: tensor.double() for name, tensor in convolution_arguments(1, (3, 3), 4, 3, None).items()}
    expected = depthwise_conv2d_torch(**doubles, grid=(3, 3))
    assert torch.equal(cpu.depthwise_conv2d(**doubles, grid=(3, 3)), expected)


@needs_kernel
def test_split_projections_and_int32_indices():
    arguments = scan_arguments(2, 15, 24, 16, paths=4, largest_gap=3, direction_B=True)
    expected = cpu.selective_scan(**arguments)
    strided = dict(arguments)
    strided["hidden_states"], strided["gate"] = torch.cat([arguments["hidden_states"], arguments["gate"]], -1).chunk(
        2, -1
    )
    strided["B"], strided["C"] = torch.cat([arguments["B"], arguments["C"]], -1).chunk(2, -1)
    strided["time_step"] = arguments["time_step"].transpose(1, 2).contiguous().transpose(1, 2)
    for name in ("order", "gaps", "moves"):
        strided[name] = arguments[name].int()
    assert not strided["gate"].is_contiguous()
    assert torch.equal(cpu.selective_scan(**strided), expected)


@needs_kernel
@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_empty(batch: int, length: int):
    arguments = scan_arguments(batch, length, 8, 8)
    results = run(cpu.selective_scan, arguments)
    assert results["output"].shape == (batch, length, 8)
    assert all(not results[name].any() for name in arguments)
    arguments = {"hidden_states": torch.zeros(0, 4, 8), "weight": torch.zeros(8, 1, 3, 3), "bias": torch.zeros(8)}
    assert run(cpu.depthwise_conv2d, arguments, grid=(2, 2))["output"].shape == (0, 4, 8)


@needs_kernel
@pytest.mark.parametrize("name", ["hidden_states", "time_step", "B", "gate", "A"])
def test_nan_reaches_the_output(name: str):
    arguments = scan_arguments(1, 6, 16, 16)
    arguments[name].flatten()[3] = torch.nan
    ours, reference = cpu.selective_scan(**arguments), selective_scan_torch(**arguments)
    assert reference.isnan().any()
    assert torch.equal(ours.isnan(), reference.isnan())


@needs_kernel
@pytest.mark.parametrize("time_step", [-200.0, 1e-3, 30.0, 500.0, 1e6])
def test_extreme_time_steps(time_step: float):
    arguments = scan_arguments(1, 8, 8, 8, largest_gap=195)
    arguments["time_step"] = torch.full_like(arguments["time_step"], time_step)
    reference = selective_scan_torch(**{n: t.double() if t.is_floating_point() else t for n, t in arguments.items()})
    ours = cpu.selective_scan(**arguments)
    assert (ours - reference).abs().max() <= 1e-6 * reference.abs().max()


@needs_kernel
def test_bad_arguments_are_named():
    arguments = scan_arguments(1, 6, 8, 8, paths=4, largest_gap=2, direction_B=True)
    for name, value in (("order", 6), ("order", -1), ("gaps", 0), ("moves", 5)):
        bad = arguments[name].clone()
        bad[0, 2, 3] = value
        with pytest.raises(IndexError, match=name):
            cpu.selective_scan(**{**arguments, name: bad})
    with pytest.raises(ValueError, match=r"`C` must have the shape \(1, 6, 8\), got \(1, 6, 7\)"):
        cpu.selective_scan(**{**arguments, "C": arguments["C"][..., :7]})
    convolution = convolution_arguments(1, (3, 3), 8, 3, 0.5)
    with pytest.raises(IndexError, match="kept"):
        cpu.depthwise_conv2d(**convolution, grid=(2, 2))
    with pytest.raises(ValueError, match="odd"):
        cpu.depthwise_conv2d(convolution["hidden_states"], torch.zeros(8, 1, 2, 2), None, (3, 3), convolution["kept"])


def with_threads(threads: int, function, *args, **options):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function(*args, **options)
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_results_do_not_depend_on_threads():
    scan = scan_arguments(5, 20, 90, 16, paths=4, largest_gap=3, direction_B=True)
    convolution = convolution_arguments(5, (6, 6), 600, 3, 0.6)
    for function, arguments, options in (
        (cpu.selective_scan, scan, {}),
        (cpu.depthwise_conv2d, convolution, {"grid": (6, 6), "silu": True}),
    ):
        once = with_threads(1, run, function, arguments, **options)
        for threads in (2, 3, 2):
            again = with_threads(threads, run, function, arguments, **options)
            assert all(torch.equal(once[name], again[name]) for name in once)


def _scan_sum(arguments: Arguments, queue) -> None:
    torch.set_num_threads(2)
    queue.put(cpu.selective_scan(**arguments).double().sum().item())


@needs_kernel
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_process_computes():
    arguments = scan_arguments(4, 10, 64, 8)
    expected = with_threads(2, cpu.selective_scan, **arguments).double().sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_scan_sum, args=(arguments, queue))
    child.start()
    child.join(20)
    alive = child.is_alive()
    child.kill()
    assert not alive, "the forked process hangs"
    assert queue.get() == expected


@needs_kernel
def test_threads_of_python_may_call_at_the_same_time():
    from concurrent.futures import ThreadPoolExecutor

    arguments = scan_arguments(4, 20, 64, 16, paths=4)
    expected = cpu.selective_scan(**arguments)
    with ThreadPoolExecutor(4) as executor:
        results = list(executor.map(lambda _: cpu.selective_scan(**arguments), range(16)))
    assert all(torch.equal(result, expected) for result in results)


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


@needs_kernel
def test_operators_are_registered_correctly():
    arguments = scan_arguments(2, 5, 8, 8, paths=4, largest_gap=3, direction_B=True, hole_time_step=True)
    names = (
        *("hidden_states", "time_step", "A", "B", "C", "D", "time_step_bias", "gate"),
        *("order", "gaps", "hole_time_step", "direction_B", "moves"),
    )
    inputs = [arguments[name] for name in names]
    for tensor in inputs:
        tensor.requires_grad_(tensor.is_floating_point())
    torch.library.opcheck(torch.ops.hf_vssm_prune.selective_scan.default, inputs, test_utils=OPCHECKS)
    inputs[7:] = [None] * 6
    torch.library.opcheck(torch.ops.hf_vssm_prune.selective_scan.default, inputs, test_utils=OPCHECKS)

    arguments = convolution_arguments(2, (3, 4), 8, 3, 0.5)
    inputs = [*arguments.values(), 3, 4, True]
    for tensor in inputs[:3]:
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.hf_vssm_prune.depthwise_conv2d.default, inputs, test_utils=OPCHECKS)


@needs_kernel
def test_compiles_to_one_graph_and_exports():
    arguments = scan_arguments(2, 5, 8, 8, gate=True)
    convolution = convolution_arguments(2, (1, 5), 8, 3, None)

    class Mixer(torch.nn.Module):
        def forward(self, weight: Tensor, inputs: Arguments) -> Tensor:
            hidden_states = cpu.depthwise_conv2d(inputs["hidden_states"], weight, None, (1, 5), silu=True)
            return cpu.selective_scan(**{**inputs, "hidden_states": hidden_states})

    mixer, weight = Mixer(), convolution["weight"]
    expected = mixer(weight, arguments)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight, arguments), expected)
    weight = weight.clone().requires_grad_()
    compiled(weight, arguments).sum().backward()
    assert weight.grad is not None
    program = torch.export.export(mixer, (convolution["weight"], arguments))
    assert torch.equal(program.module()(convolution["weight"], arguments), expected)


# ----------------------------------------------------------------------------------------------------------------------
# Building and choosing
# ----------------------------------------------------------------------------------------------------------------------


def test_only_for_the_cpu():
    assert "CPU" in cpu.unavailable("cuda")


def test_can_be_turned_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(cpu.DISABLE, "1")
    assert cpu.DISABLE in cpu.unavailable("cpu")
    with pytest.raises(ImportError, match=cpu.DISABLE):
        choose_kernel("selective_scan", "cpu", "cpu")


@pytest.fixture
def without_prebuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and no library in the package."""
    monkeypatch.setattr(build, "PREBUILT_DIRECTORY", tmp_path / "prebuilt")
    monkeypatch.setenv("HF_VSSM_PRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_says_that_a_compiler_is_missing(without_prebuilt: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(without_prebuilt))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match=r"install g\+\+ or clang\+\+"):
        build.library_path()


def test_says_what_the_compiler_said(without_prebuilt: Path, monkeypatch: pytest.MonkeyPatch):
    compiler = without_prebuilt / "compiler"
    compiler.write_text("#!/bin/sh\necho broken compiler >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError, match="broken compiler"):
        build.library_path()
    assert not list(without_prebuilt.rglob("*.so*"))


@needs_kernel
def test_processes_that_build_at_once_share_one_library(without_prebuilt: Path):
    program = "from hf_vssm_prune.kernels import build; print(build.library_path())"
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    (path,) = map(Path, paths)
    assert path.is_relative_to(without_prebuilt)
    assert {file.suffix for file in path.parent.iterdir()} <= {".so", ".lock"}

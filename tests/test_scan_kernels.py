"""Every scan kernel compared with plain PyTorch in float64: values, gradients, shapes, precisions.

Without a GPU, Triton interprets its kernels, and the adapter for mamba-ssm calls a loop with the same arguments as its
CUDA function.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, TOKEN_PRUNING, make_model, make_plainmamba_config
from kernel_arguments import SCANS, Arguments, assert_close_to_reference, run, scan_arguments
from torch import Tensor

from hf_vssm_prune import mamba_ssm_scan as mamba_ssm
from hf_vssm_prune import triton_backend, triton_scan
from hf_vssm_prune.kernels import KERNELS, cpu
from hf_vssm_prune.scan_operator import ScanArguments
from hf_vssm_prune.selective_scan import selective_scan
from hf_vssm_prune.selective_scan_torch import selective_scan_torch
from hf_vssm_prune.triton_machine import PROGRAMS_THAT_FILL_A_GPU


def mamba_scan_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """What mamba-ssm's `selective_scan_fn` computes without its options; channels come before length."""
    state, outputs = torch.zeros_like(delta[..., :1] * A), []
    for t in range(u.shape[-1]):
        entering = (delta[..., t] * u[..., t]).unsqueeze(-1) * B[:, None, :, t]
        state = torch.exp(delta[..., t].unsqueeze(-1) * A) * state + entering
        outputs.append((state * C[:, None, :, t]).sum(-1))
    return torch.stack(outputs, -1)


def scan_by_mamba_loop(**arguments: Tensor) -> Tensor:
    return mamba_ssm.scan_with(mamba_scan_loop, ScanArguments(**arguments))


def on_gpu(scan: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def scan_there(**arguments: Tensor) -> Tensor:
        return scan(**{name: tensor.cuda() for name, tensor in arguments.items()}).cpu()

    return scan_there


HAS_GPU = torch.cuda.is_available()
SCAN_KERNELS = {
    "cpu": cpu.selective_scan,
    "triton": on_gpu(triton_scan.selective_scan) if HAS_GPU else triton_scan.selective_scan,
    "mamba_ssm": on_gpu(mamba_ssm.selective_scan) if HAS_GPU else scan_by_mamba_loop,
}


@pytest.fixture(params=SCAN_KERNELS)
def scan(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """Each kernel in turn."""
    device_type = "cpu" if request.param == "cpu" or not HAS_GPU else "cuda"
    is_stand_in = request.param == "mamba_ssm" and not HAS_GPU
    if not is_stand_in and (reason := KERNELS[request.param].unavailable(device_type)):
        pytest.skip(reason)
    return SCAN_KERNELS[request.param]


def to_double(arguments: Arguments) -> Arguments:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in arguments.items()}


@pytest.mark.parametrize("case", SCANS)
def test_values_and_gradients(case: str, scan):
    arguments = scan_arguments(**SCANS[case])
    reference = run(selective_scan_torch, arguments, torch.float64)
    assert_close_to_reference(run(scan, arguments), reference, value=1e-6, gradient=2e-6)


@pytest.mark.parametrize(("case", "sizes"), [("one path", {}), ("zero_input", {"paths": 2})])
def test_triton_in_chunks(case: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch):
    """Several blocks of channels, and chunks of several blocks of steps, the last of which is shorter."""
    if reason := triton_backend.unavailable("cuda" if HAS_GPU else "cpu"):
        pytest.skip(reason)
    planned = []

    def plan(*_, is_backward: bool = False) -> triton_scan.Plan:
        planned.append(is_backward)
        return triton_scan.Plan(16, 2, chunk_length=4)

    monkeypatch.setattr(triton_scan, "plan_scan", plan)
    arguments = scan_arguments(**{**SCANS[case], "batch": 1, "length": 9, **sizes})
    reference = run(selective_scan_torch, arguments, torch.float64)
    assert_close_to_reference(run(SCAN_KERNELS["triton"], arguments), reference, value=1e-6, gradient=2e-6)
    assert set(planned) == {False, True}


def test_plans_of_triton_fill_a_gpu_with_programs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    plan = triton_scan.plan_scan
    assert plan(4, 196, 896).chunks(196) == plan(1, 197, 768).chunks(197) == 1  # too short to be walked twice
    assert plan(4, 196, 896).block_channels == 8
    assert plan(4 * 64, 196, 896).block_channels == 16
    for images, length in ((1, 1569), (8, 1569), (1, 12545), (8, 12545), (64, 12545)):
        chosen = plan(images, length, 384)
        assert chosen.chunk_length % chosen.unroll == 0
        programs = images * 384 / chosen.block_channels * chosen.chunks(length)
        assert chosen.chunk_length == 68 or programs >= 0.9 * PROGRAMS_THAT_FILL_A_GPU
    assert plan(64, 12545, 384).chunks(12545) == 1


def test_values_and_gradients_at_the_size_of_a_model():
    """Only on the CPU: an interpreted kernel would take minutes."""
    if reason := cpu.unavailable("cpu"):
        pytest.skip(reason)
    arguments = scan_arguments(2, 196, 96, 16, paths=4, direction_B=True)
    reference = run(selective_scan_torch, arguments, torch.float64)
    assert_close_to_reference(run(cpu.selective_scan, arguments), reference, value=1e-6, gradient=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, scan):
    arguments = scan_arguments(2, 12, 24, 16, paths=2)
    rounded = {name: t.to(dtype) if t.is_floating_point() else t for name, t in arguments.items()}
    output = scan(**rounded)
    assert output.dtype == dtype
    torch.testing.assert_close(output, selective_scan_torch(**to_double(rounded)).to(dtype))


def test_float64_keeps_its_precision(scan):
    if scan is scan_by_mamba_loop:
        pytest.skip("the adapter leaves float64 to plain PyTorch before it asks for mamba-ssm's function")
    doubles = to_double(scan_arguments(1, 6, 4, 4))
    torch.testing.assert_close(scan(**doubles), selective_scan_torch(**doubles), rtol=1e-12, atol=1e-12)


def test_split_projections_and_int32_indices(scan):
    arguments = scan_arguments(2, 8, 24, 16, paths=2, largest_gap=3, direction_B=True)
    expected = scan(**arguments)
    strided = dict(arguments)
    projection = torch.cat([arguments["hidden_states"], arguments["gate"]], -1)
    strided["hidden_states"], strided["gate"] = projection.chunk(2, -1)
    strided["B"], strided["C"] = torch.cat([arguments["B"], arguments["C"]], -1).chunk(2, -1)
    strided["time_step"] = arguments["time_step"].transpose(1, 2).contiguous().transpose(1, 2)
    for name in ("order", "gaps", "moves"):
        strided[name] = arguments[name].int()
    assert not strided["gate"].is_contiguous()
    torch.testing.assert_close(scan(**strided), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_empty(batch: int, length: int, scan):
    if scan is scan_by_mamba_loop:
        pytest.skip("the adapter returns before it asks for mamba-ssm's function")
    arguments = scan_arguments(batch, length, 8, 8)
    results = run(scan, arguments)
    assert results["output"].shape == (batch, length, 8)
    assert all(not results[name].any() for name in arguments)


@pytest.mark.parametrize("name", ["hidden_states", "time_step", "B", "gate", "A"])
def test_nan_reaches_the_output(name: str, scan):
    arguments = scan_arguments(1, 6, 16, 16)
    arguments[name].flatten()[3] = torch.nan
    reference = selective_scan_torch(**arguments)
    assert reference.isnan().any()
    assert torch.equal(scan(**arguments).isnan(), reference.isnan())


@pytest.mark.parametrize("time_step", [-200.0, 1e-3, 30.0, 500.0, 1e6])
def test_extreme_time_steps(time_step: float, scan):
    arguments = scan_arguments(1, 8, 8, 8, largest_gap=195)
    arguments["time_step"] = torch.full_like(arguments["time_step"], time_step)
    reference = selective_scan_torch(**to_double(arguments))
    assert (scan(**arguments) - reference).abs().max() <= 1e-6 * reference.abs().max()


def test_bad_shapes_are_named(scan):
    if scan is scan_by_mamba_loop:
        pytest.skip("the adapter checks before it asks for mamba-ssm's function")
    arguments = scan_arguments(1, 6, 8, 8)
    with pytest.raises(ValueError, match=r"`C` must have the shape \(1, 6, 8\), got \(1, 6, 7\)"):
        scan(**{**arguments, "C": arguments["C"][..., :7]})


def test_compiles_to_one_graph(scan):
    arguments = scan_arguments(2, 5, 8, 8, paths=2, largest_gap=2)
    expected = run(scan, arguments)
    compiled = run(torch.compile(scan, fullgraph=True, backend="aot_eager"), arguments)
    for name, value in expected.items():
        torch.testing.assert_close(compiled[name], value)


# ----------------------------------------------------------------------------------------------------------------------
# By name
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_a_backend_asked_for_is_the_one_that_computes(name: str, monkeypatch: pytest.MonkeyPatch):
    if HAS_GPU or (reason := KERNELS[name].unavailable("cpu")):
        pytest.skip("tested on the CPU" if HAS_GPU else reason)
    calls = []
    original = KERNELS[name].selective_scan
    monkeypatch.setattr(KERNELS[name], "selective_scan", lambda *args: calls.append(name) or original(*args))
    arguments = scan_arguments(1, 3, 4, 4)
    torch.testing.assert_close(selective_scan(**arguments, backend=name), selective_scan_torch(**arguments))
    assert calls == [name]


def test_a_whole_model_by_the_triton_kernel():
    if HAS_GPU or triton_backend.unavailable("cpu"):
        pytest.skip("Triton interprets its kernels on a CPU where it is installed, and where there is no GPU")
    config = make_plainmamba_config(conv_kernel=3, token_pruning=dict(TOKEN_PRUNING))
    model = make_model(config)
    images = torch.randn(1, 3, 32, 32)
    expected = model(images).logits
    config.scan_backend = "triton"
    torch.testing.assert_close(model(images).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_cpu_kernel_is_what_auto_takes_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    if reason := cpu.unavailable("cpu"):
        pytest.skip(reason)
    calls = []
    original = cpu.selective_scan
    monkeypatch.setattr(cpu, "selective_scan", lambda *args: calls.append("cpu") or original(*args))
    selective_scan(**scan_arguments(1, 3, 4, 4))
    assert calls == ["cpu"]


@pytest.mark.skipif(HAS_GPU, reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("name", "reason"), [("triton", "PyTorch finds no GPU"), ("mamba_ssm", "mamba-ssm package is not installed")]
)
def test_why_a_gpu_kernel_is_not_there(name: str, reason: str):
    assert reason in KERNELS[name].unavailable("cuda")


def test_triton_is_not_used_where_it_computes_something_else(monkeypatch: pytest.MonkeyPatch):
    if triton_backend.unavailable("cpu"):
        pytest.skip("Triton is not installed")
    assert triton_backend.self_check("cpu") is None
    with monkeypatch.context() as patch:
        patch.setattr(triton_scan, "_backward", lambda *_: 1 / 0)
        assert triton_backend.self_check("cpu", with_gradients=False) is None
        assert "ZeroDivisionError" in triton_backend.self_check("cpu")
    monkeypatch.setattr(triton_scan, "_walk_forward", lambda _arguments, _plan, output, *_: output.zero_())
    assert "differ from plain PyTorch's" in triton_backend.self_check("cpu")
    monkeypatch.setattr(triton_scan, "_walk_forward", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in triton_backend.self_check("cpu")


def test_triton_is_checked_on_the_gpu_in_use(monkeypatch: pytest.MonkeyPatch):
    """It must not be checked on the first GPU, which is the default in a new thread."""
    pytest.importorskip("triton")
    checked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(triton_backend, "self_check", lambda device, _: checked.append(device))
    triton_backend._self_check_on_gpu.cache_clear()
    assert triton_backend.unavailable("cuda") is None
    triton_backend._self_check_on_gpu.cache_clear()
    assert checked == ["cuda:3"]


def test_what_cannot_be_used_is_a_reason_and_no_error(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")

    def fail(*_) -> None:
        raise RuntimeError("0 active drivers")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", fail)
    assert triton_backend.unavailable("cuda") == "the GPU cannot be used: 0 active drivers"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    monkeypatch.setattr("importlib.import_module", fail)
    assert mamba_ssm.unavailable("cuda") == "the mamba-ssm package cannot be imported: RuntimeError: 0 active drivers"


def test_tokens_are_not_limited_by_the_grid_of_triton(monkeypatch: pytest.MonkeyPatch):
    """CUDA launches at most 65,535 programs in the second and third dimension of a grid."""
    pytest.importorskip("triton")
    from hf_vssm_prune import triton_scan_kernels

    grids: list[tuple[int, ...]] = []

    class Launch:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable:
            return lambda *_, **__: grids.append(grid)

    monkeypatch.setattr(triton_scan_kernels, "gate_sum", Launch())
    triton_scan._gate_sum(torch.empty(2, 4, 300_000, 8, device="meta"), None, torch.float32)
    assert grids == [(150_000, 1)]


def test_triton_compiles_for_gpus_that_are_not_here(tmp_path: Path):
    """Compiles to machine code for NVIDIA and AMD, with and without each option."""
    pytest.importorskip("triton")
    paths = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    environment = {**os.environ, "TRITON_INTERPRET": "0", **paths}
    script = Path(__file__).with_name("compile_triton_kernels.py")
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line.split("; ") for line in result.stdout.splitlines()]
    assert [kind for kind, *_ in lines] == ["cubin"] * 4 + ["hsaco"] * 4
    spilling = [name for _, _, name, resources in lines if "STACK" in resources and "STACK:0" not in resources]
    assert not spilling

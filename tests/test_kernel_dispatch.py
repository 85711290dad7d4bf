"""Whole models use the C++ kernels, and warn if they cannot: there is no silent fallback."""

import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import make_plainmamba_config, make_vim_config
from kernel_arguments import scan_arguments
from torch.utils._python_dispatch import TorchDispatchMode

from hf_vssm_prune import kernel_table, kernels
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.kernels import build, cpu


NO_KERNEL = cpu.unavailable("cpu")
needs_kernel = pytest.mark.skipif(NO_KERNEL is not None, reason=NO_KERNEL or "")


class OperatorCount(TorchDispatchMode):
    """Counts calls of this package's operators, in forward and backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        namespace, _, name = operator.name().partition("::")
        if namespace == "hf_vssm_prune":
            self.calls[name] += 1
        return operator(*args, **(kwargs or {}))


# Of four layers. PlainMamba has one more convolution, after its first layer; the others one of both for each
# direction.
OPERATORS = {
    "plainmamba": {"selective_scan": 4, "depthwise_conv2d": 5},
    "videomamba": {"selective_scan": 8, "depthwise_conv2d": 8},
    "vim": {"selective_scan": 8, "depthwise_conv2d": 8},
}


@needs_kernel
def test_inference_runs_the_kernels(tiny_pruned_config, pixel_values) -> None:
    model = FAMILIES[tiny_pruned_config.model_type].classifier(tiny_pruned_config).eval()
    with torch.no_grad(), OperatorCount() as count:
        model(pixel_values)
    assert count.calls == OPERATORS[tiny_pruned_config.model_type]


@needs_kernel
@pytest.mark.parametrize("training", [True, False])
def test_gradients_run_the_kernels(training, tiny_pruned_config, pixel_values) -> None:
    model = FAMILIES[tiny_pruned_config.model_type].classifier(tiny_pruned_config).train(training)
    with OperatorCount() as count:
        model(pixel_values, labels=torch.tensor([0, 2])).loss.backward()
    forward = OPERATORS[tiny_pruned_config.model_type]
    assert count.calls == {**forward, **{f"{name}_backward": calls for name, calls in forward.items()}}


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Simulates a machine without a compiler and without compiled kernels."""
    monkeypatch.setattr(build, "PREBUILT_DIRECTORY", tmp_path / "prebuilt")
    monkeypatch.setenv("HF_VSSM_PRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(kernel_table, "_WARNED", set())
    cpu._load.cache_clear()
    yield
    cpu._load.cache_clear()


def test_without_a_compiler_models_run_and_warn_once(without_compiler, pixel_values) -> None:
    assert "install g++ or clang++" in kernels.available()["cpu (cpu)"]
    for config in (make_plainmamba_config(), make_vim_config()):
        model = FAMILIES[config.model_type].classifier(config).eval()
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught, OperatorCount() as count:
            warnings.simplefilter("always")
            logits = model(pixel_values).logits
            model(pixel_values)
        messages = [str(warning.message) for warning in caught if "no fast kernel" in str(warning.message)]
        expected = 1 if config.model_type == "plainmamba" else 0  # the second model has been warned about
        assert len(messages) == expected
        assert all("install g++ or clang++" in message for message in messages)
        assert not count.calls
        config.scan_backend = "torch"
        with torch.no_grad():
            assert torch.equal(model(pixel_values).logits, logits)


def test_devices_without_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_table, "_WARNED", set())
    with pytest.warns(UserWarning, match=r"no fast kernel for mps: .* \(there are kernels for cpu, cuda only\)"):
        assert kernels.choose_kernel("causal_conv1d", "auto", "mps") is None


@needs_kernel
def test_idle_threads_do_not_spin() -> None:
    threads, arguments = torch.get_num_threads(), scan_arguments(8, 50, 256, 16)
    torch.set_num_threads(4)
    try:
        cpu.selective_scan(**arguments)
    finally:
        torch.set_num_threads(threads)
    time.sleep(0.1)

    def cpu_time_of_a_pause() -> float:
        before = time.process_time()  # of all threads
        time.sleep(0.3)
        return time.process_time() - before

    # Threads that other tests left may be busy for a moment.
    assert any(cpu_time_of_a_pause() < 0.1 for _ in range(5))

"""The GPU check, rehearsed without a GPU: a wrong kernel is named, and a part that hangs does not affect the others."""

import argparse
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from timeit import timeit

import pytest
import torch
from conftest import load_script

from hf_vssm_prune.kernels import KERNELS


gpu_check = load_script("gpu_check")

from benchmarking.measuring import Group  # noqa: E402
from gpu_checking import distribution, golden, kernels, machine, models, training  # noqa: E402
from gpu_checking.report import Report  # noqa: E402


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    return gpu_check.parse_options(["--output_dir", str(tmp_path), "--device", "cpu", "--small"])


def test_models_and_training_steps_are_measured(options) -> None:
    for time_them in (models.time_models, training.time_training):
        report = Report(options.output_dir / "report.json")
        time_them(options, report)
        assert report.wrong == []
        (table,) = report.tables
        assert len(table.rows) >= 3, table.title
        assert all(float(row[-3]) > 0 and float(row[-2]) > 0 for row in table.rows)


def test_memory_is_what_a_run_adds_to_the_weights(options, monkeypatch) -> None:
    """Of whatever is in memory, none is counted: the weights of the other models, or their gradients."""
    for name, value in {"synchronize": None, "memory_allocated": 3 << 30, "max_memory_allocated": 5 << 30}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    assert models.peak_memory(lambda: None, "cuda") == 2048
    assert models.peak_memory(lambda: None, "cpu") == "–"
    kept = torch.nn.Linear(2, 2)
    kept.forward = lambda images, labels: argparse.Namespace(loss=torch.nn.functional.linear(images, kept.weight).sum())
    training.step(kept, torch.ones(1, 2), torch.zeros(1))()
    assert kept.weight.grad is None


@pytest.mark.parametrize("failing", [{"dense"}, {"dense", "pruned"}])
def test_steps_that_do_not_fit_into_memory_cost_only_themselves(failing, options, monkeypatch) -> None:
    """If the dense model does not fit, other models are not compared with one that took its place."""

    def peak_memory(case, _) -> int:
        if case() in failing:
            raise torch.OutOfMemoryError("full")
        return 0

    monkeypatch.setattr(training, "peak_memory", peak_memory)
    steps = {name: lambda name=name: name for name in ("dense", "pruned")}
    monkeypatch.setattr(training, "make_steps", lambda *_: steps)
    report = Report(options.output_dir / "report.json")
    training.time_training(options, report)
    assert len(report.wrong) == len(failing)
    assert [(row[0], row[3]) for row in report.tables[0].rows] == [(name, "–") for name in steps if name not in failing]


@pytest.mark.parametrize("what", gpu_check.COMPILING)
def test_what_is_compiled_before_runs(what: str, options, triton_is_there) -> None:
    report = Report(options.output_dir / "report.json")
    gpu_check.COMPILING[what](options, report)
    assert report.wrong == []


@pytest.fixture
def triton_is_there() -> None:
    if reason := KERNELS["triton"].unavailable("cpu"):
        pytest.skip(reason)


def test_kernels_are_right(options, triton_is_there) -> None:
    report = Report(options.output_dir / "report.json")
    for dtype in kernels.NAMES:
        kernels.check_kernel("triton", dtype, options, report)
    assert report.wrong == []
    assert [len(table.rows) for table in report.tables] == [5, 5, 5]


@pytest.mark.parametrize(
    ("operation", "case"),
    [("selective_scan", "one path"), ("depthwise_conv2d", "convolution, 3 x 3, one stand-in")],
    ids=["scan", "convolution"],
)
def test_a_wrong_kernel_is_named(operation: str, case: str, options, triton_is_there, monkeypatch) -> None:
    right = getattr(KERNELS["triton"], operation)
    monkeypatch.setattr(KERNELS["triton"], operation, lambda *arguments: right(*arguments) * 1.001)
    calls = [call for call in kernels.calls_to_check("triton", small=True) if call[0] == case]
    monkeypatch.setattr(kernels, "calls_to_check", lambda *_, **__: calls)
    report = Report(options.output_dir / "report.json")
    kernels.check_kernel("triton", torch.float32, options, report)
    assert any(line.startswith(f"triton, {case}, float32: ") for line in report.wrong)


def test_convolutions_are_timed_beside_plain_pytorch(options, triton_is_there) -> None:
    report = Report(options.output_dir / "report.json")
    kernels.time_kernels("convolutions", options, report)
    assert report.wrong == []
    assert {row[3] for row in report.tables[0].rows} == {"triton", "torch"}


def test_scans_are_timed_and_a_missing_mamba_ssm_is_no_mistake(options, triton_is_there, monkeypatch) -> None:
    # One run of each instead of three or more: interpreted, a run takes long.
    monkeypatch.setattr(kernels, "take_turns", lambda _, cases, *__: Group("", {"": [timeit(cases[""], number=1)]}))
    report = Report(options.output_dir / "report.json")
    kernels.time_kernels("scans", options, report)
    assert report.wrong == []
    assert report.lines == ["- mamba_ssm is not used: mamba-ssm was not given (--mamba_ssm)"]
    assert {row[3] for row in report.tables[0].rows} == {"triton"}
    assert all(float(row[-2]) > 0 and float(row[-1]) > 0 for row in report.tables[0].rows)


def test_compiled_models_are_timed(options, monkeypatch) -> None:
    make = models.make_models  # the dense one is enough
    monkeypatch.setattr(models, "make_models", lambda *words: dict([*make(*words).items()][:1]))
    report = Report(options.output_dir / "report.json")
    models.time_compiled_models(options, report)
    assert report.wrong == []
    assert [row[3] for row in report.tables[0].rows] == ["compiled"]


def test_a_built_mamba_ssm_is_found(options, tmp_path, monkeypatch) -> None:
    """Its package is imported without its own `__init__`, which needs more than the scan does."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mamba_ssm", raising=False)
    options.mamba_ssm = tmp_path
    assert "is not built" in machine.find_mamba_ssm(options)
    (tmp_path / machine.BUILD_FOLDER).mkdir()
    (tmp_path / machine.BUILD_FOLDER / "selective_scan_cuda.so").touch()
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("raise ImportError('language models')")
    (tmp_path / "mamba_ssm" / "scan_of_a_test.py").write_text("answer = 42")
    assert machine.find_mamba_ssm(options) is None
    assert importlib.import_module("mamba_ssm.scan_of_a_test").answer == 42
    for name in ("mamba_ssm", "mamba_ssm.scan_of_a_test"):
        del sys.modules[name]  # monkeypatch would put it back at the end


def test_mamba_ssm_is_built_from_its_scans_sources(options, tmp_path, monkeypatch) -> None:
    assert machine.start_building(options) is None  # no source was given
    sources = tmp_path / "csrc" / "selective_scan"
    sources.mkdir(parents=True)
    for name in ("selective_scan.cpp", "forward.cu", "selective_scan.h", "notes.cmake"):
        (sources / name).touch()
    calls = []
    monkeypatch.setattr("torch.utils.cpp_extension.load", lambda *words, **settings: calls.append((words, settings)))
    machine.build_mamba_ssm(tmp_path)
    ((name, files), settings) = calls[0]
    assert name == "selective_scan_cuda"
    assert [Path(file).name for file in files] == ["forward.cu", "selective_scan.cpp"]
    assert Path(settings["build_directory"]).is_dir()
    options.mamba_ssm = tmp_path
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no nvcc
    assert machine.start_building(options) is None


@pytest.mark.parametrize(
    ("losses", "status", "wrong"),
    [
        ([1.5, 1.5, 1.5], 0, None),
        ([1.5, 1.5, 1.6], 0, "the runs end with losses [1.5, 1.5, 1.6]"),
        ([1.5, 1.5, math.nan], 0, "the runs end with losses [1.5, 1.5, nan]"),
        ([1.5, 1.5, 1.5], 3, "run 0 on cpu: status 3; log.distribution.txt has its error"),
    ],
    ids=["same", "other", "nan", "failed"],
)
def test_runs_that_differ_or_fail_are_wrong(losses, status, wrong, options, monkeypatch) -> None:
    def train(command: list[str], **_) -> subprocess.CompletedProcess:
        folder = Path(command[command.index("--output_dir") + 1])
        folder.mkdir(parents=True)
        results = {"history": [{"eval_loss": losses[int(folder.name)]}]}
        (folder / "all_results.json").write_text(json.dumps(results))
        return subprocess.CompletedProcess(command, status, "", "")

    monkeypatch.setattr(subprocess, "run", train)
    (options.output_dir / ".runs" / "0").mkdir(parents=True)  # of an earlier check
    report = Report(options.output_dir / "report.json")
    distribution.check_distribution(options, report)
    assert report.wrong == ([] if wrong is None else [wrong])


def test_arguments_are_drawn_on_the_cpu(options) -> None:
    """Generators are on the CPU, whatever the default device; after the first timed case, it is the GPU."""
    torch.set_default_device("meta")
    try:
        calls = [next(kernels.calls_to_time(what, ["torch"], options)) for what in kernels.TIMED]
    finally:
        torch.set_default_device(None)
    assert {tensor.device.type for call in calls for tensor in call.forward.args[1].values()} == {"cpu"}


def test_golden_cases(options, shared) -> None:
    options.golden = shared / "golden"
    report = Report(options.output_dir / "report.json")
    golden.check_golden_cases("plainmamba", options, report)
    assert report.wrong == []
    assert report.tables[0].rows


def test_golden_cases_that_are_not_there_are_wrong(options, tmp_path) -> None:
    options.golden = tmp_path / "nothing"
    report = Report(options.output_dir / "report.json")
    golden.check_golden_cases("plainmamba", options, report)
    assert report.wrong == [f"--golden {tmp_path / 'nothing'} has no cases of plainmamba"]


def test_a_part_ends_with_the_check(options, monkeypatch) -> None:
    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *_, **__) -> None:
            super().__init__(["sleep", "600"], start_new_session=True)
            started.append(self)

        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None:
                raise KeyboardInterrupt
            return super().wait()

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.run_part("machine", math.inf, 1, options)
    assert started[0].returncode == -9


def test_a_part_that_fails_or_hangs_costs_only_itself(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(gpu_check.PARTS, "models", gpu_check.PARTS["models"]._replace(seconds=0.5))
    missing = ["--golden", str(tmp_path / "nothing")]
    arguments = ["--output_dir", str(tmp_path / "out"), "--device", "cpu", "--small", *missing]
    (tmp_path / "out").mkdir()
    Report(tmp_path / "out" / ".models.json").say("of a check that was killed")
    assert gpu_check.main([*arguments, "--patience", "4", "--parts", "models", "machine"]) == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: result["status"] for name, result in results.items()} == {"models": "too slow", "machine": "ok"}
    page = (tmp_path / "out" / "gpu_check.md").read_text()
    assert "| models | too slow |" in page
    assert "killed" not in page
    assert f"torch {torch.__version__}" in page

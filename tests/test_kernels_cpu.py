"""What is specific to the C++ kernels: vectors, threads, operators, compiling. test_scan_kernels.py and
test_convolution_kernels.py test what they have in common with other kernels."""

import hashlib
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE
from forking import Forked
from kernel_arguments import (
    Arguments,
    assert_close_to_reference,
    assert_rounded_once,
    convolution_arguments,
    run,
    scan_arguments,
)
from torch import Tensor

from hf_vssm_prune.causal_convolution import causal_conv1d
from hf_vssm_prune.convolution_torch import causal_conv1d_torch, depthwise_conv2d_torch
from hf_vssm_prune.grid_convolution import depthwise_conv2d
from hf_vssm_prune.kernels import build, choose_kernel, cpu
from hf_vssm_prune.selective_scan_torch import selective_scan_torch
from hf_vssm_prune.token_pruning import nearest_tokens


NO_KERNEL = cpu.unavailable("cpu")
needs_kernel = pytest.mark.skipif(NO_KERNEL is not None, reason=NO_KERNEL or "")


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
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_is_not_the_kernels(dtype: torch.dtype):
    convolution = partial(cpu.depthwise_conv2d, grid=(5, 7)), convolution_arguments(2, (5, 7), 19, 3, 0.6)
    scan = cpu.selective_scan, scan_arguments(2, 9, 19, 5, paths=2, largest_gap=3)

    def compute() -> list[Tensor]:
        results = []
        for function, arguments in (convolution, scan):
            inputs = {
                name: tensor.float().requires_grad_() if tensor.is_floating_point() else tensor
                for name, tensor in arguments.items()
            }
            output = function(**inputs)
            results += [output, *torch.autograd.grad(output.sum(), [x for x in inputs.values() if x.requires_grad])]
        return results

    expected = compute()
    torch.set_default_dtype(dtype)
    try:
        found = compute()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@needs_kernel
@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("keep_ratio", [0.6, 0.01])
def test_convolution_with_stand_ins_equals_reference(kernel: int, keep_ratio: float):
    arguments = convolution_arguments(2, (7, 9), 77, kernel, keep_ratio)
    options = {"grid": (7, 9), "silu": True, "stand_ins": nearest_tokens(arguments["kept"], (7, 9))}
    reference = run(depthwise_conv2d_torch, arguments, torch.float64, **options)
    assert_close_to_reference(run(cpu.depthwise_conv2d, arguments, **options), reference, value=1e-6, gradient=2e-6)


@needs_kernel
def test_stand_ins_of_a_whole_grid_change_nothing():
    arguments = convolution_arguments(2, (4, 5), 24, 3, 1.0)
    itself = torch.arange(20).expand(2, -1)
    with_stand_ins = cpu.depthwise_conv2d(**arguments, grid=(4, 5), stand_ins=itself)
    assert torch.equal(with_stand_ins, cpu.depthwise_conv2d(**arguments, grid=(4, 5)))


@needs_kernel
def test_convolution_of_many_channels():
    arguments = convolution_arguments(1, (5, 5), 600, 3, 0.5)
    reference = run(depthwise_conv2d_torch, arguments, torch.float64, grid=(5, 5))
    assert_close_to_reference(run(cpu.depthwise_conv2d, arguments, grid=(5, 5)), reference, 1e-6, 2e-6)


@needs_kernel
@pytest.mark.parametrize("taps", [1, 3, 4, 5])
@pytest.mark.parametrize("length", [1, 2, 30])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])
def test_causal_convolution_equals_reference(taps: int, length: int, reverse: bool):
    arguments = {
        "hidden_states": torch.randn(2, length, 24),
        "weight": torch.randn(24, 1, taps),
        "bias": torch.randn(24),
    }
    reference = run(causal_conv1d_torch, arguments, torch.float64, reverse=reverse)
    result = run(causal_conv1d, arguments, backend="cpu", reverse=reverse)
    assert_close_to_reference(result, reference, value=1e-6, gradient=2e-6)


@needs_kernel
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])
def test_causal_convolution_with_stand_ins_equals_reference(reverse: bool):
    arguments = convolution_arguments(2, (1, 30), 24, 3, keep_ratio=0.4)
    kept = arguments.pop("kept")
    arguments["weight"] = torch.randn(24, 1, 4)
    options = {"reverse": reverse, "kept": kept, "stand_ins": nearest_tokens(kept, (1, 30))}
    reference = run(causal_conv1d_torch, arguments, torch.float64, **options)
    result = run(causal_conv1d, arguments, backend="cpu", **options)
    assert_close_to_reference(result, reference, value=1e-6, gradient=2e-6)


@needs_kernel
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])
def test_causal_convolution_looks_one_way(reverse: bool):
    hidden_states, weight, bias = torch.randn(1, 9, 8), torch.randn(8, 1, 4), torch.randn(8)
    before = causal_conv1d(hidden_states, weight, bias, reverse)
    hidden_states[:, 5] += 1
    changed = (causal_conv1d(hidden_states, weight, bias, reverse) != before).any(-1)[0]
    seen = range(2, 6) if reverse else range(5, 9)  # four taps
    assert changed.nonzero().flatten().tolist() == list(seen)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_indices_of_convolutions_may_be_int32_or_int64(backend: str):
    if backend == "cpu" and NO_KERNEL is not None:
        pytest.skip(NO_KERNEL)
    arguments = convolution_arguments(2, (1, 30), 24, 3, keep_ratio=0.4)
    sequence = {"hidden_states": arguments["hidden_states"], "weight": torch.randn(24, 1, 4), "bias": arguments["bias"]}
    results = []
    for dtype in (torch.int32, torch.int64):
        kept = arguments["kept"].to(dtype)
        for stand_ins in (None, nearest_tokens(arguments["kept"], (1, 30)).to(dtype)):
            indices = {"kept": kept, "stand_ins": stand_ins, "backend": backend}
            results.append(depthwise_conv2d(**{**arguments, **indices}, grid=(1, 30)))
        results.append(causal_conv1d(**sequence, **indices))
    assert all(map(torch.equal, results[:3], results[3:]))


@needs_kernel
def test_int32_indices_are_read_where_they_lie():
    scan = scan_arguments(2, 8, 24, 16, paths=2, largest_gap=3, direction_B=True)
    convolution = convolution_arguments(2, (4, 5), 24, 3, 0.6)
    convolution["stand_ins"] = nearest_tokens(convolution["kept"], (4, 5))
    for function, arguments, options in (
        (cpu.selective_scan, scan, {}),
        (cpu.depthwise_conv2d, convolution, {"grid": (4, 5)}),
    ):
        int32 = {name: tensor if tensor.is_floating_point() else tensor.int() for name, tensor in arguments.items()}
        with torch.profiler.profile() as profile:
            function(**int32, **options)
        assert not {"aten::_to_copy", "aten::copy_"} & {event.key for event in profile.key_averages()}


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
    with pytest.raises(IndexError, match="stand_ins"):
        cpu.depthwise_conv2d(**convolution, grid=(3, 3), stand_ins=torch.full((1, 9), 4))
    with pytest.raises(ValueError, match="stand_ins"):
        cpu.depthwise_conv2d(**convolution, grid=(3, 3), stand_ins=torch.zeros(1, 4))
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


@needs_kernel
def test_kernels_use_the_threads_of_pytorch():
    library = cpu._load()
    assert not isinstance(library, str)
    assert library.has_threads() == 1


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
    child.join(PATIENCE)
    alive = child.is_alive()
    child.kill()
    assert not alive, "the forked process hangs"
    assert queue.get() == expected


OUT_OF_MEMORY = """
import re, resource, sys, torch
sys.path.insert(0, "tests")
from pathlib import Path
from kernel_arguments import scan_arguments
from hf_vssm_prune.kernels import cpu

arguments = scan_arguments(16, 1024, 128, 16)
for value in arguments.values():
    value.requires_grad_(value.is_floating_point())
cpu.selective_scan(**scan_arguments(2, 8, 128, 16))
output = cpu.selective_scan(**arguments)
size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 40 * 2**20,) * 2)
try:
    output.sum().backward()
except (MemoryError, RuntimeError) as error:  # RuntimeError: PyTorch's own allocations
    print(f"error: {error}")
"""


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_runs_out_is_an_error_of_python():
    command = [sys.executable, "-c", OUT_OF_MEMORY]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "error: " in result.stdout


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
    for tensor in arguments.values():
        tensor.requires_grad_(tensor.is_floating_point())
    for stand_ins in (None, nearest_tokens(arguments["kept"], (3, 4))):
        inputs = [*arguments.values(), stand_ins, 3, 4, True, 0]
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
    found, own = (torch.autograd.grad(function(weight, arguments).sum(), weight) for function in (compiled, mixer))
    torch.testing.assert_close(found, own)
    program = torch.export.export(mixer, (convolution["weight"], arguments))
    assert torch.equal(program.module()(convolution["weight"], arguments), expected)


# ----------------------------------------------------------------------------------------------------------------------
# Building and choosing
# ----------------------------------------------------------------------------------------------------------------------


def test_only_for_the_cpu():
    assert "CPU" in cpu.unavailable("cuda")


@pytest.mark.parametrize("value", ["1", "true", "Yes", "on"])
def test_can_be_turned_off(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(cpu.DISABLE, value)
    assert cpu.DISABLE in cpu.unavailable("cpu")
    with pytest.raises(ImportError, match=cpu.DISABLE):
        choose_kernel("selective_scan", "cpu", "cpu")


@pytest.mark.parametrize("value", ["", "0", "false", "False", "no", "NO", "off", " off "])
def test_what_does_not_turn_it_off(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(cpu.DISABLE, value)
    assert cpu.DISABLE not in (cpu.unavailable("cpu") or "")


@pytest.fixture(scope="module")
def compiled() -> Path:
    """The library used by the other tests."""
    return build.library_path()


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


@pytest.mark.parametrize("write", [str, shlex.quote, lambda path: f"{shlex.quote(path)} -O1"])
def test_says_what_the_compiler_said(write: Callable, without_prebuilt: Path, monkeypatch: pytest.MonkeyPatch):
    """Works wherever the compiler is, and however CXX is quoted, with options or without."""
    compiler = without_prebuilt / "a ß" / "compiler"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho broken compiler >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", write(str(compiler)))
    with pytest.raises(build.BuildError, match="broken compiler"):
        build.library_path()
    assert not list(without_prebuilt.rglob("*.so*"))


@pytest.fixture
def quick_compiler(compiled: Path, without_prebuilt: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that copies the existing library. Each call adds a line to the returned log file."""
    log, compiler = without_prebuilt / "log", without_prebuilt / "compiler"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\nfor output; do :; done\nsleep "${COMPILER_SECONDS:-0}"\n'
        f'cp {shlex.quote(str(compiled))} "$output"\necho >> {shlex.quote(str(log))}\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", shlex.quote(str(compiler)))
    return log


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="the compiler is a script")
def test_a_cache_that_others_wrote_is_only_read(quick_compiler: Path, monkeypatch: pytest.MonkeyPatch):
    path = build.library_path()

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("filelock.FileLock", refuse)
    assert build.library_path() == path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(build.BuildError, match=r"cannot be used \(read-only\); set HF_VSSM_PRUNE_CACHE"):
        build.library_path()


def test_says_what_is_wrong_with_the_place(without_prebuilt: Path, monkeypatch: pytest.MonkeyPatch):
    def no_home(_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("HOME", str(without_prebuilt))
    monkeypatch.setenv("HF_VSSM_PRUNE_CACHE", "~/cache")  # as in a file that no shell reads
    assert build._cache_directory() == without_prebuilt / "cache" / "kernels"
    monkeypatch.delenv("HF_VSSM_PRUNE_CACHE")
    assert build._cache_directory() == without_prebuilt / ".cache" / "hf_vssm_prune" / "kernels"
    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(build.BuildError, match="no folder is available for the kernels' cache"):
        build._cache_directory()
    monkeypatch.setenv("CXX", "g++ 'unbalanced")
    with pytest.raises(build.BuildError, match="CXX is not a command"):
        build.find_compiler()
    assert build._digest("/\udcff/g++") != build._digest("/\udcfe/g++"), "paths need not be text"


def test_a_cache_whose_files_cannot_be_locked_is_named(without_prebuilt: Path, monkeypatch: pytest.MonkeyPatch):
    """Older versions of filelock raise this error on some cluster file systems."""

    def refuse(*_: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock", refuse)
    monkeypatch.setattr(build, "find_compiler", lambda: ["true"])
    with pytest.raises(build.BuildError, match=r"does not appear to support flock.*; set HF_VSSM_PRUNE_CACHE"):
        build.library_path()


def test_only_the_sources_count_as_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    digest = build._digest(build._sources())
    shutil.copytree(build.SOURCE_DIRECTORY, tmp_path / "csrc")
    (tmp_path / "csrc" / ".DS_Store").write_bytes(b"\xff\x00")  # as macOS puts into folders that it shows
    (tmp_path / "csrc" / "folder").mkdir()
    monkeypatch.setattr(build, "SOURCE_DIRECTORY", tmp_path / "csrc")
    assert build._digest(build._sources.__wrapped__()) == digest


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="the compiler is a script")
def test_processes_that_build_at_once_share_one_library(
    quick_compiler: Path, without_prebuilt: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COMPILER_SECONDS", "1")  # the second process comes while the first compiles
    program = "from hf_vssm_prune.kernels import build; print(build.library_path())"
    processes = [Forked("-c", program) for _ in range(2)]
    results = [process.wait() for process in processes]
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    (path,) = {Path(result.stdout.strip()) for result in results}
    assert path.is_relative_to(without_prebuilt)
    assert len(quick_compiler.read_text()) == 1
    assert {file.suffix for file in path.parent.iterdir()} <= {".so", ".lock", ".sha256"}


def flip_byte(place: int) -> Callable[[Path], object]:
    def flip(library: Path) -> None:
        content = bytearray(library.read_bytes())
        content[place] ^= 0xFF
        library.write_bytes(content)

    return flip


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda library: library.write_bytes(b""),
    "one byte": lambda library: library.write_bytes(library.read_bytes()[:1]),
    "cut in the middle": lambda library: library.write_bytes(library.read_bytes()[: library.stat().st_size // 2]),
    "last byte missing": lambda library: library.write_bytes(library.read_bytes()[:-1]),
    "page of zeros": lambda library: library.write_bytes(library.read_bytes()[:-4096] + bytes(4096)),
    "one byte wrong": flip_byte(-1000),
    "other processor": flip_byte(18),  # e_machine of ELF
    "not a library": lambda library: library.write_text("<html>404</html>"),
    "missing": lambda library: library.unlink(),
    "of another version": lambda library: build._checksum_file(library).write_bytes(
        build._checksum(library, "of another version")
    ),
    "no checksum": lambda library: build._checksum_file(library).unlink(),
    "checksum cut short": lambda library: build._checksum_file(library).write_bytes(b"3a"),
}


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="the compiler is a script")
def test_damaged_libraries_are_compiled_anew(quick_compiler: Path):
    library = build.library_path()
    whole = library.read_bytes()
    for count, (name, damage) in enumerate(DAMAGES.items(), start=2):
        damage(library)
        assert build.library_path() == library
        assert library.read_bytes() == whole, name
        assert len(quick_compiler.read_text()) == count, name
    assert build.library_path() == library
    assert len(quick_compiler.read_text()) == len(DAMAGES) + 1


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="the compiler is a script")
def test_a_damaged_prebuilt_library_is_not_taken(quick_compiler: Path):
    library = build.library_path()
    prebuilt = build.PREBUILT_DIRECTORY / build._prebuilt_name(build.best_variant())
    prebuilt.parent.mkdir()
    for source, target in ((library, prebuilt), (build._checksum_file(library), build._checksum_file(prebuilt))):
        shutil.copy(source, target)
    assert build.library_path() == prebuilt
    DAMAGES["cut in the middle"](prebuilt)
    assert build.library_path() == library


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="the compiler is a script")
def test_a_process_survives_a_library_that_was_cut_short(quick_compiler: Path):
    DAMAGES["cut in the middle"](build.library_path())
    program = "from hf_vssm_prune import kernels; print(kernels.available()['cpu (cpu)'])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert (result.returncode, result.stdout.strip()) == (0, "available")


@needs_kernel
def test_looking_at_the_library_takes_as_long_as_reading_it():
    """Both in turns, as their times depend on the machine and on what else it does."""
    library, variant = build.library_path(), build.best_variant()
    looking, reading = [], []
    for _ in range(20):
        start = time.perf_counter()
        assert build.is_whole(library, variant)
        looking.append(time.perf_counter() - start)
        start = time.perf_counter()
        hashlib.sha256(library.read_bytes()).digest()
        reading.append(time.perf_counter() - start)
    assert min(looking) < 5 * min(reading)


# ----------------------------------------------------------------------------------------------------------------------
# Half precision
# ----------------------------------------------------------------------------------------------------------------------

HALVES = (torch.bfloat16, torch.float16)
OF_WEIGHTS = ("A", "D", "time_step_bias", "hole_time_step", "direction_B", "weight", "bias")
OPERATIONS = {
    "scan": (
        cpu.selective_scan,
        selective_scan_torch,
        scan_arguments(2, 13, 77, 16, paths=4, largest_gap=4, hole_time_step=True, direction_B=True),
        {},
    ),
    "grid": (
        cpu.depthwise_conv2d,
        depthwise_conv2d_torch,
        convolution_arguments(2, (7, 9), 77, 3, None),
        {"grid": (7, 9)},
    ),
    "kept cells": (
        cpu.depthwise_conv2d,
        depthwise_conv2d_torch,
        convolution_arguments(2, (7, 9), 77, 7, 0.6),
        {"grid": (7, 9), "silu": True},
    ),
}


@needs_kernel
@pytest.mark.parametrize("weights_too", [True, False], ids=["weights too", "float32 weights"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_half_precision_is_rounded_once(operation: str, dtype: torch.dtype, weights_too: bool):
    """Values and gradients equal those of the rounded inputs in float64, rounded to the tensor's own dtype."""
    kernel, plain, arguments, options = OPERATIONS[operation]
    rounded = {
        name: tensor.to(dtype) if tensor.is_floating_point() and (weights_too or name not in OF_WEIGHTS) else tensor
        for name, tensor in arguments.items()
    }
    assert_rounded_once(kernel, plain, rounded, options)


@needs_kernel
@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_of_half_precision_is_read_and_written(dtype: torch.dtype):
    """Includes infinity, NaN and subnormal numbers. Values between two numbers are rounded as in PyTorch."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(1, 256, 256)
    for factor in (1.0, 1 / 3, 1e-3, 1e-6, 1e3):
        weight = torch.full((256, 1, 1, 1), factor)
        result = cpu.depthwise_conv2d(numbers, weight, None, grid=(16, 16))
        expected = (numbers.float() * factor).to(dtype)
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@needs_kernel
def test_rows_of_different_precision_go_together():
    arguments = scan_arguments(2, 5, 24, 8, paths=2, largest_gap=3)
    mixed = {**arguments, "hidden_states": arguments["hidden_states"].bfloat16(), "gate": arguments["gate"].half()}
    inputs = {n: t.clone().requires_grad_() if t.is_floating_point() else t for n, t in mixed.items()}
    output = cpu.selective_scan(**inputs)
    torch.testing.assert_close(output, selective_scan_torch(**mixed))
    output.sum().backward()
    assert all(t.grad.dtype == t.dtype for t in inputs.values() if t.is_floating_point())


@needs_kernel
def test_half_precision_is_not_converted():
    """A layer with bfloat16 weights copies nothing."""
    scan = scan_arguments(2, 8, 24, 16, paths=2, largest_gap=3, direction_B=True)
    convolution = convolution_arguments(2, (4, 5), 24, 3, 0.6)
    for function, arguments, options in (
        (cpu.selective_scan, scan, {}),
        (cpu.depthwise_conv2d, convolution, {"grid": (4, 5)}),
    ):
        halved = {n: t.bfloat16() if t.is_floating_point() else t.int() for n, t in arguments.items()}
        with torch.profiler.profile() as profile:
            function(**halved, **options)
        assert not {"aten::_to_copy", "aten::copy_"} & {event.key for event in profile.key_averages()}

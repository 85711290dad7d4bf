"""Describes the machine, and builds mamba-ssm's scan there."""

import argparse
import importlib.util
import platform
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from gpu_checking.report import Report
from hf_vssm_prune.kernels import available


BUILD_FOLDER = ".mamba_ssm_build"


def describe(options: argparse.Namespace, report: Report) -> None:
    report.say(f"Python {platform.python_version()}")
    for package in ("torch", "triton", "transformers", "accelerate", "mamba-ssm"):
        try:
            report.say(f"{package} {version(package)}")
        except PackageNotFoundError:
            report.say(f"{package}: not installed")
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        report.say(
            f"GPU: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
            f"{properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
        )
    for kernel, state in available().items():
        report.say(f"kernel {kernel}: {state}")


def start_building(options: argparse.Namespace) -> subprocess.Popen | None:
    """Starts building mamba-ssm's scan for this GPU, while the first parts run. None: there is nothing to build."""
    if options.mamba_ssm is None or shutil.which("nvcc") is None:
        return None
    command = [sys.executable, "-m", "gpu_checking.machine", str(options.mamba_ssm.resolve())]
    with (options.output_dir / "log.mamba-ssm build.txt").open("a", encoding="utf-8") as log:
        return subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=log, stderr=subprocess.STDOUT)


def build_mamba_ssm(source: Path) -> None:
    """Compiles `selective_scan_cuda` with the options of mamba-ssm's own setup.py, into a folder in its source."""
    from torch.utils.cpp_extension import load

    folder = source / BUILD_FOLDER
    folder.mkdir(exist_ok=True)
    sources = sorted((source / "csrc" / "selective_scan").glob("*.c*"))
    flags = ["-O3", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda"]  # PyTorch adds its -std
    flags += ["-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_OPERATORS__"]
    flags += ["-U__CUDA_NO_BFLOAT16_CONVERSIONS__", "-U__CUDA_NO_BFLOAT162_OPERATORS__"]
    load(
        "selective_scan_cuda",
        [str(file) for file in sources if file.suffix in (".cpp", ".cu")],
        extra_cflags=["-O3"],
        extra_cuda_cflags=flags,
        extra_include_paths=[str(source / "csrc" / "selective_scan")],
        build_directory=str(folder),
    )


def find_mamba_ssm(options: argparse.Namespace) -> str | None:
    """Makes the scan of the built mamba-ssm importable. Returns why there is none, or None if there is one.

    The package's own `__init__` is skipped, because it imports language models, which need more than the scan does.
    """
    if options.mamba_ssm is None:
        return "mamba-ssm was not given (--mamba_ssm)"
    folder = options.mamba_ssm / BUILD_FOLDER
    if not list(folder.glob("selective_scan_cuda*.so")):
        return "mamba-ssm's scan is not built (log.mamba-ssm build.txt)"
    sys.path.insert(0, str(folder))
    spec = ModuleSpec("mamba_ssm", None, is_package=True)
    spec.submodule_search_locations = [str(options.mamba_ssm / "mamba_ssm")]
    sys.modules.setdefault("mamba_ssm", importlib.util.module_from_spec(spec))
    return None


if __name__ == "__main__":
    build_mamba_ssm(Path(sys.argv[1]))

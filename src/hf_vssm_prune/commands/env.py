"""Prints what a bug report needs: versions, kernels and the machine.

hf-vssm-prune env
"""

import argparse
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hf_vssm_prune import __version__
from hf_vssm_prune.commands.parsing import command_parser
from hf_vssm_prune.kernels import available


LIBRARIES = (
    *("torch", "transformers", "huggingface-hub", "safetensors", "numpy", "pillow", "accelerate", "datasets"),
    *("av", "evaluate", "peft", "timm", "torchvision", "triton", "mamba-ssm", "onnx", "onnxruntime", "gradio"),
)
# Only these variables, because the values of others may be secret.
VARIABLES = ("HF_VSSM_PRUNE_", "OMP_", "GOMP_", "KMP_", "HF_HUB_OFFLINE", "ATEN_CPU_CAPABILITY", "CXX")


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    return command_parser(__doc__, prog)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    make_parser(prog).parse_args(arguments)
    rows = report()
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0


def report() -> dict[str, str]:
    """Names and values of everything that is installed, detected and set."""
    rows = {"hf_vssm_prune": __version__, "Python": platform.python_version(), "platform": platform.platform()}
    rows |= {"processor": processor(), "CPU capability": torch.backends.cpu.get_cpu_capability()}
    rows |= {"threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores"}
    rows |= {f"GPU {i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())} or {"GPU": "none"}
    rows |= {name: installed_version(name) for name in LIBRARIES}
    rows |= {f"kernel {name}": status for name, status in available().items()}
    rows |= {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    return rows


def installed_version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The processor's name according to Linux, or otherwise to Python."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

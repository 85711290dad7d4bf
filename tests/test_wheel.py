"""A wheel with compiled kernels runs them without a compiler; a wheel without them works on any platform."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import PATIENCE

from hf_vssm_prune.commands import VERBS
from hf_vssm_prune.kernels import build
from hf_vssm_prune.metrics import METRICS


ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("hatchling")
try:
    build.find_compiler()
except build.BuildError as error:
    pytest.skip(str(error), allow_module_level=True)
if platform.system() != "Linux":
    pytest.skip("the kernels are compiled on Linux only", allow_module_level=True)


def build_wheel(directory: Path, prebuilt: str) -> Path:
    """Compiles kernels with -O1, in half the time; the allowed instructions are the same."""
    compiler = directory / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {shlex.join(build.find_compiler())} "$@" -O1\n')
    compiler.chmod(0o755)
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(directory)]
    environment = {**os.environ, "HF_VSSM_PRUNE_PREBUILT": prebuilt, "CXX": shlex.quote(str(compiler))}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=PATIENCE)
    (wheel,) = directory.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only the package, from a wheel with compiled kernels."""
    wheel = build_wheel(tmp_path_factory.mktemp("wheel"), "1")
    assert wheel.stem.endswith("-py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_"))
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*command, str(wheel)], check=True, timeout=PATIENCE)
    return folder


# Which library the process has loaded is read from the system, not asked of the package.
PROGRAM = """
import torch
import hf_vssm_prune
from hf_vssm_prune.kernels import available
from hf_vssm_prune.selective_scan import selective_scan

print(hf_vssm_prune.__file__)
assert available()["cpu (cpu)"] == "available", available()
rows, states, channels = torch.randn(3, 2, 9, 16), torch.randn(2, 2, 9, 4), torch.rand(2, 16)
arguments = (rows[0], rows[1], -torch.rand(16, 4), *states, *channels, rows[2])
torch.testing.assert_close(
    selective_scan(*arguments, backend="cpu"), selective_scan(*arguments, backend="torch"), rtol=1e-5, atol=1e-5
)
print(*{line.rstrip().split(maxsplit=5)[-1] for line in open("/proc/self/maps") if "prebuilt" in line})
"""


@pytest.mark.parametrize("capability", ["default", None])
def test_prebuilt_kernels_run_without_a_compiler(capability: str | None, installed: Path, tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "ATEN_CPU_CAPABILITY")}
    environment |= {"PATH": str(tmp_path), "PYTHONPATH": str(installed), "HF_VSSM_PRUNE_CACHE": str(tmp_path / "cache")}
    if capability is not None:
        environment["ATEN_CPU_CAPABILITY"] = capability
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 0, result.stderr[-3000:]
    package, library = map(Path, result.stdout.splitlines())
    assert package.is_relative_to(installed)
    assert library.is_relative_to(installed / "hf_vssm_prune" / "kernels" / "prebuilt")
    variant = "baseline" if capability == "default" else build.best_variant()
    assert f"-{variant}-" in library.name
    assert not (tmp_path / "cache").exists(), "nothing was compiled"


@pytest.mark.skipif(not build.IS_X86 or shutil.which("objdump") is None, reason="needs objdump on an x86-64")
def test_baseline_runs_on_any_x86_64(installed: Path):
    """Instructions since AVX start with v; those of SSE3 to SSE4.2 are searched by name."""
    newer = re.compile(
        r"\t(v[a-z0-9]+|p?blendv?[a-z]+|dpp[sd]|round[sp][sd]|pmulld|haddp[sd]|pshufb|insertps|popcnt)\s"
    )

    def newer_instructions(variant: str) -> set[str]:
        (library,) = installed.glob(f"hf_vssm_prune/kernels/prebuilt/*-{variant}-*.so")
        command = ["objdump", "--disassemble", "--no-show-raw-insn", str(library)]
        return set(newer.findall(subprocess.run(command, capture_output=True, text=True, check=True).stdout))

    assert not newer_instructions("baseline")
    assert newer_instructions("avx2"), "the search finds them where they are"


def test_plain_wheel_is_for_any_platform(tmp_path: Path):
    wheel = build_wheel(tmp_path, "0")
    assert wheel.stem.endswith("-py3-none-any")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert "hf_vssm_prune/kernels/csrc/selective_scan.cpp" in names, "to be compiled at the first use"
    assert {f"hf_vssm_prune/commands/{verb}.py" for verb in VERBS} <= set(names)
    assert {f"hf_vssm_prune/metrics/{name}/{name}.py" for name in METRICS} <= set(names)
    assert {f"hf_vssm_prune/recipes/{file.name}" for file in (ROOT / "recipes").iterdir()} <= set(names)
    assert wheel.stat().st_size < 25e6
    # The terms of ImageNet's photographs do not allow to pass them on.
    of_imagenette = [name for name in names if re.search("imagenette|n0[0-9]{7}", name.lower())]
    assert all(re.fullmatch(r"hf_vssm_prune/recipes/[a-z0-9_]+\.yaml", name) for name in of_imagenette), of_imagenette
    data = [name for name in names if name.endswith((".safetensors", ".parquet"))]
    assert data
    assert all("trashnet" in name for name in data), data
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert b"hf-vssm-prune = hf_vssm_prune.__main__:main" in zipfile.ZipFile(wheel).read(entry_points)

"""Adds compiled CPU kernels to the wheel if the environment variable HF_VSSM_PRUNE_PREBUILT is 1.

Such a wheel is for one platform and can be used without a compiler. Without the variable, the wheel is for all
platforms, and the kernels are compiled on first use.
"""

import importlib.util
import shutil
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PrebuiltKernelsHook(BuildHookInterface):
    directory: Path | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        package = Path(self.root) / "src" / "hf_vssm_prune"
        if version == "editable" or not load(package / "environment.py").is_switched_on("HF_VSSM_PRUNE_PREBUILT"):
            return
        self.directory = Path(tempfile.mkdtemp())
        try:
            load(package / "kernels" / "build.py").build_prebuilt(self.directory)
        except BaseException:
            shutil.rmtree(self.directory)  # without a wheel, `finalize` is not called
            raise
        for file in self.directory.iterdir():  # libraries and their checksums
            build_data["force_include"][str(file)] = f"hf_vssm_prune/kernels/prebuilt/{file.name}"
        platform_tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform_tag}"
        build_data["pure_python"] = False

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self.directory is not None:
            shutil.rmtree(self.directory)


def load(file: Path) -> ModuleType:
    """Loads a module on its own: importing its package would need torch, which is not installed where wheels are
    built."""
    spec = importlib.util.spec_from_file_location(f"build_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""transformers' own model tests, from the source distribution of the installed version.

transformers' wheel does not contain them, and they are not copied into this repository. They are downloaded once per
version of transformers into the user's cache, as a package with another name.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import transformers
from filelock import FileLock


PACKAGE = "transformers_tests"
MODULES = ("test_modeling_common", "test_configuration_common", "test_backbone_common")
# Those modules import these, which the source distribution does not hold. They are about text generation and about
# exporters; the last lists the arguments of configurations that a test sets, and none are left of them.
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}
DOWNLOAD_SECONDS = 300


class SuiteUnavailable(Exception):
    """The source distribution is not in the cache and cannot be downloaded."""


def import_suite(module: str) -> ModuleType:
    """Imports one of `MODULES`, after downloading it if it is not cached.

    Raises:
        SuiteUnavailable: the download failed; the message says how.
    """
    folder = str(fetch_suite())
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(f"{PACKAGE}.{module}")


def fetch_suite() -> Path:
    """The folder that contains the package. If several processes call this at once, only one downloads it."""
    cache = cache_folder()
    folder = cache / f"transformers-{transformers.__version__}-tests"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                unpacked = Path(scratch) / folder.name
                unpack(download(Path(scratch)), unpacked / PACKAGE)
                os.replace(unpacked, folder)
    return folder


def cache_folder() -> Path:
    """The user's cache folder.

    Raises:
        SuiteUnavailable: there is no home folder, or no permission to write to it.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_vssm_prune"
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except (OSError, RuntimeError) as error:
        raise SuiteUnavailable(f"no cache for transformers' own tests ({error}); set XDG_CACHE_HOME") from error


def download(folder: Path) -> Path:
    """Downloads the source distribution of the installed transformers with pip."""
    options = ["--quiet", "--retries", "1", "--no-binary", ":all:", "--no-deps", "--dest", str(folder)]
    requirement = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise SuiteUnavailable(f"no source distribution of {requirement} after {DOWNLOAD_SECONDS} seconds") from error
    except subprocess.CalledProcessError as error:
        raise SuiteUnavailable(f"no source distribution of {requirement}: {error.stderr.strip()}") from error
    return next(folder.glob("transformers-*.tar.gz"))


def unpack(archive: Path, package: Path) -> None:
    """Writes the modules, and stubs for the other tests that they import."""
    root = archive.name.removesuffix(".tar.gz")
    files = dict(STUBS)
    with tarfile.open(archive) as tar:
        for module in MODULES:
            files[f"{module}.py"] = tar.extractfile(f"{root}/tests/{module}.py").read().decode()
    for name, text in files.items():
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(text, encoding="utf-8")

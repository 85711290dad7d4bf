"""Compiles the C++ kernels in `csrc/` on first use and caches them, or finds them precompiled in the package.

`python -m hf_vssm_prune.kernels.build` adds a precompiled library for every variant to the package. With the
environment variable HF_VSSM_PRUNE_PREBUILT=1, wheels include them (`hatch_build.py`, which imports this file where
neither torch nor any other dependency is installed).

Each library has a checksum next to it. Loading a truncated or modified library would end the process or crash later, so
it is not loaded but compiled again.
"""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path


SOURCE_DIRECTORY = Path(__file__).parent / "csrc"
PREBUILT_DIRECTORY = Path(__file__).parent / "prebuilt"

# No -ffast-math: it would break the range reduction of exp2 and the handling of NaN.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-fPIC", "-shared", "-pthread")

IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

# The instruction sets for which a library is compiled. `baseline` is supported by all processors of the architecture.
VARIANTS: dict[str, tuple[str, ...]] = {
    "avx512": ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
    "baseline": (),
}


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says why and what would help."""


def library_path() -> Path:
    """The complete library for this machine, compiled if it does not exist yet.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    from filelock import FileLock

    variant = best_variant()
    prebuilt = PREBUILT_DIRECTORY / _prebuilt_name(variant)
    if is_whole(prebuilt, variant):
        return prebuilt
    compiler = find_compiler()
    path = _cache_directory() / _digest(_sources(), *compiler, _version(compiler), variant) / "kernels.so"
    if is_whole(path, variant):  # without the lock, for a folder that only others may write to
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not is_whole(path, variant):
                compile_library(compiler, variant, path)
    except (OSError, NotImplementedError) as error:  # the latter from older filelock, if files cannot be locked there
        raise BuildError(
            f"the kernels' cache {path.parent} cannot be used ({error}); set HF_VSSM_PRUNE_CACHE"
        ) from error
    return path


def is_whole(library: Path, variant: str) -> bool:
    """Whether a file is a complete library of these sources for `variant`, exactly as it was compiled. Takes 0.3 ms."""
    try:
        return _checksum_file(library).read_bytes() == _checksum(library, variant)
    except OSError:
        return False


def best_variant() -> str:
    """The variant with the widest instructions that this machine's processor supports."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability().lower()
    return capability if capability in VARIANTS else "baseline"


def find_compiler() -> list[str]:
    """The command of the C++ compiler: the first of `$CXX`, g++ and clang++ that exists."""
    variable = os.environ.get("CXX", "")
    try:
        named = [variable] if shutil.which(variable) else shlex.split(variable)  # a path may have spaces and quotes
    except ValueError as error:
        raise BuildError(f"CXX is not a command: {error}") from error
    candidates = [named, ["g++"], ["clang++"]]
    for command in candidates:
        if command and shutil.which(command[0]):
            return command
    raise BuildError("no C++ compiler was found; install g++ or clang++, or set CXX to one")


def compile_library(compiler: list[str], variant: str, path: Path) -> None:
    """Compiles `csrc/` for `variant` to `path`, which appears only when it is complete, and then writes its
    checksum."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary_checksum = _checksum_file(temporary)
    sources = [str(source) for source in sorted(SOURCE_DIRECTORY.glob("*.cpp"))]
    command = [*compiler, *FLAGS, *_instruction_sets(variant), *sources, "-o", str(temporary)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if result.returncode:
            raise BuildError(f"compiling the kernels failed ({shlex.join(command)}):\n{result.stderr[-2000:]}")
        temporary_checksum.write_bytes(_checksum(temporary, variant))
        os.replace(temporary, path)
        os.replace(temporary_checksum, _checksum_file(path))
    finally:
        temporary.unlink(missing_ok=True)
        temporary_checksum.unlink(missing_ok=True)


def build_prebuilt(directory: Path) -> list[Path]:
    """Compiles every variant of this architecture into `directory`, whose earlier contents are removed.

    Returns:
        The libraries. Their checksums are next to them.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    paths = []
    for variant in VARIANTS if IS_X86 else ("baseline",):
        paths.append(directory / _prebuilt_name(variant))
        compile_library(find_compiler(), variant, paths[-1])
    return paths


def _instruction_sets(variant: str) -> tuple[str, ...]:
    """The compiler's options for a variant. Some distributions' compilers assume newer processors unless they are told
    the oldest."""
    return ("-march=x86-64", *VARIANTS[variant]) if IS_X86 else VARIANTS[variant]


def _prebuilt_name(variant: str) -> str:
    """Contains a digest of the sources, so that a library compiled from other sources is not used."""
    return f"{platform.system().lower()}-{platform.machine().lower()}-{variant}-{_digest(_sources())}.so"


def _cache_directory() -> Path:
    root = os.environ.get("HF_VSSM_PRUNE_CACHE")
    try:
        return Path(root or Path("~", ".cache", "hf_vssm_prune")).expanduser() / "kernels"
    except RuntimeError as error:  # the user has no home folder
        raise BuildError(f"no folder is available for the kernels' cache ({error}); set HF_VSSM_PRUNE_CACHE") from error


@functools.cache
def _sources() -> str:
    files = sorted(path for path in SOURCE_DIRECTORY.iterdir() if path.suffix in (".cpp", ".h"))
    return "".join(path.name + path.read_text(encoding="utf-8") for path in files)


def _checksum_file(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _checksum(library: Path, variant: str) -> bytes:
    """A checksum of the library and the sources that it was compiled from, so that another version's library is not
    used."""
    return hashlib.sha256(_digest(_sources(), variant).encode() + library.read_bytes()).hexdigest().encode()


def _version(compiler: list[str]) -> str:
    command = [*compiler, "--version"]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False).stdout


def _digest(*parts: str) -> str:
    text = "\0".join((*parts, *FLAGS, *map(str, map(_instruction_sets, VARIANTS)), platform.machine()))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]  # CXX may be any bytes


if __name__ == "__main__":
    for library in build_prebuilt(PREBUILT_DIRECTORY):
        print(library)

"""How the process was started, and its environment variables: switches, and variables that must be set before torch is
loaded.

This module imports only the standard library: it is used when wheels are built, where nothing else is installed, and
before torch is loaded.
"""

import os
import sys
from pathlib import Path


PROGRAM = "hf-vssm-prune"
OFF = ("", "0", "false", "f", "no", "n", "off")

# Variables with which users set how idle threads wait.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# By default, an idle thread spins for at least a hundred thousand iterations; if another process needs the core, both
# become slower. With these values, threads spin briefly and then sleep. GNU's runtime reads both variables and uses the
# second; other runtimes read the first.
PATIENT_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


def is_switched_on(variable: str) -> bool:
    """Whether an environment variable is set to anything other than an empty string, 0, false, no or off (in any
    case)."""
    return os.environ.get(variable, "").strip().lower() not in OFF


def let_threads_wait() -> None:
    """Makes idle threads sleep early, in this process and the processes that it starts, unless the user has set how
    they wait.

    Torch reads these variables when it is loaded; changing them later has no effect on this process.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ.update(PATIENT_THREADS)


def is_command() -> bool:
    """Whether this process was started to run one of this package's commands: `hf-vssm-prune`, `python -m
    hf_vssm_prune`, or a file in the repository's `scripts`."""
    package, started = Path(__file__).resolve().parent, Path(sys.argv[0])
    if sys.argv[0] == "-m":  # until Python has found the module, for which it imports this package
        return any(word.removeprefix("-m").partition(".")[0] == package.name for word in sys.orig_argv[1:])
    return started.stem == PROGRAM or started.resolve().parent == package.parents[1] / "scripts"


def command_line() -> list[str]:
    """The words that started this process, as a user would type them."""
    started, *words = sys.argv
    if Path(started).stem == PROGRAM or Path(started).parts[-2:] == ("hf_vssm_prune", "__main__.py"):
        return [PROGRAM, *words]
    return ["python", started, *words]

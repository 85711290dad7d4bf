"""Environment variables: switches, and what has to be set before torch is loaded.

Only Python's own modules are imported here: wheels are built where nothing is installed, and what torch reads when it
is loaded must be there before.
"""

import os
import sys
from pathlib import Path


OFF = ("", "0", "false", "f", "no", "n", "off")

# By these a person says how idle threads wait.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# By default a thread that has nothing to do spins, for as long as a loop of a hundred thousand turns and more, and on a
# machine where another process wants the core both lose. GNU's runtime reads both, of which the number counts, others
# the first: threads spin shortly, then sleep.
PATIENT_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


def is_switched_on(variable: str) -> bool:
    """Whether the environment variable is set to anything but nothing, 0, false, no or off, in whatever case."""
    return os.environ.get(variable, "").strip().lower() not in OFF


def let_threads_wait() -> None:
    """Has idle threads sleep soon, in this process and in those that it starts, unless the user has set how they wait.

    Torch's threads read it when torch is loaded: afterwards nothing changes in this process.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ.update(PATIENT_THREADS)


def is_command() -> bool:
    """Whether this process was started to run one of this package's commands: `hf-vssm-prune`, `python -m
    hf_vssm_prune`, or a file of the repository's `scripts`."""
    package, started = Path(__file__).resolve().parent, Path(sys.argv[0])
    if sys.argv[0] == "-m":  # until the module is found, and this package is imported for that
        return any(word.removeprefix("-m").partition(".")[0] == package.name for word in sys.orig_argv[1:])
    return started.stem == "hf-vssm-prune" or started.resolve().parent == package.parents[1] / "scripts"

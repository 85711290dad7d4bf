"""The machine on which Triton's kernels run."""

import os


# An H100 has 132 processors of four schedulers, and a scheduler needs about three warps to be busy.
PROGRAMS_THAT_FILL_A_GPU = 132 * 4 * 3


def is_interpreted() -> bool:
    """Whether kernels run on the CPU, slowly, for tests. There, an instruction takes as long for many channels as for
    few, and programs run one after another. Triton reads the variable when its modules are imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

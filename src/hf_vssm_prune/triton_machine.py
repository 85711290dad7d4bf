"""What Triton's kernels run on."""

import os


# An H100 has 132 processors of four schedulers, and a scheduler needs about three warps to be busy.
PROGRAMS_THAT_FILL_A_GPU = 132 * 4 * 3


def is_interpreted() -> bool:
    """Whether kernels run on the CPU, slowly, to be tested: an instruction takes as long for many channels as for few,
    and all programs one after another. Triton asks when its modules are imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

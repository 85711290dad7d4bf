"""To be imported before torch is loaded: idle threads sleep soon in place of spinning, unless the host has set how they
wait. A Space's cores are shared, and so is the machine of somebody who looks at the page."""

import os


# As `hf_vssm_prune.environment.PATIENT_THREADS`, which cannot be imported without torch.
if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}

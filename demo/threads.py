"""Import this before torch is loaded. It makes idle threads sleep early instead of spinning, unless the host has set
how they wait: a Space's cores are shared."""

import os


# Equal to `hf_vssm_prune.environment.PATIENT_THREADS`, which cannot be imported without torch.
if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}

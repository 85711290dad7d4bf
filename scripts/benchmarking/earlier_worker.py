"""A process of `earlier.py`, with the package of one checkout.

For each name of a model that it reads, it runs a forward pass in plain PyTorch and prints its CPU time in seconds.
"""

import sys
import time

import torch

from hf_vssm_prune import PlainMambaConfig, PlainMambaForImageClassification


def main(preset: str, flops_reduction: float, method: str, batch: int, threads: int) -> None:
    torch.set_num_threads(threads)
    schedules = {"dense": None, "pruned": {"flops_reduction": flops_reduction, "method": method}}
    models = {}
    for name, schedule in schedules.items():
        torch.manual_seed(0)
        config = PlainMambaConfig.from_preset(preset, token_pruning=schedule, scan_backend="torch")
        models[name] = PlainMambaForImageClassification(config).eval()
    side = config.image_size
    images = torch.randn(batch, config.num_channels, side, side)
    with torch.no_grad():
        for line in sys.stdin:
            before = time.process_time()
            models[line.strip()](images)
            print(time.process_time() - before, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))

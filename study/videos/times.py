"""Measures clips a second of a dense video model and of its pruned forms, in turns, by CPU time on one thread.

    python study/videos/times.py <dense> times.json --flops_reduction 0.416

CPU time hardly depends on other programs. The pixel values are random: they do not change what is computed.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hf_vssm_prune.hub.loading import load_classifier


METHODS: dict[str, dict[str, Any]] = {
    "local_merge (default)": {"method": "local_merge"},
    "top (the paper's method)": {"method": "top"},
    "top, alignment none": {"method": "top", "alignment": "none"},
    "r_meeto": {"method": "r_meeto"},
    "state_merge": {"method": "state_merge"},
}


@torch.no_grad()
def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    model = load_classifier(options.model).eval()
    clips = torch.randn(model.config.pixel_values_shape(options.batch_size))
    schedules: dict[str, dict[str, Any] | None] = {"dense": None}
    schedules |= {name: {"flops_reduction": options.flops_reduction, **method} for name, method in METHODS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in schedules}
    for turn in range(options.turns + 1):
        for name, schedule in schedules.items():
            model.set_token_pruning(schedule)
            start = time.process_time()
            model(clips)
            if turn:  # the first one warms up
                seconds[name].append(time.process_time() - start)
    results = {
        name: {
            "clips_per_second": round(options.batch_size / min(times), 1),
            "median_clips_per_second": round(options.batch_size / median(times), 1),
            "times_as_fast": round(min(seconds["dense"]) / min(times), 2),
            "median_times_as_fast": round(median(a / b for a, b in zip(seconds["dense"], times, strict=True)), 2),
        }
        for name, times in seconds.items()
    }
    Path(options.results).write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("results", help="JSON file to write")
    parser.add_argument("--flops_reduction", type=float, default=0.416)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=12)
    return parser.parse_args()


if __name__ == "__main__":
    main()

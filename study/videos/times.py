"""Measures the clips per second of a dense video model and its pruned variants, interleaved, by CPU time on one thread.

    python study/videos/times.py <dense> times.json --flops_reduction 0.416

CPU time hardly depends on other programs. The pixel values are random: they do not change what is computed.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the study is not part of the package

from hf_vssm_prune.hub.loading import load_classifier
from hf_vssm_prune.training.arguments.parsing import count
from hf_vssm_prune.training.atomic_files import write_json
from study.times import run_alternately


METHODS: dict[str, dict[str, Any]] = {
    "local_merge (default)": {"method": "local_merge"},
    "top (the paper's method)": {"method": "top"},
    "top, alignment none": {"method": "top", "alignment": "none"},
    "r_meeto": {"method": "r_meeto"},
    "state_merge": {"method": "state_merge"},
}


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    model = load_classifier(options.model).eval()
    clips = torch.randn(model.config.pixel_values_shape(options.batch_size))
    cases = {"dense": partial(model, clips, token_pruning=None)}
    for name, method in METHODS.items():
        schedule = model.config.complete_token_pruning({"flops_reduction": options.flops_reduction, **method})
        cases[name] = partial(model, clips, token_pruning=schedule)
    seconds = run_alternately(cases, options.turns)
    results = {
        name: {
            "clips_per_second": round(options.batch_size / min(times), 1),
            "median_clips_per_second": round(options.batch_size / median(times), 1),
            "times_as_fast": round(min(seconds["dense"]) / min(times), 2),
            "median_times_as_fast": round(median(a / b for a, b in zip(seconds["dense"], times, strict=True)), 2),
        }
        for name, times in seconds.items()
    }
    write_json(results, Path(options.results))
    print(json.dumps(results, indent=1))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("results", help="JSON file to write")
    parser.add_argument("--flops_reduction", type=float, default=0.416)
    parser.add_argument("--batch_size", type=count, default=8)
    parser.add_argument("--turns", type=count, default=12)
    return parser.parse_args()


if __name__ == "__main__":
    main()

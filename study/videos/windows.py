"""Compares windows of the methods that choose tokens window by window, on a dense video model without training.

    python study/videos/windows.py <videos by class> <dense> windows.json --windows 2x2x2 1x2x2 2x1x1 1x3x3

A window is frames x rows x columns of tokens. Models have no option for it, so this script replaces the function from
which `local_top` and `local_merge` get it.
"""

import argparse
from functools import partial
from pathlib import Path

from hf_vssm_prune import grid_windows
from hf_vssm_prune.training import jobs
from hf_vssm_prune.training.arguments import EvaluationArguments, EvaluationDataArguments
from hf_vssm_prune.training.atomic_files import write_json
from hf_vssm_prune.training.tasks.video_classification import VideoClassification, ViewArguments


METHODS = ("local_top", "local_merge")


def main() -> None:
    options = parse_options()
    task = VideoClassification(ViewArguments(frame_sampling="segments"))
    data = EvaluationDataArguments(options.videos)
    evaluation = EvaluationArguments(model_name_or_path=options.model, device="cpu")
    schedules = {
        f"{method} at {reduction:.1%}": {"method": method, "flops_reduction": reduction}
        for method in METHODS
        for reduction in options.flops_reductions
    }
    results = {}
    for name in options.windows:
        grid_windows.default_window = partial(_window, tuple(int(side) for side in name.split("x")))
        for schedule, result in jobs.compare_schedules(data, evaluation, schedules, task).items():
            metrics = {metric: round(result.metrics[metric], 4) for metric in ("top1", "loss")}
            results[f"{schedule}, {name}" if schedule != "dense" else "dense"] = metrics
        write_json(results, Path(options.results))
    for name, metrics in results.items():
        print(f"{name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items()))


def _window(sides: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...]:
    return sides


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos")
    parser.add_argument("model")
    parser.add_argument("results", help="JSON file to write")
    parser.add_argument("--windows", nargs="+", default=["2x2x2", "1x2x2", "2x1x1", "1x3x3"])
    parser.add_argument("--flops_reductions", nargs="+", type=float, default=[0.2, 0.3, 0.416, 0.6])
    return parser.parse_args()


if __name__ == "__main__":
    main()

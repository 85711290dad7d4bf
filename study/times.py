"""Measures how long the models of a study take, dense, pruned and smaller, relative to the dense model.

One model for each family, with the weights from which the study starts, runs with all schedules and image sizes in
turn, in a random order, on one thread and with the same batch of photographs. (Copies of a model are not equally fast:
it depends on where their weights are in memory.) A time is the shortest CPU time. The report uses the result,
`times.json` in the folder of the results, in place of the speeds of the individual pieces, which other programs may
have disturbed. The two variables keep freed memory, without which the results of some cases differ from run to run:

    MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 \\
        python study/times.py --study recipes/study_photos.yaml --output study/photos/times.json
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the study is not part of the package

from hf_vssm_prune.training.arguments.parsing import check_output_file, count
from hf_vssm_prune.training.atomic_files import write_json
from hf_vssm_prune.training.data import load_evaluation_dataset
from study.plan import Study, list_pieces, read_study, smaller_name, with_method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True, help="YAML file of the study")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    parser.add_argument("--turns", type=count, default=8, help="number of times that each model runs")
    parser.add_argument("--batch_size", type=count, default=8)
    options = parser.parse_args()
    try:
        check_output_file("output", options.output)
        study = read_study(options.study)
        check_study(study)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    rows, _ = load_evaluation_dataset("trashnet", max_samples=options.batch_size)
    photographs = [Image.open(BytesIO(row["image"]["bytes"])) for row in rows]
    shares = {}
    for family, of_family in study.families.items():
        folder = of_family["model_name_or_path"]
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        processor = AutoImageProcessor.from_pretrained(folder)
        cases = make_cases(study, family, model, processor(photographs, return_tensors="pt")["pixel_values"])
        seconds = {name: min(times) for name, times in run_alternately(cases, options.turns).items()}
        shares[family] = {name: round(taken / seconds["dense"], 4) for name, taken in seconds.items()}
    write_json(shares, options.output)


def check_study(study: Study) -> None:
    """
    Raises:
        ValueError: the models would not be those of the study, or not at its image size.
    """
    if new := [name for name, options in study.families.items() if "model_name_or_path" not in options]:
        raise ValueError(f"--study has no weights for {', '.join(new)}: only models that start from some are measured.")
    if resized := [name for name, options in study.datasets.items() if "image_size" in options["dense"]]:
        raise ValueError(
            f"--study trains with another image size on {', '.join(resized)}: only models of one size are measured."
        )


def make_cases(study: Study, family: str, model: Any, pixel_values: Tensor) -> dict[str, Callable[[], object]]:
    """Forward passes of the dense model, and by the names of the report, of the pruned ones and the smaller ones."""
    untrained = next(piece for piece in list_pieces(study) if (piece.family, piece.name) == (family, "untrained"))
    cases: dict[str, Callable[[], object]] = {"dense": partial(model, pixel_values, token_pruning=None)}
    for name, schedule in untrained.options["schedules"].items():
        # Finds the schedule of the budget, and creates what it needs. Without a method, it would be the previous one's.
        model.set_token_pruning(with_method(schedule))
        cases[name] = partial(model, pixel_values, token_pruning=model.config.token_pruning)
    for name, options in study.smaller_models(family).items():
        own = options.get("model_name_or_path")
        smaller = AutoModelForImageClassification.from_pretrained(own).eval() if own else model
        size = options.get("image_size", pixel_values.shape[-1])
        resized = F.interpolate(pixel_values, size, mode="bilinear", antialias=True)
        cases[smaller_name(name)] = partial(smaller, resized, token_pruning=None, interpolate_pos_encoding=True)
    return cases


@torch.inference_mode()
def run_alternately(cases: Mapping[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """The CPU times of each case in seconds, one for each turn after the first, which is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in tqdm(range(turns + 1), unit="turn"):
        for name in random.sample([*cases], len(cases)):
            start = time.process_time()
            cases[name]()
            if turn:
                seconds[name].append(time.process_time() - start)
    return seconds


if __name__ == "__main__":
    main()

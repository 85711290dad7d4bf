"""Measures how long the models of a study take, dense, pruned and smaller, relative to the dense model.

The times do not depend on what the weights are, so they are random, and one batch of random pixels is used. All models
run alternately on one thread; the time of a model is its shortest CPU time. The report uses the result, `times.json` in
the folder of the results, in place of the speeds of the individual pieces, which other programs may have disturbed.

    python study/times.py --study recipes/study_photos.yaml --output study/photos/times.json
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the study is not part of the package

import hf_vssm_prune  # noqa: F401 - registers the families
from study.plan import Study, list_pieces, read_study, smaller_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True, help="YAML file of the study")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    parser.add_argument("--turns", type=int, default=10, help="number of times that each model runs")
    parser.add_argument("--batch_size", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    study = read_study(options.study)
    shares = {}
    for family, of_family in study.families.items():
        config = AutoConfig.from_pretrained(of_family["model_name_or_path"])
        models = make_models(study, family, config)
        cases = {name: _case(model, options.batch_size) for name, model in models.items()}
        seconds = run_alternately(cases, options.turns)
        shares[family] = {name: round(taken / seconds["dense"], 4) for name, taken in seconds.items()}
    options.output.write_text(json.dumps(shares, indent=1) + "\n")


def make_models(study: Study, family: str, config: PreTrainedConfig) -> dict[str, nn.Module]:
    """The dense model, and by the names of the report, the pruned ones and the smaller ones."""
    untrained = next(piece for piece in list_pieces(study) if (piece.family, piece.name) == (family, "untrained"))
    models = {"dense": _make(config)}
    for name, schedule in untrained.options["schedules"].items():
        models[name] = _make(config)
        models[name].set_token_pruning(schedule)
    for name, changes in study.smaller.items():
        models[smaller_name(name)] = _make(config, **changes)
    return models


def _make(config: PreTrainedConfig, **changes: Any) -> Any:
    changed = type(config).from_dict({**config.to_dict(), **changes})
    return AutoModelForImageClassification.from_config(changed).eval()


def _case(model: Any, batch_size: int) -> Callable[[], object]:
    pixel_values = torch.randn(model.config.pixel_values_shape(batch_size))
    return torch.inference_mode()(lambda: model(pixel_values=pixel_values))


def run_alternately(cases: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """The shortest CPU time of each case in seconds; the first turn is a warm-up."""
    seconds = dict.fromkeys(cases, float("inf"))
    for turn in tqdm(range(turns + 1), unit="turn"):
        for name, case in cases.items():
            start = time.process_time()
            case()
            if turn:
                seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds


if __name__ == "__main__":
    main()

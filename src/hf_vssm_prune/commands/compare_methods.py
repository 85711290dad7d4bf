"""Prunes a model with every method to the same budget, without training, and compares each with the dense model.

    hf-vssm-prune compare_methods --model_name_or_path <checkpoint> --dataset_name <Hub data set or folder>

--schedules compares `token_pruning` options from a JSON file instead. `dyvm` has its own parameters, which are
untrained here: it drops whole regions and loses more than a random choice.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_vssm_prune.publication import TOP_REDUCTION
from hf_vssm_prune.training import jobs
from hf_vssm_prune.training.arguments import EvaluationArguments, EvaluationDataArguments, OptionParser, parse_arguments
from hf_vssm_prune.training.arguments.parsing import exclude
from hf_vssm_prune.training.evaluation import ModelEvaluation
from hf_vssm_prune.training.tasks import Task, TaskArguments, choose_task


@dataclass
class ComparisonArguments:
    """Schedules to compare with the dense model."""

    _argument_group_name = "comparison"

    flops_reduction: float | None = field(
        default=None, metadata={"help": f"fraction of FLOPs that every method removes; by default {TOP_REDUCTION}"}
    )
    schedules: str | None = field(
        default=None, metadata={"help": "JSON file of `token_pruning` options by name, instead of all methods"}
    )

    def __post_init__(self) -> None:
        exclude("schedules", self.schedules, "flops_reduction", self.flops_reduction)

    def read_schedules(self, name_or_path: str) -> dict[str, dict[str, Any]]:
        """The schedules for a model."""
        if self.schedules is None:
            reduction = TOP_REDUCTION if self.flops_reduction is None else self.flops_reduction
            return jobs.method_schedules(name_or_path, reduction)
        try:
            content = json.loads(Path(self.schedules).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"--schedules {self.schedules} cannot be read: {error}") from error
        if not isinstance(content, dict) or not all(isinstance(each, dict) for each in content.values()):
            raise ValueError(f"--schedules {self.schedules} does not map names to `token_pruning` options.")
        if "dense" in content:
            raise ValueError(f"--schedules {self.schedules} names 'dense', which is the model without pruning.")
        return content


def option_types(task: type[Task]) -> list[Any]:
    return [
        TaskArguments,
        EvaluationDataArguments,
        EvaluationArguments,
        ComparisonArguments,
        task.evaluation_arguments,
    ]


def make_parser(prog: str | None = None) -> OptionParser:
    return OptionParser(option_types(choose_task([])), __doc__, prog)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    chosen = choose_task(arguments)
    _, data, options, comparison, of_task = parse_arguments(option_types(chosen), arguments, __doc__, prog)
    task = chosen(of_task)

    def compare() -> dict[str, ModelEvaluation]:
        schedules = comparison.read_schedules(options.model_name_or_path)
        return jobs.compare_schedules(data, options, schedules, task)

    return jobs.report(compare, options, task)

"""The tasks that can be trained, evaluated and estimated. Each is defined in its own file (see `task.Task`) and listed
here."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from hf_vssm_prune.training.recipes import read_recipe
from hf_vssm_prune.training.tasks.classification import ImageClassification
from hf_vssm_prune.training.tasks.object_detection import ObjectDetection
from hf_vssm_prune.training.tasks.semantic_segmentation import SemanticSegmentation
from hf_vssm_prune.training.tasks.task import Task
from hf_vssm_prune.training.tasks.video_classification import VideoClassification


TASKS: dict[str, type[Task]] = {
    task.name: task for task in (ImageClassification, ObjectDetection, SemanticSegmentation, VideoClassification)
}
DEFAULT_TASK = ImageClassification.name


@dataclass
class TaskArguments:
    """The task. Each task has its own options."""

    _argument_group_name = "task"

    # The table itself, so that tasks added to it later are allowed, too.
    task: str = field(
        default=DEFAULT_TASK, metadata={"help": "the task to train, evaluate or estimate", "choices": TASKS}
    )


def default_task() -> Task:
    """Image classification."""
    return TASKS[DEFAULT_TASK](None)


def choose_task(arguments: Sequence[str] | None) -> type[Task]:
    """The task named on the command line or in its recipe. It must be known before the command line is parsed
    completely, because it determines the options. The parser itself rejects unknown tasks."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task")
    parser.add_argument("--recipe")
    given, _ = parser.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    name = given.task
    if name is None and given.recipe is not None:
        with suppress(ValueError):  # the recipe cannot be read
            name = read_recipe(given.recipe).get("task")
    return TASKS.get(name or DEFAULT_TASK, TASKS[DEFAULT_TASK])

"""The tasks that the tests of the loop's guarantees go through: those of the package, and the toy of the docs."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from hf_vssm_prune.training.tasks import TASKS
from hf_vssm_prune.training.tasks.classification import AugmentationArguments, ImageClassification
from hf_vssm_prune.training.tasks.task import Task


def load_toy() -> type[Task]:
    """The task that docs/extend.md shows."""
    file = Path(__file__).resolve().parents[1] / "docs" / "examples" / "mean_colour.py"
    spec = importlib.util.spec_from_file_location("mean_colour", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MeanColour


MeanColour = load_toy()
EVERY_TASK: dict[str, type[Task]] = {**TASKS, MeanColour.name: MeanColour}

PLAIN = {"no_random_crop": True, "hflip": 0.0, "randaugment_num_ops": 0, "reprob": 0.0}
UNMIXED = {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0}
# Each task with nothing random in its batches, and with as much as it has.
PLAIN_TASKS: dict[str, Callable[[], Task]] = {
    "image-classification": lambda: ImageClassification(AugmentationArguments(**PLAIN, **UNMIXED)),
    "mean-colour": MeanColour,
}
RANDOM_TASKS: dict[str, Callable[[], Task]] = {
    "image-classification": ImageClassification,
    "mean-colour": lambda: MeanColour(MeanColour.training_arguments(noise=0.1)),
}

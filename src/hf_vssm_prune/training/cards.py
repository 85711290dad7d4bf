"""The information in the model cards of a run that cannot be read from the model itself."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hf_vssm_prune.environment import command_line
from hf_vssm_prune.hub.loading import packaged_model
from hf_vssm_prune.hub.model_card import ModelCardInfo, TrainingRecipe
from hf_vssm_prune.training.arguments import DataArguments
from hf_vssm_prune.training.data.sources import PACKAGED_NAMES
from hf_vssm_prune.training.loop import Recipe
from hf_vssm_prune.training.paths import local_path
from hf_vssm_prune.training.saved_models import WriteCard


def card_writer(data: DataArguments, recipe: Recipe, base_model: str | None, pruned: bool) -> WriteCard:
    """Creates what a `Trainer` needs to write model cards: the command, the options, and the origin of the model."""
    options = {**asdict(recipe.optimization), **asdict(recipe.task.arguments), "seed": recipe.run.seed}
    if recipe.elastic.elastic_budgets:
        options |= asdict(recipe.elastic)
    if recipe.losses.needs_teacher:
        options |= asdict(recipe.losses)
    training = TrainingRecipe(
        command=shlex.join(map(_without_folders, command_line())),
        hyperparameters={
            name: _without_folders(value) if isinstance(value, str) else value
            for name, value in options.items()
            if value is not None
        },
    )
    datasets = datasets_on_hub([data.dataset_name])
    dataset_name = data.dataset_name if datasets else Path(data.dataset_name).absolute().name

    def write(metrics: dict[str, float], num_images: int) -> ModelCardInfo:
        return ModelCardInfo(
            name=(recipe.run.hub_model_id or Path(recipe.run.output_dir).absolute().name).split("/")[-1],
            model_id=recipe.run.hub_model_id,
            base_model=model_on_hub(base_model),
            datasets=datasets,
            training=training,
            evaluation=recipe.task.evaluation_on_card(
                metrics, num_images, dataset_name, data.eval_split or "evaluation", pruned
            ),
        )

    return write


def model_on_hub(name_or_path: str | None) -> str | None:
    """A base model for a card's metadata, which links to the Hub: None for a local folder and the package's own."""
    return None if name_or_path is None or local_path(packaged_model(name_or_path)).exists() else name_or_path


def datasets_on_hub(names: Sequence[str]) -> list[str]:
    """The same for data sets: those that are neither local nor the package's own."""
    return [name for name in names if not local_path(name).exists() and name not in PACKAGED_NAMES]


def _without_folders(word: str) -> str:
    """A word of the command line or an option's value; absolute paths are reduced to the file name, because cards are
    published."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = local_path(value)
    return f"{option}{equals}{path.name}" if path.is_absolute() else word

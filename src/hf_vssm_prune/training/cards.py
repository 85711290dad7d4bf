"""What the cards of a run's models say beside what a model itself tells."""

import shlex
from dataclasses import asdict
from pathlib import Path

from hf_vssm_prune.commands import command_line
from hf_vssm_prune.hub.model_card import ModelCardInfo, TrainingRecipe
from hf_vssm_prune.training.arguments import DataArguments
from hf_vssm_prune.training.loop import Recipe
from hf_vssm_prune.training.saved_models import WriteCard


def card_writer(data: DataArguments, recipe: Recipe, base_model: str | None, pruned: bool) -> WriteCard:
    """What a `Trainer` needs to write model cards: the command, the options, and where the model came from."""
    options = {**asdict(recipe.optimization), **asdict(recipe.task.arguments), "seed": recipe.run.seed}
    if recipe.elastic.elastic_budgets:
        options |= asdict(recipe.elastic)
    if recipe.losses.needs_teacher:
        options |= asdict(recipe.losses)
    training = TrainingRecipe(
        command=shlex.join(map(_without_folders, command_line())),
        hyperparameters={name: value for name, value in options.items() if value is not None},
    )
    # The card's metadata links to the Hub; what is a folder here is not there.
    dataset_on_hub = not Path(data.dataset_name).expanduser().exists()
    dataset_name = data.dataset_name if dataset_on_hub else Path(data.dataset_name).name
    if base_model is not None and Path(base_model).expanduser().exists():
        base_model = None

    def write(metrics: dict[str, float], num_images: int) -> ModelCardInfo:
        return ModelCardInfo(
            name=(recipe.run.hub_model_id or Path(recipe.run.output_dir).absolute().name).split("/")[-1],
            model_id=recipe.run.hub_model_id,
            base_model=base_model,
            datasets=[dataset_name] if dataset_on_hub else [],
            training=training,
            evaluation=recipe.task.evaluation_on_card(
                metrics, num_images, dataset_name, data.eval_split or "evaluation", pruned
            ),
        )

    return write


def _without_folders(word: str) -> str:
    """A word of the command line, of an absolute path the name alone: cards are published."""
    option, equals, value = word.rpartition("=")
    path = Path(value).expanduser()
    return f"{option}{equals}{path.name}" if path.is_absolute() else word

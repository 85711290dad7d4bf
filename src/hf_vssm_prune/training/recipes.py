"""Recipes: options of the training commands in a YAML file. Options on the command line override them."""

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_vssm_prune.training.paths import local_path


# A wheel contains the recipes in the package; in the repository (editable installation), they are next to `src`.
_PACKAGE = Path(__file__).resolve().parents[1]
PACKAGED_RECIPES = next(
    (folder for folder in (_PACKAGE / "recipes", _PACKAGE.parents[1] / "recipes") if folder.is_dir()), _PACKAGE
)
# Options of a recipe that an option on the command line removes in addition to the same option: those that cannot be
# combined with it, and those that belong to the replaced method.
SET_ASIDE = {
    "flops_reduction": ["keep_ratios"],
    "keep_ratios": ["flops_reduction"],
    "num_train_epochs": ["max_train_steps"],
    "num_warmup_steps": ["warmup_epochs"],
    "warmup_epochs": ["num_warmup_steps"],
    "no_random_crop": ["random_crop_padding", "scale"],
    "random_crop_padding": ["no_random_crop", "scale"],
    "scale": ["no_random_crop", "random_crop_padding"],
    "prune_method": ["prune_alignment", "importance"],
    "window": ["window_stride"],
    "model_name_or_path": ["family", "preset", "patch_size", "config_overrides", "image_mean", "image_std", "crop_pct"],
    "family": ["model_name_or_path"],
}


def insert_recipe(
    arguments: Sequence[str], options: Mapping[str, str], of_other_commands: Collection[str] = ()
) -> list[str]:
    """Replaces `--recipe FILE` with the options in the file, placed before all others so that those override them; see
    also `SET_ASIDE`.

    Args:
        arguments: arguments of the command line.
        options: options that the command knows: from each spelling, without dashes, to the name.
        of_other_commands: options that a recipe may have although the command has no use for them.

    Raises:
        ValueError: the file is missing, is not a YAML mapping, or has an option that the command does not know, or
            whose value is neither a number or text nor a list of them.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    given, rest = parser.parse_known_args(list(arguments))
    if given.recipe is None:
        return rest
    recipe = read_recipe(given.recipe)
    if unknown := sorted(set(recipe) - set(options) - set(of_other_commands)):
        raise ValueError(f"--recipe {given.recipe} has {unknown}, which are not options of this command; see --help.")
    for name, value in recipe.items():
        if any(isinstance(each, list | dict) for each in (value if isinstance(value, list) else [value])):
            raise ValueError(f"--recipe {given.recipe}: the value of {name} must be a number, text, or a list of them.")
    over = [options.get(word.removeprefix("--").partition("=")[0]) for word in rest if word.startswith("--")]
    aside = {name for option in over if option is not None for name in SET_ASIDE.get(option, [])}
    kept = {
        name: value
        for name, value in recipe.items()
        if value is not None and name in options and options[name] not in aside
    }
    return [word for name, value in kept.items() for word in _words(name, value)] + rest


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a recipe: a path, or the name of a recipe that comes with the package.

    Raises:
        ValueError: neither exists.
    """
    path = local_path(name_or_path)
    if path.is_file() or path.suffix or len(path.parts) > 1:
        return path
    file = PACKAGED_RECIPES / f"{name_or_path}.yaml"
    if not file.exists():
        names = ", ".join(sorted(each.stem for each in PACKAGED_RECIPES.glob("*.yaml")))
        raise ValueError(f"--recipe {name_or_path} is neither a file nor one of the package's recipes: {names}.")
    return file


def read_recipe(name_or_path: str | Path) -> dict[str, Any]:
    """The options in a recipe; see `find_recipe`.

    Raises:
        ValueError: the file is missing or not a YAML mapping.
    """
    file = find_recipe(name_or_path)
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--recipe {file} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"--recipe {file} does not map options to values.")
    return {str(name): value for name, value in recipe.items()}


def _words(name: str, value: Any) -> list[str]:
    return [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]

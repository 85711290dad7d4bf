"""Recipes: options of the training scripts in a YAML file, by name. The command line overrides them."""

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml


# What an option of the command line puts out of force in a recipe, beside the same option: what excludes it, and what
# belongs to the method that it replaces.
SET_ASIDE = {
    "flops_reduction": ["keep_ratios"],
    "keep_ratios": ["flops_reduction"],
    "num_warmup_steps": ["warmup_epochs"],
    "warmup_epochs": ["num_warmup_steps"],
    "no_random_crop": ["random_crop_padding"],
    "random_crop_padding": ["no_random_crop"],
    "prune_method": ["prune_alignment", "importance"],
}


def insert_recipe(arguments: Sequence[str], options: Collection[str]) -> list[str]:
    """Replaces `--recipe FILE` by the options in the file, before all others, so that those override them; see also
    `SET_ASIDE`.

    Args:
        arguments: of the command line.
        options: that the script knows, without dashes.

    Raises:
        ValueError: the file is missing or no YAML mapping, or has an option that the script does not know.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    given, rest = parser.parse_known_args(list(arguments))
    if given.recipe is None:
        return rest
    recipe = read_recipe(Path(given.recipe))
    if unknown := sorted(set(recipe) - set(options)):
        raise ValueError(f"--recipe {given.recipe} has {unknown}, which this script does not know; see --help.")
    over = [word.removeprefix("--").partition("=")[0] for word in rest if word.startswith("--")]
    aside = {name for option in over for name in SET_ASIDE.get(option, [])}
    kept = {name: value for name, value in recipe.items() if value is not None and name not in aside}
    return [word for name, value in kept.items() for word in _words(name, value)] + rest


def read_recipe(file: Path) -> dict[str, Any]:
    """The options in a recipe.

    Raises:
        ValueError: the file is missing or no YAML mapping.
    """
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--recipe {file} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"--recipe {file} is no mapping of options to values.")
    return {str(name): value for name, value in recipe.items()}


def _words(name: str, value: Any) -> list[str]:
    return [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]

"""Reads options from a command line and its recipe into dataclasses."""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_vssm_prune.training.arguments.help import OptionParser
from hf_vssm_prune.training.recipes import insert_recipe


MOST_SEED = 2**32 - 1  # NumPy's global generator accepts no more


def parse_arguments(
    dataclass_types: list[Any], arguments: Sequence[str] | None, description: str | None, prog: str | None = None
) -> tuple:
    """Parses a command line and its recipe into dataclasses. If there is a mistake, prints it and exits with status 2.
    For the arguments, see `OptionParser`."""
    parser = OptionParser(dataclass_types, description, prog)
    options = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    try:
        words = insert_recipe(sys.argv[1:] if arguments is None else arguments, options - {"recipe"})
        return parser.parse_args_into_dataclasses(words, look_for_args_file=False)[: len(dataclass_types)]
    except ValueError as error:
        parser.error(str(error))


def describe(text: str, *aliases: str, choices: Sequence[str] | None = None) -> dict[str, Any]:
    """The metadata of a field, in the form that `HfArgumentParser` reads."""
    metadata: dict[str, Any] = {"help": text, "aliases": list(aliases)}
    return metadata if choices is None else {**metadata, "choices": tuple(choices)}


def check_range(name: str, value: float | None, low: float, high: float, below: bool = False) -> None:
    """Raises an error for a value outside [low, high], or outside [low, high) if `below` is set."""
    if value is None or (low <= value < high if below else low <= value <= high):
        return
    if high == math.inf:
        raise ValueError(f"--{name} is {value}: it must be at least {low}.")
    raise ValueError(f"--{name} is {value}: it must be from {low} to {'less than ' if below else ''}{high}.")


def check_output_file(name: str, file: str | Path | None) -> None:
    """Raises an error for a file that cannot be written, so that this is noticed before the work and not after it."""
    if file is None:
        return
    if Path(file).is_dir():
        raise ValueError(f"--{name} {file} is a folder; it must be a file.")
    if not (folder := Path(file).absolute().parent).is_dir():
        raise ValueError(f"--{name} {file}: its folder does not exist.")
    if not os.access(file if Path(file).exists() else folder, os.W_OK):
        raise ValueError(f"--{name} {file} cannot be written: permission denied.")


def exclude(first: str, first_value: object, second: str, second_value: object) -> None:
    if first_value is not None and second_value is not None:
        raise ValueError(f"--{first} and --{second} cannot be combined: give one of them.")

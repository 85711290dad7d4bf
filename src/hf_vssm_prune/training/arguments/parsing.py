"""Reads options from a command line and its recipe into dataclasses."""

import argparse
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
    dataclass_types: list[Any],
    arguments: Sequence[str] | None,
    description: str | None,
    prog: str | None = None,
    of_other_commands: Sequence[Any] = (),
) -> tuple:
    """Parses a command line and its recipe into dataclasses. If there is a mistake, prints it and exits with status 2.

    Args:
        dataclass_types, description, prog: see `OptionParser`.
        arguments: the words of the command line; None: those of the process.
        of_other_commands: dataclasses whose options a recipe may have, although the command has no use for them.
    """
    parser = OptionParser(dataclass_types, description, prog)
    options = _spellings(parser)
    del options["recipe"]
    others = _spellings(OptionParser(of_other_commands, None)) if of_other_commands else {}
    try:
        words = insert_recipe(sys.argv[1:] if arguments is None else arguments, options, others)
        return parser.parse_args_into_dataclasses(words, look_for_args_file=False)[: len(dataclass_types)]
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _spellings(parser: OptionParser) -> dict[str, str]:
    """The options of a parser: from each spelling, without dashes, to the name."""
    return {option.removeprefix("--"): action.dest for action in parser._actions for option in action.option_strings}


def describe(text: str, *aliases: str, choices: Sequence[str] | None = None) -> dict[str, Any]:
    """The metadata of a field, in the form that `HfArgumentParser` reads."""
    metadata: dict[str, Any] = {"help": text, "aliases": list(aliases)}
    return metadata if choices is None else {**metadata, "choices": tuple(choices)}


def check_range(
    name: str, value: float | None, low: float, high: float, above: bool = False, below: bool = False
) -> None:
    """Raises an error for a value outside [low, high]. With `above`, low itself is not allowed; with `below`, high."""
    if value is None or ((low < value if above else low <= value) and (value < high if below else value <= high)):
        return
    if high == math.inf:
        allowed = f"{'greater than' if above else 'at least'} {low}"
    elif above:
        allowed = f"between {low} and {high}" if below else f"greater than {low} and at most {high}"
    else:
        allowed = f"from {low} to {'less than ' if below else ''}{high}"
    raise ValueError(f"--{name} is {value}: it must be {allowed}.")


def count(text: str) -> int:
    """The type of an option of a script, for `argparse`: a number of things, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


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


def check_output_folder(name: str, folder: str | Path) -> None:
    """The same for a folder, which is created if it does not exist.

    Raises:
        NotADirectoryError: the folder or one of its parents is a file.
        PermissionError: there is no permission to write there.
    """
    absolute = Path(folder).absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"--{name} {folder}: {existing} is a file.")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"--{name} {folder}: no permission to write to {existing}.")


def exclude(first: str, first_value: object, second: str, second_value: object) -> None:
    if first_value is not None and second_value is not None:
        raise ValueError(f"--{first} and --{second} cannot be combined: give one of them.")

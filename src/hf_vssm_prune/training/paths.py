"""Paths as users write them."""

import os
from collections.abc import Iterable
from pathlib import Path


def local_path(name_or_path: str | Path) -> Path:
    """The path that a name would have, with `~` replaced by a home folder.

    A `~name` that is nobody's home stays as it is, since it may be the name of a file or of a data set;
    `Path.expanduser` would raise a RuntimeError.
    """
    return Path(os.path.expanduser(name_or_path))


def expand_home(words: Iterable[str]) -> list[str]:
    """The words of a command line with `~` replaced as in `local_path`. A shell leaves it in `--option=~/folder`, and
    so does a recipe."""
    expanded = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        expanded.append(f"{option}{equals}{os.path.expanduser(value)}")
    return expanded

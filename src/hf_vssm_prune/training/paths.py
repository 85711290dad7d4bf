"""Paths as users write them."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def local_path(name_or_path: str | Path) -> Path:
    """The path that a name would have, with `~` replaced by a home folder.

    A `~name` that is nobody's home stays as it is, since it may be the name of a file or of a data set;
    `Path.expanduser` would raise a RuntimeError.
    """
    return Path(os.path.expanduser(name_or_path))


class PathParser(argparse.ArgumentParser):
    """A parser that replaces `~` in the words of a command line, as `local_path` does. A shell leaves it in
    `--option=~/folder`, and so does a recipe."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_expand_home(word) for word in words], namespace)


def _expand_home(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{os.path.expanduser(value)}"

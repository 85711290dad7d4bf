"""The parser of a verb with few options."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from hf_vssm_prune.training.paths import expand_home


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        return super().parse_known_args(expand_home(sys.argv[1:] if args is None else args), namespace)


def command_parser(description: str | None, prog: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the description without reformatting it, and which replaces `~` in paths.

    Args:
        description: the docstring of the verb's file.
        prog: the program's name in messages; None: that of the running script.
    """
    return _Parser(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

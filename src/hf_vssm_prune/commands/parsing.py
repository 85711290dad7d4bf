"""The parser of a verb with few options."""

import argparse

from hf_vssm_prune.training.paths import PathParser


def command_parser(description: str | None, prog: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the description without reformatting it, and which replaces `~` in paths.

    Args:
        description: the docstring of the verb's file.
        prog: the program's name in messages; None: that of the running script.
    """
    return PathParser(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

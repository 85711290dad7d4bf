"""The parser of a verb with few options."""

import argparse


def command_parser(description: str | None, prog: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the description as it is written.

    Args:
        description: the docstring of the verb's file.
        prog: the program's name in messages; None: that of the script that runs.
    """
    return argparse.ArgumentParser(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

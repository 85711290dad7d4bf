"""The parser of a verb with few options."""

import argparse


def command_parser(description: str | None, prog: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the description without reformatting it.

    Args:
        description: the docstring of the verb's file.
        prog: the program's name in messages; None: that of the running script.
    """
    return argparse.ArgumentParser(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

"""Prints a script that completes the verbs and their options in a shell.

    hf-vssm-prune completion bash > ~/.local/share/bash-completion/completions/hf-vssm-prune
    hf-vssm-prune completion zsh > "${fpath[1]}/_hf-vssm-prune"
    hf-vssm-prune completion fish > ~/.config/fish/completions/hf-vssm-prune.fish

Run it again after an update of the package. The script starts no Python, so that completion is immediate.
"""

import argparse
from collections.abc import Sequence

import shtab

from hf_vssm_prune.commands import VERBS, make_parser_of
from hf_vssm_prune.commands.parsing import command_parser
from hf_vssm_prune.environment import PROGRAM


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, prog)
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="the shell to write the script for")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = make_parser(prog).parse_args(arguments)
    print(shtab.complete(whole_parser(), options.shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """A parser of all verbs with their options. A verb whose extra is not installed has no options."""
    parser = argparse.ArgumentParser(PROGRAM)
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers()
    for name, verb in VERBS.items():
        try:
            parents = [for_completion(make_parser_of(name)())]
        except ModuleNotFoundError:
            parents = []
        verbs.add_parser(name, help=verb.summary, add_help=not parents, parents=parents)
    return parser


def for_completion(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser, with option names spelled with underscores only. Values that are neither choices nor numbers are
    completed as file names."""
    for action in parser._actions:
        action.option_strings = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        if action.choices is None and action.nargs != 0 and action.type not in (int, float):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser

"""`hf-vssm-prune VERB` and `python -m hf_vssm_prune VERB`: the package's command line."""

import argparse
import sys
from collections.abc import Sequence

from hf_vssm_prune import __version__
from hf_vssm_prune.commands import REPOSITORY_SCRIPTS, VERBS, run
from hf_vssm_prune.environment import PROGRAM


DESCRIPTION = "Token pruning for vision Mambas: train, prune, compare, convert and share models."


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and (verb := words[0].replace("-", "_")) in VERBS:
        return run(verb, words[1:])
    parser = make_parser()
    if words and verb in REPOSITORY_SCRIPTS:
        parser.error(
            f"{words[0]} is a script in the repository, not part of the package, because it needs "
            f"{REPOSITORY_SCRIPTS[verb]}. "
            f"There: python scripts/{verb}.py"
        )
    if not words:
        parser.print_help()
        return 2
    parser.parse_args(words)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser for the words before the verb; each verb parses its own options."""
    parser = argparse.ArgumentParser(
        PROGRAM,
        f"{PROGRAM} VERB [options]",
        DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"{verbs_by_group()}\n\n`{PROGRAM} VERB --help` describes the options of a verb. On several devices:\n"
        "`accelerate launch -m hf_vssm_prune finetune ...`.",
    )
    parser.add_argument("verb", choices=VERBS, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def verbs_by_group() -> str:
    width = max(map(len, VERBS))
    lines: list[str] = []
    for group in dict.fromkeys(verb.group for verb in VERBS.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items() if verb.group == group]
    return "\n".join(lines[1:])


if __name__ == "__main__":
    sys.exit(main())

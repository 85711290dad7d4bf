"""The command line. Each verb is one file, with a `main` function for the words after the verb and a `make_parser`
function, and one line in the table here. It can be run as `hf-vssm-prune VERB`, as `python -m hf_vssm_prune VERB`, and
as `scripts/VERB.py` in the repository, for `accelerate launch`."""

import argparse
import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_vssm_prune.environment import PROGRAM


@dataclass(frozen=True)
class Verb:
    """A line in `hf-vssm-prune --help`.

    Attributes:
        group: heading under which it is listed.
        summary: what it does.
        extra: extra of the package that it needs; None: it needs none.
    """

    group: str
    summary: str
    extra: str | None = None


VERBS = {
    "train": Verb("training", "train a dense model", "train"),
    "finetune": Verb("training", "prune a checkpoint and fine-tune it", "train"),
    "estimate": Verb("training", "estimate time and memory of a run before it starts", "train"),
    "evaluate": Verb(
        "evaluation", "compare a model with its pruned version: accuracy, FLOPs, images per second", "train"
    ),
    "compare_methods": Verb("evaluation", "compare all pruning methods on one model, without training", "train"),
    "visualize": Verb("evaluation", "draw which tokens a model keeps", "train"),
    "convert": Verb("files and the Hub", "convert a published checkpoint to a folder, and back", "train"),
    "export": Verb("files and the Hub", "write ONNX, torch.export or AOTInductor files", "export"),
    "write_card": Verb("files and the Hub", "write the model card of a folder", "train"),
    "push": Verb("files and the Hub", "upload a folder to the Hub in one commit"),
    "reopen": Verb("files and the Hub", "load a folder as its users would, and classify images"),
    "demo": Verb("other", "prune and fine-tune the package's example model", "train"),
    "env": Verb("other", "report versions, kernels and the machine, for bug reports"),
    "completion": Verb("other", "print a script that completes verbs and options in a shell", "completion"),
}

# Scripts that are not verbs because each needs files that are in the repository but not in the package, named here.
REPOSITORY_SCRIPTS = {
    "benchmark": "the baselines that it times, and a compiler",
    "gpu_check": "the checks, and the golden cases",
    "study": "the plan and the results of the study",
    "audit": "the environment of `make audit`",
    "build_trashnet": "TrashNet's original photographs",
    "screenshot_card": "the model cards, and Chromium",
    "write_model_cards": "the texts of `model_cards/`",
}


def main_of(verb: str) -> Callable[..., int]:
    """The function that runs a verb. Its arguments are the words after the verb (None: those of the command line) and
    the program's name; it returns the exit status."""
    return importlib.import_module(f"{__name__}.{verb}").main


def make_parser_of(verb: str) -> Callable[..., argparse.ArgumentParser]:
    """The function that creates a verb's parser from the program's name. Options that depend on the task are those of
    image classification."""
    return importlib.import_module(f"{__name__}.{verb}").make_parser


def run(verb: str, words: list[str]) -> int:
    """Runs a verb. If a library from the verb's extra is missing, prints one line that says so."""
    try:
        main = main_of(verb)
    except ModuleNotFoundError as error:
        extra, missing = VERBS[verb].extra, _missing_module(error)
        if extra is None or missing is None:
            raise
        # Not `pip install 'hf_vssm_prune[...]'`: the package is not on an index, where anyone could take its name.
        print(
            f"error: {verb} needs {missing}: install the package with its extra `{extra}` "
            f"(in the repository: pip install -e '.[{extra}]')",
            file=sys.stderr,
        )
        return 1
    return main(words, f"{PROGRAM} {verb}")


def one_line_errors(*others: type[Exception]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorates a verb's `main`: a ValueError, an OSError or one of the other errors is printed on one line, and the
    exit status is 1."""
    errors: tuple[type[Exception], ...] = (ValueError, OSError, *others)

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run_verb(*arguments: Any, **options: Any) -> int:
            try:
                return main(*arguments, **options)
            except errors as error:
                print(f"error: {error}", file=sys.stderr)
                return 1

        return run_verb

    return decorate


def _missing_module(error: BaseException | None) -> str | None:
    """The name of the module that could not be imported. transformers raises a second error, without the name, from the
    first one."""
    while isinstance(error, ImportError) and error.name is None:
        error = error.__cause__
    return error.name if isinstance(error, ImportError) else None


def script_main(file: str) -> Callable[..., int]:
    """The function that runs the verb with the name of a script.

    Python puts a script's folder first on the import path. It is removed from there, because `evaluate.py` in it would
    be imported instead of Hugging Face's package of that name.
    """
    folder, verb = Path(file).resolve().parent, Path(file).stem
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != folder]
    return main_of(verb)

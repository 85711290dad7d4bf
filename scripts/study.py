"""Runs a study, or the rest of it, and writes STUDY.md and its plots from the results.

    python scripts/study.py --study recipes/study_small.yaml --results study/small.jsonl --folder runs/study/small

Ctrl-C stops it, and the same command resumes it. On two cores, two workers with one thread each are faster than one
worker with two.
`--only 'cifar10/vim/*'` runs a part of it. To combine parts from several machines, concatenate their result files.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_vssm_prune.commands import one_line_errors
from hf_vssm_prune.training.arguments.parsing import check_output_file


# The study belongs to the repository, not to the package. Its folder must come before this one, which has a study.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from study.plan import Study, list_pieces, read_study
from study.report import write_report
from study.runner import StudyRunner, check_results, read_results


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True, help="YAML file of the study")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines of the finished pieces")
    parser.add_argument(
        "--folder", type=Path, help="folder for the models and logs of the pieces; without it, nothing is run"
    )
    parser.add_argument("--report", type=Path, help="Markdown file to write; its plots are saved next to the results")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="NAME=FOLDER", help="folders to use instead of data sets on the Hub"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="pieces to run, in this order, for instance 'cifar10/vim/*' or '*/dense'",
    )
    parser.add_argument("--workers", type=int, default=1, help="number of pieces to run at the same time")
    parser.add_argument("--threads", type=int, help="threads of each worker; by default PyTorch's choice")
    options = parser.parse_args(arguments)
    if options.folder is None:
        if options.report is None:
            parser.error("there is nothing to do: --folder runs the study, and --report writes its page.")
        of_running = ("data", "only", "workers", "threads")
        if unused := [f"--{name}" for name in of_running if getattr(options, name) != parser.get_default(name)]:
            parser.error(f"{', '.join(unused)} need --folder; without it, nothing is run.")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO, force=True)
    study = read_study(options.study)
    check_output_file("report", options.report)
    if options.results.is_dir():
        raise ValueError(f"--results {options.results} is a folder; it must be a file.")
    if options.folder is None and not options.results.exists():
        raise ValueError(f"--results {options.results} does not exist, and without --folder nothing is run.")
    warn_of_unknown(study, options.results)
    status = 0 if options.folder is None else run(study, options)
    if options.report is not None and options.results.exists():  # a run may have ended without a result
        results = read_results(options.results)
        check_results(results, study)
        write_report(study, results, options.report, options.results.parent)
    return status


def warn_of_unknown(study: Study, results: Path) -> None:
    """Names results that the page does not show, such as those of a variant that has another name now."""
    keys = {piece.key for piece in list_pieces(study)}
    if unknown := [key for key in read_results(results) if key not in keys]:
        logging.warning("%s has results that are not in the study, and are ignored: %s", results, ", ".join(unknown))


def run(study: Study, options: argparse.Namespace) -> int:
    """Runs the remaining pieces. The exit status is 128 + the signal's number if a signal stopped it, and 1 if a piece
    failed or could not be started."""
    if wrong := [each for each in options.data if "=" not in each]:
        raise ValueError(f"--data has {wrong}; NAME=FOLDER is needed.")
    folders = dict(each.split("=", 1) for each in options.data)
    runner = StudyRunner(
        study,
        Path(__file__).parent,
        options.folder,
        options.results,
        folders,
        options.workers,
        options.threads,
        options.only,
    )
    stopped_by = runner.run()
    if stopped_by is not None:
        return 128 + stopped_by
    return 1 if runner.failed or runner.left else 0


if __name__ == "__main__":
    sys.exit(main())

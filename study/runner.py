"""Runs a study: dense baselines for several data sets, families and seeds, pruned and fine-tuned in many ways.

Each piece is a run of another script with its own recipe, so that every figure can be reproduced by hand. A finished
piece is one JSON line in the results and is not run again; an interrupted piece resumes from its checkpoint.
"""

import itertools
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import hf_vssm_prune
from hf_vssm_prune.hub.loading import sha256_of_file
from hf_vssm_prune.pruning_methods import PAPERS_METHOD
from hf_vssm_prune.training.atomic_files import write_json, write_text
from hf_vssm_prune.training.checkpoints import RESULTS, find_checkpoints
from hf_vssm_prune.training.interruption import StopRequest
from study.plan import Piece, Study, list_pieces, with_method


logger = logging.getLogger(__name__)

COMPARISON = "comparison.json"
WEIGHTS = Path("last", "model.safetensors")
BEGUN = "start_weights.txt"  # SHA-256 of the weights from which a piece's checkpoints come


# ---- Results -----------------------------------------------------------------------------------------------------


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """The finished pieces of a study by key; empty if there is no file yet.

    Raises:
        ValueError: a line is not a result.
    """
    if not file.exists():
        return {}
    results = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            results[record["piece"]] = record
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number} is not a result of a study: {error!r}") from error
    return results


def write_results(results: Mapping[str, dict[str, Any]], file: Path) -> None:
    """Writes all results atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text("".join(json.dumps(record) + "\n" for record in results.values()), file)


def check_results(results: Mapping[str, dict[str, Any]], study: Study) -> None:
    """Checks that the results belong to the study.

    Raises:
        ValueError: a piece was run with other options than those in the study, or pieces started from other weights
            than those of the corresponding piece in the results.
    """
    started_elsewhere: dict[str, list[str]] = {}
    for piece in list_pieces(study):
        if (record := results.get(piece.key)) is None:
            continue
        if not may_be_of(record, piece):
            raise ValueError(
                f"In the results, {piece.key!r} has other options than in the study: use another file for the results "
                "and another folder, or remove its line and its folder, and those of the pieces that start from it."
            )
        start = piece.key_of_start() or ""
        had, has = record.get("start_weights"), results.get(start, {}).get("weights")
        if had and has and had != has:
            started_elsewhere.setdefault(start, []).append(piece.key)
    if started_elsewhere:
        start, keys = next(iter(started_elsewhere.items()))
        raise ValueError(
            f"In the results, these started from other weights than the current ones of {start!r}: "
            f"{', '.join(map(repr, keys))}. Remove their lines and their folders to run them again."
        )


def record_piece(piece: Piece, folder: Path, start_weights: str | None, seconds: float) -> dict[str, Any]:
    """The result of a finished piece: its figures and options, without paths.

    Args:
        piece, folder: the piece, and the folder in which it was run.
        start_weights: SHA-256 of the weights from which it started, if any.
        seconds: duration of the run, or of its last part if it was interrupted.
    """
    figures: dict[str, Any]
    if piece.script == "compare_methods":
        evaluations = json.loads((folder / COMPARISON).read_text(encoding="utf-8"))
        figures = {
            name: {
                "top1": evaluation["metrics"]["top1"],
                "gflops": evaluation["gflops_published"],
                "images_per_second": evaluation["images_per_second"],
            }
            for name, evaluation in evaluations.items()
        }
    else:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        figures = {
            "top1": results["eval_top1"],
            "gflops": results["gflops_pruned"],
            "num_parameters": results["num_parameters"],
            "top1_by_epoch": [each["eval_top1"] for each in results["history"]],
        }
    return {
        "piece": piece.key,
        "dataset": piece.dataset,
        "family": piece.family,
        "seed": piece.seed,
        "name": piece.name,
        "figures": figures,
        "script": piece.script,
        "options": piece.options,
        **({} if start_weights is None else {"start_weights": start_weights}),
        **({} if piece.script == "compare_methods" else {"weights": sha256_of_file(folder / WEIGHTS)}),
        "seconds": round(seconds, 1),
        "versions": {"hf_vssm_prune": hf_vssm_prune.__version__, "torch": torch.__version__},
    }


# ---- Running -----------------------------------------------------------------------------------------------------


class StudyRunner:
    """Runs the remaining pieces of a study.

    Args:
        study: the plan.
        scripts: folder with train.py, finetune.py and compare_methods.py.
        folder: folder for models and logs, with one subfolder per piece.
        results: JSON lines of finished pieces.
        dataset_names: data sets on the Hub, or folders, to use instead of those in the study.
        workers: number of pieces to run at the same time.
        threads: number of threads per worker.
        only: shell patterns for the keys of the pieces to run, in this order.

    Raises:
        ValueError: the results do not belong to this study, a data set is not part of the study, a pattern matches no
            piece, or there is no worker or thread.
    """

    def __init__(
        self,
        study: Study,
        scripts: Path,
        folder: Path,
        results: Path,
        dataset_names: Mapping[str, str],
        workers: int = 1,
        threads: int | None = None,
        only: Sequence[str] = ("*",),
    ) -> None:
        if unknown := sorted(set(dataset_names) - set(study.datasets)):
            raise ValueError(f"The study has no data set {unknown}; it has {sorted(study.datasets)}.")
        self.data_options = {
            name: {option: value for option, value in options.items() if option != "dense"}
            for name, options in study.datasets.items()
        }
        self.data_options |= {name: {"dataset_name": other} for name, other in dataset_names.items()}
        if workers < 1:
            raise ValueError(f"There are {workers} workers; at least 1 is needed.")
        if threads is not None and threads < 1:
            raise ValueError(f"There are {threads} threads; at least 1 is needed.")
        self.study = study
        self.scripts, self.folder, self.results_file, self.workers = scripts, folder, results, workers
        self.environment = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.results = read_results(results)
        check_results(self.results, study)
        self.pieces = select_pieces(list_pieces(study), only)
        self.failed: list[Piece] = []
        self._running: dict[str, tuple[Piece, subprocess.Popen, float]] = {}

    def run(self) -> signal.Signals | None:
        """Runs all pieces that can be run. Afterwards, `failed` has the pieces that failed, and `left` those without a
        model to start from.

        Returns:
            The signal that stopped it; None if it was not stopped.

        Raises:
            ValueError: another process is running a study in this folder; or a piece that was run again has other
                weights now, and results remain that started from the earlier ones.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / "study.lock", timeout=0):
                return self._run()
        except Timeout as error:
            raise ValueError(f"Another process is running a study in {self.folder}.") from error

    def _run(self) -> signal.Signals | None:
        done = sum(map(self._is_done, self.pieces))
        progress = tqdm(desc="study", total=len(self.pieces), initial=done, unit="piece")
        with StopRequest() as stop, logging_redirect_tqdm(), progress:
            try:
                while stop.received is None and (self._start_pieces() or self._running):
                    self._collect(progress)
                    time.sleep(0.1)
                self._stop(stop.received or signal.SIGTERM)
            except ValueError:
                self._stop(signal.SIGTERM)
                raise
            finally:
                for _, process, _ in self._running.values():
                    process.kill()
            if stop.received is None and (left := self.left):
                logger.error(
                    "%d pieces were not run, the first of them %r: there is no model of %r in %s. Unless that piece "
                    "failed, run it as well; if it is already in the results, remove its line and those of all pieces "
                    "that start from it, or choose another file for the results.",
                    *(len(left), left[0].key, left[0].key_of_start(), self.folder),
                )
        return stop.received

    @property
    def left(self) -> list[Piece]:
        """The selected pieces that are neither done nor failed."""
        return [piece for piece in self.pieces if not self._is_done(piece) and piece not in self.failed]

    def _is_done(self, piece: Piece) -> bool:
        return piece.key in self.results and self.results[piece.key]["options"] == piece.options

    def _start_pieces(self) -> int:
        """Starts pieces on all free workers, and returns their number, including those that failed at once."""
        free = self.workers - len(self._running)
        ready = list(itertools.islice(filter(self._is_ready, self.pieces), free))  # stops searching early
        for piece in ready:
            try:
                self._running[piece.key] = (piece, self._start(piece), time.perf_counter())
            except ValueError as error:
                logger.error("%s", error)
                self.failed.append(piece)
        return len(ready)

    def _is_ready(self, piece: Piece) -> bool:
        if self._is_done(piece) or piece.key in self._running or piece in self.failed:
            return False
        start = piece.key_of_start()
        return start is None or (start in self.results and (self.folder / start / "last").is_dir())

    def _start(self, piece: Piece) -> subprocess.Popen:
        """
        Raises:
            ValueError: its checkpoints come from other weights than the current ones.
        """
        folder = self.folder / piece.key
        folder.mkdir(parents=True, exist_ok=True)
        resumes = bool(find_checkpoints(folder))
        self._check_start(piece, folder / BEGUN, resumes)
        recipe = self._recipe(piece, folder)
        write_text(yaml.safe_dump(recipe, sort_keys=False), folder / "recipe.yaml")
        command = [sys.executable, str(self.scripts / f"{piece.script}.py"), "--recipe", str(folder / "recipe.yaml")]
        if resumes:
            command += ["--resume", "latest"]
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            # Its own session, so that it receives Ctrl-C only once, from this process.
            return subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _check_start(self, piece: Piece, begun: Path, resumes: bool) -> None:
        """Notes the weights from which a piece starts. Where it resumes, they must be the same: its options are checked
        by the script itself, but a checkpoint does not say from which weights the run started."""
        if (weights := self._start_weights(piece)) is None:
            return
        if not resumes:
            write_text(weights, begun)
        elif begun.exists() and begun.read_text(encoding="utf-8") != weights:
            raise ValueError(
                f"{piece.key} cannot be resumed, because it started from other weights than the current ones of "
                f"{piece.key_of_start()!r}: remove {begun.parent} to run it again."
            )

    def _recipe(self, piece: Piece, folder: Path) -> dict[str, Any]:
        """The options of the script, including paths."""
        recipe = {**self.data_options[piece.dataset], "seed": piece.seed, **piece.options}
        start = piece.key_of_start()
        if start is not None:
            recipe["model_name_or_path"] = str(self.folder / start / "last")
        if piece.script == "finetune":  # see `with_method`
            recipe = {"prune_method": PAPERS_METHOD, **recipe}
        if piece.script != "compare_methods":
            return {**recipe, "output_dir": str(folder)}
        schedules = {name: with_method(schedule) for name, schedule in piece.options["schedules"].items()}
        write_json(schedules, folder / "schedules.json")
        return {**recipe, "schedules": str(folder / "schedules.json"), "json": str(folder / COMPARISON)}

    def _collect(self, progress: tqdm) -> None:
        """Collects the results of finished pieces."""
        for key, (piece, process, start) in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[key]
            if process.returncode != 0:
                logger.error("%s failed with status %d: see %s", key, process.returncode, self.folder / key / "log.txt")
                self.failed.append(piece)
                continue
            start_weights = self._start_weights(piece)
            record = record_piece(piece, self.folder / key, start_weights, time.perf_counter() - start)
            # Another process running a part of the study may have written to the file in the meantime.
            self.results = read_results(self.results_file) | {key: record}
            write_results(self.results, self.results_file)
            logger.info("%s", describe(self.results[key]))
            progress.update()
            progress.set_postfix_str(self._time_left(), refresh=True)
            check_results(self.results, self.study)  # now, not when everything has been run from the new weights

    def _start_weights(self, piece: Piece) -> str | None:
        start = piece.key_of_start()
        return None if start is None else sha256_of_file(self.folder / start / WEIGHTS)

    def _time_left(self) -> str:
        seconds = sum(expected_seconds(piece, self.results.values()) for piece in self.left) / self.workers
        return f"about {seconds / 3600:.1f} h left" if seconds >= 3600 else f"about {seconds / 60:.0f} min left"

    def _stop(self, number: signal.Signals) -> None:
        """Makes the running pieces save a checkpoint and exit."""
        for _, process, _ in self._running.values():
            process.send_signal(number)
        for _, process, _ in self._running.values():
            process.wait()
        self._running.clear()


def may_be_of(record: Mapping[str, Any], piece: Piece) -> bool:
    """Whether a result was computed with a piece's options. A comparison may lack some schedules: a study may get more
    variants, and earlier measurements remain valid until all variants are compared again."""
    had, has = record["options"], piece.options
    if "schedules" not in has or not had.get("schedules", {}).items() <= has["schedules"].items():
        return had == has
    return had == {**has, "schedules": had.get("schedules")}


def select_pieces(pieces: Sequence[Piece], patterns: Sequence[str]) -> list[Piece]:
    """The pieces whose keys match a pattern: first all matches of the first pattern, then further matches of the next
    ones.

    Raises:
        ValueError: a pattern matches no piece.
    """
    selected: dict[str, Piece] = {}
    for pattern in patterns:
        fitting = {piece.key: piece for piece in pieces if fnmatchcase(piece.key, pattern)}
        if not fitting:
            raise ValueError(f"No piece of the study matches {pattern!r}; the first piece is {pieces[0].key!r}.")
        selected |= fitting
    return list(selected.values())


def expected_seconds(piece: Piece, records: Iterable[dict[str, Any]]) -> float:
    """The expected duration of a piece: the mean over similar pieces, otherwise over pieces of the same script,
    otherwise over all."""
    records = list(records)
    for names in (["script", "dataset", "family"], ["script"], []):
        like = [each["seconds"] for each in records if all(each[name] == getattr(piece, name) for name in names)]
        if like:
            return statistics.mean(like)
    return 0.0


def describe(record: dict[str, Any]) -> str:
    """One line about a finished piece."""
    figures = record["figures"]
    accuracy = f"top-1 {figures['top1']:.2%}" if "top1" in figures else f"{len(figures)} models compared"
    return f"{record['piece']}: {accuracy}, {record['seconds']:.0f} s"

"""A study: dense baselines of several data sets, families and seeds, pruned and fine-tuned in many ways.

A study is a YAML file (recipes/study_*.yaml), and a list of pieces follows from it. Each piece is a run of another
script with a recipe written for it, so that any figure can be made again by hand. A finished piece is one JSON line in
the results; what is there is not run again, and a piece that was stopped goes on from its checkpoint.
"""

import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import hf_vssm_prune
from hf_vssm_prune.pruning_methods import DEFAULT_METHOD
from hf_vssm_prune.training.checkpoints import find_checkpoints, write_json
from hf_vssm_prune.training.interruption import StopRequest
from hf_vssm_prune.training.recipes import read_recipe


logger = logging.getLogger(__name__)

TRAINING_RESULTS, COMPARISON = "all_results.json", "comparison.json"
# `token_pruning` by its own names, and what scripts/finetune.py calls it.
PRUNING_OPTIONS = {
    "layers": "prune_layers",
    "method": "prune_method",
    "alignment": "prune_alignment",
    "importance": "importance",
}
LOSSES_OF_A_TEACHER = ("kd_weight", "alignment_weight")


# ---- What there is to do -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A way to prune and to fine-tune.

    Attributes:
        pruning: `layers`, `method`, `alignment` and `importance` of `token_pruning`; what is left out is the default.
        training: options of scripts/finetune.py, over those of the study.
    """

    pruning: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """The content of a study's file.

    Attributes:
        seeds: each piece is run with each.
        budgets: shares of FLOPs to remove.
        main_budget: the one of them at which all variants are compared.
        max_eval_samples: images that every evaluation draws, by the seed.
        datasets: by name `dataset_name`, and options of scripts/train.py in `dense`.
        families: by name options of scripts/train.py.
        training, dense, finetuning: options of all pieces that train, of scripts/train.py, of scripts/finetune.py.
        elastic: the `variant` that is trained for all budgets at once, and options over its own.
        variants: by name; the first is the baseline.
        more_variants: others, which are run after everything else.
        every_budget: names of those that are fine-tuned for every budget.
    """

    seeds: list[int]
    budgets: list[float]
    main_budget: float
    max_eval_samples: int
    datasets: dict[str, dict[str, Any]]
    families: dict[str, dict[str, Any]]
    training: dict[str, Any]
    dense: dict[str, Any]
    finetuning: dict[str, Any]
    elastic: dict[str, Any]
    variants: dict[str, Variant]
    more_variants: dict[str, Variant]
    every_budget: list[str]

    @property
    def all_variants(self) -> dict[str, Variant]:
        return {**self.variants, **self.more_variants}


def read_study(file: Path) -> Study:
    """Reads a study's file.

    Raises:
        ValueError: it is missing, or its content is not that of a study; the message names what is wrong.
    """
    content = read_recipe(file)
    names = [each.name for each in fields(Study)]
    if sorted(content) != sorted(names):
        raise ValueError(f"{file} has {sorted(content)}; a study has exactly {sorted(names)}.")
    variants, more_variants = (
        {name: _read_variant(file, name, parts) for name, parts in content[key].items()}
        for key in ("variants", "more_variants")
    )
    if unknown := sorted(set(content["every_budget"]) - set(variants)):
        raise ValueError(f"{file}: every_budget has {unknown}, which are no variants: {sorted(variants)}.")
    if content["elastic"].get("variant") not in variants:
        raise ValueError(f"{file}: elastic has no 'variant' that is one of {sorted(variants)}.")
    if content["main_budget"] not in content["budgets"]:
        raise ValueError(f"{file}: main_budget {content['main_budget']} is none of {content['budgets']}.")
    return Study(**{**content, "variants": variants, "more_variants": more_variants})


def _read_variant(file: Path, name: str, parts: dict[str, Any]) -> Variant:
    if unknown := sorted(set(parts) - {"pruning", "training"}):
        raise ValueError(f"{file}: variant {name!r} has {unknown}; allowed are 'pruning' and 'training'.")
    variant = Variant(**parts)
    if unknown := sorted(set(variant.pruning) - set(PRUNING_OPTIONS)):
        raise ValueError(f"{file}: variant {name!r} prunes by {unknown}; allowed are {sorted(PRUNING_OPTIONS)}.")
    return variant


@dataclass(frozen=True)
class Piece:
    """One run of a script.

    Attributes:
        script: "train", "finetune" or "compare_methods".
        dataset, family, seed: for which.
        name: what it is, unique among those of the same data set, family and seed.
        options: of the script, without paths.
        start: name of the piece whose weights it begins with.
    """

    script: str
    dataset: str
    family: str
    seed: int
    name: str
    options: dict[str, Any]
    start: str | None = None

    @property
    def key(self) -> str:
        return f"{self.dataset}/{self.family}/{self.seed}/{self.name}"

    def key_of_start(self) -> str | None:
        return None if self.start is None else f"{self.dataset}/{self.family}/{self.seed}/{self.start}"


def list_pieces(study: Study) -> list[Piece]:
    """All pieces in the order in which they are run: a piece comes after the one that it starts from, and what is
    compared over seeds comes together."""
    return [
        piece
        for dataset in study.datasets
        for family in study.families
        for name in _templates(study, dataset, family)
        for piece in (_piece(study, dataset, family, seed, name) for seed in study.seeds)
    ]


def _piece(study: Study, dataset: str, family: str, seed: int, name: str) -> Piece:
    script, start, options = _templates(study, dataset, family)[name]
    return Piece(script, dataset, family, seed, name, options, start)


def _templates(study: Study, dataset: str, family: str) -> dict[str, tuple[str, str | None, dict[str, Any]]]:
    """Script, start and options of every piece of a data set and a family, by its name."""
    evaluated = {"max_eval_samples": study.max_eval_samples}
    trained = {**evaluated, **study.training}
    dense = {**trained, **study.dense, "family": family, **study.datasets[dataset]["dense"], **study.families[family]}
    elastic_variant = study.variants[study.elastic["variant"]]
    elastic = {
        **_tuned_options(study, study.elastic["variant"], study.main_budget),
        **{name: value for name, value in study.elastic.items() if name != "variant"},
    }
    elastic_schedules = {
        tuned_name("elastic", budget): {"flops_reduction": budget, **elastic_variant.pruning}
        for budget in study.budgets
    }
    at_main_budget = [(name, study.main_budget) for name in study.variants]
    at_others = [(name, budget) for name in study.every_budget for budget in study.budgets]

    def tuned(budgets: list[tuple[str, float]]) -> dict[str, tuple[str, str | None, dict[str, Any]]]:
        return {
            tuned_name(name, budget): ("finetune", "dense", _tuned_options(study, name, budget))
            for name, budget in budgets
        }

    return {
        "dense": ("train", None, dense),
        "dense tuned": ("train", "dense", {**trained, **study.finetuning}),
        **tuned(at_main_budget),
        "untrained": ("compare_methods", "dense", {**evaluated, "schedules": _untrained_schedules(study)}),
        **tuned([each for each in at_others if each not in at_main_budget]),
        "elastic": ("finetune", "dense", elastic),
        "elastic compared": ("compare_methods", "elastic", {**evaluated, "schedules": elastic_schedules}),
        **tuned([(name, study.main_budget) for name in study.more_variants]),
    }


def _untrained_schedules(study: Study) -> dict[str, dict[str, Any]]:
    """Every way to prune once, by the name of the first variant that does."""
    schedules: dict[str, dict[str, Any]] = {}
    for name, variant in study.all_variants.items():
        for budget in study.budgets if name in study.every_budget else [study.main_budget]:
            schedule = {"flops_reduction": budget, **variant.pruning}
            if schedule not in schedules.values():
                schedules[tuned_name(name, budget)] = schedule
    return schedules


def _tuned_options(study: Study, name: str, budget: float) -> dict[str, Any]:
    """The options of scripts/finetune.py; no teacher, unless the variant has one."""
    variant = study.all_variants[name]
    return {
        "max_eval_samples": study.max_eval_samples,
        **study.training,
        **dict.fromkeys(LOSSES_OF_A_TEACHER, 0),
        **study.finetuning,
        "flops_reduction": budget,
        **{PRUNING_OPTIONS[option]: value for option, value in variant.pruning.items()},
        **variant.training,
    }


def tuned_name(variant: str, budget: float) -> str:
    return f"{variant} at {budget:.1%}"


# ---- What is done ------------------------------------------------------------------------------------------------


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """The finished pieces of a study by their key; none where there is no file yet.

    Raises:
        ValueError: a line is no result.
    """
    if not file.exists():
        return {}
    results = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            results[record["piece"]] = record
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number} is no result of a study: {error!r}") from error
    return results


def write_results(results: Mapping[str, dict[str, Any]], file: Path) -> None:
    """Writes all results at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in results.values()), encoding="utf-8")
    temporary.replace(file)


def record_piece(piece: Piece, folder: Path, seconds: float) -> dict[str, Any]:
    """What the results keep of a finished piece: the figures, the options that gave them, and no paths."""
    figures: dict[str, Any]
    if piece.script == "compare_methods":
        evaluations = json.loads((folder / COMPARISON).read_text(encoding="utf-8"))
        figures = {
            name: {
                "top1": evaluation["accuracy"]["top1"],
                "gflops": evaluation["gflops_published"],
                "images_per_second": evaluation["images_per_second"],
            }
            for name, evaluation in evaluations.items()
        }
    else:
        results = json.loads((folder / TRAINING_RESULTS).read_text(encoding="utf-8"))
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
        "seconds": round(seconds, 1),
        "versions": {"hf_vssm_prune": hf_vssm_prune.__version__, "torch": torch.__version__},
    }


# ---- Doing it ----------------------------------------------------------------------------------------------------


class StudyRunner:
    """Runs what is left of a study.

    Args:
        study: what there is to do.
        scripts: folder of train.py, finetune.py and compare_methods.py.
        folder: for the pieces' models and logs, each in a folder of its own.
        results: JSON lines of what is done.
        dataset_names: data sets on the Hub or folders in place of the study's.
        workers: pieces at a time.
        threads: of each.

    Raises:
        ValueError: the results are of other options than the study's, or a data set is not one of the study's.
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
    ) -> None:
        if unknown := sorted(set(dataset_names) - set(study.datasets)):
            raise ValueError(f"The study has no data set {unknown}; it has {sorted(study.datasets)}.")
        self.dataset_names = {name: options["dataset_name"] for name, options in study.datasets.items()}
        self.dataset_names |= dataset_names
        self.scripts, self.folder, self.results_file, self.workers = scripts, folder, results, workers
        self.environment = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.results = read_results(results)
        self.pieces = list_pieces(study)
        for piece in self.pieces:
            record = self.results.get(piece.key)
            if record is not None and record["options"] != json.loads(json.dumps(piece.options)):
                raise ValueError(
                    f"{results} has {piece.key!r} with other options than the study: name another file for the "
                    "results and another folder, or remove its line and its folder."
                )
        self.failed: list[Piece] = []
        self._running: dict[str, tuple[Piece, subprocess.Popen, float]] = {}

    def run(self) -> signal.Signals | None:
        """Runs until nothing is left that can be run; `failed` has what could not be.

        Returns:
            The signal that stopped it before; None if there was none.

        Raises:
            ValueError: another process runs a study in this folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / "study.lock", timeout=0):
                return self._run()
        except Timeout as error:
            raise ValueError(f"Another process is running a study in {self.folder}.") from error

    def _run(self) -> signal.Signals | None:
        done = sum(piece.key in self.results for piece in self.pieces)
        progress = tqdm(desc="study", total=len(self.pieces), initial=done, unit="piece")
        with StopRequest() as stop, logging_redirect_tqdm(), progress:
            try:
                while stop.received is None and (self._start_pieces() or self._running):
                    self._collect(progress)
                    time.sleep(0.1)
                self._stop(stop.received or signal.SIGTERM)
            finally:
                for _, process, _ in self._running.values():
                    process.kill()
        return stop.received

    def _start_pieces(self) -> int:
        """Starts as many pieces as there are free workers for, and returns how many."""
        ready = [piece for piece in self.pieces if self._is_ready(piece)]
        started = ready[: self.workers - len(self._running)]
        for piece in started:
            self._running[piece.key] = (piece, self._start(piece), time.perf_counter())
        return len(started)

    def _is_ready(self, piece: Piece) -> bool:
        if piece.key in self.results or piece.key in self._running or piece in self.failed:
            return False
        start = piece.key_of_start()
        return start is None or (start in self.results and (self.folder / start / "last").is_dir())

    def _start(self, piece: Piece) -> subprocess.Popen:
        folder = self.folder / piece.key
        folder.mkdir(parents=True, exist_ok=True)
        recipe = self._recipe(piece, folder)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        command = [sys.executable, str(self.scripts / f"{piece.script}.py"), "--recipe", str(folder / "recipe.yaml")]
        if find_checkpoints(folder):
            command += ["--resume", "latest"]
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            # Its own session: a Ctrl-C reaches it once, from here.
            return subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _recipe(self, piece: Piece, folder: Path) -> dict[str, Any]:
        """The options of the script with the paths that belong to them."""
        recipe = {"dataset_name": self.dataset_names[piece.dataset], "seed": piece.seed, **piece.options}
        start = piece.key_of_start()
        if start is not None:
            recipe["model_name_or_path"] = str(self.folder / start / "last")
        if piece.script == "finetune":
            # As in `token_pruning`, no method means the paper's; in the script it means ours.
            recipe = {"prune_method": DEFAULT_METHOD, **recipe}
        if piece.script != "compare_methods":
            return {**recipe, "output_dir": str(folder)}
        write_json(piece.options["schedules"], folder / "schedules.json")
        return {**recipe, "schedules": str(folder / "schedules.json"), "json": str(folder / COMPARISON)}

    def _collect(self, progress: tqdm) -> None:
        """Takes the results of the pieces that have ended."""
        for key, (piece, process, start) in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[key]
            if process.returncode != 0:
                logger.error("%s failed with status %d: see %s", key, process.returncode, self.folder / key / "log.txt")
                self.failed.append(piece)
                continue
            self.results[key] = record_piece(piece, self.folder / key, time.perf_counter() - start)
            write_results(self.results, self.results_file)
            logger.info("%s", describe(self.results[key]))
            progress.update()
            progress.set_postfix_str(self._time_left(), refresh=True)

    def _time_left(self) -> str:
        left = [piece for piece in self.pieces if piece.key not in self.results]
        seconds = sum(expected_seconds(piece, self.results.values()) for piece in left) / self.workers
        return f"about {seconds / 3600:.1f} h left" if seconds >= 3600 else f"about {seconds / 60:.0f} min left"

    def _stop(self, number: signal.Signals) -> None:
        """Lets the pieces that run save a checkpoint and end."""
        for _, process, _ in self._running.values():
            process.send_signal(number)
        for _, process, _ in self._running.values():
            process.wait()
        self._running.clear()


def expected_seconds(piece: Piece, records: Iterable[dict[str, Any]]) -> float:
    """How long a piece may take: the mean of its like, else of those of the same script, else of all there are."""
    records = list(records)
    for names in (["script", "dataset", "family"], ["script"], []):
        like = [each["seconds"] for each in records if all(each[name] == getattr(piece, name) for name in names)]
        if like:
            return statistics.mean(like)
    return 0.0


def describe(record: dict[str, Any]) -> str:
    """A finished piece in a line."""
    figures = record["figures"]
    accuracy = f"top-1 {figures['top1']:.2%}" if "top1" in figures else f"{len(figures)} models compared"
    return f"{record['piece']}: {accuracy}, {record['seconds']:.0f} s"

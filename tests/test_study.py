"""The study: its list of pieces, a small study that is run, stopped and resumed, and the page written from the
results."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
import torch
import yaml
from conftest import PATIENCE, SCRIPTS, hear_signals, make_plainmamba_config
from forking import Forked, run_forked

from hf_vssm_prune import PlainMambaForImageClassification
from study import report, runner, times
from study.plan import list_pieces, read_study, tuned_name
from study.report import Group, difference, mean_and_spread, plot_lines, verdict, write_report
from study.runner import (
    StudyRunner,
    check_results,
    expected_seconds,
    may_be_of,
    read_results,
    select_pieces,
    write_results,
)
from study.times import check_study, make_cases
from study.videos import times as times_of_videos


ROOT = SCRIPTS.parent
RECIPES = ROOT / "recipes"
STUDIES = sorted(RECIPES.glob("study_*.yaml"))
SMALL = {
    "seeds": [0],
    "budgets": [0.4],
    "main_budget": 0.4,
    "max_eval_samples": 20,
    "datasets": {"images": {"dataset_name": "trashnet", "dense": {"image_size": 28}}},
    "families": {
        "plainmamba": {
            "config_overrides": [
                "hidden_size=8",
                "num_hidden_layers=4",
                "state_size=2",
                "stem_channels=4",
                "num_stem_convs=1",
            ]
        }
    },
    "training": {
        "per_device_train_batch_size": 8,
        "dataloader_num_workers": 0,
        "model_ema": False,
        "max_train_samples": 16,
        "num_train_epochs": 1,
        "num_warmup_steps": 0,
    },
    "dense": {"patch_size": 4},
    "finetuning": {"learning_rate": 1e-4},
    "smaller": {"8 pixels": {"image_size": 8}},
    "elastic": {"variant": "paper", "elastic_budgets": [0.4]},
    "variants": {"paper": {}},
    "more_variants": {"naive": {"pruning": {"alignment": "none"}}},
    "every_budget": ["paper"],
}
NAMES = [
    "dense",
    "dense tuned",
    "paper at 40.0%",
    "untrained",
    "dense, 8 pixels",
    "elastic",
    "elastic compared",
    "naive at 40.0%",
]


def write_study(file: Path, **changes) -> Path:
    file.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return file


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_studies_of_the_repository(file) -> None:
    study = read_study(file)
    keys: set[str] = set()
    for piece in list_pieces(study):
        assert piece.key not in keys
        assert piece.start is None or piece.key_of_start() in keys  # what it starts from comes before
        keys.add(piece.key)
    tuned = len(study.all_variants) + len(study.every_budget) * (len(study.budgets) - 1)
    of_families = [5 + tuned + len(study.smaller_models(family)) for family in study.families]
    assert len(keys) == len(study.datasets) * len(study.seeds) * sum(of_families)


def test_order_of_pieces(tmp_path) -> None:
    study = read_study(write_study(tmp_path / "study.yaml", seeds=[0, 1]))
    assert [piece.name for piece in list_pieces(study) if piece.seed == 0] == NAMES
    assert [piece.seed for piece in list_pieces(study)] == [0, 1] * len(NAMES)
    options = {piece.name: piece.options for piece in list_pieces(study)}
    assert options["naive at 40.0%"]["prune_alignment"] == "none"
    assert options["naive at 40.0%"]["kd_weight"] == options["naive at 40.0%"]["alignment_weight"] == 0
    assert options["untrained"]["schedules"]["naive at 40.0%"] == {"flops_reduction": 0.4, "alignment": "none"}


def test_smaller_model_with_its_own_weights(tmp_path) -> None:
    own = {"model_name_or_path": {"plainmamba": "shallow", "vim": "vim_shallow"}, "num_train_epochs": 2}
    families = {**SMALL["families"], "vim": {}, "videomamba": {}}
    study = read_study(write_study(tmp_path / "study.yaml", families=families, smaller={"2 layers": own}))
    pieces = {piece.family: piece for piece in list_pieces(study) if piece.name == "dense, 2 layers"}
    assert list(pieces) == ["plainmamba", "vim"]
    for family, weights in own["model_name_or_path"].items():
        assert pieces[family].start is None
        assert pieces[family].options["model_name_or_path"] == weights
        assert pieces[family].options["num_train_epochs"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": 1}, "a study has exactly"),
        ({"seeds": 3}, "seeds is 3; it must be a list"),
        ({"training": None}, "training is None; it must be a dict"),
        ({"variants": {"paper": None}}, "variants has .'paper'. without options; without any, write {}"),
        ({"smaller": {"shallow": {}}}, "smaller has 'shallow'; a name is a number and"),
        ({"smaller": {"2 layers": {"model_name_or_path": "shallow"}}}, "they must be given by family"),
        (
            {"smaller": {"2 layers": {"model_name_or_path": {"vim": "shallow"}}}},
            "'2 layers' has weights of .'vim'.; the families are .'plainmamba'.",
        ),
        ({"variants": {"paper": {"losses": {}}}}, "variant 'paper' has .'losses'."),
        ({"variants": {"paper": {"pruning": {"keep": 1}}}}, "variant 'paper' has the pruning options .'keep'."),
        ({"more_variants": {"paper": {}}}, ".'paper'. are in both variants and more_variants"),
        (
            {"datasets": {"images": {"dataset_name": "trashnet", "train": {}}}},
            "data set 'images' has .'dataset_name', 'tr",
        ),
        ({"every_budget": ["best"]}, "every_budget has .'best'.; the variants are"),
        ({"elastic": {"variant": "best"}}, "elastic needs a 'variant', one of"),
        ({"main_budget": 0.5}, "main_budget is 0.5; it must be one of"),
    ],
)
def test_wrong_study(changes, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        read_study(write_study(tmp_path / "study.yaml", **changes))


def options(tmp_path: Path) -> list[str]:
    paths = {"study": "study.yaml", "results": "results.jsonl", "folder": "pieces", "report": "STUDY.md"}
    arguments = [word for name, path in paths.items() for word in (f"--{name}", str(tmp_path / path))]
    return [*arguments, "--workers", "2", "--threads", "1"]


class ForkedPiece:
    """Replaces the runner's `subprocess.Popen`, to save the seconds that a new Python takes for each piece."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], stdout: TextIO, **_: Any) -> None:
        self.forked = Forked(*command[1:], environment=env, prepare=lambda: begin(stdout.fileno()))
        self.kill = self.forked.process.kill

    @property
    def returncode(self) -> int | None:
        return self.forked.process.exitcode

    def poll(self) -> int | None:
        return None if self.returncode is None else self.wait()

    def wait(self) -> int:
        return self.forked.wait().returncode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.forked.process.pid, number)


def begin(log: int) -> None:
    """Sets what differs between a fork of the runner and a new Python."""
    os.setsid()
    hear_signals()
    for number in (1, 2):
        os.dup2(log, number)


def fork_pieces() -> None:
    """Called in the runner's process, which is itself a fork of this one."""
    hear_signals()
    runner.subprocess = SimpleNamespace(Popen=ForkedPiece, STDOUT=subprocess.STDOUT)


def test_run_stopped_and_gone_on_with(tmp_path) -> None:
    write_study(tmp_path / "study.yaml")
    results = tmp_path / "results.jsonl"
    study = Forked(SCRIPTS / "study.py", *options(tmp_path), prepare=fork_pieces)
    end = time.monotonic() + PATIENCE
    while not results.exists() and time.monotonic() < end:
        time.sleep(0.1)
    os.kill(study.process.pid, signal.SIGINT)
    stopped = study.wait()
    assert stopped.returncode == 128 + signal.SIGINT, stopped.stderr
    done = read_results(results)
    assert 1 <= len(done) < len(NAMES)

    finished = run_forked(SCRIPTS / "study.py", *options(tmp_path), prepare=fork_pieces)
    assert finished.returncode == 0, finished.stderr
    assert f"{len(NAMES)}/{len(NAMES)}" in finished.stderr
    everything = read_results(results)
    assert [everything[key] for key in done] == list(done.values())  # not run again
    assert sorted(record["name"] for record in everything.values()) == sorted(NAMES)
    assert str(tmp_path) not in results.read_text()
    assert len({record["start_weights"] for record in everything.values() if "start_weights" in record}) == 2
    assert list(everything["images/plainmamba/0/untrained"]["figures"]) == ["dense", "paper at 40.0%", "naive at 40.0%"]

    begun = (tmp_path / "pieces/images/plainmamba/0/dense tuned/start_weights.txt").read_text()
    assert begun == everything["images/plainmamba/0/dense tuned"]["start_weights"]
    schedules = json.loads((tmp_path / "pieces/images/plainmamba/0/untrained/schedules.json").read_text())
    assert {schedule["method"] for schedule in schedules.values()} == {"top"}, "no method is the paper's in a study"

    page = (tmp_path / "STUDY.md").read_text()
    assert "## images, plainmamba" in page
    assert (tmp_path / "images-plainmamba.svg").read_text().startswith("<?xml")


def test_piece_that_fails_is_named_and_the_others_run(tmp_path, caplog, monkeypatch) -> None:
    """The first piece runs in a new Python, as for a user."""

    def start(command: Sequence[str], **options: Any) -> subprocess.Popen | ForkedPiece:
        return (subprocess.Popen if Path(command[1]).stem == "train" else ForkedPiece)(command, **options)

    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=start, STDOUT=subprocess.STDOUT))
    variants = {"paper": {}, "wrong": {"pruning": {"alignment": "sideways"}}}
    study = read_study(write_study(tmp_path / "study.yaml", variants=variants))
    only = ["*/dense", "*/wrong at *", "*/dense tuned"]
    study_runner = StudyRunner(
        study, SCRIPTS, tmp_path / "pieces", tmp_path / "results.jsonl", {}, workers=2, threads=1, only=only
    )
    assert study_runner.run() is None
    assert [piece.name for piece in study_runner.failed] == ["wrong at 40.0%"]
    assert "wrong at 40.0% failed with status 2: see " in caplog.text
    assert "sideways" in (tmp_path / "pieces" / "images/plainmamba/0/wrong at 40.0%" / "log.txt").read_text()
    assert {record["name"] for record in read_results(tmp_path / "results.jsonl").values()} == {"dense", "dense tuned"}


def test_a_configuration_is_that_of_the_data_set_on_the_hub(tmp_path) -> None:
    on_hub = {"dataset_name": "user/images", "dataset_config_name": "160px"}
    study = read_study(write_study(tmp_path / "study.yaml", datasets={"images": {**on_hub, "dense": {}}}))
    piece = list_pieces(study)[0]
    for folders, given in (({}, on_hub), ({"images": "folder"}, {"dataset_name": "folder"})):
        of_piece = StudyRunner(study, SCRIPTS, tmp_path, tmp_path / "none.jsonl", folders)._recipe(piece, tmp_path)
        assert {name: value for name, value in of_piece.items() if name.startswith("dataset_")} == given


def test_pieces_without_a_model_to_start_from_are_named(tmp_path) -> None:
    write_study(tmp_path / "study.yaml")
    finished = run_forked(SCRIPTS / "study.py", *options(tmp_path), "--only", "*/dense tuned")
    assert finished.returncode == 1
    assert (
        "1 pieces were not run, the first of them 'images/plainmamba/0/dense tuned': there is no model of "
        "'images/plainmamba/0/dense'" in finished.stderr
    )


def test_a_piece_is_not_resumed_after_its_start_has_changed(tmp_path, caplog, monkeypatch) -> None:
    """Its checkpoint would go on from weights of which the results know nothing."""
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace())  # starts nothing
    study = read_study(write_study(tmp_path / "study.yaml"))
    dense, tuned = list_pieces(study)[:2]
    write_results({dense.key: {"piece": dense.key, "options": dense.options}}, tmp_path / "results.jsonl")
    files = {
        tmp_path / dense.key / "last" / "model.safetensors": "the new weights",
        tmp_path / tuned.key / "checkpoint-1" / "training_state.json": "{}",
        tmp_path / tuned.key / "start_weights.txt": "the old ones",
    }
    for file, content in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    study_runner = StudyRunner(study, SCRIPTS, tmp_path, tmp_path / "results.jsonl", {}, only=["*/dense tuned"])
    assert study_runner.run() is None
    assert study_runner.failed == [tuned]
    assert f"{tuned.key} cannot be resumed, because it started from other weights than the current ones" in caplog.text
    assert str(tmp_path / tuned.key) in caplog.text


def test_select_pieces(tmp_path) -> None:
    pieces = list_pieces(read_study(write_study(tmp_path / "study.yaml", seeds=[0, 1])))
    selected = select_pieces(pieces, ["images/*/1/paper at *", "*/dense"])
    keys = ["images/plainmamba/1/paper at 40.0%", "images/plainmamba/0/dense", "images/plainmamba/1/dense"]
    assert [piece.key for piece in selected] == keys
    with pytest.raises(
        ValueError, match=r"No piece of the study matches 'cats/\*'; the first piece is 'images/plainmamba/0/den"
    ):
        select_pieces(pieces, ["*", "cats/*"])


def test_results_of_another_study_are_refused(tmp_path) -> None:
    study = read_study(write_study(tmp_path / "study.yaml"))
    piece = list_pieces(study)[0]
    write_results({piece.key: {"piece": piece.key, "options": {"learning_rate": 1}}}, tmp_path / "results.jsonl")
    with pytest.raises(ValueError, match="has other options than in the study"):
        StudyRunner(study, SCRIPTS, tmp_path, tmp_path / "results.jsonl", {})
    with pytest.raises(ValueError, match="There are 0 workers"):
        StudyRunner(study, SCRIPTS, tmp_path, tmp_path / "none.jsonl", {}, workers=0)
    with pytest.raises(ValueError, match="The study has no data set"):
        StudyRunner(study, SCRIPTS, tmp_path, tmp_path / "none.jsonl", {"cats": "folder"})


def test_results_from_other_weights_are_refused(tmp_path) -> None:
    study = read_study(write_study(tmp_path / "study.yaml"))
    dense, tuned = list_pieces(study)[:2]
    results = {
        dense.key: {"piece": dense.key, "options": dense.options, "weights": "new"},
        tuned.key: {"piece": tuned.key, "options": tuned.options, "weights": "of it", "start_weights": "new"},
    }
    check_results(results, study)
    results[tuned.key]["start_weights"] = "old"
    compared = next(piece for piece in list_pieces(study) if piece.name == "untrained")
    results[compared.key] = {"piece": compared.key, "options": compared.options, "start_weights": "old"}
    message = (
        r"other weights than the current ones of 'images/.*/0/dense': 'images/.*dense tuned', 'images/.*untrained'"
    )
    with pytest.raises(ValueError, match=message):
        check_results(results, study)
    del results[tuned.key]["start_weights"], results[compared.key]["start_weights"]  # of before results had them
    check_results(results, study)


def test_run_ends_when_a_piece_has_other_weights_than_its_results(tmp_path, monkeypatch) -> None:
    """Its line was removed to get its model back, but not those of the pieces that had started from it."""
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=EndedPiece, STDOUT=subprocess.STDOUT))
    study = read_study(write_study(tmp_path / "study.yaml"))
    dense, tuned = list_pieces(study)[:2]
    results = tmp_path / "results.jsonl"
    line = {"piece": tuned.key, "script": "train", "dataset": "images", "family": "plainmamba", "seconds": 1}
    write_results({tuned.key: {**line, "options": tuned.options, "start_weights": "old"}}, results)
    study_runner = StudyRunner(study, SCRIPTS, tmp_path, results, {})
    with pytest.raises(
        ValueError, match=r"other weights than the current ones of 'images/.*/0/dense': 'images/.*tuned'"
    ):
        study_runner.run()
    assert list(read_results(results)) == [tuned.key, dense.key]
    assert not (tmp_path / list_pieces(study)[2].key).exists(), "nothing is started from the new weights"


class EndedPiece:
    """Replaces `subprocess.Popen` by a training run that has already ended."""

    returncode = 0

    def __init__(self, command: Sequence[str], **_: Any) -> None:
        folder = Path(command[command.index("--recipe") + 1]).parent
        (folder / "last").mkdir()
        (folder / "last" / "model.safetensors").write_text("the new weights")
        figures = {"eval_top1": 0.5, "gflops_pruned": 1.0, "num_parameters": 1, "history": []}
        (folder / "all_results.json").write_text(json.dumps(figures))

    def poll(self) -> int:
        return self.returncode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to do: --folder runs the study, and --report writes its page"),
        (["--report", "STUDY.md", "--only", "*/dense", "--workers", "2"], "--only, --workers need --folder"),
        (["--report", "STUDY.md"], "results.jsonl does not exist, and without --folder nothing is run"),
        (["--folder", "pieces", "--threads", "0"], "There are 0 threads; at least 1 is needed"),
    ],
)
def test_options_that_would_do_nothing_are_refused(arguments, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path / "study.yaml")
    ended = run_forked(SCRIPTS / "study.py", "--study", "study.yaml", "--results", "results.jsonl", *arguments)
    assert ended.returncode != 0
    assert message in ended.stderr
    assert not (tmp_path / "STUDY.md").exists()


@pytest.mark.parametrize(
    ("main", "needed"),
    [(times.main, ["--study", "s", "--output", "t"]), (times_of_videos.main, ["model", "results"])],
    ids=["images", "videos"],
)
def test_a_time_needs_a_turn(main, needed, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["times.py", *needed, "--turns", "0"])
    with pytest.raises(SystemExit):
        main()
    assert "argument --turns: '0' is not a whole number of at least 1" in capsys.readouterr().err


def test_results_of_no_piece_are_named(tmp_path) -> None:
    write_study(tmp_path / "study.yaml")
    key = {"dataset": "images", "family": "plainmamba", "seed": 0, "name": "aligned"}
    write_results({"aligned": {"piece": "images/plainmamba/0/aligned", **key}}, tmp_path / "results.jsonl")
    ended = run_forked(SCRIPTS / "study.py", *options(tmp_path), "--only", "*/dense tuned")
    assert "has results that are not in the study, and are ignored: images/plainmamba/0/aligned" in ended.stderr


def test_study_may_get_more_variants(tmp_path) -> None:
    """A comparison that lacks a variant is run again; until then, its figures are shown. For other pieces, options must
    match exactly."""
    more = {"paper": {}, "naive": {"pruning": {"alignment": "none"}}, "random": {"pruning": {"importance": "random"}}}
    old, new = (
        {piece.name: piece for piece in list_pieces(read_study(write_study(tmp_path / f"{name}.yaml", **changes)))}
        for name, changes in (("old", {}), ("new", {"variants": more, "more_variants": {}}))
    )
    record = {"options": old["untrained"].options}
    assert may_be_of(record, old["untrained"])
    assert may_be_of(record, new["untrained"])
    assert not may_be_of({"options": new["untrained"].options}, old["untrained"])
    assert not may_be_of({"options": {**old["untrained"].options, "max_eval_samples": 1}}, new["untrained"])
    assert not may_be_of({"options": old["dense"].options}, new["dense tuned"])

    figures = {name: {"top1": 0.5, "gflops": 1, "images_per_second": 9} for name in ("dense", "paper at 40.0%")}
    records = {(0, "dense"): {"figures": {"top1": 0.75}}, (0, "untrained"): {"figures": figures}}
    group = Group(read_study(tmp_path / "new.yaml"), records)
    assert group.untrained_losses("paper", 0.4) == {0: 25}
    assert group.untrained_losses("random", 0.4) == group.time_shares("untrained", "random at 40.0%") == {}


@pytest.mark.parametrize("line", ["", "{", "[]", "{}"])
def test_damaged_results_are_refused(line, tmp_path) -> None:
    (tmp_path / "results.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError, match="line 1 is not a result"):
        read_results(tmp_path / "results.jsonl")


def test_expected_seconds(tmp_path) -> None:
    dense = list_pieces(read_study(write_study(tmp_path / "study.yaml")))[0]
    like = {"script": "train", "dataset": "images", "family": "plainmamba"}
    assert expected_seconds(dense, []) == 0
    others = [{**like, "family": "vim", "seconds": 9}, {**like, "script": "finetune", "seconds": 5}]
    assert expected_seconds(dense, others) == 9
    assert expected_seconds(dense, others[1:]) == 5
    assert expected_seconds(dense, [*others, {**like, "seconds": 2}, {**like, "seconds": 4}]) == 3


def test_times_are_those_of_the_compared_schedules(tmp_path) -> None:
    """A variant without a method is pruned by the paper's, whatever the one before it was pruned by."""
    variants = {"paper": {}, "merged": {"pruning": {"method": "local_merge"}}, "l1": {"pruning": {"importance": "l1"}}}
    shallow = {"model_name_or_path": {"plainmamba": str(tmp_path / "shallow")}}
    smaller = {**SMALL["smaller"], "1 layers": shallow}
    study = read_study(write_study(tmp_path / "study.yaml", variants=variants, smaller=smaller))
    model, shallow_model = (
        PlainMambaForImageClassification(make_plainmamba_config(patch_size=4, stem_channels=4, **changes)).eval()
        for changes in ({}, {"num_hidden_layers": 1})
    )
    shallow_model.save_pretrained(tmp_path / "shallow")
    cases = make_cases(study, "plainmamba", model, torch.randn(1, 3, 32, 32))
    schedules = {name: case.keywords["token_pruning"] for name, case in cases.items()}
    methods = {name: schedule and (schedule["method"], schedule["alignment"]) for name, schedule in schedules.items()}
    assert methods == {
        "dense": None,
        "paper at 40.0%": ("top", "repeat"),
        "merged at 40.0%": ("local_merge", "none"),
        "l1 at 40.0%": ("top", "repeat"),
        "naive at 40.0%": ("top", "none"),
        "dense, 8 pixels": None,
        "dense, 1 layers": None,
    }
    assert cases["dense, 1 layers"].func.config.num_hidden_layers == 1
    assert schedules["l1 at 40.0%"]["importance"] == "l1"
    assert cases["dense, 8 pixels"].args[0].shape == (1, 3, 8, 8)


def test_times_of_models_without_weights_or_of_another_size_are_refused(tmp_path) -> None:
    new = read_study(write_study(tmp_path / "new.yaml"))
    with pytest.raises(ValueError, match="--study has no weights for plainmamba"):
        check_study(new)
    families = {"plainmamba": {"model_name_or_path": "study/photos/plainmamba-imagenette"}}
    with pytest.raises(ValueError, match="--study trains with another image size on images"):
        check_study(read_study(write_study(tmp_path / "resized.yaml", families=families)))
    check_study(read_study(RECIPES / "study_photos.yaml"))


def test_every_schedule_that_the_page_needs_is_compared() -> None:
    for file in STUDIES:
        study = read_study(file)
        group = Group(study, {})
        compared = {piece.name: piece.options for piece in list_pieces(study)}["untrained"]["schedules"]
        for name in study.all_variants:
            for budget in study.budgets if name in study.every_budget else [study.main_budget]:
                schedule = {"flops_reduction": budget, **study.all_variants[name].pruning}
                assert compared[group.schedule_name(name, budget)] == schedule


# ---- The page ----------------------------------------------------------------------------------------------------


def test_figures_of_the_page() -> None:
    assert mean_and_spread([]) == "–"
    assert mean_and_spread({0: 1.234}) == "1.23 (1 seed)"
    assert mean_and_spread({0: 1.0, 1: 2.0, 2: 3.0}, signed=True) == "+2.00 ± 1.00"
    assert difference({0: 3.0, 1: 5.0}, {1: 1.0, 2: 9.0}) == {1: 4.0}
    assert verdict({0: 1.0}) == "not decided yet"
    assert verdict({0: 1.0, 1: 0.1}) == "holds"
    assert verdict({0: -1.0, 1: -0.1}) == "does not hold"
    assert verdict({0: -1.0, 1: 0.1}) == "differs between seeds"


def test_page_of_made_up_results(tmp_path) -> None:
    """Losses, advantages, times and verdicts worked out by hand."""
    study = read_study(write_study(tmp_path / "study.yaml", seeds=[0, 1]))
    records = {}

    def add(seed: int, name: str, figures: dict) -> None:
        key = f"images/plainmamba/{seed}/{name}"
        records[key] = {"piece": key, "dataset": "images", "family": "plainmamba", "seed": seed, "name": name} | {
            "figures": figures
        }

    def compared(top1: float, gflops: float, speed: float) -> dict:
        return {"top1": top1, "gflops": gflops, "images_per_second": speed}

    paper, naive, elastic = tuned_name("paper", 0.4), tuned_name("naive", 0.4), tuned_name("elastic", 0.4)
    for seed, dense in ((0, 0.90), (1, 0.92)):
        add(seed, "dense", {"top1": dense, "gflops": 2.0, "num_parameters": 1234})
        schedules = {paper: compared(dense - 0.05, 1.2, 160), naive: compared(dense - 0.09, 1.2, 160)}
        add(seed, "untrained", {"dense": compared(dense, 2.0, 100), **schedules})
        add(seed, "dense tuned", {"top1": dense + 0.01})
        add(seed, "dense, 8 pixels", {"top1": dense - 0.02, "gflops": 0.9})
        add(seed, paper, {"top1": dense, "top1_by_epoch": [dense - 0.02, dense]})
        add(seed, naive, {"top1": dense - 0.02 + 0.03 * seed, "top1_by_epoch": [0.5]})
        add(
            seed,
            "elastic compared",
            {"dense": compared(dense, 2.0, 100), elastic: compared(dense - 0.002, 1.2, 150)},
        )
    (tmp_path / "discussion.md").write_text("What it means.\n")
    write_report(study, records, tmp_path / "STUDY.md", tmp_path)

    page = (tmp_path / "STUDY.md").read_text()
    assert "What it means." in page
    assert "Dense: top-1 91.00 ± 1.41% (2 of 2 seeds; 1,234 parameters, 2.0000 GFLOPs)." in page
    assert "| paper |  | 5.00 ± 0.00 | 1.00 ± 0.00 | +0.00 ± 0.00 | 0.62 ± 0.00 |" in page
    assert "| naive | alignment none | 9.00 ± 0.00 | 1.50 ± 2.12 | +0.50 ± 2.12 | 0.62 ± 0.00 |" in page
    assert "| paper loses less than naive, not fine-tuned | +4.00 ± 0.00 | holds |" in page
    assert "| paper loses less than naive, fine-tuned | +0.50 ± 2.12 | differs between seeds |" in page
    assert "| difference from paper | +0.20 ± 0.00 |" in page
    assert "| 8 pixels | 0.45 ± 0.00 | – | 3.00 ± 0.00 |" in page
    assert "| images, plainmamba, paper | 91.00 ± 1.41 | 86.00 ± 1.41 | 89.00 ± 1.41 | 91.00 ± 1.41 |" in page
    drawing = (tmp_path / "images-plainmamba.svg").read_bytes()
    (tmp_path / "pages").mkdir()
    write_report(study, records, tmp_path / "pages" / "STUDY.md", tmp_path)
    assert "](../images-plainmamba.svg)" in (tmp_path / "pages" / "STUDY.md").read_text()
    assert (tmp_path / "images-plainmamba.svg").read_bytes() == drawing

    (tmp_path / "times.json").write_text(json.dumps({"plainmamba": {paper: 0.7, "dense, 8 pixels": 0.5}}))
    write_report(study, records, tmp_path / "STUDY.md", tmp_path)
    page = (tmp_path / "STUDY.md").read_text()
    assert "| paper |  | 5.00 ± 0.00 | 1.00 ± 0.00 | +0.00 ± 0.00 | 0.70 |" in page
    assert "| naive | alignment none | 9.00 ± 0.00 | 1.50 ± 2.12 | +0.50 ± 2.12 | 0.62 ± 0.00 |" in page
    assert "| 8 pixels | 0.45 ± 0.00 | 0.50 | 3.00 ± 0.00 |" in page
    assert (tmp_path / "images-plainmamba.svg").read_bytes() != drawing


def test_points_and_curves_have_all_their_seeds(tmp_path) -> None:
    """The comparison without fine-tuning may have been run with fewer seeds."""
    study = read_study(write_study(tmp_path / "study.yaml", seeds=[0, 1]))
    paper = tuned_name("paper", 0.4)
    trained = {"top1": 0.5, "top1_by_epoch": [0.3, 0.5]}
    records: dict = {(seed, name): {"figures": trained} for seed in study.seeds for name in ("dense", paper)}
    compared = {"top1": 0.4, "gflops": 1.0, "images_per_second": 4}
    figures = {"dense": {**compared, "gflops": 2.0, "images_per_second": 2}, paper: compared}
    group = Group(study, {**records, (0, "untrained"): {"figures": figures}})
    lines = plot_lines(group)
    assert lines["paper, fine-tuned"][1] == ([0.5], [0.5], [50.0, 50.0])
    assert lines["paper, not trained"][1] == ([0.5], [0.5], [40.0])
    curves = report._authors_curves({("images", "plainmamba"): group})
    row = "| 50.00 ± 0.00 | 40.00 (1 seed) | 30.00 ± 0.00 | 50.00 ± 0.00 |"
    assert f"| images, plainmamba, paper {row}" in curves


@pytest.mark.parametrize(
    ("recipe", "results", "page"),
    [
        ("study_small", "study/small.jsonl", "STUDY.md"),
        ("study_photos", "study/photos/study.jsonl", "study/photos/STUDY.md"),
        ("study_photos_160", "study/photos_160/study.jsonl", "study/photos_160/STUDY.md"),
    ],
)
def test_pages_of_the_repository_are_those_of_their_results(recipe, results, page, tmp_path, monkeypatch) -> None:
    """They are what the report writes, and means in their text are in their tables."""
    monkeypatch.setattr(report, "draw_group", lambda *_: None)  # another version of Matplotlib draws differently
    folder = (tmp_path / results).parent
    folder.mkdir(parents=True)
    for name in ("discussion.md", "times.json"):
        if (file := (ROOT / results).parent / name).exists():
            (folder / name).write_text(file.read_text())
    study, records = read_study(RECIPES / f"{recipe}.yaml"), read_results(ROOT / results)
    check_results(records, study)
    write_report(study, records, tmp_path / page, folder)
    text = (tmp_path / page).read_text()
    assert text == (ROOT / page).read_text(), f"{page} has to be written again"
    discussion, tables = text.replace("−", "-").split("## Claims")
    means = set(re.findall(r"-?\d+\.\d+ ± \d+\.\d+", discussion))
    assert means <= set(re.findall(r"-?\d+\.\d+ ± \d+\.\d+", tables))

"""`hf-vssm-prune VERB`: every verb on the shipped model, its help, and the scripts of the same names."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from conftest import PATIENCE, SCRIPTS, load_script
from PIL import Image

import hf_vssm_prune
from hf_vssm_prune import EXAMPLE_MODEL, commands
from hf_vssm_prune.__main__ import main
from hf_vssm_prune.commands import VERBS, command_line
from hf_vssm_prune.environment import PATIENT_THREADS, WAITING, is_command
from hf_vssm_prune.training.arguments import FinetuneArguments
from hf_vssm_prune.training.arguments.help import OptionParser


# A terminal of today has some fifty lines of a hundred characters or more.
LINES, COLUMNS = 50, 120
# What only the repository needs: to test, to document, to publish.
OF_THE_REPOSITORY = {
    "audit",
    "benchmark",
    "build_trashnet",
    "gpu_check",
    "screenshot_card",
    "study",
    "write_model_cards",
}
WITH_GROUPS = ("train", "finetune", "estimate", "evaluate", "compare_methods")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def printed(capsys: pytest.CaptureFixture[str], function, *arguments) -> str:
    """What a command prints that ends by itself, with status 0."""
    with pytest.raises(SystemExit) as exit_:
        function(*arguments)
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_every_verb_has_a_script_and_every_script_a_verb():
    scripts = {file.stem for file in SCRIPTS.glob("*.py")}
    assert scripts - OF_THE_REPOSITORY == VERBS.keys() - {"env"}


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - {"env"}))
def test_script_and_verb_take_the_same_options(verb, capsys):
    words = ["--help", "all"] if verb in WITH_GROUPS else ["--help"]
    of_script = printed(capsys, load_script(verb).main, words)
    of_verb = printed(capsys, main, [verb.replace("_", "-"), *words])
    by_name = [text.partition("\n\n")[2] if verb not in WITH_GROUPS else text for text in (of_script, of_verb)]
    assert by_name[0] == by_name[1]
    assert "--" in of_verb


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_fits_two_screens(verb, capsys):
    lines = printed(capsys, main, [*filter(None, [verb]), "--help"]).splitlines()
    assert len(lines) <= 2 * LINES
    assert max(map(len, lines)) <= COLUMNS


def options_in(text: str) -> set[str]:
    """Those of the lines that list options."""
    lines = [line for line in text.splitlines() if line.startswith(("  --", "  -h"))]
    return {word.strip(",") for line in lines for word in line.split() if word.startswith("--")}


@pytest.mark.parametrize("verb", WITH_GROUPS)
def test_a_group_of_options_fits_one_screen(verb, capsys):
    overview = printed(capsys, main, [verb, "--help"])
    everything = printed(capsys, main, [verb, "--help", "all"])
    groups = [line.partition(":")[0] for line in everything.splitlines() if line[:1].strip()]
    shown = set()
    for group in groups:
        text = printed(capsys, main, [verb, "--help", group])
        assert text in everything
        assert len(text.splitlines()) <= LINES
        shown |= options_in(text)
    assert options_in(overview) <= shown


def test_help_of_an_unknown_group_names_those_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help", "optimiser"])
    assert "--help optimiser: there are the groups task, data, model, optimization" in capsys.readouterr().err


def test_help_tells_defaults_choices_and_switches():
    parser = OptionParser([FinetuneArguments], "What it does.")
    text = parser.format_group("model")
    assert "--image_size, --img_size INT" in text, "names with dashes are not repeated"
    assert "{mse,cosine}" in text
    assert "(default: 1.0)" in text
    assert "required:\n  --model_name_or_path TEXT" in parser.format_help()


def test_version(capsys):
    assert printed(capsys, main, ["--version"]).strip() == hf_vssm_prune.__version__


def test_environment_names_no_place_and_no_secret(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_VSSM_PRUNE_DISABLE_CPU_KERNELS", "0")
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("hf_vssm_prune ")
    for row in ("torch ", "transformers ", "evaluate ", "Python ", "processor ", "kernel cpu (cpu)"):
        assert f"\n{row}" in out
    assert "HF_VSSM_PRUNE_DISABLE_CPU_KERNELS" in out
    assert "hf_secret" not in out
    assert str(Path.home()) + "/" not in out


SCRIPT = str(SCRIPTS / "train.py")


@pytest.mark.parametrize(
    ("started", "words", "expected"),
    [
        ("/usr/bin/hf-vssm-prune", [], True),
        (SCRIPT, [], True),
        ("-m", ["-u", "-m", "hf_vssm_prune", "train"], True),
        ("-m", ["-mhf_vssm_prune", "train"], True),
        ("-m", ["-m", "pytest"], False),
        ("/somewhere/train.py", [], False),
        ("-c", [], False),
        ("", [], False),
    ],
)
def test_own_commands_are_known(started, words, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(sys, "orig_argv", ["python", *(words or [started])])
    assert is_command() == expected


@pytest.mark.parametrize("set_by_user", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_commands_choose_how_threads_wait_and_the_user_wins(set_by_user):
    environment = {name: value for name, value in os.environ.items() if name not in WAITING} | set_by_user
    command = [sys.executable, "-m", "hf_vssm_prune", "env"]
    report = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found = dict(line.split() for line in report.splitlines() if line.startswith(WAITING))
    assert found == (set_by_user or PATIENT_THREADS)


def test_the_library_changes_no_environment():
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    code = (
        "import os; before = dict(os.environ); import hf_vssm_prune.environment; print(set(os.environ) - set(before))"
    )
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert not any(name in found.stdout for name in WAITING)


def test_the_demo_chooses_as_the_commands_do(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    runpy.run_path(str(SCRIPTS.parent / "demo" / "threads.py"))
    assert os.environ == PATIENT_THREADS


@pytest.mark.parametrize(("words", "status"), [([], 2), (["prune"], 2)])
def test_wrong_verbs_show_the_right_ones(words, status, capsys):
    try:
        code = main(words)
    except SystemExit as exit_:
        code = exit_.code
    assert code == status
    output = capsys.readouterr()
    assert "finetune" in output.out + output.err


def test_module_and_version_in_a_process():
    command = [sys.executable, "-m", "hf_vssm_prune", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.strip() == hf_vssm_prune.__version__


def test_a_missing_extra_is_one_line(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "hf_vssm_prune.commands.train", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    for name in [name for name in sys.modules if name.startswith("hf_vssm_prune.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(commands, "train", raising=False)
    assert main(["train", "--help"]) == 1
    error = capsys.readouterr().err
    assert error == "error: train needs accelerate: pip install 'hf_vssm_prune[train]'\n"


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        (["/usr/bin/hf-vssm-prune", "finetune"], ["hf-vssm-prune", "finetune"]),
        (["/x/hf_vssm_prune/__main__.py", "finetune"], ["hf-vssm-prune", "finetune"]),
        (["scripts/finetune.py", "--lr", "1"], ["python", "scripts/finetune.py", "--lr", "1"]),
    ],
)
def test_command_line_as_somebody_else_would_type_it(started, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", started)
    assert command_line() == expected


# Every verb


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.linear_gradient("L").resize((28, 28)).save(file)
    return str(file)


# What the package ships beside its model.
(DATASET,) = (folder.name for folder in EXAMPLE_MODEL.parent.iterdir() if folder != EXAMPLE_MODEL)
DATA = ["--dataset_name", DATASET, "--workers", "0"]
MODEL = ["--model_name_or_path", str(EXAMPLE_MODEL)]
SHORT = ["--max_train_samples", "32", "--max_eval_samples", "20", "--batch_size", "16", "--max_train_steps", "1"]
BUDGET = ["--flops_reduction", "0.4"]


def test_finetune_card_push_and_reopen(photo, tmp_path, capsys):
    run = [*DATA, *MODEL, *BUDGET, *SHORT, "--use_cpu", "--num_warmup_steps", "0", "--min_lr", "0"]
    assert main(["finetune", *run, "--output_dir", str(tmp_path / "run")]) == 0
    folder = str(tmp_path / "run" / "best")
    capsys.readouterr()
    assert main(["push", folder, "user/name", "--dry_run"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert main(["reopen", folder, photo]) == 0
    assert len(json.loads(capsys.readouterr().out)["labels"]) == 1
    (tmp_path / "card.yaml").write_text("name: a-new-name\n")
    assert main(["write_card", folder, str(tmp_path / "card.yaml")]) == 0
    assert "a-new-name" in (tmp_path / "run" / "best" / "README.md").read_text()


def test_train(tmp_path):
    sizes = ["hidden_size=16", "num_hidden_layers=2", "state_size=4", "num_channels=1"]
    new = ["--family", "plainmamba", "--image_size", "28", "--patch_size", "14", "--config_overrides", *sizes]
    statistics = ["--image_mean", "0.5", "--image_std", "0.25"]
    run = [*DATA, *new, *statistics, *SHORT, "--use_cpu", "--num_warmup_steps", "0"]
    assert main(["train", *run, "--output_dir", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "last" / "config.json").exists()


def test_evaluate_and_compare_methods(tmp_path, capsys):
    run = [*DATA, *MODEL, "--max_eval_samples", "20", "--device", "cpu"]
    assert main(["evaluate", *run, *BUDGET]) == 0
    assert "| pruned |" in capsys.readouterr().out
    (tmp_path / "schedules.json").write_text(json.dumps({"one": {"layers": [2], "keep_ratios": [0.5]}}))
    assert main(["compare-methods", *run, "--schedules", str(tmp_path / "schedules.json")]) == 0
    assert "| one |" in capsys.readouterr().out


def test_estimate(capsys):
    assert main(["estimate", *MODEL, *BUDGET, "--num_images", "100", "--per_device_train_batch_size", "10"]) == 0
    assert "steps" in capsys.readouterr().out


def test_convert_visualize_and_export(photo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(EXAMPLE_MODEL), "published.safetensors"]) == 0
    assert main(["convert", "published.safetensors", "model"]) == 0
    assert main(["visualize", photo, "--model_name_or_path", "model"]) == 0
    assert (tmp_path / "kept_tokens.png").exists()
    assert main(["export", "model", "exported", "--formats", "torch", *BUDGET]) == 0
    assert list((tmp_path / "exported").glob("*.pt2"))

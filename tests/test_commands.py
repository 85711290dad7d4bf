"""`hf-vssm-prune VERB`: each verb with the example model, its help, and the script of the same name."""

import ast
import json
import os
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from conftest import IMPORTED_WITH, PATIENCE, SCRIPTS, STARTED_WITH, load_script
from PIL import ExifTags, Image
from transformers import PreTrainedConfig, UperNetConfig

import hf_vssm_prune
from hf_vssm_prune import EXAMPLE_MODEL, VideoMambaConfig, VimConfig, commands
from hf_vssm_prune.__main__ import main
from hf_vssm_prune.commands import REPOSITORY_SCRIPTS, VERBS, make_parser_of, reopen
from hf_vssm_prune.environment import PATIENT_THREADS, WAITING, command_line, is_command, let_threads_wait
from hf_vssm_prune.pruning_methods import METHODS
from hf_vssm_prune.training.arguments import FinetuneArguments
from hf_vssm_prune.training.arguments.help import OptionParser
from hf_vssm_prune.training.tasks import TASKS
from hf_vssm_prune.training.tasks.classification import ImageClassification
from hf_vssm_prune.training.tasks.object_detection import BoxArguments, DetectionArguments


# A terminal of today has some fifty lines of a hundred characters or more.
LINES, COLUMNS = 50, 120
# What has no script, because nothing starts it on several devices.
VERBS_ALONE = {"env", "completion"}
WITH_GROUPS = ("train", "finetune", "estimate", "evaluate", "compare_methods")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def printed(capsys: pytest.CaptureFixture[str], function, *arguments) -> str:
    """The output of a command that exits with status 0."""
    with pytest.raises(SystemExit) as exit_:
        function(*arguments)
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_every_verb_has_a_script_and_every_script_a_verb():
    scripts = {file.stem for file in SCRIPTS.glob("*.py")}
    assert scripts - REPOSITORY_SCRIPTS.keys() == VERBS.keys() - VERBS_ALONE
    assert scripts >= REPOSITORY_SCRIPTS.keys()


def test_a_script_of_the_repository_is_no_verb_and_named(capsys):
    with pytest.raises(SystemExit):
        main(["gpu-check"])
    assert "There: python scripts/gpu_check.py" in capsys.readouterr().err


def test_an_option_is_the_same_option_in_every_verb():
    """An option means the same in all verbs. The exception is the batch size, which is for training or for
    evaluation."""
    meanings: dict[str, set[str]] = {}
    for verb in VERBS:
        for action in make_parser_of(verb)()._actions:
            for name in action.option_strings:
                meanings.setdefault(name.replace("-", "_"), set()).add(action.dest)
    several = {name: found for name, found in meanings.items() if len(found) > 1}
    assert several == {"__batch_size": {"per_device_train_batch_size", "per_device_eval_batch_size"}}


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - VERBS_ALONE))
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
    """Options on the lines that list options."""
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
    assert "--help optimiser: the groups are task, data, model, teacher, optimization" in capsys.readouterr().err


def test_a_group_has_its_own_name_after_a_parser_of_its_base_class():
    assert [*OptionParser([BoxArguments], None).groups] == ["box", "common"]
    assert [*OptionParser([DetectionArguments], None).groups] == ["detection", "common"]


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


def test_commands_choose_how_threads_wait():
    """Runs `env` in a new process, as a user would. Its report ends with the environment variables that are set."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    command = [sys.executable, "-m", "hf_vssm_prune", "env"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.split()[:2] == ["hf_vssm_prune", hf_vssm_prune.__version__]
    found = dict(line.split() for line in done.stdout.splitlines() if line.startswith(WAITING))
    assert found == PATIENT_THREADS


@pytest.mark.parametrize("set_by_user", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_the_user_wins(set_by_user, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(set_by_user))
    let_threads_wait()
    assert os.environ == set_by_user


def test_the_library_changes_no_environment():
    """Importing the library in a process that is not one of its commands, like this one, sets no variables."""
    assert all(IMPORTED_WITH.get(name) == STARTED_WITH.get(name) for name in WAITING)


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda script: script.stem)
def test_scripts_choose_before_torch_is_loaded(script):
    """If set later, the variables would affect only child processes and not the script itself."""
    imports = [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    packages = [name.partition(".")[0] for name in names]
    if "hf_vssm_prune" in packages:
        before = packages[: packages.index("hf_vssm_prune")]
        assert not {"torch", "transformers", "accelerate", "benchmarking", "gpu_checking"} & set(before)


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


def test_a_missing_extra_is_one_line(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "hf_vssm_prune.commands.train", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    for name in [name for name in sys.modules if name.startswith("hf_vssm_prune.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(commands, "train", raising=False)
    assert main(["train", "--help"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: train needs accelerate: install the package with its extra `train`")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        (["/usr/bin/hf-vssm-prune", "finetune"], ["hf-vssm-prune", "finetune"]),
        (["/x/Scripts/hf-vssm-prune.exe", "finetune"], ["hf-vssm-prune", "finetune"]),
        (["/x/hf_vssm_prune/__main__.py", "finetune"], ["hf-vssm-prune", "finetune"]),
        (["scripts/finetune.py", "--lr", "1"], ["python", "scripts/finetune.py", "--lr", "1"]),
    ],
)
def test_command_line_as_somebody_else_would_type_it(started, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", started)
    assert command_line() == expected


# Completion

COMPLETE = """
eval "$1"
shift
COMP_WORDS=(hf-vssm-prune "$@")
COMP_CWORD=$#
_shtab_hf_vssm_prune hf-vssm-prune "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def completion() -> str:
    pytest.importorskip("shtab")
    printed = StringIO()
    with redirect_stdout(printed):
        assert main(["completion", "bash"]) == 0
    return printed.getvalue()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fi"], ["finetune"]),
        ([""], sorted(VERBS)),
        (["finetune", "--prune_m"], ["--prune_method"]),
        (["finetune", "--prune_method", "local_"], sorted(name for name in METHODS if name.startswith("local_"))),
        (["train", "--task", ""], sorted(TASKS)),
        (["convert", "photo"], ["photo.png"]),
        (["evaluate", "--dataset_name", "photo"], ["photo.png"]),
        (["demo", "--seed", "photo"], []),
    ],
    ids=" ".join,
)
def test_completion_in_bash(words, expected, completion, photo):
    command = ["bash", "-c", COMPLETE, "bash", completion, *words]
    done = subprocess.run(command, cwd=Path(photo).parent, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert sorted(set(done.stdout.split())) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_of_other_shells_has_every_option(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for verb in VERBS:
        for action in make_parser_of(verb)()._actions:
            assert all(name.lstrip("-") in script for name in action.option_strings if "-" not in name.lstrip("-"))


def test_completion_without_an_extra_has_the_verbs_alone(monkeypatch, capsys):
    pytest.importorskip("shtab")

    def missing(verb):
        raise ModuleNotFoundError(verb)

    monkeypatch.setattr("hf_vssm_prune.commands.completion.make_parser_of", missing)
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "finetune" in script
    assert "--prune_method" not in script


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


def test_images_are_reopened_upright(photo, tmp_path):
    image = Image.open(photo)
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    first, second = reopen.classify(str(EXAMPLE_MODEL), [photo, str(tmp_path / "turned.png")])["logits"]
    assert first == pytest.approx(second, abs=1e-5)


def save_config(config: PreTrainedConfig, folder: Path) -> str:
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("make_model", "file", "message"),
    [
        (lambda folder: str(EXAMPLE_MODEL), "none.png", "none.png"),
        (lambda folder: "no/such", "photo.png", "no/such cannot be opened"),
        (lambda folder: save_config(VideoMambaConfig(), folder), "photo.png", "it must be an image classifier"),
        (
            lambda folder: save_config(UperNetConfig(backbone_config=VimConfig()), folder),
            "photo.png",
            "'upernet' model; it must be an image classifier",
        ),
    ],
    ids=["no image", "no model", "videos", "segmentation"],
)
def test_what_cannot_be_reopened_is_named(make_model, file, message, tmp_path, capsys):
    assert main(["reopen", make_model(tmp_path / "model"), file]) == 1
    error = capsys.readouterr().err
    assert "error: " in error
    assert message in error.rpartition("error: ")[2]


def test_models_with_other_heads_are_not_classified_with(tmp_path):
    folder = save_config(UperNetConfig(backbone_config=VimConfig()), tmp_path)
    with pytest.raises(ValueError, match="is a 'upernet' model; --task image-classification needs a classifier of ima"):
        ImageClassification().load_model(folder, ["a", "b"])


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


def test_convert_and_visualize(photo, tmp_path, monkeypatch, capsys):
    """test_export.py covers `export`."""
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(EXAMPLE_MODEL), "published.safetensors"]) == 0
    assert main(["convert", "published.safetensors", "model"]) == 0
    assert main(["visualize", photo, "--model_name_or_path", "model"]) == 0
    assert (tmp_path / "kept_tokens.png").exists()
    assert main(["convert", "published.safetensors", "again.pth"]) == 1
    assert "error: again.pth would be a folder" in capsys.readouterr().err
    assert main(["visualize", photo, "--frame_sampling", "uniform"]) == 1
    assert "error: --frame_sampling is for videos" in capsys.readouterr().err

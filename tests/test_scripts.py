"""The training scripts as a user runs them: complete runs, killed and resumed runs, two processes, and wrong
options."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import PATIENCE, SCRIPTS, hear_signals, load_script, make_plainmamba_config, make_vim_config
from forking import run_forked, start_ranks
from PIL import Image
from ports import free_port
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_vssm_prune.hub import save_for_hub
from hf_vssm_prune.hub.loading import load_config, new_image_processor
from hf_vssm_prune.pruning_methods import METHODS
from hf_vssm_prune.training import jobs, loop
from hf_vssm_prune.training.arguments import (
    DataArguments,
    DenseModelArguments,
    ElasticArguments,
    FinetuneArguments,
    OptimizationArguments,
    PruningArguments,
    RunArguments,
    ScaleArguments,
    ScratchOptimizationArguments,
    TeacherArguments,
    parse_arguments,
)
from hf_vssm_prune.training.recipes import insert_recipe, read_recipe
from hf_vssm_prune.training.tasks import TaskArguments, choose_task


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SCHEDULE = ["--prune_layers", "1", "3", "--keep_ratios", "0.7", "0.6"]
SMALL = ["--batch_size", "4", "--grad_accum_steps", "3", "--lr", "1e-3", "--workers", "0", "--use_cpu"]


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 training and 9 test images of random noise in three classes."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 50), ("test", 9)):
        for i in range(count):
            file = folder / split / f"class {i % 3}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense PlainMamba, which has batch norm in its stem."""
    torch.manual_seed(0)
    config = make_plainmamba_config()
    model = AutoModelForImageClassification.from_config(config)
    processor = new_image_processor(config, [0.5] * 3, [0.25] * 3, crop_pct=1.0)
    return save_for_hub(model, tmp_path_factory.mktemp("dense") / "model", processor)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state in singletons."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def command(script: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, str(SCRIPTS / script), *map(str, arguments)]


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    result = run_forked(SCRIPTS / script, *arguments, environment=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def launch_on_two(script: str, *arguments: str | Path) -> None:
    """Uses `accelerate launch`, which treats several processes on a CPU as several GPUs; the script's --use_cpu takes
    precedence."""
    python, *words = command(script, *arguments)
    launcher = [python, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launcher += [f"--main_process_port={free_port()}", "--mixed_precision=no", "--dynamo_backend=no"]
    result = subprocess.run([*launcher, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr[-3000:]


def run_on_two(script: str, *arguments: str | Path) -> None:
    for process in start_ranks(SCRIPTS / script, *arguments):
        result = process.wait()
        assert result.returncode == 0, result.stderr[-3000:]


def stop(script: str, *arguments: str | Path, after: str, number: signal.Signals) -> subprocess.CompletedProcess:
    """Runs a script which gets a signal, with its children, when it has saved a checkpoint of this name. It sends it
    itself: another process might be late, and the run further or over."""

    def prepare() -> None:
        os.setsid()
        hear_signals()
        save = loop.save_checkpoint

        def save_and_stop(*given: object) -> Path:
            folder = save(*given)
            if folder.name == after:
                loop.save_checkpoint = save  # a run that stops at the end of an epoch saves it once more
                os.killpg(0, number)  # as launchers and terminals do
            return folder

        loop.save_checkpoint = save_and_stop

    return run_forked(SCRIPTS / script, *arguments, environment=ENVIRONMENT, prepare=prepare)


def assert_same_weights(first: Path, second: Path) -> None:
    for name in ("last", "last_ema"):
        weights, others = (load_file(run / name / "model.safetensors") for run in (first, second))
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[key], others[key]) for key in weights), name


def finetuning(image_folder: Path, checkpoint: Path) -> list[str | Path]:
    """All randomness at once: augmentation, mixing, drop path. An epoch has 4 steps of 3 batches of 4 images."""
    options = ["--num_train_epochs", "6", "--checkpointing_steps", "4", "--drop_path", "0.3", "--logging_steps", "5"]
    model = ["--model_name_or_path", checkpoint, "--model_ema_decay", "0.9", "--alignment_layers", "1", "3"]
    return ["--dataset_name", image_folder, *model, *options, *SCHEDULE, *SMALL]


def test_killed_and_resumed_runs_end_with_the_same_weights_to_the_bit(image_folder, checkpoint, tmp_path):
    arguments = finetuning(image_folder, checkpoint)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("finetune.py", *arguments, "--output_dir", whole)

    full = ["finetune.py", *arguments, "--output_dir", broken, "--resume", "latest"]
    killed = stop(*full, after="checkpoint-8", number=signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert not (broken / "last").exists()

    stopped = stop(*full, "--workers", "2", after="checkpoint-12", number=signal.SIGTERM)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr[-3000:]
    assert "Stopped by SIGTERM" in stopped.stderr
    assert "--resume latest" in stopped.stderr
    assert not (broken / "last").exists()

    result = run(*full)
    assert "Resuming from" in result.stderr
    assert_same_weights(whole, broken)
    assert not list(broken.glob(".*"))
    histories = [json.loads((folder / "all_results.json").read_text())["history"] for folder in (whole, broken)]
    assert histories[0] == histories[1]


def test_two_processes_train_and_resume_to_the_bit(image_folder, checkpoint, tmp_path):
    arguments = [*finetuning(image_folder, checkpoint), "--save_total_limit", "20"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    launch_on_two("finetune.py", *arguments, "--output_dir", whole)
    results = json.loads((whole / "all_results.json").read_text())
    assert [entry["step"] for entry in results["history"]] == [2, 4, 6, 8, 10, 12]

    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-4", resumed / "checkpoint-4")
    run_on_two("finetune.py", *arguments, "--output_dir", resumed, "--resume", "latest")
    assert_same_weights(whole, resumed)


def test_train_from_scratch_then_prune_then_evaluate(image_folder, tmp_path):
    sizes = ["hidden_size=16", "num_hidden_layers=4", "state_size=4"]
    new_model = ["--family", "vim", "--image_size", "32", "--patch_size", "4", "--config_overrides", *sizes]
    data = ["--dataset_name", image_folder]
    short = ["--max_train_steps", "2", "--num_warmup_steps", "1", *SMALL]
    run("train.py", *data, *new_model, *short, "--output_dir", tmp_path / "dense")
    dense = AutoModelForImageClassification.from_pretrained(tmp_path / "dense" / "last")
    assert dense.config.model_type == "vim"
    assert dense.config.token_pruning is None
    assert dense.config.id2label == {0: "class 0", 1: "class 1", 2: "class 2"}

    start = ["--model_name_or_path", tmp_path / "dense" / "last"]
    run("finetune.py", *data, *start, *short, "--flops_reduction", "0.4", "--output_dir", tmp_path / "pruned")
    pruned = AutoModelForImageClassification.from_pretrained(tmp_path / "pruned" / "last")
    assert pruned.config.token_pruning["alignment"] == "none"
    assert pruned.config.token_pruning["method"] == "local_merge"
    card = (tmp_path / "pruned" / "last" / "README.md").read_text()
    assert "finetune.py" in card
    assert "--flops_reduction 0.4" in card

    model = ["--model_name_or_path", tmp_path / "pruned" / "last", "--dense_name_or_path", tmp_path / "dense" / "last"]
    result = run("evaluate.py", *data, *model, "--workers", "0", "--device", "cpu", "--json", tmp_path / "out.json")
    assert "| pruned |" in result.stdout
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures.keys() == {"dense", "pruned"}
    assert figures["dense"]["num_images"] == 9
    reduction = 1 - figures["pruned"]["gflops_published"] / figures["dense"]["gflops_published"]
    assert reduction == pytest.approx(0.4, abs=0.005)


def test_a_model_learns_from_a_teacher_of_another_family(image_folder, checkpoint, tmp_path, capsys, monkeypatch):
    sizes = ["hidden_size=16", "num_hidden_layers=2", "state_size=4"]
    model = ["--family", "vim", "--image_size", "16", "--patch_size", "4", "--config_overrides", *sizes]
    teacher = ["--teacher_name_or_path", checkpoint, "--kd_weight", "2", "--kd_temperature", "3"]
    arguments = ["--dataset_name", image_folder, *model, *teacher, "--max_train_steps", "1", "--num_warmup_steps", "0"]
    arguments += [*SMALL, "--output_dir", tmp_path / "student"]
    like_the_teachers = ["--image_mean", *["0.5"] * 3, "--image_std", *["0.25"] * 3]
    arguments += ["--teacher_dtype", "bfloat16"]
    teachers, make_trainer = [], jobs.Trainer
    monkeypatch.setattr(jobs, "Trainer", lambda *given: teachers.append(given[4]) or make_trainer(*given))
    script = load_script("train")
    assert script.main([str(argument) for argument in arguments]) == 1
    assert "expects pixel values made with image_mean [0.5, 0.5, 0.5], but those" in capsys.readouterr().err
    assert script.main([str(argument) for argument in [*arguments, *like_the_teachers]]) == 0
    words = capsys.readouterr().err.split()
    loss, own, taught = (float(words[words.index(name) + 1]) for name in ("loss", "cross_entropy", "distillation"))
    assert loss == pytest.approx(own + 2 * taught, rel=1e-4)
    assert taught > 0
    assert teachers[0].plainmamba.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    assert "kd_temperature" in (tmp_path / "student" / "last" / "README.md").read_text()


def test_a_dense_model_is_given_the_pixel_values_that_it_knows(image_folder, checkpoint, tmp_path, capsys):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    arguments = ["--dataset_name", image_folder, "--model_name_or_path", checkpoint, "--dense_name_or_path", other]
    arguments = [str(argument) for argument in [*arguments, "--workers", "0", "--device", "cpu"]]
    assert load_script("evaluate").main(arguments) == 1
    assert f"is compared with a pruned model, but {checkpoint} has no pruning schedule" in capsys.readouterr().err
    arguments += SCHEDULE
    file = other / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_std": [0.5] * 3}))
    assert load_script("evaluate").main(arguments) == 1
    said = capsys.readouterr().err
    assert f"The dense model {other} expects pixel values made with image_std [0.5, 0.5, 0.5], but those" in said
    shutil.copy(Path(checkpoint) / file.name, file)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"crop_size": {"height": 40, "width": 40}}))
    assert load_script("evaluate").main(arguments) == 1
    assert f"The dense model {other} expects pixel values made with crop_size" in capsys.readouterr().err


def test_schedules_side_by_side(image_folder, checkpoint, tmp_path, capsys):
    schedules = {"one": {"layers": [2], "keep_ratios": [0.5]}, "two": {"layers": [1, 2], "keep_ratios": [0.9, 0.8]}}
    (tmp_path / "schedules.json").write_text(json.dumps(schedules))
    arguments = ["--model_name_or_path", checkpoint, "--dataset_name", image_folder, "--workers", "0"]
    arguments += ["--device", "cpu", "--schedules", tmp_path / "schedules.json", "--json", tmp_path / "out.json"]
    script = load_script("compare_methods")
    assert script.main([str(argument) for argument in arguments]) == 0
    assert list(json.loads((tmp_path / "out.json").read_text())) == ["dense", "one", "two"]

    for content in ("[]", '{"one": 1}', '{"dense": {}}', "no JSON"):
        (tmp_path / "schedules.json").write_text(content)
        assert script.main([str(argument) for argument in arguments]) == 1
        assert f"error: --schedules {tmp_path / 'schedules.json'} " in capsys.readouterr().err


def test_no_model_is_pruned_in_a_way_that_it_cannot_be(checkpoint):
    """The checkpoint is a PlainMamba, whose mixers lack what one importance needs."""
    schedules = jobs.method_schedules(str(checkpoint), 0.02)
    config = load_config(str(checkpoint))
    assert all(config.complete_token_pruning(schedule) for schedule in schedules.values())
    assert "top, repeat, mirrored_backward" not in schedules


def test_methods_side_by_side(image_folder, tmp_path, capsys):
    model = AutoModelForImageClassification.from_config(make_vim_config())
    processor = new_image_processor(model.config, [0.5] * 3, [0.25] * 3, crop_pct=1.0)
    folder = save_for_hub(model, tmp_path / "model", processor)
    arguments = ["--model_name_or_path", folder, "--dataset_name", image_folder, "--workers", "0", "--device", "cpu"]
    arguments += ["--flops_reduction", "0.3", "--json", tmp_path / "out.json"]
    assert load_script("compare_methods").main([str(argument) for argument in arguments]) == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in figures)
    for method in METHODS:
        for alignment in ("none", "repeat"):
            reduction = 1 - figures[f"{method}, {alignment}"]["gflops_published"] / figures["dense"]["gflops_published"]
            assert reduction == pytest.approx(0.3, abs=0.005)
    assert {"top, zero_input", "top, repeat, random", "top, repeat, mirrored_backward"} <= set(figures)


def test_weights_in_half_precision(image_folder, checkpoint, tmp_path, capsys, monkeypatch):
    """Weights are those of `from_pretrained(dtype=...)`, which keeps the parameters of the state in float32."""
    script, evaluated = load_script("evaluate"), {}
    compare_models = jobs.compare_models

    def compare(task, models, *options):
        evaluated.update(models)
        return compare_models(task, models, *options)

    monkeypatch.setattr(jobs, "compare_models", compare)
    arguments = ["--dataset_name", image_folder, "--model_name_or_path", checkpoint, "--workers", "0"]
    arguments = [str(argument) for argument in [*arguments, "--device", "cpu", "--dtype", "bfloat16", *SCHEDULE]]
    assert script.main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    assert evaluated.keys() == {"dense", "pruned"}
    for model in evaluated.values():
        mixer = model.plainmamba.layers[0].mixer
        assert mixer.in_proj.weight.dtype == torch.bfloat16
        assert mixer.A_log.dtype == torch.float32
    assert json.loads((tmp_path / "out.json").read_text())["pruned"]["num_images"] == 9
    capsys.readouterr()
    assert script.main([*arguments, "--int8"]) == 1
    assert capsys.readouterr().err.startswith("error: --int8 needs the rest of the model in float32, but --dtype is")


# Wrong options


FINETUNE = ["--dataset_name", "d", "--output_dir", "o", "--model_name_or_path", "m"]
TRAIN = ["--dataset_name", "d", "--output_dir", "o", "--family", "plainmamba"]
CONTINUE = ["--dataset_name", "d", "--output_dir", "o", "--model_name_or_path", "m"]
EVALUATE = ["--dataset_name", "d", "--model_name_or_path", "m"]
IDLE_TEACHER = ["--teacher_name_or_path", "t", "--kd_weight", "0"]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("finetune", [], "required: --dataset_name"),
        ("finetune", [*FINETUNE, "--nonsense", "1"], "--nonsense"),
        ("finetune", [*FINETUNE, "--prune_layers", "6"], "--prune_layers and --keep_ratios must be given together"),
        ("finetune", [*FINETUNE, "--prune_layers", "6", "--keep_ratios", "1", "1"], "differ in length"),
        ("finetune", [*FINETUNE, "--prune_layers", "6", "--keep_ratios", "1.5"], "--keep_ratios has [1.5]"),
        ("finetune", [*FINETUNE, *SCHEDULE, "--flops_reduction", "0.4"], "cannot be combined"),
        ("compare_methods", [*EVALUATE, "--int8"], "--int8"),
        ("compare_methods", [*EVALUATE, "--schedules", "s", "--flops_reduction", "0.3"], "cannot be combined"),
        ("finetune", [*FINETUNE, "--flops_reduction", "41.6"], "--flops_reduction is 41.6"),
        ("finetune", [*FINETUNE, "--prune_alignment", "copy"], "invalid choice: 'copy'"),
        ("finetune", [*FINETUNE, "--importance", "max"], "invalid choice: 'max'"),
        ("finetune", [*FINETUNE, "--prune_method", "ToMe"], "invalid choice: 'ToMe'"),
        ("train", [*TRAIN, "--elastic_budgets", "0", "1"], "--elastic_budgets has [1.0]"),
        ("finetune", [*FINETUNE, "--elastic_importance", "l2"], "'l2': it needs --elastic_budgets"),
        ("finetune", [*FINETUNE, "--kd_temperature", "0"], "--kd_temperature is 0.0"),
        ("finetune", [*FINETUNE, "--kd_weight", "-1"], "--kd_weight is -1.0"),
        ("finetune", [*FINETUNE, "--alignment_weight", "0", "--alignment_layers", "3"], "needs an --alignment_weight"),
        ("finetune", [*FINETUNE, "--ignore_mismatched_sizes"], "cannot teach"),
        ("finetune", [*FINETUNE, "--mixup", "-1"], "mixup_alpha is -1.0"),
        ("finetune", [*FINETUNE, "--scale", "0.5"], "--scale is [0.5]"),
        ("finetune", [*FINETUNE, "--no_random_crop", "--random_crop_padding", "4"], "cannot be combined"),
        ("finetune", [*FINETUNE, "--no_random_crop", "--scale", "0.5", "1"], "--scale and --no_random_crop cannot be"),
        ("train", [*TRAIN, "--random_crop_padding", "0", "--scale", "0.5", "1"], "--scale and --random_crop_padding"),
        ("finetune", [*FINETUNE, "--learning_rate", "0"], "--learning_rate is 0.0"),
        ("finetune", [*FINETUNE, "--learning_rate", "1e-7"], "--min_lr is 1e-06, above --learning_rate"),
        ("finetune", [*FINETUNE, "--warmup_epochs", "1", "--num_warmup_steps", "9"], "cannot be combined"),
        ("finetune", [*FINETUNE, "--batch_size", "0"], "--per_device_train_batch_size is 0"),
        ("finetune", [*FINETUNE, "--drop_path", "1"], "--drop_path is 1.0: it must be from 0 to less than 1"),
        ("finetune", [*FINETUNE, "--clip_grad", "nan"], "--clip_grad is nan"),
        ("finetune", [*FINETUNE, "--mixed_precision", "int8"], "invalid choice: 'int8'"),
        ("finetune", [*FINETUNE, "--checkpointing_steps", "often"], "--checkpointing_steps is 'often'"),
        ("finetune", [*FINETUNE, "--seed", str(2**32)], "--seed is 4294967296: it must be from 0 to 4294967295"),
        ("finetune", [*FINETUNE, "--push_to_hub"], "--push_to_hub needs --hub_model_id"),
        ("train", [*TRAIN, "--hub_private_repo"], "--hub_private_repo needs --push_to_hub"),
        ("train", [*TRAIN, "--push_to_hub", "--hub_model_id", "user/name/"], "'user/name/' is not a valid repository"),
        ("train", [*TRAIN, "--report_to", "wandb"], "--report_to is 'wandb': it needs --with_tracking"),
        ("train", [*TRAIN, "--shuffle_buffer_size", "9"], "--shuffle_buffer_size is 9: it needs --streaming"),
        ("finetune", [*FINETUNE, "--train_val_split", "1"], "--train_val_split is 1.0"),
        ("finetune", [*FINETUNE, "--max_train_samples", "0"], "--max_train_samples is 0"),
        ("train", TRAIN[:4], "Give either --family"),
        ("train", [*TRAIN, "--model_name_or_path", "m"], "Give either --family"),
        ("train", [*TRAIN, "--kd_weight", "2"], "--kd_weight needs a --teacher_name_or_path"),
        ("train", [*TRAIN, *IDLE_TEACHER], "--teacher_name_or_path t has no use: --kd_weight is 0"),
        ("finetune", [*FINETUNE, *IDLE_TEACHER, "--alignment_weight", "0"], "--kd_weight and --alignment_weight are 0"),
        ("train", [*TRAIN, "--preset", "S"], "unknown preset 'S' of PlainMambaConfig"),
        ("train", [*TRAIN, "--patch_size", "7"], "`patch_size` is 7"),
        ("train", [*TRAIN, "--config_overrides", "hidden_size"], "it must be key=value"),
        ("train", [*TRAIN, "--config_overrides", "hidden_size=wide"], "--config_overrides: Validation error for field"),
        ("train", [*TRAIN, "--config_overrides", "width=3"], "'width', which PlainMambaConfig does not have"),
        ("train", [*TRAIN, "--config_overrides", 'id2label=["a"]'], "'id2label', which cannot be set this way"),
        ("train", [*TRAIN, "--config_overrides", "num_channels=1"], "the model's images have 1 channels"),
        ("train", [*CONTINUE, "--preset", "L1"], "--preset is for a new model"),
        ("train", [*CONTINUE, "--config_overrides", "hidden_size=8"], "--config_overrides is for a new model"),
        ("train", [*CONTINUE, "--image_mean", "0", "0", "0"], "--image_mean is for a new model"),
        ("estimate", [*CONTINUE[4:], "--crop_pct", "1"], "--crop_pct is for a new model"),
        ("evaluate", [*EVALUATE, "--seed", "-1"], "--seed is -1"),
        ("evaluate", [*EVALUATE, "--json", "/nowhere/out.json"], "does not exist"),
        ("evaluate", [*EVALUATE, "--save_results", f"{__file__}/out"], "test_scripts.py is a file"),
        ("evaluate", [*EVALUATE, "--dtype", "bfloat16", "--mixed_precision", "bf16"], "give only one of them"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(script, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        load_script(script).main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


# Recipes


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
TRAINING_RECIPES = [file for file in sorted(RECIPES.glob("*.yaml")) if not file.stem.startswith("study_")]


def parse(types: list, *arguments: str) -> dict:
    return {name: value for part in parse_arguments(types, arguments, "") for name, value in vars(part).items()}


@pytest.mark.parametrize("recipe", TRAINING_RECIPES, ids=lambda file: file.stem)
def test_recipes_say_what_they_set(recipe):
    values = read_recipe(recipe)
    is_pruned = "prune_layers" in values
    types = [FinetuneArguments, PruningArguments, OptimizationArguments]
    if not is_pruned:
        types = [DenseModelArguments, TeacherArguments, ScratchOptimizationArguments]
    task = choose_task(["--recipe", str(recipe)])
    types += [TaskArguments, DataArguments, task.training_arguments, ElasticArguments, ScaleArguments, RunArguments]
    needed = ["--dataset_name", "d", "--output_dir", "o"]
    if "family" not in values:
        needed += ["--model_name_or_path", "m"]
    parsed = parse(types, "--recipe", str(recipe), *needed)
    assert {name: parsed[name] for name in values} == values
    assert parse(types, *needed, "--recipe", str(recipe), "--batch_size", "3")["per_device_train_batch_size"] == 3
    if recipe.stem.startswith("upernet_"):  # as in the authors' configurations
        assert (parsed["auxiliary_channels"], parsed["batch_norm"]) == (256, "sync")
    if recipe.stem.startswith("r_meeto_"):  # all layers of the authors' models have the same learning rate
        assert parsed["layer_decay"] is None
    if recipe.stem.startswith("dyvm_") and recipe.stem.endswith("_imagenet"):  # they compare the last layer's tokens
        assert parsed["alignment_layers"] == [23]


def test_a_recipe_is_found_by_its_name_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_recipe("few_images") == read_recipe(RECIPES / "few_images.yaml")
    (tmp_path / "few_images").mkdir()
    assert read_recipe("few_images") == read_recipe(RECIPES / "few_images.yaml"), "a folder is no recipe"
    (tmp_path / "few_images").rmdir()
    with pytest.raises(ValueError, match=r"neither a file nor one of the package's recipes: .*few_images"):
        read_recipe("few_image")
    (tmp_path / "few_images").write_text("seed: 5\n")
    assert read_recipe("few_images") == {"seed": 5}, "a file of the user's is taken first"


def test_a_checkpoint_takes_the_place_of_a_recipes_new_model():
    recipe = read_recipe("plainmamba_imagenette_80")
    options = {name: name for name in recipe}
    words = insert_recipe(["--recipe", "plainmamba_imagenette_80", "--model_name_or_path=m"], options)
    assert "--family" in words, "the command has no other option for the model"
    options["model_name_or_path"] = "model_name_or_path"
    words = insert_recipe(["--recipe", "plainmamba_imagenette_80", "--model_name_or_path", "m"], options)
    aside = {"family", "preset", "patch_size", "config_overrides"}
    assert {word.removeprefix("--") for word in words if word.startswith("--")} == {*recipe} - aside | {
        "model_name_or_path"
    }


@pytest.mark.parametrize(
    ("recipe", "options", "expected"),
    [
        (
            "top_plainmamba_l3_imagenet",
            ["--flops_reduction", "0.3"],
            {"flops_reduction": 0.3, "keep_ratios": None, "prune_layers": [6, 12, 18], "importance": "clip"},
        ),
        ("top_plainmamba_l3_imagenet", ["--flops-reduction=0.3"], {"flops_reduction": 0.3, "keep_ratios": None}),
        (
            "top_plainmamba_l3_imagenet",
            ["--prune_method=tome"],
            {"prune_method": "tome", "importance": None, "prune_alignment": None, "keep_ratios": [0.7, 0.7, 0.7]},
        ),
        ("r_meeto_vim_s_imagenet", ["--warmup_epochs", "1"], {"warmup_epochs": 1, "num_warmup_steps": None}),
        ("plainmamba_camvid_pruned", ["--num_train_epochs", "5"], {"num_train_epochs": 5, "max_train_steps": None}),
        ("plainmamba_camvid_pruned", ["--epochs=5"], {"num_train_epochs": 5, "max_train_steps": None}),
        ("few_images", ["--no_random_crop"], {"no_random_crop": True, "scale": [0.08, 1.0]}),
    ],
)
def test_any_value_of_a_recipe_is_overridden(recipe, options, expected):
    task = choose_task(["--recipe", str(RECIPES / f"{recipe}.yaml")])
    types = [TaskArguments, FinetuneArguments, PruningArguments, OptimizationArguments, task.training_arguments]
    needed = ["--dataset_name", "d", "--model_name_or_path", "m"]
    parsed = parse([*types, DataArguments], *needed, "--recipe", str(RECIPES / f"{recipe}.yaml"), *options)
    assert parsed.items() >= expected.items()


@pytest.mark.parametrize("recipe", [file.stem for file in TRAINING_RECIPES])
def test_a_recipe_is_estimated_without_its_options_of_data(recipe, capsys):
    model = [] if "family" in read_recipe(recipe) else ["--family", "vim"]
    wrong = ["--recipe", recipe, *model, "--num_images", "0"]
    with pytest.raises(SystemExit):
        load_script("estimate").main(wrong)
    assert "--num_images is 0" in capsys.readouterr().err


@pytest.mark.parametrize("nothing", ["None", "null"])
def test_options_of_a_new_model_as_in_python_or_json(nothing):
    overrides = ["--config_overrides", f"num_frames={nothing}", "hidden_size=16", "scan_backend=torch"]
    parsed = parse_arguments([DenseModelArguments], ["--family", "videomamba", *overrides], None)[0]
    assert parsed.config(["a"]).input_size == (224, 224)


def test_a_home_folder_is_replaced_everywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("output_dir: ~/runs/a b\nteacher_name_or_path: ~nobody-of-this-name/m\n")
    types = [FinetuneArguments, RunArguments]
    parsed = parse(types, "--recipe=~/own.yaml", "--model_name_or_path=~/modèle/", "--resume", "~/c")
    assert parsed["output_dir"] == f"{tmp_path}/runs/a b"
    assert parsed["model_name_or_path"] == f"{tmp_path}/modèle/"
    assert parsed["resume"] == f"{tmp_path}/c"
    assert parsed["teacher_name_or_path"] == "~nobody-of-this-name/m"
    assert load_script("push").main(["~/model", "user/name"]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/model is not a folder.\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rate: 1\ncolour: red", "has ['colour']"),
        ("- 1", "does not map"),
        ("a: [", "cannot be read"),
        ("learning_rate: -1", "--learning_rate is -1.0"),
        ("output_dir: {a: b}", "the value of output_dir must be a number, text, or a list of them"),
        ("keep_ratios: [&a [x], *a]", "the value of keep_ratios must be"),
        (None, "cannot be read"),
    ],
)
def test_wrong_recipes_are_refused(content, message, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_text(content)
    with pytest.raises(SystemExit) as exit_:
        load_script("finetune").main([*FINETUNE, "--recipe", str(recipe)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


STAGES = {"layers": [1, 3], "keep_ratios": [0.7, 0.6]}
OURS = {"method": "local_merge", "alignment": "none"}
OTHERS = {"method": "top", "alignment": "repeat", "importance": "l1"}


@pytest.mark.parametrize(
    ("given", "of_dense", "of_pruned"),
    [
        ({}, None, STAGES | OTHERS),
        ({"prune_layers": [2], "keep_ratios": [0.5]}, OURS, OTHERS),
        ({"flops_reduction": 0.2}, OURS, OTHERS),
        ({"flops_reduction": 0.191, "prune_layers": [2]}, OURS, OTHERS),
        ({"flops_reduction": 0.2, "prune_alignment": "repeat"}, OURS | {"alignment": "repeat"}, OTHERS),
        ({"flops_reduction": 0.2, "prune_method": "mtr"}, {"method": "mtr"}, {"method": "mtr", "alignment": "none"}),
        ({"prune_method": "mtr"}, "--prune_method is 'mtr'", STAGES | {"method": "mtr", "alignment": "none"}),
        ({"importance": "l2"}, "--importance is 'l2'", STAGES | OTHERS | {"importance": "l2"}),
        ({"importance": "l2", "flops_reduction": 0.2}, {"method": "top", "importance": "l2"}, {"importance": "l2"}),
    ],
    ids=str,
)
def test_what_is_not_given_is_the_checkpoints(given, of_dense, of_pruned):
    arguments = PruningArguments(**given)
    for own, expected in ((None, of_dense), (STAGES | OTHERS, of_pruned)):
        config = make_vim_config(token_pruning=own)
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                arguments.schedule(config)
        elif expected is None:
            assert arguments.schedule(config) is None
        else:
            assert arguments.schedule(config).items() >= expected.items()


def test_another_method_keeps_the_blocks_of_a_checkpoint():
    config = make_vim_config(token_pruning=STAGES | OTHERS | {"block_keep_ratio": 0.5})
    for given, expected in ({}, 0.5), ({"prune_method": "mtr"}, 0.5), ({"block_keep_ratio": 0.25}, 0.25):
        assert PruningArguments(**given).schedule(config)["block_keep_ratio"] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "has no pruning schedule, and none was given"),
        (["--prune_layers", "9", "--keep_ratios", "0.5"], "a model with 4 layers"),
        ([*SCHEDULE, "--resume", "nowhere"], "--resume nowhere is not a checkpoint"),
        ([*SCHEDULE, "--batch_size", "51"], "do not fill one batch of 51"),
        ([*SCHEDULE, "--alignment_layers", "7"], "the model has layers 0 to 3"),
        ([*SCHEDULE, "--block_ratio_weight", "1"], "--block_ratio_weight is 1.0: it needs a --block_keep_ratio"),
        ([*SCHEDULE, "--dataset_config_name", "small"], "only data sets on the Hub have configurations"),
        ([*SCHEDULE, "--with_tracking", "--report_to", "comet_ml"], "no such experiment tracker is installed"),
    ],
)
def test_what_does_not_fit_is_one_line_and_status_1(changes, message, image_folder, checkpoint, tmp_path, capsys):
    arguments = ["--dataset_name", image_folder, "--model_name_or_path", checkpoint, *SMALL]
    arguments += [*changes, "--output_dir", tmp_path / "run"]
    assert load_script("finetune").main([str(argument) for argument in arguments]) == 1
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("error: ")
    assert message in last_line
    assert not (tmp_path / "run").exists()

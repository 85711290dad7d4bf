"""Parts of the training loop, and the loop itself, in this process and with a few small images."""

import errno
import fcntl
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import MAKE_CONFIG, PATIENCE, TOKEN_PRUNING, make_plainmamba_config, make_video_config, make_vim_config
from forking import FORK
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification

import hf_vssm_prune
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.hub.model_card import ModelCardInfo
from hf_vssm_prune.training import interruption, jobs, resuming
from hf_vssm_prune.training.arguments import (
    DataArguments,
    ElasticArguments,
    OptimizationArguments,
    RunArguments,
    ScaleArguments,
)
from hf_vssm_prune.training.batch_norm import freeze_batch_norm
from hf_vssm_prune.training.cards import card_writer
from hf_vssm_prune.training.checkpoints import check_output_dir, find_checkpoints, find_resumed, only_run_in
from hf_vssm_prune.training.data import EvaluationImages, collate, load_image_dataset
from hf_vssm_prune.training.distribution import ProcessLostError, lost_processes_named
from hf_vssm_prune.training.divergence import TrainingDivergedError
from hf_vssm_prune.training.ema import ExponentialMovingAverage
from hf_vssm_prune.training.evaluation import compare_models, comparison_table
from hf_vssm_prune.training.interruption import StopRequest
from hf_vssm_prune.training.loop import Recipe, Trainer
from hf_vssm_prune.training.losses import LossWeights
from hf_vssm_prune.training.memory import peak_memory
from hf_vssm_prune.training.optimization import LearningRateSchedule, make_optimizer, parameter_groups
from hf_vssm_prune.training.run_settings import ADDED
from hf_vssm_prune.training.sampling import EpochSampler
from hf_vssm_prune.training.saved_models import PICTURE
from hf_vssm_prune.training.tasks.classification import AugmentationArguments, ImageClassification, score_predictions
from hf_vssm_prune.training.tasks.object_detection import DetectionArguments, ObjectDetection


CLASSES = ("blue", "green", "red")


def write_images(folder: Path, split: str, per_class: int, generator: np.random.Generator) -> None:
    for number, name in enumerate(CLASSES):
        (folder / split / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = generator.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            pixels[..., 2 - number] += 100
            Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training and 5 test images in each of three colours."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    write_images(folder, "train", 12, generator)
    write_images(folder, "test", 5, generator)
    return folder


@pytest.fixture
def datasets(image_folder: Path):
    return load_image_dataset(str(image_folder))


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state in singletons."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def plain_augmentation(**changes) -> AugmentationArguments:
    """No augmentation, except for what is passed."""
    nothing = {
        "no_random_crop": True,
        "hflip": 0.0,
        "randaugment_num_ops": 0,
        "reprob": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "smoothing": 0.0,
    }
    return AugmentationArguments(**{**nothing, **changes})


def make_recipe(output_dir: Path, losses: LossWeights | None = None, augmentation=None, **optimization) -> Recipe:
    defaults = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_epochs": 0.0,
        "model_ema": False,
    }
    return Recipe(
        OptimizationArguments(**{**defaults, **optimization}),
        ImageClassification(augmentation or plain_augmentation()),
        RunArguments(output_dir=str(output_dir), use_cpu=True),
        losses or LossWeights(),
    )


def make_trainer(config, datasets, recipe: Recipe, teacher=None) -> Trainer:
    torch.manual_seed(0)
    model = recipe.task.auto_class.from_config(config)
    processor = new_image_processor(config, [0.5] * 3, [0.25] * 3, crop_pct=1.0)
    return Trainer(model, datasets, processor, recipe, teacher)


# Optimizer and learning rate


@pytest.mark.parametrize("make_config", [*MAKE_CONFIG.values(), make_video_config])
def test_no_decay_on_norms_biases_and_the_state_space_parameters(make_config):
    config = make_config()
    model = FAMILIES[config.model_type].classifier(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.05)
    found = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert found.keys() == set(names.values())
    undecayed = ("bias", "A_log", ".D", "direction_B", "_embeddings", "class_token")
    for name, decay in found.items():
        assert decay == (0.0 if name.endswith((*undecayed, "norm.weight", "normalization.weight")) else 0.05), name
    assert {group["lr"] for group in groups} == {1e-3}


def test_layer_decay_lowers_the_rate_towards_the_input(vim_config):
    model = AutoModelForImageClassification.from_config(vim_config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.0, layer_decay=0.5)
    rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    assert rates["vim.embeddings.class_token"] == 0.5**5
    assert rates["vim.layers.0.norm.weight"] == 0.5**4
    assert rates["vim.layers.3.mixer.out_proj.weight"] == 0.5
    assert rates["vim.norm.weight"] == rates["classifier.weight"] == 1.0


def test_cosine_schedule_with_warmup_and_lowest_rate():
    schedule = LearningRateSchedule("cosine", num_steps=110, warmup_steps=10, warmup_factor=0.2, min_factor=0.1)
    assert schedule.factor(0) == 0.2
    assert schedule.factor(5) == pytest.approx(0.6)
    assert schedule.factor(10) == 1.0
    assert schedule.factor(35) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert schedule.factor(110) == pytest.approx(0.1)


def test_linear_and_constant_schedules():
    assert LearningRateSchedule("linear", num_steps=10, min_factor=0.5).factor(4) == pytest.approx(0.8)
    assert LearningRateSchedule("constant", num_steps=10, min_factor=0.5).factor(9) == 1.0


def test_a_schedule_keeps_the_ratios_between_groups(vim_config):
    model = AutoModelForImageClassification.from_config(vim_config)
    optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.0, layer_decay=0.5)
    LearningRateSchedule("linear", num_steps=10).apply(optimizer, 5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [group["initial_lr"] / 2 for group in optimizer.param_groups]
    )


# The average of the weights


def test_average_of_weights_and_batch_norm_statistics():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    ema = ExponentialMovingAverage(model, decay=0.75)
    expected = {name: value.double() for name, value in start.items()}
    for step in (1, 2, 3):
        model(torch.randn(8, 3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(model, step)
        for name, value in model.state_dict().items():
            expected[name] = 0.75 * expected[name] + 0.25 * value.double()
    averages = ema.model.state_dict()
    assert averages["1.num_batches_tracked"] == 3
    assert not torch.equal(averages["1.running_mean"], start["1.running_mean"])
    for name in averages.keys() - {"1.num_batches_tracked"}:
        torch.testing.assert_close(averages[name].double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


def test_decay_warms_up():
    ema = ExponentialMovingAverage(nn.Linear(1, 1), decay=0.99, warmup=True)
    assert ema.decay_at(1) == 0.0
    assert ema.decay_at(8) == pytest.approx(0.75)
    assert ema.decay_at(10_000) == 0.99


# The order of images


def test_order_depends_on_seed_and_epoch_and_can_start_in_the_middle():
    sampler = EpochSampler(20, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(20))
    assert list(sampler) == first
    sampler.start_at(epoch=1)
    second = list(sampler)
    assert second != first
    sampler.start_at(epoch=1, image=8)
    assert list(sampler) == second[8:]
    assert len(sampler) == 12
    assert list(EpochSampler(20, seed=2)) != first


# Evaluation


def test_top1_top5_and_loss():
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4], [9.0, 8, 7, 6, 5, 4], [9.0, 8, 7, 6, 5, 4]])
    scores = score_predictions(logits, torch.tensor([0, 4, 5]))
    assert scores[:, 1:].tolist() == [[label, 0, 1, 2, 3, 4] for label in (0, 4, 5)]
    metrics = ImageClassification().metrics([scores[:1], scores[1:]])
    assert (metrics["top1"], metrics["top5"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    log_sum = math.log(sum(math.exp(-i) for i in range(6)))
    assert metrics["loss"] == pytest.approx(log_sum + (0 + 4 + 5) / 3, rel=1e-6)


def test_fewer_labels_than_five():
    scores = score_predictions(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([0]))
    assert scores[0, 1:].tolist() == [0, 2, 1, 0, -1, -1]
    metrics = ImageClassification().metrics([scores])
    assert (metrics["top1"], metrics["top5"]) == (0, 1)


def test_comparison_of_dense_and_pruned(datasets):
    models = {name: AutoModelForImageClassification.from_config(make_vim_config()) for name in ("dense", "pruned")}
    models["pruned"].load_state_dict(models["dense"].state_dict())
    models["pruned"].set_token_pruning(dict(TOKEN_PRUNING))
    processor = new_image_processor(make_vim_config(), [0.5] * 3, [0.25] * 3, crop_pct=1.0)
    images = EvaluationImages(datasets.evaluation, processor)
    loader = torch.utils.data.DataLoader(images, batch_size=4, collate_fn=collate)
    evaluations = compare_models(ImageClassification(), models, loader, torch.device("cpu"))
    batch = collate([images[i] for i in range(len(images))])
    for name, model in models.items():
        with torch.no_grad():
            guesses = model.eval()(batch["pixel_values"]).logits.argmax(-1)
        expected = (guesses == batch["labels"]).float().mean().item()
        assert evaluations[name].num_images == 15
        assert evaluations[name].metrics["top1"] == pytest.approx(expected)
        assert evaluations[name].images_per_second > 0
    flops = hf_vssm_prune.count_flops(models["pruned"].config)
    assert evaluations["dense"].gflops_total == flops.dense.total / 1e9
    assert evaluations["pruned"].gflops_total == flops.pruned.total / 1e9
    assert "| pruned |" in comparison_table(ImageClassification(), evaluations)


# The loop


def test_a_run_leaves_models_checkpoints_and_results(datasets, tmp_path):
    recipe = make_recipe(tmp_path / "run", num_train_epochs=3, model_ema=True, model_ema_warmup=True)
    results = make_trainer(make_plainmamba_config(), datasets, recipe).train()
    assert [folder.name for folder in find_checkpoints(tmp_path / "run")] == ["checkpoint-18", "checkpoint-27"]
    assert json.loads((tmp_path / "run" / "all_results.json").read_text()) == results
    assert [entry["step"] for entry in results["history"]] == [9, 18, 27]
    assert len({file.stat().st_mode for file in (tmp_path / "run" / "checkpoint-27").iterdir()}) == 1
    tops = [entry[key] for entry in results["history"] for key in ("eval_top1", "eval_ema_top1")]
    assert results["best"]["top1"] == max(tops)
    for name in ("best", "last", "last_ema"):
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / name)
        assert (tmp_path / "run" / name / "preprocessor_config.json").is_file()
        assert model.config.num_labels == 3
    assert not list((tmp_path / "run").glob(".*"))


def test_steps_average_the_gradients_of_their_batches(datasets, tmp_path):
    """5 batches of 4 in groups of 3, so the second step has 2. Adam's update hides the magnitude of gradients, but its
    moments do not: with a learning rate near 0, the first moment is 0.9 * 0.1 * first gradient + 0.1 * second."""
    config = make_vim_config(num_labels=3)
    datasets = replace(datasets, train=datasets.train.select(range(5, 25)))
    recipe = make_recipe(tmp_path, gradient_accumulation_steps=3, learning_rate=1e-20, warmup_lr=0.0, min_lr=0.0)
    trainer = make_trainer(config, datasets, recipe)
    model = trainer.plain_model
    images = EvaluationImages(datasets.train, trainer.saved_models.image_processor)
    order = list(EpochSampler(20, seed=0))

    def gradient(batches: list[int]) -> torch.Tensor:
        model.zero_grad()
        for i in batches:
            batch = collate([images[k] for k in order[4 * i : 4 * i + 4]])
            loss = nn.functional.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"])
            (loss / len(batches)).backward()
        return model.classifier.weight.grad.clone()

    expected = 0.09 * gradient([0, 1, 2]) + 0.1 * gradient([3, 4])
    model.zero_grad()
    trainer.train()
    assert trainer.state.steps == 2
    moment = trainer.optimizer.optimizer.state[model.classifier.weight]["exp_avg"]
    torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-8)


def test_finetuning_logs_every_term_and_leaves_the_teacher_alone(datasets, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", logger="hf_vssm_prune")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # so that there is a faster way to start the run
    teacher = AutoModelForImageClassification.from_config(make_plainmamba_config(drop_path_rate=0.5))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    recipe = make_recipe(tmp_path, LossWeights(kd_weight=1.0, alignment_weight=1.0), max_train_steps=3)
    trainer = make_trainer(make_plainmamba_config(token_pruning=dict(TOKEN_PRUNING)), datasets, recipe, teacher)
    trainer.train()
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in teacher.parameters())
    line = next(record.message for record in caplog.records if "step 3/3" in record.message)
    for term in ("loss", "cross_entropy", "distillation", "alignment", "gradient_norm", "learning_rate"):
        assert f" {term} " in line
    launch = "OMP_NUM_THREADS=1 accelerate launch --multi_gpu --num_processes 2 "
    assert any(f"one single-threaded process per core: {launch}" in record.message for record in caplog.records)
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "last").config.token_pruning == TOKEN_PRUNING


def test_elastic_training_prunes_each_step_by_a_budget_drawn(datasets, tmp_path):
    def run(name: str) -> tuple[list[dict | None], Trainer]:
        elastic = ElasticArguments(elastic_budgets=[0, 0.25, 0.394], elastic_importance="random")
        losses = LossWeights(kd_weight=1.0, alignment_weight=1.0)
        recipe = replace(make_recipe(tmp_path / name, losses, num_train_epochs=2), elastic=elastic)
        config = make_vim_config(token_pruning=TOKEN_PRUNING | {"alignment": "zero_input"})
        teacher = AutoModelForImageClassification.from_config(make_vim_config())
        trainer = make_trainer(config, datasets, recipe, teacher)
        used: list[dict | None] = []
        trainer.plain_model.register_forward_pre_hook(
            lambda model, _, options: used.append(options["token_pruning"]) if model.training else None,
            with_kwargs=True,
        )
        trainer.train()
        return used, trainer

    used, trainer = run("once")
    assert len(used) == 18
    assert len({json.dumps(schedule) for schedule in used}) == 3
    pruned = next(schedule for schedule in used if schedule is not None)
    assert (pruned["alignment"], pruned["importance"]) == ("zero_input", "random")
    assert trainer.plain_model.config.token_pruning["layers"] == TOKEN_PRUNING["layers"]
    assert run("again")[0] == used


def test_batches_of_a_step_share_its_budget(datasets, tmp_path):
    """They are pruned like a single large batch."""
    used: dict[int, list[str]] = {}
    for accumulation in (1, 3):
        elastic = ElasticArguments(elastic_budgets=[0, 0.25, 0.394])
        options = {"per_device_train_batch_size": 12 // accumulation, "gradient_accumulation_steps": accumulation}
        recipe = replace(make_recipe(tmp_path / str(accumulation), num_train_epochs=2, **options), elastic=elastic)
        trainer = make_trainer(make_vim_config(), datasets, recipe)
        used[accumulation] = []
        trainer.plain_model.register_forward_pre_hook(
            lambda model, _, options, seen=used[accumulation]: (
                seen.append(json.dumps(options["token_pruning"])) if model.training else None
            ),
            with_kwargs=True,
        )
        trainer.train()
    assert used[3] == [schedule for schedule in used[1] for _ in range(3)]


def test_parameters_of_pruning_are_trained(datasets, tmp_path):
    """Also with elastic budgets, which use the same layers; a step with a budget of 0 uses none of them."""
    options = {"layers": [1, 3], "keep_ratios": [0.7, 0.6], "method": "dyvm", "alignment": "learned"}
    elastic = ElasticArguments(elastic_budgets=[0, 0.394])
    recipe = replace(make_recipe(tmp_path, num_train_epochs=1, learning_rate=0.01), elastic=elastic)
    trainer = make_trainer(make_vim_config(token_pruning=options), datasets, recipe)
    names = [name for name, _ in trainer.plain_model.named_parameters() if "predictors" in name or "offset" in name]
    assert {name.split(".")[2] for name in names if "predictors" in name} == {"1", "3"}
    before = {name: value.clone() for name, value in trainer.plain_model.state_dict().items()}
    trainer.train()
    last = AutoModelForImageClassification.from_pretrained(tmp_path / "last")
    for name in names:
        assert not torch.equal(trainer.plain_model.state_dict()[name], before[name]), name
    assert torch.equal(
        last.state_dict()["vim.token_predictors.3.input.weight"],
        trainer.plain_model.state_dict()["vim.token_predictors.3.input.weight"],
    )


def test_what_an_earlier_schedule_has_learned_stays_as_it_is(datasets, tmp_path):
    """Also, a run whose model has unused parameters can be resumed."""
    recipe = make_recipe(tmp_path, max_train_steps=2)
    recipe.run.checkpointing_steps = "1"
    learned = {"layers": [1, 3], "keep_ratios": [0.7, 0.6], "method": "dyvm", "alignment": "learned"}
    other = {"layers": [2], "keep_ratios": [0.6], "method": "dyvm", "alignment": "learned"}

    def prepare() -> Trainer:
        torch.manual_seed(0)
        model = AutoModelForImageClassification.from_config(make_vim_config(token_pruning=learned))
        model.set_token_pruning(other)
        processor = new_image_processor(model.config, [0.5] * 3, [0.25] * 3, crop_pct=1.0)
        return Trainer(model, datasets, processor, recipe)

    trainer = prepare()
    before = {name: value.clone() for name, value in trainer.plain_model.state_dict().items()}
    trainer.train()
    changed = {name for name, value in trainer.plain_model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[2] for name in changed if "predictors" in name} == {"2"}
    assert {name.split(".")[2] for name in changed if "offset" in name} == {"2", "3"}

    shutil.rmtree(tmp_path / "checkpoint-2")
    recipe.run.resume = "latest"
    resumed = prepare()
    resumed.train()
    assert all(
        torch.equal(value, resumed.plain_model.state_dict()[name])
        for name, value in trainer.plain_model.state_dict().items()
    )


def test_elastic_training_goes_on_from_before_all_budgets_were_drawn(datasets, tmp_path):
    options = {"layers": [1, 3], "keep_ratios": [0.7, 0.6], "method": "dyvm"}
    recipe = replace(make_recipe(tmp_path, max_train_steps=3), elastic=ElasticArguments(elastic_budgets=[0.394, 0]))
    recipe.run.checkpointing_steps = "1"
    recipe.run.save_total_limit = 3
    whole = make_trainer(make_vim_config(token_pruning=options), datasets, recipe)
    whole.train()
    first, last = (load_file(tmp_path / f"checkpoint-{step}" / "optimizer.safetensors") for step in (1, 3))
    assert not any("token_predictors" in name for name in first)  # the first step was of the dense model
    assert any("token_predictors" in name for name in last)
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    recipe.run.resume = "latest"
    resumed = make_trainer(make_vim_config(token_pruning=options), datasets, recipe)
    resumed.train()
    weights, others = (trainer.plain_model.state_dict() for trainer in (whole, resumed))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_bf16_autocast(datasets, tmp_path):
    recipe = make_recipe(tmp_path, max_train_steps=2, mixed_precision="bf16")
    trainer = make_trainer(make_vim_config(token_pruning=dict(TOKEN_PRUNING)), datasets, recipe)
    dtypes = {True: set(), False: set()}  # in training, in the evaluation
    trainer.plain_model.vim.layers[0].mixer.in_proj.register_forward_hook(
        lambda module, inputs, output: dtypes[module.training].add(output.dtype)
    )
    assert math.isfinite(trainer.train()["eval_loss"])
    assert dtypes == {True: {torch.bfloat16}, False: {torch.bfloat16}}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.plain_model.parameters())


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_change(datasets, tmp_path):
    recipe = make_recipe(tmp_path, max_train_steps=8, learning_rate=1e30)
    recipe.run.checkpointing_steps = "1"
    trainer = make_trainer(make_vim_config(), datasets, recipe)
    with pytest.raises(TrainingDivergedError, match=r"step 2 of 8.*--learning_rate \(it is 1e\+30\)") as error:
        trainer.train()
    assert trainer.state.steps == 1
    assert all(parameter.isfinite().all() for parameter in trainer.plain_model.parameters())
    assert [folder.name for folder in find_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert f"The last checkpoint is {tmp_path / 'checkpoint-1'}" in str(error.value)


def break_at_step(trainer: Trainer, step: int, module: str, change) -> None:
    """Changes a module's output from a step on."""

    def hook(layer: nn.Module, inputs: object, output):
        if layer.training and trainer.state.steps >= step - 1:
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
        return None

    # Before the trainer's own hook, which is to see it.
    trainer.plain_model.get_submodule(module).register_forward_hook(hook, prepend=True)


@pytest.mark.parametrize("module", ["vim.embeddings", "vim.layers.2.mixer", "vim.norm", "classifier"])
@pytest.mark.parametrize("value", [math.nan, 1e300], ids=["nan", "overflow"])
def test_a_layer_whose_output_is_not_finite_is_named(datasets, tmp_path, module, value):
    trainer = make_trainer(make_vim_config(), datasets, make_recipe(tmp_path, max_train_steps=8))
    break_at_step(trainer, 3, module, lambda output: output * value)
    with pytest.raises(TrainingDivergedError, match=rf"step 3 of 8: .*not finite is that of {module}\."):
        trainer.train()


def test_a_gradient_that_is_not_finite_is_named_where_it_arose(datasets, tmp_path):
    trainer = make_trainer(make_vim_config(), datasets, make_recipe(tmp_path, max_train_steps=8))

    def break_gradient(output: torch.Tensor) -> torch.Tensor:
        output.register_hook(lambda gradient: gradient * math.inf)
        return output

    break_at_step(trainer, 2, "vim.layers.2", break_gradient)
    with pytest.raises(TrainingDivergedError, match=r"step 2 of 8: .*first gradient.*that of vim\.layers\.2\."):
        trainer.train()


def test_a_teacher_that_overflows_is_named(datasets, tmp_path):
    teacher = AutoModelForImageClassification.from_config(make_vim_config())
    teacher.vim.layers[1].mixer.out_proj.weight.data[0, 0] = math.inf
    recipe = make_recipe(tmp_path, LossWeights(kd_weight=1.0), max_train_steps=8)
    trainer = make_trainer(make_vim_config(), datasets, recipe, teacher)
    with pytest.raises(TrainingDivergedError, match=r"step 1 of 8: .*not finite is that of teacher\.classifier\."):
        trainer.train()


def test_gradients_that_no_scale_makes_finite_stop_the_run(datasets, tmp_path):
    """fp16 needs a GPU, so the scaler is a fake that lowers its scale like torch's."""

    class Scaler:
        factor = 32.0

        def get_scale(self) -> float:
            return self.factor

        def scale(self, loss: torch.Tensor) -> torch.Tensor:
            return loss * self.factor

        def state_dict(self) -> dict:
            return {}

    trainer = make_trainer(make_vim_config(), datasets, make_recipe(tmp_path, max_train_steps=8))
    break_at_step(trainer, 2, "vim.layers.2", lambda output: output.register_hook(lambda g: g * math.inf) and output)
    scaler = trainer.accelerator.scaler = Scaler()

    def skip() -> None:
        scaler.factor /= 8

    trainer.optimizer.step = skip
    with pytest.raises(TrainingDivergedError, match=r"step 3 of 8: .*first gradient"):
        trainer.train()


def test_a_signal_that_a_launcher_passes_on_is_not_a_second_one(monkeypatch):
    """It arrives while the first is handled."""
    passed_on, heard = [], []

    def pass_on(seconds: float) -> None:
        passed_on.append(seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(interruption, "time", SimpleNamespace(sleep=pass_on))
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.received == signal.SIGTERM
            assert passed_on == [interruption.SAME_SIGNAL]
            assert not heard
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_divergence_is_not_taken_for_a_lost_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingDivergedError), lost_processes_named():
        raise TrainingDivergedError("The last checkpoint is runs/nccl/checkpoint-1.")
    with pytest.raises(ProcessLostError, match="Another of the 2 processes"), lost_processes_named():
        raise RuntimeError("NCCL error: remote process exited")


def test_a_process_that_is_lost_before_the_first_step_is_named(monkeypatch, capsys):
    def prepare() -> None:
        raise torch.distributed.DistStoreError("Timed out after 21 seconds waiting for clients. 1/2 clients joined.")

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert jobs.run(prepare) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Another of the 2 processes died or did not respond")


def test_weights_that_are_not_finite_do_not_replace_the_last_good_checkpoint(datasets, tmp_path):
    recipe = make_recipe(tmp_path, max_train_steps=8)
    recipe.run.checkpointing_steps, recipe.run.save_total_limit = "1", 1
    trainer = make_trainer(make_vim_config(), datasets, recipe)
    step = trainer.optimizer.step

    def overflow() -> None:
        step()
        if trainer.state.steps == 2:
            trainer.plain_model.vim.layers[1].mixer.out_proj.weight.data[0, 0] = math.inf

    trainer.optimizer.step = overflow
    message = r"After step 3 of 8 the weight vim\.layers\.1\.mixer\.out_proj\.weight is not finite.*checkpoint-2"
    with pytest.raises(TrainingDivergedError, match=message):
        trainer.train()
    assert [folder.name for folder in find_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert all(value.isfinite().all() for value in load_file(tmp_path / "checkpoint-2" / "model.safetensors").values())


# Numbers to trust


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_training_learns(family, datasets, tmp_path):
    """After 12 epochs, the pruned model tells three colours apart on images that it has not seen."""
    config = MAKE_CONFIG[family](token_pruning=dict(TOKEN_PRUNING))
    recipe = make_recipe(tmp_path, num_train_epochs=12, per_device_train_batch_size=6, learning_rate=1e-2)
    recipe.run.checkpointing_steps = "1000"
    results = make_trainer(config, datasets, recipe).train()
    losses = [entry["eval_loss"] for entry in results["history"]]
    assert losses[0] > 0.5
    assert losses[-1] < 0.1
    assert results["eval_top1"] == 1.0
    with pytest.raises(FileExistsError, match=r"contains the results of an earlier run \(all_results.json\)"):
        check_output_dir(recipe.run)


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_deterministic_runs_are_the_same_to_the_bit(family, datasets, tmp_path):
    def weights(name: str) -> dict[str, torch.Tensor]:
        recipe = replace(
            make_recipe(tmp_path / name, LossWeights(kd_weight=1.0, alignment_weight=1.0), max_train_steps=3),
            scale=ScaleArguments(deterministic=True),
        )
        config = MAKE_CONFIG[family](token_pruning=dict(TOKEN_PRUNING), drop_path_rate=0.3)
        torch.manual_seed(1)
        teacher = AutoModelForImageClassification.from_config(MAKE_CONFIG[family]())
        trainer = make_trainer(config, datasets, recipe, teacher)
        assert torch.are_deterministic_algorithms_enabled()
        trainer.train()
        return trainer.plain_model.state_dict()

    try:
        first, second = weights("first"), weights("second")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_without_pruning_there_is_nothing_to_align(family, datasets, tmp_path):
    """While the student equals its teacher, the loss is exactly 0, and so is its gradient. PlainMamba's batch norm must
    not use other statistics than the teacher's."""
    config = MAKE_CONFIG[family]()
    recipe = make_recipe(tmp_path, LossWeights(alignment_weight=1.0), max_train_steps=1)
    torch.manual_seed(0)
    teacher = AutoModelForImageClassification.from_config(config)
    trainer = make_trainer(MAKE_CONFIG[family](), datasets, recipe, teacher)
    freeze_batch_norm(trainer.model.train())
    terms = trainer._losses(next(iter(trainer.loaders.train)), epoch=0, index=0)
    assert terms["alignment"].item() == 0
    terms["alignment"].backward()
    assert all(p.grad is None or not p.grad.any() for p in trainer.plain_model.parameters())


def test_gradient_checkpointing_saves_memory_and_changes_nothing(datasets, tmp_path):
    figures = {}
    for checkpointing in (False, True):
        recipe = make_recipe(tmp_path / str(checkpointing), per_device_train_batch_size=12)
        recipe = replace(recipe, scale=ScaleArguments(gradient_checkpointing=checkpointing))
        config = make_vim_config(num_hidden_layers=12, token_pruning=dict(TOKEN_PRUNING), drop_path_rate=0.3)
        trainer = make_trainer(config, datasets, recipe)
        batch = next(iter(trainer.loaders.train))
        memory = peak_memory(lambda t=trainer, b=batch: t._losses(b, 0, 0)["loss"].backward(), torch.device("cpu"))
        gradients = [parameter.grad.clone() for parameter in trainer.plain_model.parameters()]
        figures[checkpointing] = memory, gradients
    assert figures[True][0] < 0.4 * figures[False][0]
    for ours, others in zip(figures[True][1], figures[False][1], strict=True):
        torch.testing.assert_close(ours, others, rtol=1e-5, atol=1e-8)


def test_frozen_batch_norm_keeps_its_statistics(datasets, tmp_path):
    recipe = replace(make_recipe(tmp_path, max_train_steps=2), scale=ScaleArguments(batch_norm="frozen"))
    trainer = make_trainer(make_plainmamba_config(), datasets, recipe)
    before = {name: buffer.clone() for name, buffer in trainer.plain_model.named_buffers()}
    trainer.train()
    assert before
    assert all(torch.equal(before[name], buffer) for name, buffer in trainer.plain_model.named_buffers())


def test_synchronized_batch_norm_needs_gpus(datasets, tmp_path):
    recipe = replace(make_recipe(tmp_path), scale=ScaleArguments(batch_norm="sync"))
    with pytest.raises(ValueError, match="--batch_norm sync needs GPUs"):
        make_trainer(make_plainmamba_config(), datasets, recipe)


def test_trackers_get_the_figures(datasets, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = make_recipe(tmp_path, max_train_steps=2)
    recipe.run.with_tracking = True
    make_trainer(make_vim_config(), datasets, recipe).train()
    (file,) = (tmp_path / "hf_vssm_prune").glob("events*")
    events = event_accumulator.EventAccumulator(str(file)).Reload()
    assert {"train_loss", "train_learning_rate", "eval_top1"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == []  # a dense model keeps every token


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_trackers_and_cards_get_pictures_of_what_is_kept(family, datasets, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = make_recipe(tmp_path, max_train_steps=10)
    recipe.run.with_tracking = True
    trainer = make_trainer(MAKE_CONFIG[family](token_pruning=dict(TOKEN_PRUNING)), datasets, recipe)
    trainer.saved_models.write_card = lambda metrics, num_images: ModelCardInfo(name="with a picture")
    trainer.train()
    (file,) = (tmp_path / "hf_vssm_prune").glob("events*")
    events = event_accumulator.EventAccumulator(str(file)).Reload()
    logged = events.Images("kept_tokens")
    assert [event.step for event in logged] == [evaluation["step"] for evaluation in trainer.state.history]
    with (
        Image.open(io.BytesIO(logged[-1].encoded_image_string)) as last,
        Image.open(tmp_path / "last" / PICTURE) as on_card,
    ):
        np.testing.assert_array_equal(np.asarray(last), np.asarray(on_card))
    assert f"({PICTURE})" in (tmp_path / "last" / "README.md").read_text()


def test_a_teacher_is_needed_where_the_losses_need_one(datasets, tmp_path):
    with pytest.raises(ValueError, match="need a teacher"):
        make_trainer(make_vim_config(), datasets, make_recipe(tmp_path, LossWeights(kd_weight=1.0)))


def test_layers_to_align_must_exist(datasets, tmp_path):
    recipe = make_recipe(tmp_path, LossWeights(alignment_weight=1.0, alignment_layers=(1, 4)))
    teacher = AutoModelForImageClassification.from_config(make_vim_config())
    with pytest.raises(ValueError, match=r"has \[4\]: the model has layers 0 to 3"):
        make_trainer(make_vim_config(), datasets, recipe, teacher)


def test_a_batch_must_be_filled(datasets, tmp_path):
    with pytest.raises(ValueError, match="36 training images do not fill one batch of 64"):
        make_trainer(make_vim_config(), datasets, make_recipe(tmp_path, per_device_train_batch_size=64))


def test_options_of_the_optimizer_the_schedule_and_the_mixing(datasets, tmp_path):
    options = {
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
        "lr_scheduler_type": "linear",
        "min_lr": 0.0,
    }
    trainer = make_trainer(make_vim_config(), datasets, make_recipe(tmp_path, **options))
    for group in trainer.optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)
    assert trainer.schedule.factor(3) == pytest.approx(1 - 3 / 9)
    mixing = AugmentationArguments(mixup=0.2, cutmix=0.4, mixup_prob=0.6, mixup_switch_prob=0.7, smoothing=0.3).mix()
    assert (mixing.mixup_alpha, mixing.cutmix_alpha, mixing.label_smoothing) == (0.2, 0.4, 0.3)
    assert (mixing.probability, mixing.switch_probability) == (0.6, 0.7)


def test_warmup_is_a_share_of_the_run(datasets, tmp_path):
    for steps, warmup in ((2, 0), (60, 2)):
        recipe = make_recipe(tmp_path, max_train_steps=steps, warmup_epochs=None)
        assert make_trainer(make_vim_config(), datasets, recipe).schedule.warmup_steps == warmup


def test_warmup_must_leave_something(datasets, tmp_path):
    with pytest.raises(ValueError, match="9 warm-up steps do not fit into a run of 9 steps"):
        make_trainer(make_vim_config(), datasets, make_recipe(tmp_path, warmup_epochs=1.0))


def test_two_runs_do_not_mix_in_a_folder(datasets, tmp_path):
    recipe = make_recipe(tmp_path, max_train_steps=1)
    make_trainer(make_vim_config(), datasets, recipe).train()
    with pytest.raises(FileExistsError, match="the last is checkpoint-1"):
        make_trainer(make_vim_config(), datasets, recipe)


def hold(folder: Path, connection: Connection) -> None:
    """Writes to a run's folder in another process, with a data loader's worker, until it is killed."""
    with only_run_in(folder, SimpleNamespace(is_main_process=True)):
        (folder / ".unfinished-checkpoint-1").mkdir()
        worker = FORK.Process(target=time.sleep, args=(PATIENCE,))
        worker.start()
        connection.send(worker.pid)
        worker.join()


def test_two_runs_do_not_write_to_a_folder_at_the_same_time(datasets, tmp_path):
    """Even before the first one has a checkpoint; and its unfinished one is not removed. If it is killed, it can be
    resumed at once."""
    trainer = make_trainer(make_vim_config(), datasets, make_recipe(tmp_path, max_train_steps=1))
    ours, theirs = FORK.Pipe()
    other = FORK.Process(target=hold, args=(tmp_path, theirs))
    other.start()
    worker = ours.recv()
    with pytest.raises(FileExistsError, match=r"another run is writing .* remove .*/\.run\.lock"):
        trainer.train()
    assert (tmp_path / ".unfinished-checkpoint-1").is_dir()
    other.kill()
    other.join()
    trainer.train()
    os.kill(worker, signal.SIGKILL)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_a_file_system_without_locks_and_permissions_is_no_obstacle(datasets, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    monkeypatch.setattr(os, "chmod", Mock(side_effect=PermissionError(errno.EPERM, "Operation not permitted")))
    make_trainer(make_vim_config(), datasets, make_recipe(tmp_path, max_train_steps=1)).train()
    assert "cannot be locked ([Errno 37] No locks available)" in caplog.text
    names = {file.name for file in tmp_path.iterdir()}
    assert {"checkpoint-1", "best", "last"} <= names
    assert not [name for name in names if name.startswith(".")]


def test_going_back_behind_a_later_checkpoint_is_refused(datasets, tmp_path):
    """Otherwise, `--resume latest` would not find what was trained from there."""
    recipe = make_recipe(tmp_path, max_train_steps=3)
    recipe.run.checkpointing_steps, recipe.run.save_total_limit = "1", 5
    make_trainer(make_vim_config(), datasets, recipe).train()
    recipe.run.resume = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"is from step 1, but .* has later checkpoints, up to checkpoint-3"):
        make_trainer(make_vim_config(), datasets, recipe)


def test_a_checkpoint_is_saved_again_in_its_place(datasets, tmp_path):
    trainer = make_trainer(make_vim_config(), datasets, make_recipe(tmp_path, max_train_steps=1))
    trainer.train()
    trainer.state.history.append({"epoch": 2})
    folder = trainer._save_checkpoint()
    assert json.loads((folder / "training_state.json").read_text())["state"]["history"][-1] == {"epoch": 2}
    assert [each.name for each in tmp_path.glob("*checkpoint*")] == ["checkpoint-1"]
    elsewhere = folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(elsewhere)
    trainer._save_checkpoint()
    assert [each.name for each in tmp_path.glob("*checkpoint*")] == ["checkpoint-1"]
    assert not folder.is_symlink()
    assert find_resumed(tmp_path, str(elsewhere)) == elsewhere


def test_a_run_that_was_killed_while_it_replaced_its_checkpoint_goes_on_from_it(datasets, tmp_path):
    recipe = make_recipe(tmp_path, max_train_steps=1)
    make_trainer(make_vim_config(), datasets, recipe).train()
    (tmp_path / "checkpoint-1").rename(tmp_path / ".replaced-checkpoint-1")
    recipe.run.resume = "latest"
    assert make_trainer(make_vim_config(), datasets, recipe).state.steps == 1


def test_hosts_without_a_shared_disk_resume_alike(datasets, tmp_path, monkeypatch):
    """Other hosts have only a copy of the checkpoint."""
    recipe = make_recipe(tmp_path, max_train_steps=1)
    best = make_trainer(make_vim_config(), datasets, recipe).train()["best"]
    (tmp_path / "best" / "config.json").unlink()
    recipe.run.resume = "latest"
    assert make_trainer(make_vim_config(), datasets, recipe).state.best == {}
    monkeypatch.setattr(resuming, "of_all_processes", lambda accelerator, value: [1, int(value)])
    assert make_trainer(make_vim_config(), datasets, recipe).state.best == best
    monkeypatch.setattr(resuming, "of_all_processes", lambda accelerator, value: [0, int(value)])
    with pytest.raises(ValueError, match=r"resume after different numbers of steps \(\[0, 1\]\): copy the newest"):
        make_trainer(make_vim_config(), datasets, recipe)


def test_a_run_with_other_settings_is_not_continued(datasets, tmp_path):
    make_trainer(make_vim_config(), datasets, make_recipe(tmp_path, max_train_steps=1)).train()
    recipe = make_recipe(tmp_path, max_train_steps=2, clip_grad=1.0)
    recipe.run.resume = "latest"
    with pytest.raises(ValueError, match=r"max_train_steps was 1 and is 2; clip_grad was None and is 1\.0"):
        make_trainer(make_vim_config(), datasets, recipe)


def test_steps_of_other_images_are_not_continued(datasets, tmp_path):
    """Of 22 images, the second step of an epoch has 2 batches of 4, or 1 batch of 6."""
    few = replace(datasets, train=datasets.train.select(range(22)))
    options = {"max_train_steps": 2, "gradient_accumulation_steps": 3}
    make_trainer(make_vim_config(), few, make_recipe(tmp_path, **options)).train()
    options |= {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    recipe = make_recipe(tmp_path, **options)
    recipe.run.resume = "latest"
    with pytest.raises(ValueError, match=r"differently: the images in whole batches of an epoch were 20 and are 18\."):
        make_trainer(make_vim_config(), few, recipe)


def backwards(rows):
    return rows.select(range(len(rows) - 1, -1, -1))


def test_a_run_whose_data_or_models_have_changed_is_not_continued(datasets, tmp_path):
    teacher, other = (AutoModelForImageClassification.from_config(make_vim_config()) for _ in range(2))
    make_trainer(make_vim_config(), datasets, make_recipe(tmp_path, max_train_steps=1), teacher).train()
    recipe = make_recipe(tmp_path, max_train_steps=1)
    recipe.run.resume = "latest"
    *others, _ = datasets.label_names
    renamed = replace(datasets, label_names=[*others, "a new name"])
    larger = make_vim_config(image_size=make_vim_config().image_size + 8)
    rows = "the names, the labels or the order of the {} images were others"
    for config, data, its_teacher, message in (
        (make_vim_config(), renamed, teacher, "label_names was .* and is .*a new name"),
        (make_vim_config(), replace(datasets, train=backwards(datasets.train)), teacher, rows.format("training")),
        (
            make_vim_config(),
            replace(datasets, evaluation=backwards(datasets.evaluation)),
            teacher,
            rows.format("evaluation"),
        ),
        (make_vim_config(), datasets, other, "the teacher had other weights"),
        (larger, datasets, teacher, "config.image_size was .* and is .*; image_processor.size.shortest_edge was"),
    ):
        with pytest.raises(ValueError, match=f"cannot be resumed exactly, .*differently: {message}"):
            make_trainer(config, data, recipe, its_teacher)
    # Checkpoints of version 0.1 say nothing about these.
    file = tmp_path / "checkpoint-1" / "training_state.json"
    content = json.loads(file.read_text())
    for name in ADDED:
        del content["settings"][name]
    file.write_text(json.dumps(content))
    assert make_trainer(make_vim_config(), renamed, recipe).state.steps == 1


def test_a_checkpoint_of_before_steps_were_called_so_goes_on(datasets, tmp_path):
    """It has "updates" instead of steps, and no task."""
    recipe = make_recipe(tmp_path, max_train_steps=3)
    recipe.run.checkpointing_steps, recipe.run.save_total_limit = "1", 9
    whole = make_trainer(make_vim_config(), datasets, recipe)
    whole.train()
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    file = tmp_path / "checkpoint-1" / "training_state.json"
    content = json.loads(file.read_text())
    del content["settings"]["task"]
    for old, new in (("updates_per_epoch", "steps_per_epoch"), ("images_per_update", "images_per_step")):
        content["settings"][old] = content["settings"].pop(new)
    content["state"]["updates"] = content["state"].pop("steps")
    content["state"]["history"] = [{"epoch": 0, "update": 1, "eval_top1": 0.5}]
    file.write_text(json.dumps(content))
    recipe.run.resume = "latest"
    resumed = make_trainer(make_vim_config(), datasets, recipe)
    assert resumed.state.steps == 1
    assert resumed.train()["history"][0] == {"epoch": 0, "step": 1, "eval_top1": 0.5}
    for name, value in whole.plain_model.state_dict().items():
        assert torch.equal(resumed.plain_model.state_dict()[name], value), name


def test_a_checkpoint_that_is_not_there_or_not_whole_is_refused(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    assert find_resumed(tmp_path, "latest") is None
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        find_resumed(tmp_path, str(tmp_path / "checkpoint-5"))


def test_a_card_names_a_base_model_of_the_hub_only() -> None:
    recipe = Recipe(OptimizationArguments(), ImageClassification(), RunArguments(output_dir="runs/model"))
    for base_model, on_card in (("someone/dense", "someone/dense"), ("plainmamba_trashnet", None), (".", None)):
        write = card_writer(DataArguments(dataset_name="someone/data"), recipe, base_model, pruned=False)
        assert write({"top1": 0.5, "top5": 1.0}, 10).base_model == on_card


@pytest.mark.parametrize(("name", "on_card"), [("someone/data", ["someone/data"]), ("trashnet", []), (".", [])])
def test_a_card_names_data_of_the_hub_only_and_no_folder_of_this_machine(name, on_card, monkeypatch) -> None:
    words = ["hf-vssm-prune", "train", "--label_file", "/home/me/names.json", "--output_dir=/home/me/a=b"]
    monkeypatch.setattr(sys, "argv", words)
    task = ObjectDetection(DetectionArguments(label_file="/home/me/names.json"))
    recipe = Recipe(OptimizationArguments(), task, RunArguments(output_dir="runs/model"))
    metrics = dict.fromkeys(task.shown_metrics, 0.5)
    card = card_writer(DataArguments(dataset_name=name), recipe, None, pruned=False)(metrics, 10)
    assert card.evaluation.dataset_name
    assert card.datasets == on_card
    assert card.training.hyperparameters["label_file"] == "names.json"
    assert card.training.command == "hf-vssm-prune train --label_file names.json --output_dir=a=b"

"""What every task can rely on, and what the loop guarantees: one set of tests, run for all tasks."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import PATIENCE, TOKEN_PRUNING, load_script
from safetensors.torch import load_file
from test_training import fresh_accelerator, image_folder, make_recipe, make_trainer  # noqa: F401
from tested_tasks import EVERY_TASK, TESTED, MeanColour

from hf_vssm_prune.configuration_common import pruned_config
from hf_vssm_prune.pruned_heads import backbone_of
from hf_vssm_prune.training import interruption
from hf_vssm_prune.training.arguments import DataArguments, ElasticArguments, ScaleArguments
from hf_vssm_prune.training.checkpoints import find_checkpoints
from hf_vssm_prune.training.data import ImageDatasets
from hf_vssm_prune.training.divergence import TrainingDivergedError
from hf_vssm_prune.training.interruption import TrainingInterruptedError
from hf_vssm_prune.training.loop import Trainer
from hf_vssm_prune.training.losses import LossWeights
from hf_vssm_prune.training.tasks import TASKS
from hf_vssm_prune.training.tasks.task import Task


FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=sorted(EVERY_TASK))
def task(request: pytest.FixtureRequest) -> str:
    """Each task's name in turn."""
    return request.param


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """Data by task: 12 training and 5 test examples in each of three colours, or 26 and 5 to be streamed."""

    @cache
    def of_writer(write: Callable[[Path], None]) -> Path:
        folder = tmp_path_factory.mktemp("data")
        write(folder)
        return folder

    return lambda task, streaming: of_writer(getattr(TESTED[task], "write_stream" if streaming else "write_folder"))


@cache
def load_datasets(task: str, data: Path, streaming: bool) -> ImageDatasets:
    """Cached, because evaluation images of a stream are read and stored, which takes longer than the run."""
    buffer = {"shuffle_buffer_size": 5} if streaming else {}
    arguments = DataArguments(str(data), streaming=streaming, dataloader_num_workers=0, **buffer)
    return TESTED[task].random().load_datasets(arguments, seed=0)


def prepare(
    task: Task, data: Path, output_dir: Path, resume: str | None = None, streaming: bool = False, **optimization
) -> Trainer:
    """A run with everything at once: elastic budgets, teacher, drop path, EMA and gradient accumulation. An epoch has 5
    steps with 36 images (the last step has a single batch), or 3 steps with a stream of 26."""
    losses = LossWeights(kd_weight=1.0, alignment_weight=1.0)
    defaults = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "model_ema": True, "model_ema_decay": 0.9}
    recipe = make_recipe(output_dir, losses, **{**defaults, **optimization})
    recipe = replace(recipe, task=task, elastic=ElasticArguments(elastic_budgets=[0.0, 0.3]))
    recipe.run.resume, recipe.run.checkpointing_steps, recipe.run.save_total_limit = resume, "2", 20
    datasets = load_datasets(task.name, data, streaming)
    torch.manual_seed(1)
    make_config = TESTED[task.name].make_config
    teacher = task.auto_class.from_config(make_config())
    config = make_config(token_pruning=dict(TOKEN_PRUNING), drop_path_rate=0.3)
    return make_trainer(config, datasets, recipe, teacher)


@pytest.fixture(autouse=True)
def heard_signals(monkeypatch) -> Iterator[None]:
    """SIGTERM must not be ignored, see `conftest.hear_signals`."""
    monkeypatch.setattr(interruption, "SAME_SIGNAL", 0.0)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def stop_after(trainer: Trainer, step: int, number: signal.Signals) -> None:
    """Sends this process a signal in the middle of the next step. Only one, because a second one would end it at
    once."""

    def stop(module: torch.nn.Module, inputs: object) -> None:
        if module.training and trainer.state.steps == step:
            hook.remove()
            os.kill(os.getpid(), number)

    hook = trainer.plain_model.register_forward_pre_hook(stop)


def train_until_killed(task: Task, data: Path, output_dir: Path, streaming: bool) -> None:
    trainer = prepare(task, data, output_dir, streaming=streaming)
    stop_after(trainer, 4, signal.SIGKILL)
    trainer.train()


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# Each task once. A stream is read by what the task's data are; the toy's are classification's. Stored images are the
# sampler's, which knows no task.
@pytest.mark.parametrize(
    ("task", "streaming"), [pytest.param(name, name in TASKS, id=name) for name in sorted(EVERY_TASK)]
)
def test_killed_and_stopped_runs_end_with_the_same_weights_to_the_bit(task, streaming, folders, tmp_path):
    data = folders(task, streaming)
    whole = prepare(TESTED[task].random(), data, tmp_path / "whole", streaming=streaming).train()
    reset()

    broken = tmp_path / "broken"
    process = FORK.Process(target=train_until_killed, args=(TESTED[task].random(), data, broken, streaming))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    assert find_checkpoints(broken)[-1].name == "checkpoint-4"

    stopped = prepare(TESTED[task].random(), data, broken, resume="latest", streaming=streaming)
    assert stopped.state.steps == 4
    stop_after(stopped, 5, signal.SIGTERM)
    with pytest.raises(TrainingInterruptedError, match="Stopped by SIGTERM"):
        stopped.train()
    assert find_checkpoints(broken)[-1].name == "checkpoint-6"
    reset()

    resumed = prepare(TESTED[task].random(), data, broken, resume="latest", streaming=streaming).train()
    assert resumed["history"] == whole["history"]
    for name in ("last", "last_ema"):
        weights, others = (load_file(tmp_path / run / name / "model.safetensors") for run in ("whole", "broken"))
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[key], others[key]) for key in weights), name


def test_accumulated_small_batches_train_like_large_ones(task, folders, tmp_path):
    weights = {}
    for batch_size, accumulation in ((12, 1), (4, 3)):
        recipe = make_recipe(
            tmp_path / str(batch_size),
            num_train_epochs=2,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            adam_epsilon=1e-3,
            clip_grad=0.5,
        )
        # Batch norm in a head would see other statistics in smaller batches.
        recipe = replace(recipe, task=TESTED[task].plain(), scale=ScaleArguments(batch_norm="frozen"))
        datasets = recipe.task.load_datasets(DataArguments(str(folders(task, False))), seed=0)
        trainer = make_trainer(TESTED[task].make_config(), datasets, recipe)
        trainer.train()
        weights[batch_size] = trainer.plain_model.state_dict()
    for name, value in weights[12].items():
        torch.testing.assert_close(weights[4][name], value, rtol=1e-3, atol=1e-5)


def test_a_loss_that_is_not_finite_is_named_before_the_weights_change(task, folders, tmp_path):
    trainer = prepare(TESTED[task].random(), folders(task, False), tmp_path, gradient_accumulation_steps=1)

    def overflow(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if module.training and trainer.state.steps == 2 else output

    backbone_of(trainer.plain_model).base_model.get_submodule("layers.2.mixer").register_forward_hook(
        lambda module, inputs, output: (overflow(module, inputs, output[0]), *output[1:]), prepend=True
    )
    where = r"step 3 of 18: loss nan.*not finite is that of [\w.]+\.layers\.2\.m"
    with pytest.raises(TrainingDivergedError, match=where):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.plain_model.parameters())
    assert find_checkpoints(tmp_path)[-1].name == "checkpoint-2"


def test_terms_metrics_and_the_best_by_them(task, folders, tmp_path):
    results = prepare(TESTED[task].random(), folders(task, False), tmp_path).train()
    kind = EVERY_TASK[task]
    key = kind.metric_for_best_model
    measured = [entry[f"{prefix}{key}"] for entry in results["history"] for prefix in ("eval_", "eval_ema_")]
    assert results["best"][key] == (max if kind.greater_is_better else min)(measured)
    assert json.loads((tmp_path / "all_results.json").read_text()) == results
    for folder in ("best", "last", "last_ema"):
        model = kind.auto_class.from_pretrained(tmp_path / folder)
        assert pruned_config(model.config).token_pruning == TOKEN_PRUNING


def test_a_task_has_all_that_the_loop_asks_for(task):
    kind = EVERY_TASK[task]
    assert kind.name == task
    members = {name for name in vars(Task) if not name.startswith("_")} | set(get_type_hints(Task))
    assert all(hasattr(kind(None), name) for name in members)
    assert kind.metric_for_best_model in kind.shown_metrics
    config = TESTED[task].make_config()
    model = kind.auto_class.from_config(config)
    batch = kind(None).example_batch(model.config, 3, torch.device("cpu"))
    outputs = model(**kind(None).inputs(batch))
    assert all(term.shape == () for term in kind(None).losses(outputs, batch).values())
    scores = kind(None).scores(outputs, batch)
    assert len(scores) == 3
    assert set(kind.shown_metrics) <= set(kind(None).metrics([scores, scores]))


def test_the_loop_names_no_task():
    """It must not name a task's data, loss, metrics or head either."""
    folder = Path(__file__).resolve().parents[1] / "src" / "hf_vssm_prune" / "training"
    for name in (
        "loop",
        "loaders",
        "evaluation",
        "divergence",
        "distribution",
        "elastic",
        "ema",
        "run_log",
        "estimate",
    ):
        text = (folder / f"{name}.py").read_text().lower()
        for word in ("classif", "top1", "top-1", "accuracy", "cross_entropy", "cross-entropy", '"labels"', "mixup"):
            assert word not in text, f"{name}.py has {word!r}"


def test_a_toy_task_is_one_line_in_the_table(image_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setitem(TASKS, MeanColour.name, MeanColour)
    shared = ["--task", "mean-colour", "--dataset_name", str(image_folder), "--workers", "0"]
    sizes = ["hidden_size=16", "num_hidden_layers=4", "state_size=4"]
    model = ["--family", "vim", "--image_size", "32", "--patch_size", "8", "--config_overrides", *sizes]
    short = ["--batch_size", "4", "--max_train_steps", "2", "--num_warmup_steps", "1", "--use_cpu"]
    run = [*shared, *model, *short, "--noise", "0.1", "--output_dir", str(tmp_path / "run")]
    assert load_script("train").main(run) == 0
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["eval_rmse"] > 0
    capsys.readouterr()
    reset()
    options = ["--model_name_or_path", str(tmp_path / "run" / "best"), "--device", "cpu", "--flops_reduction", "0.3"]
    assert load_script("evaluate").main([*shared, *options, "--json", str(tmp_path / "out.json")]) == 0
    assert "| model | RMSE | GFLOPs |" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["pruned"]["metrics"]["rmse"] > 0
    with pytest.raises(SystemExit):
        load_script("train").main([*run, "--mixup", "0.5"])  # an option of another task
    assert "--mixup" in capsys.readouterr().err

"""The estimate of a run: counts checked by hand, measurements, and the command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TOKEN_PRUNING, load_script, make_vim_config

from hf_vssm_prune import VimForImageClassification, count_flops
from hf_vssm_prune.commands import estimate as command
from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.training.arguments import (
    ElasticArguments,
    EstimateArguments,
    LossArguments,
    OptimizationArguments,
    ScaleArguments,
)
from hf_vssm_prune.training.devices import launch_on_cores
from hf_vssm_prune.training.estimate import RunEstimate, estimate_run, estimate_text
from hf_vssm_prune.training.length import RunLength
from hf_vssm_prune.training.tasks.classification import ImageClassification


RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def estimate(
    elastic: ElasticArguments | None = None,
    scale: ScaleArguments | None = None,
    gradient_accumulation_steps: int = 2,
    pruning: dict | None = None,
    dtype: torch.dtype | None = None,
    teacher: VisionMambaConfig | None = None,
    **losses,
) -> RunEstimate:
    schedule = dict(TOKEN_PRUNING) if pruning is None else pruning or None
    config = make_vim_config(num_hidden_layers=8, token_pruning=schedule, dtype=dtype)
    optimization = OptimizationArguments(
        num_train_epochs=3, per_device_train_batch_size=4, gradient_accumulation_steps=gradient_accumulation_steps
    )
    options = EstimateArguments(
        num_images=100,
        num_eval_images=10,
        num_classes=3,
        num_devices=2,
        device_tflops=1e-3,
        measured_batch_sizes=[2, 8],
    )
    return estimate_run(
        ImageClassification(),
        config,
        optimization,
        LossArguments(**losses),
        elastic or ElasticArguments(),
        scale or ScaleArguments(),
        options,
        teacher,
    )


def test_updates_flops_and_hours(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # so that there is a faster way to start the run
    found = estimate()
    # 100 images are 12 batches on each of 2 devices, in pairs.
    assert (found.images_per_step, found.steps_per_epoch, found.num_steps) == (16, 6, 18)
    flops = count_flops(make_vim_config(num_hidden_layers=8, token_pruning=dict(TOKEN_PRUNING)))
    assert found.flops_per_image == 2 * (3 * flops.pruned.total + flops.dense.total)
    evaluations = 3 * 2 * 10 * 2 * flops.pruned.total
    assert found.total_flops == 18 * 16 * found.flops_per_image + evaluations
    assert found.hours == pytest.approx(found.total_flops / 2e9 / 3600)
    assert found.device_hours == pytest.approx(2 * found.hours)
    assert found.measured_images_per_second > 0
    text = estimate_text(found, num_devices=2, batch_size=4)
    launch = launch_on_cores(torch.device("cpu"), num_processes=1, batch_size=4)
    assert f"\nfaster    one single-threaded process per core: {launch}" in text
    assert "faster" not in estimate_text(replace(found, faster_launch=None), num_devices=2, batch_size=4)
    without_teacher = estimate(kd_weight=0.0, alignment_weight=0.0)
    assert without_teacher.flops_per_image == 6 * flops.pruned.total
    assert without_teacher.state_bytes == pytest.approx(found.state_bytes * 5 / 6)


def test_the_last_step_of_an_epoch_may_be_shorter():
    found = estimate(gradient_accumulation_steps=5, kd_weight=0.0, alignment_weight=0.0)
    assert found.num_steps == 9, "of 5, 5 and 2 batches in each epoch"
    evaluations = 3 * 2 * 10 * found.flops_per_image / 3
    assert found.total_flops == 3 * (5 + 5 + 2) * 4 * 2 * found.flops_per_image + evaluations
    for max_steps, batches in ((1, 5), (3, 12), (4, 17), (6, 24), (8, 34)):
        assert RunLength(12, 5, 3, max_steps).num_batches == batches


def test_every_scan_direction_runs_in_training():
    half = TOKEN_PRUNING | {"block_keep_ratio": 0.5}
    found = estimate(pruning=half, kd_weight=0.0, alignment_weight=0.0)
    config = make_vim_config(num_hidden_layers=8, token_pruning=dict(TOKEN_PRUNING))
    # From the projected class token to 2 directions, in all layers but those whose mixer's output ranks tokens.
    selectors = (8 - 2) * 2 * 2 * config.intermediate_size
    trained = 6 * (count_flops(config).pruned.total + selectors)
    assert found.flops_per_image == trained
    config.token_pruning = half
    evaluated = found.total_flops - 18 * 16 * trained
    assert evaluated == 3 * 2 * 10 * 2 * count_flops(config).pruned.total


@pytest.mark.parametrize("pruning", [{}, None], ids=["dense", "pruned"])
def test_another_model_as_the_teacher(pruning):
    larger = make_vim_config(num_hidden_layers=12, token_pruning=dict(TOKEN_PRUNING))
    given = {"teacher_name_or_path": "larger", "teacher_dtype": "bfloat16", "alignment_weight": 0.0}
    alone = estimate(pruning=pruning, kd_weight=0.0, alignment_weight=0.0)
    found = estimate(pruning=pruning, teacher=larger, **given)
    taught = found.flops_per_image - alone.flops_per_image
    assert taught == 2 * count_flops(larger).dense.total
    weights = VimForImageClassification(larger).num_parameters()
    assert found.state_bytes - alone.state_bytes == 2 * weights


def test_the_teachers_hidden_states_must_be_comparable():
    larger = make_vim_config(num_hidden_layers=12)
    with pytest.raises(ValueError, match="The teacher larger has num_hidden_layers 12, but the model has 8"):
        estimate(teacher=larger, teacher_name_or_path="larger")


def test_speed_is_that_of_the_measured_schedule():
    found = estimate(ElasticArguments([0, 0.25]))
    flops = count_flops(make_vim_config(num_hidden_layers=8, token_pruning=dict(TOKEN_PRUNING)))
    measured = 2 * (3 * flops.pruned.total + flops.dense.total)
    assert measured < found.flops_per_image
    assert 1e12 * found.measured_tflops == pytest.approx(found.measured_images_per_second * measured)
    assert found.hours_on_this_machine == pytest.approx(found.total_flops / (1e12 * found.measured_tflops) / 3600)


def test_one_process_per_core_is_recommended_where_the_batch_can_be_divided(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cpu = torch.device("cpu")
    launch = launch_on_cores(cpu, num_processes=1, batch_size=32)
    assert launch is not None
    assert launch.startswith("OMP_NUM_THREADS=1 accelerate launch --multi_gpu --num_processes 2 ")
    assert launch.endswith(" --batch_size 16 --use_cpu")
    assert launch_on_cores(cpu, num_processes=2, batch_size=32) is None
    assert launch_on_cores(cpu, num_processes=1, batch_size=31) is None
    assert launch_on_cores(torch.device("cuda"), num_processes=1, batch_size=32) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert launch_on_cores(cpu, num_processes=1, batch_size=32) is None


def test_sharding_and_checkpointing_save_memory():
    plain = estimate()
    spread = estimate(scale=ScaleArguments(fsdp=True, gradient_checkpointing=True))
    assert spread.state_bytes == plain.state_bytes / 2
    assert spread.activation_bytes < 0.7 * plain.activation_bytes
    assert spread.flops_per_image > plain.flops_per_image
    small, large = plain.measured_activation_bytes.values()
    assert small < plain.activation_bytes < large


def test_a_checkpoint_in_half_precision_is_trained_in_float32():
    expected = estimate(alignment_weight=0, kd_weight=0)
    found = estimate(dtype=torch.bfloat16, alignment_weight=0, kd_weight=0)
    assert found.activation_bytes == pytest.approx(expected.activation_bytes, rel=0.05)


def test_the_script(tmp_path, capfd):
    sizes = ["hidden_size=16", "num_hidden_layers=4", "state_size=4"]
    model = ["--family", "vim", "--image_size", "32", "--patch_size", "8", "--config_overrides", *sizes]
    pruning = ["--prune_layers", "1", "3", "--keep_ratios", "0.7", "0.6"]
    file = tmp_path / "estimate.json"
    assert load_script("estimate").main([*model, *pruning, "--json", str(file)]) == 0
    output = capfd.readouterr().out
    assert "75,060 of 512 images; 30 epochs of 2,502" in output
    assert "40 TFLOP/s on each of 8 devices" in output
    assert json.loads(file.read_text())["num_steps"] == 75_060
    assert load_script("estimate").main([*model, "--num_images", "9"]) == 1
    assert "9 images do not fill one batch of 64 on each of 8 devices" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("size", "line"),
    [
        ("ti", "32,760 of 1024 images; 140 epochs of 234"),
        ("s", "23,400 of 1024 images; 100 epochs of 234"),
        ("m", "46,800 of 512 images; 100 epochs of 468"),
    ],
)
def test_the_script_on_videos_and_their_recipes(size, line, tmp_path, capfd):
    sizes = ["hidden_size=16", "num_hidden_layers=4", "state_size=4", "num_frames=3"]
    model = ["--family", "videomamba", "--image_size", "32", "--patch_size", "8", "--config_overrides", *sizes]
    recipe = ["--recipe", str(RECIPES / f"videomamba_{size}_k400.yaml"), "--measured_batch_sizes", "1", "2"]
    kinetics = ["--num_images", "240000", "--num_eval_images", "20000", "--num_classes", "400"]
    kinetics += ["--num_clips", "4", "--num_crops", "3"]
    file = tmp_path / "estimate.json"
    assert load_script("estimate").main([*model, *recipe, *kinetics, "--json", str(file)]) == 0
    assert line in capfd.readouterr().out
    estimate = json.loads(file.read_text())
    assert estimate["num_steps"] == int(line.split()[0].replace(",", ""))
    trained = estimate["flops_per_image"] * estimate["images_per_step"] * estimate["num_steps"]
    evaluated = estimate["flops_per_image"] / 3 * 20_000 * 12 * estimate["num_epochs"]  # a dense model, no EMA
    assert estimate["total_flops"] == pytest.approx(trained + evaluated)


def test_a_layer_to_align_must_exist():
    with pytest.raises(ValueError, match=r"--alignment_layers has \[8\]: the model has layers 0 to 7"):
        estimate(alignment_layers=[8])


@pytest.mark.parametrize(("given", "count"), [([], 3), (["--num_classes", "7"], 7)])
def test_labels_are_counted_as_given_or_as_in_the_checkpoint(given, count, tmp_path, monkeypatch, capsys):
    make_vim_config().save_pretrained(tmp_path)
    seen = []

    def see(task, config, *options):
        seen.append(config)
        raise ValueError("seen")

    monkeypatch.setattr(command, "estimate_run", see)
    assert command.main(["--model_name_or_path", str(tmp_path), *given]) == 1
    assert seen[0].num_labels == len(seen[0].label_names) == count

"""Training on two processes (gloo, CPU) compared with one: equal losses, portable checkpoints, lost processes."""

import json
import os
import signal
import time
from pathlib import Path

import datasets
import distributed_runs
import numpy as np
import pytest
import torch
from conftest import PATIENCE, SCRIPTS
from distributed_runs import CONFIGS, ONE_PROCESS_RUNS, reset, train
from forking import Forked, start_ranks
from PIL import Image
from safetensors.torch import load_file
from tested_tasks import TESTED, write_box_folder, write_mask_folder
from videos import write_class_folders


def write_images(folder: Path) -> None:
    """Writes 146 training and 9 test images of three classes, as files and as Parquet."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 146), ("test", 9)):
        for i in range(count):
            pixels = generator.integers(0, 156, (32, 32, 3), dtype=np.uint8)
            pixels[..., i % 3] += 100
            file = folder / "images" / split / f"class {i % 3}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
        loaded = datasets.load_dataset("imagefolder", data_dir=str(folder / "images" / split), split="train")
        loaded = loaded.cast_column("image", datasets.Image(decode=False))
        parts = [(f"{split}-{n}.parquet", loaded.shard(3, n)) for n in range(3)]
        (folder / "parquet").mkdir(exist_ok=True)
        for name, part in parts:
            part.map(embed_bytes, features=loaded.features).to_parquet(folder / "parquet" / name)


def embed_bytes(row: dict) -> dict:
    return {**row, "image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a subfolder for each of `ONE_PROCESS_RUNS` and `TWO_PROCESS_RUNS`."""
    folder = tmp_path_factory.mktemp("runs")
    write_images(folder)
    for split, per_class in (("train", 49), ("test", 3)):
        write_class_folders(folder / "videos", split, per_class, np.random.default_rng(0))
    write_mask_folder(folder / "masks", {"train": 146, "test": 9})
    (folder / "boxes").mkdir()
    write_box_folder(folder / "boxes", {"train": 146, "test": 9})
    for family, make_config in CONFIGS.items():
        torch.manual_seed(1)
        if family != "videos":
            kind = {"masks": "semantic-segmentation", "boxes": "object-detection"}.get(family, "image-classification")
            TESTED[kind].plain().auto_class.from_config(make_config()).save_pretrained(folder / f"teacher-{family}")
    for name, options in ONE_PROCESS_RUNS.items():
        train(folder, name, **options)
        reset()
    for process in start_ranks(distributed_runs.__file__, folder):
        result = process.wait()
        assert result.returncode == 0, result.stderr[-5000:]
    for name, resumed in (("one_from_ddp", "ddp"), ("one_from_fsdp", "fsdp")):
        train(folder, name, resume=resumed)
        reset()
    return folder


def losses(runs: Path, name: str) -> np.ndarray:
    return np.array(json.loads((runs / name / "losses.json").read_text()))


# Classification in both ways, the other models and tasks in one: how the model is spread knows no task.
@pytest.mark.parametrize(
    ("spread", "kind"),
    [
        ("ddp", "long"),
        ("fsdp", "long"),
        ("fsdp", "plainmamba"),
        ("fsdp", "video"),
        ("ddp", "masks"),
        ("fsdp", "boxes"),
    ],
)
def test_two_processes_have_the_losses_of_one(runs, spread, kind):
    alone, spread_out = losses(runs, f"one_{kind}"), losses(runs, f"{spread}_{kind}")
    assert len(alone) == (26 if kind == "long" else 12)
    assert alone[-5:].mean() < alone[:5].mean()
    np.testing.assert_allclose(spread_out, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["ddp_accumulated", "fsdp_accumulated"])
def test_accumulated_batches_on_two_processes_have_the_losses_of_one_large_batch(runs, name):
    np.testing.assert_allclose(losses(runs, name), losses(runs, "one"), rtol=0, atol=1e-4)


def test_bf16_on_two_processes(runs):
    """With sharding; without it, bf16 is `autocast`, as on one process."""
    alone = losses(runs, "one_bf16")
    np.testing.assert_allclose(losses(runs, "fsdp_bf16"), alone, rtol=0, atol=0.02)
    assert not np.array_equal(alone, losses(runs, "one"))
    assert not np.array_equal(losses(runs, "fsdp_bf16"), losses(runs, "fsdp"))


def test_a_teacher_in_half_precision_and_in_shards(runs):
    alone = losses(runs, "one_half_teacher")
    np.testing.assert_allclose(losses(runs, "fsdp_half_teacher"), alone, rtol=0, atol=1e-4)
    assert not np.array_equal(alone, losses(runs, "one"))
    assert not np.array_equal(losses(runs, "fsdp_half_teacher"), losses(runs, "fsdp"))
    np.testing.assert_allclose(alone, losses(runs, "one"), rtol=0, atol=0.05)


def test_a_teacher_of_the_other_family_in_shards(runs):
    """Trackers are on: only the main process sends them the picture of what the sharded model keeps."""
    alone = losses(runs, "one_plainmamba_teacher")
    np.testing.assert_allclose(losses(runs, "fsdp_plainmamba_teacher"), alone, rtol=0, atol=1e-4)
    assert list((runs / "fsdp_plainmamba_teacher" / "hf_vssm_prune").glob("events*"))


@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
def test_elastic_training_with_parameters_that_some_budgets_do_not_use(runs, spread):
    alone = losses(runs, "one_elastic")
    np.testing.assert_allclose(losses(runs, f"{spread}_elastic"), alone, rtol=0, atol=1e-4)
    weights = load_file(runs / f"{spread}_elastic" / "last" / "model.safetensors")
    assert any(value.any() for name, value in weights.items() if name.endswith("hole_time_step.offset"))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ddp_from_one", "one"),
        ("fsdp_from_one", "one"),
        ("one_from_ddp", "ddp"),
        ("one_from_fsdp", "fsdp"),
        ("fsdp_from_fsdp", "fsdp"),
        ("ddp_streamed_from_one", "one_streamed"),
        ("fsdp_toy_from_one", "one_toy"),
    ],
)
def test_checkpoints_move(runs, name, source):
    """Resumes in the middle of an epoch with the same images, and ends with the losses and weights of the uninterrupted
    run. `ddp` reads and writes the same checkpoints as one process."""
    np.testing.assert_allclose(losses(runs, name), losses(runs, source)[6:], rtol=0, atol=1e-4)
    for model in ("last", "last_ema"):
        weights, others = (load_file(runs / run / model / "model.safetensors") for run in (name, source))
        assert weights.keys() == others.keys()
        for key, value in weights.items():
            torch.testing.assert_close(value, others[key], rtol=1e-3, atol=1e-5)


def test_what_goes_on_as_it_was_spread_is_the_same_to_the_bit(runs):
    assert np.array_equal(losses(runs, "fsdp_from_fsdp"), losses(runs, "fsdp")[6:])


def test_streams_are_the_same_on_two_processes(runs):
    np.testing.assert_allclose(losses(runs, "ddp_streamed"), losses(runs, "one_streamed"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["ddp_long", "fsdp_long"])
def test_an_uneven_last_batch_counts_each_image_once(runs, name):
    """With 9 images in batches of 4, one process gets the last image and the other a copy of it."""
    alone, spread = (json.loads((runs / run / "all_results.json").read_text()) for run in ("one_long", name))
    assert len(alone["history"]) == 3
    for mine, others in zip(spread["history"], alone["history"], strict=True):
        assert mine["eval_top1"] * 9 == pytest.approx(round(mine["eval_top1"] * 9))
        for key in ("eval_loss", "eval_ema_loss"):
            assert mine[key] == pytest.approx(others[key], abs=1e-4)


# Lost processes


@pytest.fixture
def endless_run(tmp_path):
    """The two processes, by rank, of a run that has started training."""
    write_images(tmp_path)
    sizes = ["hidden_size=16", "num_hidden_layers=4", "state_size=4"]
    options = ["--family", "vim", "--image_size", "32", "--patch_size", "8", "--config_overrides", *sizes]
    options += ["--dataset_name", tmp_path / "images", "--output_dir", tmp_path / "run", "--batch_size", "4"]
    options += ["--workers", "0", "--use_cpu", "--ddp_timeout", "20", "--checkpointing_steps", "2"]
    ranks = start_ranks(SCRIPTS / "train.py", *options)
    try:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "run" / "checkpoint-2").exists():
            assert all(rank.process.is_alive() for rank in ranks), ranks[0].wait().stderr[-3000:]
            assert time.monotonic() < deadline, "the run did not begin"
            time.sleep(0.05)
        yield ranks
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()


def error_of(rank: Forked) -> str:
    """The last line of stderr of a process that ends because the other one is gone."""
    result = rank.wait()
    assert result.returncode == 1, result.stderr[-3000:]
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: Another of the 2 processes died or did not respond")
    return line


def test_a_process_that_dies_ends_the_run(endless_run):
    endless_run[1].process.kill()
    assert "--resume latest" in error_of(endless_run[0])


def test_a_process_that_hangs_ends_the_run_in_time(endless_run):
    os.kill(endless_run[1].process.pid, signal.SIGSTOP)
    start = time.monotonic()
    assert "--resume latest" in error_of(endless_run[0])
    assert 10 < time.monotonic() - start < PATIENCE  # 20 s, of which some may have been before

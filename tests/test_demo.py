"""A shortened demo: from the example model to a folder that a new process opens."""

import json
import signal
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import load_script
from PIL import Image
from test_training import fresh_accelerator  # noqa: F401

from hf_vssm_prune.commands import demo
from hf_vssm_prune.training.interruption import TrainingInterruptedError


def test_wrong_numbers_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert demo.main(["--output_dir", str(tmp_path), "--max_eval_samples", "1000"]) == 1
    error = "error: max_eval_samples is 1000: it must be from 1 to 488, the number of images.\n"
    assert capsys.readouterr().err.endswith(error)


def test_a_demo_that_is_stopped_says_so_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    stopped = TrainingInterruptedError(signal.SIGINT, tmp_path)
    monkeypatch.setattr(demo.jobs, "prepare_finetuning", Mock(side_effect=stopped))
    assert demo.main(["--output_dir", str(tmp_path), "--max_eval_samples", "8"]) == 130
    assert capsys.readouterr().out.endswith("\nStopped by SIGINT. The next demo begins anew.\n")


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    small_batches = partial(demo.OptimizationArguments, per_device_train_batch_size=8)
    monkeypatch.setattr(demo, "OptimizationArguments", small_batches)
    short = ["--max_train_samples", "8", "--max_eval_samples", "10", "--epochs", "1"]
    assert load_script("demo").main(["--output_dir", str(tmp_path), *short]) == 0
    printed, messages = capsys.readouterr()
    assert messages.count("epoch 1/1 eval_top1 ") == 2
    rows = [line.split(" | ")[0] for line in printed.splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        "| dense",
        "| top, naive",
        "| top, aligned (the paper's)",
        "| local_merge (our default)",
        "| top, aligned, fine-tuned",
        "| local_merge, fine-tuned",
    ]
    assert "gives the same predictions" in printed

    folder = tmp_path / "model"
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "kept_tokens.png"} <= {
        file.name for file in folder.iterdir()
    }
    token_pruning = json.loads((folder / "config.json").read_text())["token_pruning"]
    assert (token_pruning["layers"], token_pruning["method"]) == ([2, 4, 6], "local_merge")
    assert Image.open(folder / "kept_tokens.png").width > 500

"""The training loop on the GPU, and moving a checkpoint from the GPU to the CPU and back."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_checking.report import Report


SCRIPTS = Path(__file__).resolve().parents[1]
OPTIONS = (
    "--dataset_name trashnet --family plainmamba --preset L1 --image_size 32 --patch_size 8 --config_overrides "
    "hidden_size=32 num_hidden_layers=3 stem_channels=8 --per_device_train_batch_size 16 --max_train_samples 64 "
    "--max_eval_samples 32 --max_train_steps 3 --checkpointing_steps 1 --save_total_limit 3 --logging_steps 1 "
    "--dataloader_num_workers 0 --drop_path 0"  # a GPU drops other paths than a CPU
)
ALLOWED = 1e-3  # between the losses of the three runs


def check_distribution(options: argparse.Namespace, report: Report) -> None:
    """Runs three steps of scripts/train.py under torchrun, resumes after the first on the CPU, and after the second of
    these on the GPU."""
    folder = (options.output_dir / ".runs").resolve()
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier check, whose checkpoints the runs would refuse
    losses = []
    runs = ((options.device, None), ("cpu", "0/checkpoint-1"), (options.device, "1/checkpoint-2"))
    for run, (device, start) in enumerate(runs):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
        command += [str(SCRIPTS / "train.py"), *OPTIONS.split(), "--output_dir", str(folder / str(run))]
        command += ["--use_cpu", "true"] if device == "cpu" else []
        command += ["--resume", str(folder / start)] if start is not None else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout[-2000:], done.stderr[-4000:])
        if done.returncode != 0:
            report.complain(f"run {run} on {device}: status {done.returncode}; log.distribution.txt has its error")
            return
        results = json.loads((folder / str(run) / "all_results.json").read_text(encoding="utf-8"))
        losses.append(results["history"][-1]["eval_loss"])
        report.say(f"steps {run + 1} to 3 on {device}: loss {losses[-1]:.5f} on the test images")
    if not all(abs(one - other) <= ALLOWED for one in losses for other in losses):  # False for NaN
        report.complain(f"the runs end with losses {losses}")

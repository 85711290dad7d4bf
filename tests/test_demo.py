"""The demo, made short: from the shipped model to a folder that a fresh process opens."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import PATIENCE
from PIL import Image


ROOT = Path(__file__).resolve().parents[1]


def test_demo(tmp_path: Path):
    command = [sys.executable, "scripts/demo.py", "--output_dir", str(tmp_path), "--max_train_samples", "64"]
    result = subprocess.run(
        [*command, "--epochs", "1"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [line.split(" | ")[0] for line in result.stdout.splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        "| dense",
        "| top, naive",
        "| top, aligned (the paper's)",
        "| local_merge (our default)",
        "| top, aligned, fine-tuned",
        "| local_merge, fine-tuned",
    ]
    assert "gives the same answers" in result.stdout

    folder = tmp_path / "model"
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "kept_tokens.png"} <= {
        file.name for file in folder.iterdir()
    }
    token_pruning = json.loads((folder / "config.json").read_text())["token_pruning"]
    assert (token_pruning["layers"], token_pruning["method"]) == ([2, 4, 6], "local_merge")
    assert Image.open(folder / "kept_tokens.png").width > 500

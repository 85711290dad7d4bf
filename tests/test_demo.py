"""The demo, made short: from the shipped model to a folder that a fresh process opens."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import PATIENCE
from PIL import Image


ROOT = Path(__file__).resolve().parents[1]


def test_demo(tmp_path: Path):
    command = [sys.executable, "scripts/demo.py", "--output_dir", str(tmp_path), "--max_train_samples", "128"]
    result = subprocess.run(
        [*command, "--epochs", "1"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for row in ("dense", "pruned naively", "pruned with alignment", "pruned, aligned, fine-tuned"):
        assert f"| {row} |" in result.stdout
    assert "gives the same answers" in result.stdout

    folder = tmp_path / "model"
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "kept_tokens.png"} <= {
        file.name for file in folder.iterdir()
    }
    assert json.loads((folder / "config.json").read_text())["token_pruning"]["layers"] == [1, 3, 4]
    assert Image.open(folder / "kept_tokens.png").width > 500

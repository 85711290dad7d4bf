"""The README's code, commands, links and figures."""

import re
from pathlib import Path

import pytest
import torch
from forking import run_forked
from transformers import AutoModelForImageClassification

from hf_vssm_prune import PlainMambaConfig, VimConfig, count_flops
from hf_vssm_prune.commands import VERBS


ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def test_python_block_runs():
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    result = run_forked("-c", block)
    assert result.returncode == 0, result.stderr
    assert "% fewer FLOPs" in result.stdout


def test_first_screen_and_length():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    screen = "\n".join(lines[:40])
    positions = [screen.index(part) for part in ("make demo", "make test", "pip install", "```python")]
    assert positions == sorted(positions)
    (block,) = re.findall(r"```python\n(.*?)```", screen, flags=re.DOTALL)
    assert len([line for line in block.splitlines() if line]) <= 10


def test_commands_it_names_are_there():
    verbs = set(re.findall(r"hf-vssm-prune (\w+)", README.read_text()))
    assert {"train", "finetune"} <= verbs <= set(VERBS)
    links = re.findall(r"\]\((?!http|#)([^)#]+)", README.read_text())
    assert "docs/quickstart.md" in links
    for link in links:
        assert (README.parent / link).exists(), link


@pytest.mark.parametrize("page", ["README.md", "docs/faq.md", "src/hf_vssm_prune/hub/model_card_template.md"])
def test_versions_that_it_requires(page: str):
    """Those of the package, also for users of a model's own code, which pip does not check."""
    for library in ("torch", "transformers"):
        required = re.search(rf'"{library}>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
        assert f"{library} {required[1]}" in (ROOT / page).read_text()


@pytest.mark.parametrize("name", ["PlainMamba-L1", "PlainMamba-L2", "PlainMamba-L3", "Vim-T", "Vim-S", "Vim-B"])
def test_table_of_flops(name: str):
    row = next(line for line in README.read_text().splitlines() if line.startswith(f"| {name} |"))
    _, _, parameters, dense, pruned, _ = (cell.strip() for cell in row.split("|"))
    family, preset = name.split("-")
    config_class = {"PlainMamba": PlainMambaConfig, "Vim": VimConfig}[family]
    config = config_class.from_preset(preset)
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    assert f"{model.num_parameters():,}" == parameters
    flops = count_flops(config)
    assert printed_like(flops.dense.published, dense)
    if pruned:
        figure, percent, layers, ratio = re.fullmatch(r"(.+ G) \(−(.+)%\): layers (.+) keep (.+)", pruned).groups()
        layers = [int(layer) for layer in layers.split(",")]
        schedule = {"layers": layers, "keep_ratios": [float(ratio)] * len(layers)}
        flops = count_flops(config_class.from_preset(preset, token_pruning=schedule))
        assert printed_like(flops.pruned.published, figure)
        assert f"{flops.reduction:.1%}" == f"{percent}%"


def printed_like(flops: int, figure: str) -> bool:
    """Whether a count, rounded to as many digits as a figure such as "14.41 G", equals it."""
    number = figure.removesuffix(" G")
    digits = len(number.partition(".")[2])
    return f"{flops / 1e9:.{digits}f}" == number

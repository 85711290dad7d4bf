"""No test depends on which others ran before it, or run beside it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE


MAKEFILE = Path(__file__).resolve().parents[1] / "Makefile"
NOTES_ITS_WORKER = """
import pathlib
import pytest

@pytest.mark.parametrize("number", range(8))
def test(number, worker_id):
    with pathlib.Path(__file__).with_suffix(".txt").open("a") as file:
        file.write(f"{worker_id} ")
"""


def test_a_file_runs_on_one_worker_and_makes_once_what_its_tests_share(tmp_path) -> None:
    pytest.importorskip("xdist")
    (options,) = re.findall(r"-m pytest (.+)", MAKEFILE.read_text())
    for name in ("a", "b"):
        (tmp_path / f"test_{name}.py").write_text(NOTES_ITS_WORKER)
    command = [sys.executable, "-m", "pytest", "-p", "xdist", *options.replace("$(WORKERS)", "2").split()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take seconds
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=PATIENCE)
    for name in ("a", "b"):
        workers = (tmp_path / f"test_{name}.txt").read_text().split()
        assert len(workers) == 8
        assert len(set(workers)) == 1, workers


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    return torch.rand(3)


def test_what_tests_share_is_the_same_whatever_ran_before(drawn) -> None:
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(0)))

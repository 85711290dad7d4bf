"""Every published size and the example model, loaded from a Hub by name, with and without the package."""

import json
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MAKE_CONFIG, PATIENCE
from forking import run_forked
from hub_server import HubServer
from PIL import Image
from test_remote_code import python_without_package  # noqa: F401
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_vssm_prune import EXAMPLE_MODEL
from hf_vssm_prune.hub import save_for_hub
from hf_vssm_prune.hub.loading import load_classifier, new_image_processor


CLIENT = Path(__file__).with_name("classify_from_hub.py")
PRESETS = {
    f"org/{family}-{preset.lower()}": (type(MAKE_CONFIG[family]()), preset)
    for family in sorted(MAKE_CONFIG)
    for preset in type(MAKE_CONFIG[family]()).presets
}
EXAMPLE = "org/plainmamba-trashnet"
# Most of the parameters: for them set HF_VSSM_PRUNE_ALL_PRESETS=1.
LARGE = {"org/plainmamba-l3", "org/vim-s", "org/vim-b", "org/videomamba-s", "org/videomamba-m", "org/videomamba-b"}
NAMES = [name for name in PRESETS if name not in LARGE or os.environ.get("HF_VSSM_PRUNE_ALL_PRESETS") == "1"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """Hosts models with random half-precision weights for 64-pixel images. All tensors but one have the published
    sizes."""
    folder = tmp_path_factory.mktemp("saved")
    with HubServer() as server:
        for name in NAMES:
            config_class, preset = PRESETS[name]
            of_images = {"num_frames": None} if "num_frames" in config_class.__dataclass_fields__ else {}
            options = {"image_size": 64, "token_pruning": {"flops_reduction": 0.3}, **of_images}
            config = config_class.from_preset(preset, **options)
            model = AutoModelForImageClassification.from_config(config, dtype=torch.bfloat16)
            processor = new_image_processor(config, [0.5] * 3, [0.25] * 3, crop_pct=0.875)
            server.host(name, save_for_hub(model, folder / name, processor))
        processor = AutoImageProcessor.from_pretrained(EXAMPLE_MODEL)
        server.host(EXAMPLE, save_for_hub(load_classifier(EXAMPLE_MODEL), folder / EXAMPLE, processor))
        yield server


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photo") / "photo.jpg"
    rows, columns = np.mgrid[0:300, 0:400]
    pixels = np.stack([rows * 255 // 300, columns * 255 // 400, (rows + columns) % 256], axis=-1)
    Image.fromarray(pixels.astype(np.uint8)).save(file)
    return file


def answers(how: str, hub: HubServer, home: Path, photo: Path, python: Path | None = None) -> dict:
    """Runs the client in a new process of `python`; None: in a fork of this process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {**hub.environment(home), "OMP_NUM_THREADS": "1"}
    words = [CLIENT, how, photo, *NAMES, EXAMPLE]
    if python is None:
        prepare = partial(hub.use_in_this_process, pytest.MonkeyPatch(), home)
        done = run_forked(*words, environment=environment, prepare=prepare)
    else:
        command = [str(part) for part in (python, "-I", *words)]
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": PATIENCE}
        done = subprocess.run(command, env=environment, cwd=home.parent, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_models_of_every_size_classify_a_photo(hub, photo, tmp_path, python_without_package) -> None:  # noqa: F811
    without = answers("without", hub, tmp_path / "first", photo, python_without_package)
    installed = answers("with", hub, tmp_path / "second", photo)
    assert set(without) == {*NAMES, EXAMPLE}
    for name, answer in installed.items():
        assert answer["module"] == "hf_vssm_prune"
        assert without[name]["module"] == "transformers_modules"
        for key in ("token_pruning", "parameters"):
            assert answer[key] == without[name][key]
        assert (answer["token_pruning"] is None) == (name == EXAMPLE)
        scores = [guess["score"] for guess in answer["guesses"]]
        assert [guess["score"] for guess in without[name]["guesses"]] == pytest.approx(scores, rel=1e-3)
    # Of random weights the best guesses are too close to compare.
    labels = [[guess["label"] for guess in each[EXAMPLE]["guesses"]] for each in (installed, without)]
    assert labels[0] == labels[1]

"""A saved folder loads with `trust_remote_code=True` where hf_vssm_prune is not installed, and gives the same
results."""

import importlib.util
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MAKE_CONFIG, PATIENCE, TOKEN_PRUNING, make_video_config
from hub_server import HubServer
from PIL import Image
from transformers import AutoModelForVideoClassification, BitImageProcessorPil, pipeline

from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.hub.saving import save_for_hub


CLIENT = Path(__file__).with_name("open_without_package.py")


@pytest.fixture(scope="module")
def python_without_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with everything that this one has, except hf_vssm_prune."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=False)
    new_site_packages = next(folder.glob("lib/python*/site-packages"))
    for site_packages in [Path(entry) for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]:
        for installed in site_packages.iterdir():
            link = new_site_packages / installed.name
            # An editable installation leaves a .pth file or a finder, both with the package's name in theirs.
            if "hf_vssm_prune" not in installed.name and not link.exists():
                link.symlink_to(installed)
    python = folder / "bin" / "python"
    found = subprocess.run([python, "-I", "-c", "import hf_vssm_prune"], capture_output=True, text=True)
    assert found.returncode == 1
    assert "ModuleNotFoundError: No module named 'hf_vssm_prune'" in found.stderr
    return python


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("family", "token_pruning"),
    [
        # With tokens that others were merged into, and with parameters of pruning.
        ("plainmamba", {"layers": [1, 3], "keep_ratios": [0.7, 0.6], "alignment": "learned", "method": "tome"}),
        ("videomamba", {"layers": [1, 3], "keep_ratios": [0.7, 0.6], "method": "local_merge"}),
        ("vim", TOKEN_PRUNING),
    ],
    ids=["plainmamba", "videomamba", "vim"],
)
def test_pruned_model_without_package(
    family: str, token_pruning: dict, image: Image.Image, tmp_path: Path, python_without_package: Path
) -> None:
    config = MAKE_CONFIG[family](token_pruning=dict(token_pruning), id2label={0: "bag", 1: "boot", 2: "coat"})
    model = FAMILIES[family].classifier(config).eval()
    image_processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    folder = tmp_path / "model"
    save_for_hub(model, folder, image_processor)

    opened = open_without_package(python_without_package, folder, image, tmp_path)

    pixel_values = image_processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(pixel_values)
        base_output = model.base_model(pixel_values)
        feature_maps = FAMILIES[family].classes["Backbone"].from_pretrained(folder).eval()(pixel_values).feature_maps
    assert opened["config"] == {"model_type": family, "token_pruning": config.token_pruning}
    assert opened["kept_tokens"] == [kept.tolist() for kept in output.kept_tokens]
    assert len(opened["feature_maps"]) == len(feature_maps)
    for name, expected in [
        ("pixel_values", pixel_values),
        ("last_hidden_state", base_output.last_hidden_state),
        ("logits", output.logits),
    ]:
        torch.testing.assert_close(torch.tensor(opened[name]), expected, rtol=1e-4, atol=1e-5)
    for found, expected in zip(opened["feature_maps"], feature_maps, strict=True):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)

    classify = pipeline("image-classification", model=model, image_processor=image_processor, device="cpu")
    expected = classify(image, top_k=config.num_labels)
    assert [answer["label"] for answer in opened["pipeline"]] == [answer["label"] for answer in expected]
    scores = [answer["score"] for answer in expected]
    assert [answer["score"] for answer in opened["pipeline"]] == pytest.approx(scores, abs=1e-5)


OF_A_CLIP = """
import sys, torch
from transformers import AutoImageProcessor, AutoModelForVideoClassification
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
model = AutoModelForVideoClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    output = model(**processor(list(torch.load(sys.argv[2])), return_tensors="pt"))
torch.save([type(model).__module__, output.logits, output.kept_tokens], sys.argv[3])
"""


def test_video_model_from_a_hub_without_package(tmp_path: Path, python_without_package: Path) -> None:
    config = make_video_config(token_pruning={"layers": [1, 3], "keep_ratios": [0.7, 0.6], "method": "local_merge"})
    model = AutoModelForVideoClassification.from_config(config).eval()
    processor = new_image_processor(config, [0.5] * 3, [0.25] * 3)
    frames = torch.randint(0, 256, (config.num_frames, 3, 40, 48), dtype=torch.uint8)
    torch.save(frames, tmp_path / "frames.pt")
    command = [python_without_package, "-I", "-c", OF_A_CLIP, "org/video", tmp_path / "frames.pt", tmp_path / "out.pt"]
    with HubServer() as hub:
        hub.host("org/video", save_for_hub(model, tmp_path / "saved", processor))
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        environment |= hub.environment(tmp_path / "home")
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        expected = model(**processor(list(frames), return_tensors="pt"))
    module, logits, kept_tokens = torch.load(tmp_path / "out.pt")
    assert module.startswith("transformers_modules.")
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert [kept.tolist() for kept in kept_tokens] == [kept.tolist() for kept in expected.kept_tokens]


BY_TRITON = """
import sys, torch
from transformers import AutoModelForImageClassification
pixel_values = torch.load(sys.argv[2])
for backend in sys.argv[3:]:
    model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True, scan_backend=backend)
    try:
        loss = model(pixel_values, labels=torch.zeros(1, dtype=torch.int64)).loss
        loss.backward()
        print(loss.item(), sum(parameter.grad.abs().sum().item() for parameter in model.parameters()))
    except ImportError as error:
        print(error)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_kernels_travel_with_the_model(tmp_path: Path, python_without_package: Path) -> None:
    """Interpreted on the CPU. The C++ kernels are not included, and requesting them is an error that says so."""
    config = MAKE_CONFIG["plainmamba"](num_hidden_layers=2, token_pruning={"layers": [1], "keep_ratios": [0.5]})
    folder = tmp_path / "model"
    save_for_hub(FAMILIES["plainmamba"].classifier(config), folder)
    torch.save(torch.randn(config.pixel_values_shape(1)), tmp_path / "pixel_values.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    environment.pop("PYTHONPATH", None)
    command = [python_without_package, "-I", "-c", BY_TRITON, folder, tmp_path / "pixel_values.pt"]
    done = subprocess.run(
        [*command, "torch", "triton", "cpu"], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    plain, triton, by_cpu = done.stdout.splitlines()[-3:]
    assert [float(word) for word in triton.split()] == pytest.approx([float(word) for word in plain.split()], rel=1e-4)
    assert "backend 'cpu' needs the hf_vssm_prune package" in by_cpu


def open_without_package(python: Path, folder: Path, image: Image.Image, scratch: Path) -> dict:
    """The output of `open_without_package.py`, run outside this repository and with its own cache."""
    image_file = scratch / "image.png"
    image.save(image_file)
    environment = {**os.environ, "HF_HOME": str(scratch / "hf_home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, "-I", CLIENT, folder, image_file],
        cwd=scratch,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

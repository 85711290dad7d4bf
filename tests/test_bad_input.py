"""Damaged checkpoints and unusual images passed to the commands: either a one-line error that names the problem, or the
right result; never incomplete files.

Input that a single part rejects is tested with that part: options and schedules, tables and folders, published
checkpoints.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_script, make_plainmamba_config
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, pipeline

from hf_vssm_prune.hub import save_for_hub
from hf_vssm_prune.hub.loading import new_image_processor


SCHEDULE = {"layers": [1, 3], "keep_ratios": [0.7, 0.6]}
STAGE = {"layers": [1], "keep_ratios": [0.7]}


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = make_plainmamba_config(token_pruning=SCHEDULE)
    model = AutoModelForImageClassification.from_config(config)
    processor = new_image_processor(config, [0.5] * 3, [0.25] * 3, crop_pct=1.0)
    return save_for_hub(model, tmp_path_factory.mktemp("saved") / "model", processor)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(12):
        file = folder / ("train", "test")[i % 2] / f"class {i % 3}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    return folder


# Checkpoints


def truncated(share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        os.truncate(file, int(share * file.stat().st_size))

    return damage


def configured(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def containing(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


PICKLE_THAT_RUNS_CODE = b"cos\nsystem\n(S'touch pickle_was_run'\ntR."


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(PICKLE_THAT_RUNS_CODE)


DAMAGES = {
    "half of the weights": (truncated(0.5), "weights of MODEL cannot be read"),
    "a few bytes of weights": (truncated(0.001), "weights of MODEL cannot be read"),
    "empty weights": (truncated(0), "weights of MODEL cannot be read"),
    "text as weights": (containing("model.safetensors", b"Not Found\n"), "weights of MODEL cannot be read"),
    "no weights": (without("model.safetensors"), "no file named model.safetensors"),
    "weights that run code": (only_a_pickle, "no file named model.safetensors"),
    "no configuration": (without("config.json"), "config.json"),
    "half a configuration": (containing("config.json", b'{"model_type": "plainm'), "not a valid JSON file"),
    "a configuration that is a list": (containing("config.json", b"[]"), "Unrecognized model in MODEL"),
    "a configuration from the future": (configured(model_type="plainmamba3"), "MODEL contains custom code"),
    "another model": (configured(model_type="vit"), "it must be a PlainMamba, Vim or VideoMamba model"),
    "a pruning option from the future": (
        configured(token_pruning=SCHEDULE | {"merging": "soft"}),
        "unknown options ['merging']",
    ),
    "an alignment from the future": (configured(token_pruning=SCHEDULE | {"alignment": "guessed"}), "'guessed'"),
    "a method from the future": (configured(token_pruning=SCHEDULE | {"method": "guessed"}), "'guessed'"),
    "a depth in words": (configured(num_hidden_layers="four"), "num_hidden_layers"),
    "more layers than weights": (configured(num_hidden_layers=5), "missing_keys"),
    "fewer layers than weights": (configured(num_hidden_layers=3, token_pruning=STAGE), "unexpected_keys"),
    "another width than the weights'": (configured(hidden_size=32), "weights of MODEL cannot be read"),
    "a label that is not there": (configured(id2label={"0": "a", "1": "b"}), "has 2 labels"),
    "a missing tensor": (with_tensors(lambda tensors: tensors.pop("classifier.bias")), "missing_keys"),
    "NaN in the weights": (with_tensors(lambda tensors: tensors["classifier.bias"].fill_(torch.nan)), "contain NaN or"),
    "no image processor": (without("preprocessor_config.json"), "preprocessor_config.json"),
    "half an image processor": (containing("preprocessor_config.json", b'{"size": {'), "not a valid JSON file"),
}


@pytest.mark.parametrize("script", ["evaluate", "finetune"])
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints(name, script, saved_model, image_folder, tmp_path, monkeypatch, capsys) -> None:
    damage, message = DAMAGES[name]
    model = shutil.copytree(saved_model, tmp_path / "model")
    damage(model)
    monkeypatch.chdir(tmp_path)
    arguments = ["--model_name_or_path", str(model), "--dataset_name", str(image_folder), "--workers", "0"]
    output = {"evaluate": ["--json", "out", "--device", "cpu"], "finetune": ["--output_dir", "out", "--use_cpu"]}
    assert load_script(script).main([*arguments, *output[script], "--batch_size", "2"]) == 1
    last_line = capsys.readouterr().err.rpartition("error: ")
    assert last_line[1]
    assert message.replace("MODEL", str(model)) in last_line[2]
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


# Images


def picture() -> Image.Image:
    """A coarse pattern of colours, 40 x 32 pixels."""
    generator = np.random.default_rng(3)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize((40, 32), Image.Resampling.NEAREST)


def save_rotated(file: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees to the right for viewing
    picture().transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)


EQUAL_IMAGES = {
    "palette.png": lambda file: picture().quantize(20).save(file),
    "alpha.png": lambda file: picture().convert("RGBA").save(file),
    "rotated.png": save_rotated,
    "cmyk.tiff": lambda file: picture().convert("CMYK").save(file),
    "lossless.webp": lambda file: picture().save(file, lossless=True),
    "bitmap.bmp": lambda file: picture().save(file),
}
ODD_IMAGES = {
    "1_pixel.png": lambda file: Image.new("RGB", (1, 1), "red").save(file),
    "strip.png": lambda file: Image.new("RGB", (400, 2), "red").save(file),
    "black_and_white.png": lambda file: picture().convert("1").save(file),
    "16_bits.png": lambda file: Image.fromarray(np.full((32, 32), 40000, dtype=np.uint16)).save(file),
    "cmyk.jpg": lambda file: picture().convert("CMYK").save(file),
}


def draw(model: Path, file: Path | str, output: Path | str) -> int:
    arguments = [str(file), "--model_name_or_path", str(model), "--output", str(output)]
    return load_script("visualize").main(arguments)


def classify(model: Path, file: Path) -> list[dict]:
    return pipeline("image-classification", model=str(model))(str(file))


@pytest.mark.parametrize("name", EQUAL_IMAGES)
def test_an_image_is_the_same_in_any_format(name, saved_model, tmp_path) -> None:
    EQUAL_IMAGES[name](tmp_path / name)
    picture().save(tmp_path / "expected.png")
    drawn = {}
    for file in (name, "expected.png"):
        output = tmp_path / f"drawn {file}.png"
        assert draw(saved_model, tmp_path / file, output) == 0
        drawn[file] = np.asarray(Image.open(output)).astype(int)
    assert drawn[name].shape == drawn["expected.png"].shape
    assert np.abs(drawn[name] - drawn["expected.png"]).max() <= 2
    scores, expected = (
        {guess["label"]: guess["score"] for guess in classify(saved_model, tmp_path / file)}
        for file in (name, "expected.png")
    )
    assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_odd_images_are_classified(name, saved_model, tmp_path) -> None:
    ODD_IMAGES[name](tmp_path / name)
    output = tmp_path / "drawn.png"
    assert draw(saved_model, tmp_path / name, output) == 0
    scores = [guess["score"] for guess in classify(saved_model, tmp_path / name)]
    assert sum(scores) == pytest.approx(1, abs=1e-5)


def half_a_jpeg(file: Path) -> None:
    picture().save(file)
    os.truncate(file, file.stat().st_size // 2)


BAD_IMAGES = {
    "half.jpg": half_a_jpeg,
    "empty.png": lambda file: file.touch(),
    "text.png": lambda file: file.write_text("Not Found"),
    "floats.tiff": lambda file: Image.fromarray(np.full((32, 32), 0.5, dtype=np.float32)).save(file),
    "folder.png": lambda file: file.mkdir(),
    "gone.png": lambda file: None,
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_named(name, saved_model, tmp_path, capsys) -> None:
    BAD_IMAGES[name](tmp_path / name)
    output = tmp_path / "drawn.png"
    assert draw(saved_model, tmp_path / name, output) == 1
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("error: ")
    assert name in last_line
    assert not output.exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [("nowhere/drawn.png", "nowhere"), ("drawn.xyz", "xyz"), (".", "is a folder")],
)
def test_pictures_that_cannot_be_written(output, message, saved_model, tmp_path, monkeypatch, capsys) -> None:
    picture().save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    assert draw(saved_model, "image.png", output) == 1
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("error: ")
    assert message in last_line
    assert {path.name for path in tmp_path.iterdir()} == {"image.png"}


# Devices, and where results go


@pytest.mark.parametrize("script", ["evaluate", "compare_methods"])
@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", ""])
def test_a_device_that_is_not_there(script, device, saved_model, image_folder, capsys) -> None:
    arguments = ["--model_name_or_path", str(saved_model), "--dataset_name", str(image_folder), "--device", device]
    assert load_script(script).main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --device {device} is not available; this machine has cpu")


ALONE = ["--model_name_or_path", "m", "--dataset_name", "d"]
WRITERS = {
    "evaluate": [*ALONE, "--json"],
    "compare_methods": [*ALONE, "--json"],
    "estimate": ["--family", "vim", "--json"],
    "benchmark": ["--json"],
    "visualize": ["image.png", "--output"],
    "study": ["--study", str(Path(__file__).parents[1] / "recipes" / "study_small.yaml"), "--results", "r", "--report"],
}


@pytest.mark.parametrize("script", WRITERS)
@pytest.mark.parametrize(("file", "reason"), [(".", "is a folder"), ("nowhere/file", "its folder does not exist")])
def test_files_that_cannot_be_written_are_refused_before_the_work(
    script, file, reason, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = load_script(script).main([*WRITERS[script], file])
    except SystemExit as exit_:
        status = exit_.code
    assert status in (1, 2)
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert f"{WRITERS[script][-1]} {file}" in last_line
    assert reason in last_line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["train", "finetune"])
def test_a_precision_that_the_device_cannot_train_in(script, saved_model, tmp_path, capsys) -> None:
    arguments = ["--model_name_or_path", str(saved_model), "--dataset_name", "no such data set", "--use_cpu"]
    output = tmp_path / "run"
    assert load_script(script).main([*arguments, "--output_dir", str(output), "--mixed_precision", "fp16"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --mixed_precision fp16 trains on a GPU only")
    assert not output.exists()


@pytest.mark.parametrize("output", ["file", "file/run"])
def test_output_folders_that_cannot_be_made(output, saved_model, tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    arguments = ["--model_name_or_path", str(saved_model), "--dataset_name", "no such data set", "--use_cpu"]
    assert load_script("train").main([*arguments, "--output_dir", str(tmp_path / output)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{tmp_path / 'file'} is a file.")

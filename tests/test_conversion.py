"""Conversion of published checkpoints, intact or damaged, in both directions, from Python and on the command line."""

import argparse
import json
import os
import pickle
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import MAKE_CONFIG, SCRIPTS, load_script, make_plainmamba_config, make_vim_config
from forking import run_forked
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_vssm_prune import PlainMambaConfig, VideoMambaConfig, VimConfig
from hf_vssm_prune.conversion import (
    convert_official_state_dict,
    convert_to_official_state_dict,
    infer_config,
    load_checkpoint,
    load_official_model,
    save_official_model,
)
from hf_vssm_prune.families import FAMILIES


SCRIPT = SCRIPTS / "convert.py"
PRESETS = [(config, name) for config in (PlainMambaConfig, VimConfig, VideoMambaConfig) for name in config.presets]
FIRST_A_LOG = {
    "plainmamba": "backbone.layers.0.mamba.A_log",
    "videomamba": "layers.0.mixer.A_log",
    "vim": "layers.0.mixer.A_log",
}
POSITIONS = {"plainmamba": "backbone.pos_embed", "videomamba": "pos_embed", "vim": "pos_embed"}
WEIGHT_KEYS = {"plainmamba": "state_dict", "videomamba": "model", "vim": "model"}


def make_model(config) -> torch.nn.Module:
    """A model whose weights are all different; unchanged zeros and ones would hide a mix-up."""
    model = FAMILIES[config.model_type].classifier(config).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor), alpha=0.1)
    return model


@pytest.fixture
def model(tiny_config) -> torch.nn.Module:
    return make_model(tiny_config)


@pytest.fixture
def official(model) -> dict[str, Tensor]:
    return convert_to_official_state_dict(model.config, model.state_dict())


@pytest.fixture
def convert():
    """The script's `main`, run in this process."""
    main = load_script("convert").main
    return lambda *arguments: main([str(argument) for argument in arguments])


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
        assert actual[name].dtype == tensor.dtype, name


# ---- Names and layouts -------------------------------------------------------------------------------------------


def test_round_trip(model, official, pixel_values) -> None:
    assert not set(official) & set(model.state_dict())
    config = infer_config(official, model.config.model_type)
    assert_same_tensors(convert_official_state_dict(config, official), model.state_dict())

    other = FAMILIES[config.model_type].classifier(config).eval()
    other.load_state_dict(convert_official_state_dict(config, official))
    with torch.no_grad():
        assert torch.equal(other(pixel_values).logits, model(pixel_values).logits)


@pytest.mark.parametrize(
    "lay_out",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "meta": {"epoch": 300}},
        lambda weights: {"model": weights, "optimizer": {}, "epoch": 300},
        lambda weights: {"model": {f"module.{name}": tensor for name, tensor in weights.items()}},
        lambda weights: {"model": {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}},
        lambda weights: {"n_averaged": torch.tensor(3)} | {f"module.{name}": each for name, each in weights.items()},
    ],
    ids=["bare", "state_dict", "model", "distributed", "compiled", "averaged"],
)
def test_layouts(lay_out, model, official) -> None:
    checkpoint = lay_out(official)
    config = infer_config(checkpoint, model.config.model_type)
    assert_same_tensors(convert_official_state_dict(config, checkpoint), model.state_dict())


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema_state_dict"])
def test_averaged_weights_on_request(key, model, official) -> None:
    last = {name: tensor + 1 for name, tensor in official.items()}
    checkpoint = {"model": last, key: {f"module.{name}": tensor for name, tensor in official.items()}}
    assert_same_tensors(convert_official_state_dict(model.config, checkpoint, ema=True), model.state_dict())
    assert_same_tensors(
        convert_official_state_dict(model.config, checkpoint), {k: v + 1 for k, v in model.state_dict().items()}
    )


def test_averaged_weights_missing(model, official) -> None:
    with pytest.raises(ValueError, match=r"no EMA weights under any of .*model_ema.*it has \['model'\]"):
        convert_official_state_dict(model.config, {"model": official}, ema=True)


@pytest.mark.parametrize("ema", [False, True])
def test_second_weights_of_plainmambas_training(ema) -> None:
    """They are buffers next to the averaged weights, with underscores instead of dots in their names."""
    model = make_model(make_plainmamba_config())
    official = convert_to_official_state_dict(model.config, model.state_dict())
    last = {f"ema_{name.replace('.', '_')}": tensor + 1 for name, tensor in official.items()}
    checkpoint = {"state_dict": official | last}
    assert_same_tensors(convert_official_state_dict(model.config, checkpoint, ema), model.state_dict())


def test_counters_that_old_checkpoints_lack() -> None:
    model = make_model(make_plainmamba_config())
    official = convert_to_official_state_dict(model.config, model.state_dict())
    old = {name: tensor for name, tensor in official.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(official)
    assert_same_tensors(convert_official_state_dict(model.config, old), model.state_dict())


# ---- Sizes -------------------------------------------------------------------------------------------------------


def sizes(config) -> dict:
    return {key: value for key, value in config.to_dict().items() if key not in ("dtype", "architectures")}


def infer_again(config, **overrides):
    with torch.device("meta"):
        state_dict = FAMILIES[config.model_type].classifier(config).state_dict()
    return infer_config(convert_to_official_state_dict(config, state_dict), config.model_type, **overrides)


@pytest.mark.parametrize(("config_class", "preset"), PRESETS)
def test_sizes_of_published_models(config_class, preset) -> None:
    config = config_class.from_preset(preset)
    assert sizes(infer_again(config)) == sizes(config)


@pytest.mark.parametrize(
    "config",
    [
        make_plainmamba_config(image_size=30, patch_size=6, conv_kernel=5, num_stem_convs=0, expand=3),
        make_plainmamba_config(num_stem_convs=3, stem_channels=8, depthwise_layers=[1, 3], num_channels=1),
        make_vim_config(conv_kernel=3, state_size=7, time_step_rank=5, num_channels=1, num_labels=11),
    ],
    ids=["plainmamba odd", "plainmamba deep stem", "vim odd"],
)
def test_sizes_of_other_models(config) -> None:
    assert sizes(infer_again(config)) == sizes(config)


def test_grid_that_is_not_square() -> None:
    for make_config in MAKE_CONFIG.values():
        config = make_config(image_size=[32, 24])
        with pytest.raises(ValueError, match=r"12 patches do not form a square grid: give `image_size`"):
            infer_again(config)
        assert infer_again(config, image_size=[32, 24]).grid_size == (4, 3)


def test_overlapping_patches(caplog) -> None:
    """Files do not say how far apart patches are, but all published models are for images of 224 pixels."""
    config = VimConfig.from_preset("T", patch_stride=8)
    for given in ({}, {"patch_stride": 8}, {"image_size": 224}):
        caplog.clear()
        inferred = infer_again(config, **given)
        assert (inferred.image_size, inferred.patch_stride, inferred.grid_size) == (224, 8, (27, 27))
        assert ("27 x 27 patches. They are taken to overlap" in caplog.text) == ("patch_stride" not in given)
    for given in ({"patch_stride": 16}, {"image_size": 432}):
        inferred = infer_again(config, **given)
        assert (inferred.image_size, inferred.patch_stride) == (432, 16)
    with pytest.raises(ValueError, match="`patch_stride` is an option of Vim"):
        infer_again(make_plainmamba_config(), patch_stride=8)


# ---- Checkpoints that do not fit ---------------------------------------------------------------------------------


def test_every_wrong_tensor_is_named(model, official) -> None:
    family = model.config.model_type
    lost = [name for name in official if "dt_proj" in name][:2]
    for name in lost:
        del official[name]
    official |= {"rope.freqs": torch.zeros(3), FIRST_A_LOG[family]: torch.zeros(32, 5)}
    with pytest.raises(ValueError, match=f"does not fit this {family} configuration") as error:
        convert_official_state_dict(model.config, official)
    assert str(error.value).splitlines()[1:] == [
        *(f"  missing: {name} {list(shape)}" for name, shape in zip(lost, [(32, 1), (32,)], strict=True)),
        "  unexpected: rope.freqs [3]",
        f"  shape: {FIRST_A_LOG[family]} is [32, 5] in the checkpoint and [32, 4] in the model",
    ]


def test_wrong_tensors_of_ours_are_named(model) -> None:
    state_dict = model.state_dict()
    state_dict["head.bias"] = state_dict.pop("classifier.bias")
    with pytest.raises(ValueError, match=r"missing: classifier\.bias\n  unexpected: head\.bias"):
        convert_to_official_state_dict(model.config, state_dict)


def test_tensor_that_tells_a_size_is_missing(model, official) -> None:
    family = model.config.model_type
    name = POSITIONS[family]
    without = {key: tensor for key, tensor in official.items() if key != name}
    with pytest.raises(ValueError, match=f"missing: {name}"):
        infer_config(without, family)
    with pytest.raises(ValueError, match=rf"shape: {name} is \[4\] in the checkpoint; it must have 3 axes"):
        infer_config(official | {name: torch.zeros(4)}, family)


@pytest.mark.parametrize("checkpoint", [{"fc.weight": torch.zeros(2)}, {"model": {"fc.weight": torch.zeros(2)}}])
def test_another_model(checkpoint) -> None:
    with pytest.raises(ValueError, match=r"neither a PlainMamba .* nor a Vim .*fc\.weight"):
        infer_config(checkpoint)


@pytest.mark.parametrize("checkpoint", [{}, {"model": None}, {"epoch": 3}, {"state_dict": {"epoch": 3}}])
def test_no_tensors(checkpoint) -> None:
    with pytest.raises(ValueError, match="the checkpoint contains no"):
        infer_config(checkpoint)


# ---- Files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_file_round_trip(suffix, model, official, pixel_values, tmp_path) -> None:
    file = tmp_path / "new folder" / f"{model.config.model_type}{suffix}"
    save_official_model(model, file)
    assert list(file.parent.iterdir()) == [file]
    checkpoint = load_checkpoint(file)
    if suffix == ".pth":
        (key,) = checkpoint
        assert key == WEIGHT_KEYS[model.config.model_type]
        checkpoint = checkpoint[key]
    assert_same_tensors(checkpoint, official)

    loaded = load_official_model(file)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)


@pytest.mark.parametrize("options", [{}, {"method": "dyvm"}, {"alignment": "learned", "method": "top"}], ids=str)
def test_loading_with_a_pruning_schedule(options, model, official, pixel_values, tmp_path) -> None:
    torch.save({"model": official}, tmp_path / "model.pth")
    schedule = {"layers": [1, 3], "keep_ratios": [0.7, 0.6]} | options
    pruned = load_official_model(tmp_path / "model.pth", family=model.config.model_type, token_pruning=schedule)
    assert len(pruned(pixel_values).kept_tokens) == 2
    assert pruned.has_pruning_parameters == bool(options)
    assert_same_tensors(pruned.state_dict() | model.state_dict(), pruned.state_dict())
    # Parameters of pruning have no published names.
    save_official_model(pruned, tmp_path / "again.safetensors")
    assert_same_tensors(load_checkpoint(tmp_path / "again.safetensors"), official)
    pruned.set_token_pruning(None)
    assert_same_tensors(convert_to_official_state_dict(pruned.config, pruned.state_dict()), official)


def test_pickled_code_does_not_run(convert, tmp_path, capsys) -> None:
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {shlex.quote(str(tmp_path / 'executed'))}",)

    torch.save({"model": {"weight": torch.zeros(1)}, "extra": Payload()}, tmp_path / "zip.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    for file in ("zip.pth", "bare.pth"):
        with pytest.raises(ValueError, match=f"{file} cannot be read as a checkpoint of tensors and plain values"):
            load_checkpoint(tmp_path / file)
        assert convert(tmp_path / file, tmp_path / "model") == 1
        assert "could run code" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["bare.pth", "zip.pth"]
    pickle.loads((tmp_path / "bare.pth").read_bytes())
    assert (tmp_path / "executed").exists(), "the payload is harmless anyway, and this test shows nothing"


def test_options_of_vims_training_script_are_plain_values(model, official, tmp_path) -> None:
    file = tmp_path / f"{model.config.model_type}.pth"
    torch.save({"model": official, "args": argparse.Namespace(lr=5e-4, model="vim_small")}, file)
    assert_same_tensors(load_official_model(file).state_dict(), model.state_dict())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_truncated_file(share, suffix, tmp_path) -> None:
    file = tmp_path / f"model{suffix}"
    save_official_model(make_model(make_vim_config()), file)
    os.truncate(file, int(share * file.stat().st_size))
    with pytest.raises(ValueError, match=f"model{suffix} cannot be read"):
        load_checkpoint(file)


def test_file_with_something_else(tmp_path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth contains a list; it must contain a dict of tensors"):
        load_checkpoint(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth: no such file"):
        load_checkpoint(tmp_path / "nothing.pth")


# ---- The script --------------------------------------------------------------------------------------------------


def run_script(*arguments: Path | str) -> str:
    result = run_forked(SCRIPT, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_script_there_and_back(tmp_path) -> None:
    """Converts both ways like a user, starting from a half-precision checkpoint with everything that training saves."""
    model = make_model(make_vim_config())
    official = {
        name: tensor.half() for name, tensor in convert_to_official_state_dict(model.config, model.state_dict()).items()
    }
    torch.save({"model": official, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "vim.pth")
    printed = run_script(tmp_path / "vim.pth", tmp_path / "vim")
    assert "vim: 4 layers, hidden size 16, images of 32 x 32 pixels as 4 x 4 patches, 3 labels" in printed
    assert f"{model.num_parameters():,} parameters" in printed

    run_script(tmp_path / "vim", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == official.keys()
    for name, tensor in official.items():
        assert torch.equal(back[name].half(), tensor), name
    assert sorted(os.listdir(tmp_path)) == ["back.safetensors", "vim", "vim.pth"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_script_changes_no_bit(suffix, convert, model, pixel_values, tmp_path, capsys) -> None:
    family = model.config.model_type
    source, folder, target = (tmp_path / name for name in (f"{family}{suffix}", "model", f"new-{family}{suffix}"))
    save_official_model(model, source)
    assert convert(source, folder) == 0
    opened = AutoModelForImageClassification.from_pretrained(folder)
    assert_same_tensors(opened.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(opened(pixel_values).logits, model(pixel_values).logits)

    assert convert(folder, target) == 0
    assert_same_tensors(load_official_model(target).state_dict(), model.state_dict())
    if suffix == ".safetensors":
        assert target.read_bytes() == source.read_bytes()
    assert f"saved to {target}" in capsys.readouterr().out
    assert set(tmp_path.iterdir()) == {source, folder, target}


def test_script_writes_the_published_image_processing(convert, model, tmp_path) -> None:
    save_official_model(model, tmp_path / "model.pth")
    assert convert(tmp_path / "model.pth", tmp_path / "model") == 0
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert processor.size == {"shortest_edge": round(32 / 0.875)}
    assert processor.crop_size == {"height": 32, "width": 32}
    assert processor.image_mean == (0.485, 0.456, 0.406)
    assert processor.image_std == (0.229, 0.224, 0.225)
    assert processor.resample == 3  # bicubic


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("labels.txt", "cat\ndog\nsea lion\n"),
        ("labels.json", '["cat", "dog", "sea lion"]'),
        ("labels.json", '{"2": "sea lion", "0": "cat", "1": "dog"}'),
    ],
)
def test_script_names_labels(file, text, convert, model, tmp_path) -> None:
    save_official_model(model, tmp_path / "model.pth")
    (tmp_path / file).write_text(text)
    assert convert(tmp_path / "model.pth", tmp_path / "model", "--id2label", tmp_path / file) == 0
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "model").config
    assert config.id2label == {0: "cat", 1: "dog", 2: "sea lion"}
    assert config.label2id == {"cat": 0, "dog": 1, "sea lion": 2}


def test_script_takes_sizes_and_averaged_weights(convert, tmp_path) -> None:
    model = make_model(make_vim_config(image_size=[32, 24], patch_stride=4))
    official = convert_to_official_state_dict(model.config, model.state_dict())
    last = {name: tensor + 1 for name, tensor in official.items()}
    torch.save({"model": last, "model_ema": official}, tmp_path / "model.pth")
    arguments = ["--ema", "--image_size", "32", "24", "--patch_stride", "4", "--image_mean", *"000"]
    assert convert(tmp_path / "model.pth", tmp_path / "model", *arguments) == 0
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert_same_tensors(opened.state_dict(), model.state_dict())
    assert opened.config.grid_size == (7, 5)
    assert AutoImageProcessor.from_pretrained(tmp_path / "model").image_mean == (0, 0, 0)


FILES = {
    "labels.json": '{"0": "cat", "3": "dog", "1": "bird"}',
    "two.txt": "cat\ndog",
    "taken/notes.txt": "",
    "taken.pth": "",
    "nothing/notes.txt": "",
}


@pytest.fixture(scope="module")
def what_is_there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, intact and damaged models, and `FILES`."""
    root = tmp_path_factory.mktemp("there")
    for name, text in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    model = make_model(make_vim_config())
    save_official_model(model, root / "model.pth")
    for folder in ("folder", "damaged", "incomplete", "future"):
        model.save_pretrained(root / folder)
    config = json.loads((root / "future" / "config.json").read_text())
    (root / "future" / "config.json").write_text(json.dumps(config | {"token_pruning": "automatic"}))
    os.truncate(root / "damaged" / "model.safetensors", 3000)
    state_dict = model.state_dict()
    del state_dict["classifier.bias"]
    save_file(state_dict, root / "incomplete" / "model.safetensors", metadata={"format": "pt"})
    return root


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.pth", "new"], "gone.pth: no such file"),
        (["model.pth", "taken"], "taken already exists and will not be overwritten"),
        (["model.pth", "model.pth"], "model.pth already exists and will not be overwritten"),
        (["folder", "taken.pth"], "taken.pth already exists and will not be overwritten"),
        (["folder", "new.bin"], "new.bin: published checkpoints are .pth or .safetensors files"),
        (["folder", "new.pth", "--ema"], "folder is a folder, and --ema can only be used with checkpoint files"),
        (["folder", "two.txt/new.pth"], "new.pth cannot be written"),
        (["nothing", "new.pth"], "nothing"),
        (["damaged", "new.pth"], "damaged"),
        (["future", "new.pth"], "'token_pruning'"),
        (["incomplete", "new.pth"], "not a complete image classifier: {'missing_keys': ['classifier.bias']"),
        (["model.pth", "new", "--ema"], "no EMA weights"),
        (["model.pth", "new", "--image_size", "64"], "pos_embed is [1, 17, 16] in the checkpoint and [1, 65, 16]"),
        (["model.pth", "new", "--image_size", "1", "2", "3"], "it must be a number of pixels or (height, width)"),
        (["model.pth", "new", "--patch_stride", "0"], "`patch_stride` is 0"),
        (["model.pth", "new", "--id2label", "two.txt"], "two.txt names 2 labels; the checkpoint has 3"),
        (["model.pth", "new", "--id2label", "labels.json"], "labels.json must be a JSON list of names"),
        (["model.pth", "new", "--id2label", "gone.txt"], "gone.txt"),
        (["model.pth", "new", "--image_mean", "0"], "image_mean has 1 and image_std 3 values"),
        (["model.pth", "new", "--image_std", "1", "1", "0"], "each must be greater than 0"),
        (["model.pth", "new", "--crop_pct", "1.5"], "crop_pct is 1.5"),
        (["model.pth", "two.txt/new"], "two.txt is a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_script_says_what_is_wrong_and_writes_nothing(
    arguments, message, convert, what_is_there, tmp_path, monkeypatch, capsys
) -> None:
    shutil.copytree(what_is_there, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert convert(*arguments) == 1
    error = capsys.readouterr().err.rpartition("error: ")  # after what transformers logs
    assert error[1]
    assert message in error[2]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_script_fills_an_empty_folder(convert, model, tmp_path) -> None:
    save_official_model(model, tmp_path / "model.pth")
    (tmp_path / "empty").mkdir()
    assert convert(tmp_path / "model.pth", tmp_path / "empty") == 0
    AutoModelForImageClassification.from_pretrained(tmp_path / "empty")


def test_full_disk_leaves_nothing_behind(convert, model, tmp_path, monkeypatch, capsys) -> None:
    def fail(*arguments, **options):
        Path(arguments[1]).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch, "save", fail)
    assert convert(tmp_path / "model", tmp_path / "new.pth") == 1
    assert "error: " in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["model"]

"""Folders for the Hub: complete, correct, portable, and never half written."""

import json
import resource
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import MAKE_CONFIG, TOKEN_PRUNING, make_plainmamba_config
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BitImageProcessorPil,
    pipeline,
)

import hf_vssm_prune
from hf_vssm_prune.hub import ModelCardInfo, save_for_hub
from hf_vssm_prune.hub.saving import auto_map, code_files


PACKAGE = Path(hf_vssm_prune.__file__).parent


@pytest.fixture
def image_processor() -> BitImageProcessorPil:
    return BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture
def model() -> hf_vssm_prune.PlainMambaForImageClassification:
    return make_classifier()


def make_classifier(family: str = "plainmamba", **changes) -> torch.nn.Module:
    return AutoModelForImageClassification.from_config(MAKE_CONFIG[family](**changes)).eval()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_auto_classes_open_the_folder(family, image_processor, pixel_values, tmp_path) -> None:
    model = make_classifier(family, token_pruning=dict(TOKEN_PRUNING))
    folder = save_for_hub(model, tmp_path / "model", image_processor)

    opened = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected, output = model(pixel_values), opened(pixel_values)
    assert torch.equal(output.logits, expected.logits)
    for kept, expected_kept in zip(output.kept_tokens, expected.kept_tokens, strict=True):
        assert torch.equal(kept, expected_kept)
    assert type(opened) is type(model)
    assert type(AutoConfig.from_pretrained(folder)) is type(model.config)
    assert AutoConfig.from_pretrained(folder).token_pruning == TOKEN_PRUNING
    assert type(AutoModel.from_pretrained(folder)).__name__ == type(model).__name__.replace(
        "ForImageClassification", "Model"
    )
    # AutoBackbone asks the Hub for a repository of this name before it looks for a folder, and there is no Hub here.
    with mock.patch("huggingface_hub.HfApi.repo_exists", return_value=True):
        assert type(AutoBackbone.from_pretrained(folder)).__name__.endswith("Backbone")
    assert AutoImageProcessor.from_pretrained(folder).crop_size == {"height": 32, "width": 32}
    assert pipeline("image-classification", model=str(folder), device="cpu").model.config.model_type == family


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_folder_holds_everything_and_nothing_else(family, image_processor, tmp_path) -> None:
    folder = save_for_hub(make_classifier(family), tmp_path / "model", image_processor)
    code = {file.name for file in folder.glob("*.py")}
    others = {file.name for file in folder.iterdir()} - code
    written = {"README.md", "NOTICE", "LICENSE-CODE", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert others == written
    assert {f"configuration_{family}.py", f"modeling_{family}.py", "selective_scan.py", "token_pruning.py"} <= code
    assert {file.name for file in PACKAGE.glob("pruning_*.py")} | {"mixer_output.py", "token_merging.py"} <= code
    assert not any(other in file for file in code for other in set(MAKE_CONFIG) - {family})
    assert list(tmp_path.iterdir()) == [folder], "a temporary folder was left behind"


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_auto_map_names_classes_that_exist(family) -> None:
    config = MAKE_CONFIG[family]()
    names = {file.stem for file in code_files(config)}
    for target in auto_map(config).values():
        module, name = target.split(".")
        assert module in names
        assert hasattr(hf_vssm_prune, name)


def test_labels_stay_in_the_order_of_their_ids(tmp_path) -> None:
    """Their order is not alphabetical, where "10" comes before "2"."""
    names = [f"class {i}" for i in range(12)]
    model = make_classifier(num_labels=12, id2label=dict(enumerate(names)))
    folder = save_for_hub(model, tmp_path / "model")
    assert list(json.loads((folder / "config.json").read_text())["id2label"]) == [str(i) for i in range(12)]
    assert AutoConfig.from_pretrained(folder).label_names == names


def test_parameters_of_pruning_are_saved(pixel_values, tmp_path) -> None:
    model = make_classifier(token_pruning=TOKEN_PRUNING | {"alignment": "learned"})
    model.set_token_pruning({"layers": [1, 3], "keep_ratios": [0.7, 0.6], "method": "dyvm", "alignment": "learned"})
    opened = AutoModelForImageClassification.from_pretrained(save_for_hub(model, tmp_path / "model")).eval()
    with torch.no_grad():
        assert torch.equal(opened(pixel_values).logits, model(pixel_values).logits)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Method: `dyvm`." in card
    assert "Importance" not in card


def test_config_belongs_to_no_machine(tmp_path) -> None:
    save_for_hub(make_classifier(scan_backend="torch"), tmp_path / "first")
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "first")
    save_for_hub(opened, tmp_path / "second")
    text = (tmp_path / "second" / "config.json").read_text()
    assert str(tmp_path) not in text
    assert "scan_backend" not in json.loads(text)
    assert (tmp_path / "first" / "config.json").read_text() == text


def test_saving_leaves_the_model_alone(model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "plain")  # transformers writes architecture and precision into the configuration
    before = model.config.to_dict()
    save_for_hub(model, tmp_path / "model")
    assert model.config.to_dict() == before


def test_headless_model(tmp_path) -> None:
    model = hf_vssm_prune.PlainMambaModel(make_plainmamba_config())
    folder = save_for_hub(model, tmp_path / "model")
    opened = AutoModel.from_pretrained(folder)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in opened.state_dict().items())


def test_parents_are_made_and_relative_paths_work(model, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert save_for_hub(model, "runs/1/best") == tmp_path / "runs" / "1" / "best"
    assert (tmp_path / "runs" / "1" / "best" / "config.json").is_file()


def test_folder_name_comes_from_the_resolved_path(model, tmp_path) -> None:
    (tmp_path / "name" / "deeper").mkdir(parents=True)
    assert save_for_hub(model, tmp_path / "name" / "deeper" / "..") == tmp_path / "name"
    assert "# name\n" in (tmp_path / "name" / "README.md").read_text()


def test_folder_has_ordinary_permissions(model, tmp_path) -> None:
    (tmp_path / "ordinary").mkdir()
    folder = save_for_hub(model, tmp_path / "model")
    assert folder.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


# ---- Into an existing folder -------------------------------------------------------------------------------------


def test_files_of_others_stay(model, tmp_path) -> None:
    folder = tmp_path / "model"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "events").write_text("mine")
    (folder / "notes.txt").write_text("mine too")
    save_for_hub(model, folder)
    assert (folder / "logs" / "events").read_text() == "mine"
    assert (folder / "notes.txt").read_text() == "mine too"
    AutoModelForImageClassification.from_pretrained(folder)
    assert not list(folder.glob(".saving-*"))


def test_saving_again_replaces_the_model(pixel_values, tmp_path) -> None:
    first, second = make_classifier(), make_classifier(token_pruning=dict(TOKEN_PRUNING))
    save_for_hub(first, tmp_path / "model")
    save_for_hub(second, tmp_path / "model")
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(opened(pixel_values).logits, second(pixel_values).logits)


@pytest.mark.parametrize("outdated", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_outdated_shards_go(outdated, model, tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / outdated).write_text("{}")
    save_for_hub(model, folder)
    assert not (folder / outdated).exists()


def test_own_card_and_image_processor_stay_where_none_is_given(model, image_processor, tmp_path) -> None:
    folder = save_for_hub(model, tmp_path / "model", image_processor)
    (folder / "README.md").write_text("# Written by hand\n")
    save_for_hub(model, folder)
    assert (folder / "README.md").read_text() == "# Written by hand\n"
    assert (folder / "preprocessor_config.json").is_file()
    save_for_hub(model, folder, image_processor, ModelCardInfo(name="Another card"))
    assert "# Another card" in (folder / "README.md").read_text()


@pytest.mark.parametrize("save", [save_for_hub, lambda model, folder: model.save_pretrained(folder)])
def test_a_card_of_another_schedule_is_named(save, tmp_path, caplog) -> None:
    model = make_classifier(token_pruning=dict(TOKEN_PRUNING))
    for _ in range(2):
        save(model, tmp_path)
    assert not caplog.records
    model.set_token_pruning(None)
    save(model, tmp_path)
    assert f"{tmp_path / 'README.md'} is kept, but it describes another pruning schedule" in caplog.text


def test_working_directory_as_folder(model, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("mine")
    save_for_hub(model, ".")
    assert (tmp_path / "mine").read_text() == "mine"
    AutoModelForImageClassification.from_pretrained(tmp_path)


def test_picture_travels_with_the_card(model, tmp_path) -> None:
    picture = tmp_path / "kept tokens.png"
    picture.write_bytes(b"a picture")
    folder = save_for_hub(model, tmp_path / "model", model_card=ModelCardInfo(name="Model", picture=picture))
    assert (folder / picture.name).read_bytes() == b"a picture"
    assert "](kept%20tokens.png)" in (folder / "README.md").read_text()
    save_for_hub(model, folder, model_card=ModelCardInfo(name="Model", picture=folder / picture.name))
    assert (folder / picture.name).read_bytes() == b"a picture"


# ---- When it cannot be saved -------------------------------------------------------------------------------------


@pytest.fixture
def full_disk() -> None:
    """Limits files to 20 kB, less than the weights need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_nothing_behind(model, tmp_path, full_disk) -> None:
    with pytest.raises(OSError, match=r"could not be saved to .*model"):
        save_for_hub(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_old_model_as_it_was(model, tmp_path, request) -> None:
    folder = save_for_hub(model, tmp_path / "model")
    before = contents(tmp_path)
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="could not be saved"):
        save_for_hub(make_classifier(), folder)
    assert contents(tmp_path) == before


def test_crash_while_writing_leaves_the_old_model_as_it_was(model, tmp_path, monkeypatch) -> None:
    folder = save_for_hub(model, tmp_path / "model")
    before = contents(tmp_path)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_vssm_prune.hub.saving.shutil.copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_for_hub(make_classifier(), folder)
    assert contents(tmp_path) == before


def test_crash_between_two_files_leaves_no_mixture_that_opens(model, tmp_path, monkeypatch) -> None:
    folder = save_for_hub(model, tmp_path / "model")
    replace = Path.replace

    def interrupted_at_weights(self: Path, target: Path) -> Path:
        if self.name == "model.safetensors":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted_at_weights)
    with pytest.raises(KeyboardInterrupt):
        save_for_hub(make_classifier(hidden_size=32), folder)
    with pytest.raises(ValueError, match=r"Unrecognized model.*config\.json"):
        AutoModelForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("name", ["file", "file/model", "file/deeper/model"])
def test_file_in_the_way(name, model, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        save_for_hub(model, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_that_no_one_can_make(model) -> None:
    with pytest.raises(OSError, match=r"could not be saved to /proc/model/here"):
        save_for_hub(model, "/proc/model/here")


@pytest.mark.parametrize("other", [torch.nn.Linear(2, 2), None, "plainmamba", torch.nn.Sequential(make_classifier())])
def test_other_models_are_refused(other, tmp_path) -> None:
    with pytest.raises(TypeError, match="Expected a PlainMamba, Vim or VideoMamba model of hf_vssm_prune"):
        save_for_hub(other, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", ["preprocessor_config.json", {"size": 32}, torch.nn.Identity()])
def test_other_image_processors_are_refused(other, model, tmp_path) -> None:
    with pytest.raises(TypeError, match="`image_processor` is a"):
        save_for_hub(model, tmp_path / "model", other)
    assert list(tmp_path.iterdir()) == []

"""Faults that no other test covers: killed processes, full disks, interrupted downloads, malicious files.
`docs/faults.md` lists all faults.

No fault may lose or corrupt existing files, or hang.
"""

import errno
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import PATIENCE, make_plainmamba_config, make_vim_config
from hub_server import HubServer
from safetensors.torch import load_file
from test_training import datasets, fresh_accelerator, image_folder, make_recipe, make_trainer  # noqa: F401
from transformers import AutoModelForImageClassification

from hf_vssm_prune.hub import save_for_hub, saving
from hf_vssm_prune.hub.loading import load_classifier
from hf_vssm_prune.hub.pushing import list_pushed_files, push_model
from hf_vssm_prune.training import checkpoints, jobs
from hf_vssm_prune.training.arguments import EvaluationArguments
from hf_vssm_prune.training.atomic_files import write_text
from hf_vssm_prune.training.checkpoints import remove_unfinished
from hf_vssm_prune.training.data import load_image_dataset
from hf_vssm_prune.training.tasks.classification import ImageClassification


FORK = multiprocessing.get_context("fork")


def make_model(seed: int = 0, **changes: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForImageClassification.from_config(make_plainmamba_config(**changes)).eval()


def same_weights(folder: Path, model: torch.nn.Module) -> bool:
    saved, expected = load_file(folder / "model.safetensors"), model.state_dict()
    return saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)


# Saving, killed in the middle


def save_and_wait(model: torch.nn.Module, folder: Path, written: FORK.Event) -> None:
    """Saves a model, but stops after everything is written and before anything is moved into place."""

    def wait(*_: object) -> None:
        written.set()
        time.sleep(PATIENCE)

    saving._publish = wait
    save_for_hub(model, folder)


def kill_while_saving(model: torch.nn.Module, folder: Path) -> None:
    written = FORK.Event()
    process = FORK.Process(target=save_and_wait, args=(model, folder, written))
    process.start()
    assert written.wait(PATIENCE)
    process.kill()
    process.join(PATIENCE)
    assert process.exitcode == -9


def test_killed_while_saving_a_new_folder(tmp_path) -> None:
    kill_while_saving(make_model(), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []
    save_for_hub(make_model(), tmp_path / "model")
    assert same_weights(tmp_path / "model", make_model())


def test_killed_while_saving_over_a_model(tmp_path) -> None:
    folder = save_for_hub(make_model(0), tmp_path / "model")
    kill_while_saving(make_model(1), folder)
    assert same_weights(folder, make_model(0))
    load_classifier(folder)
    save_for_hub(make_model(1), folder)
    assert same_weights(folder, make_model(1))
    remove_unfinished(folder)
    assert not list(folder.glob(".*"))


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that this user can read but not write. Root temporarily becomes another user."""
    folder = Path(tempfile.mkdtemp())  # not in pytest's, which is closed to other users
    save_for_hub(make_model(), folder / "model")
    for path in (folder / "model", folder):
        path.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    for path in (folder, folder / "model"):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_read_only_folder(read_only) -> None:
    before = {file.name: file.read_bytes() for file in (read_only / "model").iterdir()}
    for name in ("new", "model"):
        with pytest.raises(OSError, match=rf"could not be saved to .*{name}.*Permission denied"):
            save_for_hub(make_model(1), read_only / name)
    assert [file.name for file in read_only.iterdir()] == ["model"]
    assert {file.name: file.read_bytes() for file in (read_only / "model").iterdir()} == before


# Downloads


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[HubServer]:
    sleep = time.sleep
    monkeypatch.setattr("time.sleep", lambda seconds: sleep(min(seconds, 0.01)))  # between attempts
    with HubServer() as server:
        server.use_in_this_process(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture
def repo(tmp_path, hub) -> str:
    """A model on the Hub, under a different name in each test."""
    name = f"user/{tmp_path.name}"
    push_model(save_for_hub(make_model(), tmp_path / "pushed"), name)
    return name


def large_model() -> torch.nn.Module:
    """A model larger than the 10 MiB that huggingface_hub writes at once."""
    return make_model(hidden_size=512, num_hidden_layers=2, depthwise_layers=())


def loads_right(name: str, model: torch.nn.Module | None = None) -> bool:
    loaded, expected = load_classifier(name).state_dict(), (model or make_model()).state_dict()
    return all(torch.equal(loaded[key], expected[key]) for key in expected)


WEIGHTS = "/resolve/.*safetensors$"


@pytest.mark.parametrize("fault", ["cut_after", "stall_after"])
def test_download_goes_on_where_it_was_cut_or_stood_still(fault, hub, tmp_path, monkeypatch) -> None:
    if fault == "stall_after":  # elsewhere, a busy machine should not be taken for a connection that stands still
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1)
    model, name = large_model(), f"user/{tmp_path.name}"
    push_model(save_for_hub(model, tmp_path / "pushed"), name)
    hub.fail("GET", WEIGHTS, **{fault: 11_000_000})
    start = time.monotonic()
    assert loads_right(name, model)
    assert time.monotonic() - start < PATIENCE
    assert [asked for _, _, asked in hub.requests("GET", WEIGHTS)] == [None, "bytes=10485760-"]


def test_killed_while_downloading(hub, tmp_path) -> None:
    model, name = large_model(), f"user/{tmp_path.name}"
    push_model(save_for_hub(model, tmp_path / "pushed"), name)
    hub.fail("GET", WEIGHTS, stall_after=11_000_000)
    process = FORK.Process(target=load_classifier, args=(name,))
    process.start()
    assert hub.state.stalled.wait(PATIENCE)
    process.kill()
    process.join(PATIENCE)
    assert process.exitcode == -9
    assert loads_right(name, model)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_busy_hub_is_asked_again_for_a_file(status, hub, repo) -> None:
    hub.fail("GET", WEIGHTS, times=2, status=status)
    assert loads_right(repo)


@pytest.mark.parametrize("status", [401, 403, 404, 409, 429, 500, 503])
def test_hub_that_refuses_to_the_end_is_named(status, hub, repo) -> None:
    for method in ("GET", "HEAD"):
        hub.fail(method, "/resolve/|/api/", times=999, status=status)
    start = time.monotonic()
    with pytest.raises(OSError, match=repo):
        load_classifier(repo)
    assert time.monotonic() - start < PATIENCE


def test_hub_that_fails_does_not_keep_from_what_is_in_the_cache(hub, repo) -> None:
    assert loads_right(repo)
    for method in ("GET", "HEAD"):
        hub.fail(method, "/", times=999, status=503)
    assert loads_right(repo)


def test_hub_that_is_not_there(hub) -> None:
    hub.server.server_close()
    with pytest.raises(OSError, match="user/nobody cannot be opened"):
        load_classifier("user/nobody")


def test_corrupt_file_in_the_cache_is_found_and_named(hub, repo, tmp_path) -> None:
    assert loads_right(repo)
    (weights,) = (tmp_path / "home").rglob("snapshots/*/model.safetensors")
    file = weights.resolve()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file.name} differs from the file on the Hub: its SHA-256 is different"):
        load_classifier(repo)


# Hostile repositories and files


OUTSIDE = "../../../../../../outside.safetensors"


def index_of(name: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": dict.fromkeys(make_model().state_dict(), name)}).encode()


def test_names_from_a_repository_cannot_lead_outside_the_cache(hub, repo, tmp_path) -> None:
    files = hub.files(repo)
    files[OUTSIDE] = files.pop("model.safetensors")
    files["model.safetensors.index.json"] = index_of(OUTSIDE)
    before = {path for path in tmp_path.rglob("*") if "home" not in path.parts}
    with pytest.raises(ValueError, match=r"Invalid (filename|pointer path)"):
        load_classifier(repo)
    assert not [folder for folder in (tmp_path, *tmp_path.parents) if list(folder.glob("outside*"))]
    assert not list(tmp_path.rglob("outside*"))
    assert {path for path in tmp_path.rglob("*") if "home" not in path.parts} == before


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin"])
def test_index_of_weights_cannot_name_files_elsewhere(name, tmp_path) -> None:
    folder = save_for_hub(make_model(), tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(index_of(name))
    with pytest.raises(ValueError, match="only weight files in the same folder are allowed"):
        list_pushed_files(folder)


class Payload:
    """A pickle that creates a file when loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.file}",)


def test_pickles_in_a_repository_are_not_opened(hub, repo, tmp_path) -> None:
    files = hub.files(repo)
    del files["model.safetensors"]
    payload = pickle.dumps(Payload(tmp_path / "executed"))
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "preprocessor_config.pkl"):
        files[name] = payload
    with pytest.raises(OSError, match=r"404|model\.safetensors"):
        load_classifier(repo)
    assert not hub.requests("GET", r"\.(bin|pt|pkl)$")
    assert not (tmp_path / "executed").exists()
    pickle.loads(payload)
    assert (tmp_path / "executed").exists(), "the payload is harmless anyway, and this test shows nothing"


# Training


@pytest.fixture
def trained(datasets, tmp_path) -> Path:  # noqa: F811
    """A run of three steps with two checkpoints."""
    make_trainer(make_vim_config(), datasets, recipe_for(tmp_path)).train()
    assert (tmp_path / "checkpoint-3").is_dir()
    return tmp_path


def recipe_for(folder: Path, resume: str | None = None):
    recipe = make_recipe(folder, max_train_steps=3)
    recipe.run.resume, recipe.run.checkpointing_steps = resume, "1"
    return recipe


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGES = {
    "half of the weights": lambda folder: truncate(folder / "model.safetensors"),
    "half of the optimizer": lambda folder: truncate(folder / "optimizer.safetensors"),
    "no optimizer": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "half of the state": lambda folder: truncate(folder / "training_state.json"),
    "a state without the rest": lambda folder: (folder / "training_state.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_at_resume(damage, trained, datasets) -> None:  # noqa: F811
    DAMAGES[damage](trained / "checkpoint-3")
    with pytest.raises(ValueError, match=r"checkpoint-3 is damaged: .*an earlier one: \['checkpoint-2'\]"):
        make_trainer(make_vim_config(), datasets, recipe_for(trained, "latest"))
    reset_accelerator()
    shutil.rmtree(trained / "checkpoint-3")
    trainer = make_trainer(make_vim_config(), datasets, recipe_for(trained, "latest"))
    assert trainer.state.steps == 2


def test_a_checkpoint_that_the_system_cannot_read_is_not_to_be_removed(trained, datasets, monkeypatch) -> None:  # noqa: F811
    for raised in (OSError(errno.EIO, "Input/output error"), MemoryError("no memory")):
        monkeypatch.setattr(checkpoints, "load_file", Mock(side_effect=raised))
        with pytest.raises(type(raised), match=r"checkpoint-3 cannot be read: .*Input|^no memory$"):
            make_trainer(make_vim_config(), datasets, recipe_for(trained, "latest"))
        reset_accelerator()


def reset_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "training_state.json"])
def test_pickled_code_in_a_checkpoint_does_not_run(name, trained, datasets) -> None:  # noqa: F811
    """Checkpoints contain no pickles, and a pickle in place of one of their files is not loaded."""
    folder = trained / "checkpoint-3"
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors"}
    torch.save(Payload(trained / "executed"), folder / name)
    with pytest.raises(ValueError, match="checkpoint-3 is damaged"):
        make_trainer(make_vim_config(), datasets, recipe_for(trained, "latest"))
    assert not (trained / "executed").exists()


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Limits files to 20 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_while_a_checkpoint_is_written(trained, datasets, capsys, request) -> None:  # noqa: F811
    before = {path: path.read_bytes() for path in (trained / "checkpoint-2").rglob("*") if path.is_file()}
    shutil.rmtree(trained / "checkpoint-3")
    recipe = recipe_for(trained, "latest")
    trainer = make_trainer(make_vim_config(), datasets, recipe)
    request.getfixturevalue("full_disk")
    assert jobs.run(lambda: trainer) == 1
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("error: The checkpoint could not be saved to ")
    assert "checkpoint-3" in last_line
    assert {path: path.read_bytes() for path in (trained / "checkpoint-2").rglob("*") if path.is_file()} == before
    assert not (trained / "checkpoint-3").exists()
    assert not list(trained.glob(".unfinished-*"))


def test_full_disk_while_a_file_is_written(tmp_path, full_disk) -> None:
    (tmp_path / "results.json").write_text("old")
    with pytest.raises(OSError, match="too large"):
        write_text("x" * 30_000, tmp_path / "results.json")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_results_that_cannot_be_printed_are_written(tmp_path, monkeypatch, capsys) -> None:
    """Standard output may be a closed pipe, or of an encoding that lacks letters of a schedule's name."""
    monkeypatch.setattr(jobs, "comparison_table", Mock(side_effect=BrokenPipeError(errno.EPIPE, "Broken pipe")))
    options = EvaluationArguments("a model", json=str(tmp_path / "results.json"))
    assert jobs.report(dict, options, ImageClassification()) == 1
    assert capsys.readouterr().err == "error: [Errno 32] Broken pipe\n"
    assert (tmp_path / "results.json").read_text() == "{}\n"


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_image_in_training_is_one_line(workers, datasets, image_folder, tmp_path, capsys) -> None:  # noqa: F811
    copy = shutil.copytree(image_folder, tmp_path / "images")
    truncate(copy / "train" / "green" / "3.png")
    recipe = replace(make_recipe(tmp_path / "run"), num_workers=workers)
    trainer = make_trainer(make_vim_config(), load_image_dataset(str(copy)), recipe)
    assert jobs.run(lambda: trainer) == 1
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert "green/3.png" in error
    assert "Traceback" not in error

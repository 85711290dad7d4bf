"""Pushing to a Hub over HTTP and loading from it, in separate processes, with faults."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, SCRIPTS, make_plainmamba_config
from forking import run_forked
from hub_server import HubServer
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_vssm_prune.hub import save_for_hub
from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.hub.pushing import list_pushed_files


REPO = "user/tiny"


def save_model(folder: Path, seed: int = 0, **options: object) -> Path:
    torch.manual_seed(seed)
    config = make_plainmamba_config(token_pruning={"layers": [1, 3], "keep_ratios": [0.7, 0.6]})
    model = AutoModelForImageClassification.from_config(config)
    processor = new_image_processor(config, [0.5] * 3, [0.25] * 3, crop_pct=1.0)
    return save_for_hub(model, folder, processor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


class Client:
    """A user's processes, which share a cache."""

    def __init__(self, hub: HubServer, home: Path) -> None:
        self.hub, self.home = hub, home

    def environment(self, token: str | None) -> dict[str, str]:
        others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return others | self.hub.environment(self.home, token) | {"OMP_NUM_THREADS": "1"}

    def run(self, *command: str | Path, token: str | None = "hf_test", **variables: str) -> subprocess.CompletedProcess:
        """Runs in a new process, for what depends on how huggingface_hub and transformers are imported."""
        environment = self.environment(token) | variables
        arguments = [sys.executable, *map(str, command)]
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=PATIENCE)

    def fork(self, *command: str | Path, token: str | None = "hf_test") -> subprocess.CompletedProcess:
        """Runs in a fork of this process, with shorter waits between attempts."""
        return run_forked(*command, environment=self.environment(token), prepare=self.prepare)

    def prepare(self) -> None:
        self.hub.use_in_this_process(pytest.MonkeyPatch(), self.home)
        sleep = time.sleep
        time.sleep = lambda seconds: sleep(min(seconds, 0.01))

    def push(self, *arguments: str | Path, **options: str | None) -> subprocess.CompletedProcess:
        return self.fork(SCRIPTS / "push.py", *arguments, **options)

    def load(self, repo: str = REPO, revision: str = "main", **options: str | None) -> subprocess.CompletedProcess:
        return self.fork("-c", LOAD, repo, revision, **options)


# Loads a classifier by name and prints its classifier's bias.
LOAD = """
import sys
from hf_vssm_prune.hub.loading import load_classifier

try:
    print(load_classifier(sys.argv[1], revision=sys.argv[2]).classifier.bias.tolist())
except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
"""


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home")


def bias(folder: Path) -> list[float]:
    return load_file(folder / "model.safetensors")["classifier.bias"].tolist()


def assert_ok(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def assert_refused(result: subprocess.CompletedProcess, *messages: str) -> None:
    assert result.returncode == 1, result.stdout + result.stderr[-3000:]
    error = result.stderr.rpartition("error: ")[2]
    for message in messages:
        assert message in error, error
    assert "Traceback" not in result.stderr


# What is pushed


def test_a_push_is_one_commit_of_the_whole_model(hub, client, folder):
    output = assert_ok(client.push(folder, REPO, "--private", "--commit_message", "First"))
    assert "model.safetensors" in output
    repository = hub.state.repositories[REPO]
    assert repository.private
    assert [commit.message for commit in repository.branches["main"]] == ["initial commit", "First"]
    pushed = hub.files(REPO)
    assert pushed.keys() - {".gitattributes"} == {file.path.name for file in list_pushed_files(folder)}
    assert all(pushed[path.name] == path.read_bytes() for path in folder.iterdir() if path.name != "README.md")
    assert "modeling_plainmamba.py" in pushed


def test_the_examples_of_a_pushed_card_load_the_repository(hub, client, folder, tmp_path):
    other = '\nThe dense one: `AutoModel.from_pretrained("plainmamba_trashnet")`\n'
    copy = shutil.copytree(folder, tmp_path / folder.name)
    with (copy / "README.md").open("a") as card:
        card.write(other)
    assert_ok(client.push(copy, REPO))
    local, pushed = (folder / "README.md").read_text(), hub.files(REPO)["README.md"].decode()
    assert pushed.endswith(other)
    pushed = pushed.removesuffix(other)
    loads = re.compile(r'(?:model=|from_pretrained\()\s*"(.*?)"')
    assert set(loads.findall(local)) == {folder.name}
    assert set(loads.findall(pushed)) == {REPO}
    assert len(loads.findall(pushed)) == len(loads.findall(local)) > 1
    assert loads.sub("", pushed) == loads.sub("", local)


def test_a_pushed_model_loads_by_name_and_then_offline(hub, client, folder):
    """Offline in a new process, like a user's. A model that is not cached is named."""
    assert_ok(client.push(folder, REPO))
    expected = bias(folder)
    assert json.loads(assert_ok(client.load())) == expected
    hub.state.requests.clear()
    again = LOAD + "sys.argv[1] = 'user/other'" + LOAD
    offline = client.run("-c", again, REPO, "main", HF_HUB_OFFLINE="1")
    assert json.loads(offline.stdout) == pytest.approx(expected, abs=1e-5)
    assert_refused(offline, "user/other")
    assert hub.state.requests == []


def test_remote_code_and_pipeline(hub, client, folder):
    """Uses the code files in the repository; test_remote_code.py does so in an environment without the package."""
    assert_ok(client.push(folder, REPO))
    program = (
        "from transformers import AutoModel, pipeline; from PIL import Image\n"
        "model = AutoModel.from_pretrained('user/tiny', trust_remote_code=True)\n"
        "assert model.config.token_pruning['layers'] == [1, 3]\n"
        "classify = pipeline('image-classification', 'user/tiny', trust_remote_code=True)\n"
        "print(len(classify(Image.new('RGB', (40, 50), 'red'))))"
    )
    assert assert_ok(client.run("-c", program)).split()[-1] == "3"


def test_only_what_changed_is_sent_again(hub, client, folder, tmp_path):
    assert_ok(client.push(folder, REPO))
    changed = shutil.copytree(folder, tmp_path / "changed")
    card = changed / "README.md"
    card.write_text(card.read_text() + "\nMore to know.\n")
    hub.state.requests.clear()
    assert_ok(client.push(changed, REPO))
    assert hub.requests("PUT", "/lfs/") == []
    assert hub.files(REPO)["README.md"].endswith(b"\nMore to know.\n")
    commits = len(hub.state.repositories[REPO].branches["main"])
    assert_ok(client.push(changed, REPO))
    assert len(hub.state.repositories[REPO].branches["main"]) == commits


def test_branch_pull_request_and_pinned_revision(hub, client, folder, tmp_path):
    assert_ok(client.push(folder, REPO))
    first = hub.state.repositories[REPO].branches["main"][-1].sha
    other = save_model(tmp_path / "other", seed=1)
    with torch.no_grad():
        model = AutoModelForImageClassification.from_pretrained(other)
        model.classifier.bias.fill_(0.5)
    save_for_hub(model, other)
    assert "/discussions/1" in assert_ok(client.push(other, REPO, "--create_pr"))
    assert_ok(client.push(other, REPO, "--revision", "v2"))
    assert hub.state.repositories[REPO].branches["main"][-1].sha == first
    assert json.loads(assert_ok(client.load(revision="v2"))) == [0.5] * 3
    assert json.loads(assert_ok(client.load(revision=first))) == bias(folder)
    assert json.loads(assert_ok(client.load(revision="refs/pr/1"))) == [0.5] * 3


def test_shards_of_an_earlier_push_do_not_stay(hub, client, folder, tmp_path):
    sharded = shutil.copytree(folder, tmp_path / "sharded")
    AutoModelForImageClassification.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    (sharded / "model.safetensors").unlink()
    for file in (tmp_path / "shards").glob("model*"):
        shutil.copy(file, sharded)
    assert_ok(client.push(sharded, REPO))
    assert any("-of-" in name for name in hub.files(REPO))
    assert json.loads(assert_ok(client.load())) == bias(folder)
    assert_ok(client.push(folder, REPO))
    assert [name for name in hub.files(REPO) if "safetensors" in name] == ["model.safetensors"]


def test_a_dry_run_asks_nobody(hub, client, folder):
    output = assert_ok(client.push(folder, REPO, "--dry_run"))
    assert "model.safetensors" in output
    assert hub.state.requests == []


def damage_card(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [\n---\n")


NOT_WHOLE = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "half of the weights": (lambda folder: os.truncate(folder / "model.safetensors", 5000), "damaged or missing"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no card": (lambda folder: (folder / "README.md").unlink(), "has no README.md"),
    "a card that is not YAML": (damage_card, "metadata of"),
    "no folder": (shutil.rmtree, "is not a folder"),
}


@pytest.mark.parametrize("name", NOT_WHOLE)
def test_what_is_not_whole_is_not_pushed(name, folder, tmp_path):
    damage, message = NOT_WHOLE[name]
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy)
    with pytest.raises((ValueError, OSError), match=message):
        list_pushed_files(copy)


def test_checkpoints_logs_and_pickles_stay_at_home(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in ("optimizer.bin", "model.pth", "events.out.tfevents", ".env"):
        (copy / name).write_text("secret")
    (copy / "checkpoint-10").mkdir()
    expected = {path.name for path in folder.iterdir()}
    assert {file.path.name for file in list_pushed_files(copy)} == expected


# Faults


@pytest.mark.parametrize(
    ("options", "fault", "messages"),
    [
        ({"token": None}, None, ["401"]),
        ({"token": "hf_other"}, None, ["401"]),
        ({}, ("POST", "/commit/", 403), ["has no write access there", "403"]),
        ({}, ("POST", "/commit/", 409), ["try again", "409"]),
        ({}, ("POST", "/preupload/", 400), ["rejected", "400"]),
        ({}, ("POST", "objects/batch", 413), ["larger than the Hub allows"]),
        ({}, ("POST", "/commit/", 500), ["the Hub failed", "500"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals_change_nothing(options, fault, messages, hub, client, folder):
    if fault is not None:
        method, path, status = fault
        hub.fail(method, path, times=99, status=status)
    assert_refused(client.push(folder, REPO, **options), *messages)
    repository = hub.state.repositories.get(REPO)
    assert repository is None or len(repository.branches["main"]) == 1


def test_a_busy_hub_is_asked_again(hub, client, folder):
    hub.fail("PUT", "/lfs/", times=2, status=503)
    hub.fail("POST", "/preupload/", times=1, status=429)
    assert_ok(client.push(folder, REPO))
    assert hub.files(REPO)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_an_upload_that_is_cut_off_can_be_made_again(hub, client, folder):
    hub.fail("PUT", "/lfs/", times=99, cut_after=1000)
    result = client.push(folder, REPO)
    assert_refused(result, "was not changed")
    assert len(hub.state.repositories[REPO].branches["main"]) == 1
    hub.state.faults.clear()
    assert_ok(client.push(folder, REPO))
    assert hub.files(REPO)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_of_two_pushes_that_race_one_is_refused_whole(hub, client, folder, tmp_path):
    assert_ok(client.push(folder, REPO))
    other = save_model(tmp_path / "other", seed=1)
    with (other / "README.md").open("a") as card:
        card.write("\nThe other.\n")
    overtaking = []
    hub.state.before_commit.append(lambda: overtaking.append(client.push(other, REPO)))
    changed = save_model(tmp_path / "changed", seed=2)
    assert_refused(client.push(changed, REPO), "someone else has changed it", "412")
    assert_ok(overtaking[0])
    assert hub.files(REPO)["model.safetensors"] == (other / "model.safetensors").read_bytes()
    assert hub.files(REPO)["README.md"].endswith(b"\nThe other.\n")


def test_a_download_that_is_cut_off_is_made_whole(hub, client, folder):
    assert_ok(client.push(folder, REPO))
    hub.fail("GET", "/resolve/.*safetensors", times=1, cut_after=3000)
    assert json.loads(assert_ok(client.load())) == bias(folder)
    assert len(hub.requests("GET", "/resolve/.*safetensors$")) == 2


@pytest.mark.parametrize("revision", ["main", "v2"])
def test_wrong_bytes_of_the_right_size_are_found_and_named(revision, hub, client, folder):
    assert_ok(client.push(folder, REPO, "--revision", revision))
    hub.fail("GET", "/resolve/.*safetensors", times=1, wrong_bytes=True)
    assert_refused(client.load(revision=revision), "differs from the file on the Hub", "SHA-256", "blobs")


@pytest.mark.parametrize(
    ("repo", "options", "message"),
    [
        ("user/nothing", {}, "user/nothing"),
        (REPO, {"revision": "nothing"}, "nothing"),
        (REPO, {"token": None}, REPO),
    ],
    ids=["no such model", "no such revision", "private"],
)
def test_models_that_cannot_be_loaded_are_named(repo, options, message, hub, client, folder):
    assert_ok(client.push(folder, REPO, "--private"))
    assert_refused(client.load(repo, **options), message)


def test_the_trainers_way_to_the_hub(hub, client, folder, tmp_path):
    """If the Hub rejects `--push_to_hub`, training ends with a message, and the model is not lost."""
    program = (
        "import sys; from pathlib import Path; from types import SimpleNamespace\n"
        "from hf_vssm_prune.training import jobs\n"
        "from hf_vssm_prune.training.arguments import RunArguments\n"
        "hub = {'push_to_hub': True, 'hub_model_id': 'user/tiny', 'hub_private_repo': True}\n"
        "run = RunArguments(output_dir=sys.argv[1], **hub)\n"
        "trainer = SimpleNamespace(train=lambda: None, accelerator=SimpleNamespace(is_main_process=True))\n"
        "trainer.recipe = SimpleNamespace(run=run)\n"
        "sys.exit(jobs.run(lambda: trainer))"
    )
    shutil.copytree(folder, tmp_path / "run" / "best")
    hub.fail("POST", "/commit/", times=9, status=403)
    assert_refused(client.fork("-c", program, tmp_path / "run"), "has no write access there", str(tmp_path / "run"))
    hub.state.faults.clear()
    assert_ok(client.fork("-c", program, tmp_path / "run"))
    assert "model.safetensors" in hub.files(REPO)
    assert hub.state.repositories[REPO].private

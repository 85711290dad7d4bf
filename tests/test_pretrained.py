"""`save_pretrained` and `push_to_hub` of the models: everything that a model's page needs, not only the weights."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import MAKE_CONFIG, TOKEN_PRUNING
from hub_server import HubServer
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

import hf_vssm_prune
from hf_vssm_prune import EXAMPLE_MODEL
from hf_vssm_prune.hub import ModelCardInfo, pretrained
from hf_vssm_prune.hub.loading import load_classifier, load_config, load_image_processor, new_image_processor
from hf_vssm_prune.hub.pushing import PushError, list_pushed_files, push_model
from hf_vssm_prune.hub.saving import auto_map


PACKAGE = Path(hf_vssm_prune.__file__).parent


@pytest.fixture
def model(tiny_pruned_config) -> torch.nn.Module:
    return AutoModelForImageClassification.from_config(tiny_pruned_config).eval()


@pytest.fixture
def plainmamba() -> torch.nn.Module:
    config = MAKE_CONFIG["plainmamba"](token_pruning=dict(TOKEN_PRUNING))
    return AutoModelForImageClassification.from_config(config).eval()


@pytest.fixture
def image_processor(vim_config):
    return new_image_processor(vim_config, [0.5] * 3, [0.25] * 3, crop_pct=1.0)


@pytest.fixture
def repo(tmp_path) -> str:
    """A different name in each test, because transformers caches commits of repositories for the lifetime of a
    process."""
    return f"user/{tmp_path.name}"


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[HubServer]:
    sleep = time.sleep
    monkeypatch.setattr("time.sleep", lambda seconds: sleep(min(seconds, 0.01)))  # between attempts
    with HubServer() as server:
        server.use_in_this_process(monkeypatch, tmp_path / "home")
        yield server


# Saving


def test_save_pretrained_writes_all_that_a_page_needs(model, image_processor, pixel_values, tmp_path) -> None:
    model.save_pretrained(tmp_path / "model", image_processor=image_processor, model_card=ModelCardInfo("Mine"))
    names = {file.name for file in (tmp_path / "model").iterdir()}
    family = model.config.model_type
    assert names >= {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "NOTICE"}
    assert names >= {"LICENSE-CODE", f"modeling_{family}.py", f"configuration_{family}.py"}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["auto_map"] == auto_map(model.config)
    of_images = {"AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoBackbone"}
    of_videos = {"AutoModelForVideoClassification"} if family == "videomamba" else set()
    assert set(config["auto_map"]) == of_images | of_videos
    assert "# Mine" in (tmp_path / "model" / "README.md").read_text()
    opened = load_classifier(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(opened(pixel_values).logits, model(pixel_values).logits)


def test_the_codes_licence_comes_along_and_the_weights_is_named(plainmamba, tmp_path) -> None:
    plainmamba.save_pretrained(tmp_path / "without")
    assert "no licence was named" in (tmp_path / "without" / "NOTICE").read_text()
    card = ModelCardInfo("Mine", license="mit", license_notice="Images by Someone, CC BY 4.0.")
    plainmamba.save_pretrained(tmp_path / "with", model_card=card)
    notice = (tmp_path / "with" / "NOTICE").read_text()
    assert "The weights: under mit.\nImages by Someone, CC BY 4.0.\n" in notice
    license = (tmp_path / "with" / "LICENSE-CODE").read_bytes()
    assert license == (PACKAGE / "hub" / "LICENSE-CODE").read_bytes()
    assert license == (Path(__file__).parents[1] / "LICENSE").read_bytes()


def test_options_of_transformers_still_work(plainmamba, tmp_path) -> None:
    state_dict = {name: tensor + 1 for name, tensor in plainmamba.state_dict().items()}
    plainmamba.save_pretrained(tmp_path / "model", state_dict=state_dict, max_shard_size="20KB")
    shards = sorted((tmp_path / "model").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    saved = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert torch.equal(saved["classifier.bias"], plainmamba.classifier.bias + 1)
    plainmamba.save_pretrained(tmp_path / "helper", is_main_process=False)
    assert list((tmp_path / "helper").iterdir()) == []


def test_a_card_that_is_there_stays(plainmamba, tmp_path) -> None:
    plainmamba.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# By hand\n")
    plainmamba.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# By hand\n"


def test_saving_into_a_file_is_refused(plainmamba, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        plainmamba.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# Pushing


def test_push_to_hub_is_one_commit_of_everything(hub, model, image_processor, pixel_values, repo) -> None:
    about = {"commit_message": "First", "commit_description": "of two"}
    commit = model.push_to_hub(repo, image_processor=image_processor, private=True, tags=["clothes"], **about)
    assert commit.commit_description == "of two"
    repository = hub.state.repositories[repo]
    assert repository.private
    assert [each.message for each in repository.branches["main"]] == ["initial commit", "First"]
    assert commit.oid == repository.branches["main"][-1].sha
    names = set(hub.files(repo))
    assert names >= {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "NOTICE"}
    assert names >= {"LICENSE-CODE", f"modeling_{model.config.model_type}.py"}
    card = hub.files(repo)["README.md"].decode()
    assert "- clothes\n" in card
    assert f'from_pretrained("{repo}")' in card
    with torch.no_grad():
        assert torch.equal(load_classifier(repo).eval()(pixel_values).logits, model(pixel_values).logits)


def test_push_to_hub_keeps_the_page_that_is_there(hub, plainmamba, repo) -> None:
    plainmamba.push_to_hub(repo, model_card=ModelCardInfo("By hand", license="mit"))
    page = {name: hub.files(repo)[name] for name in ("README.md", "NOTICE")}
    with torch.no_grad():
        plainmamba.classifier.bias.fill_(0.5)
    plainmamba.push_to_hub(repo)
    assert {name: hub.files(repo)[name] for name in page} == page
    assert load_classifier(repo).classifier.bias.tolist() == [0.5] * 3


def test_save_pretrained_keeps_the_page_that_is_there(hub, plainmamba, tmp_path, repo) -> None:
    HfApi().create_repo(repo)
    HfApi().upload_file(path_or_fileobj=b"# By hand\n", path_in_repo="README.md", repo_id=repo)
    plainmamba.save_pretrained(tmp_path / "tiny", push_to_hub=True, repo_id=repo)
    assert hub.files(repo)["README.md"] == b"# By hand\n"
    assert hub.files(repo)["NOTICE"] == (tmp_path / "tiny" / "NOTICE").read_bytes()
    (tmp_path / "tiny" / "README.md").write_text("# Another one\n")
    plainmamba.save_pretrained(tmp_path / "tiny", push_to_hub=True, repo_id=repo)
    assert hub.files(repo)["README.md"] == b"# Another one\n"


def test_branch_and_pull_request(hub, plainmamba, repo) -> None:
    plainmamba.push_to_hub(repo)
    first = hub.state.repositories[repo].branches["main"][-1].sha
    with torch.no_grad():
        plainmamba.classifier.bias.fill_(0.5)
    assert plainmamba.push_to_hub(repo, create_pr=True).pr_url.endswith("/discussions/1")
    plainmamba.push_to_hub(repo, revision="v2")
    assert hub.state.repositories[repo].branches["main"][-1].sha == first
    assert load_classifier(repo, revision="v2").classifier.bias.tolist() == [0.5] * 3
    assert load_classifier(repo, revision=first).classifier.bias.tolist() != [0.5] * 3
    with torch.no_grad():
        plainmamba.classifier.bias.fill_(0.25)
    plainmamba.push_to_hub(repo, revision="refs/pr/1", commit_message="More")
    request = [commit.message for commit in hub.state.repositories[repo].branches["refs/pr/1"]]
    assert request == ["initial commit", "Upload model", "Upload model", "More"]


@pytest.mark.parametrize("variant", [None, "fp16", "no-ema"])
def test_saving_in_other_shards_leaves_no_old_weights(variant, plainmamba, pixel_values, tmp_path) -> None:
    for size, count in (("50GB", 1), ("5KB", None), ("50GB", 1)):
        with torch.no_grad():
            plainmamba.classifier.bias += 1
            plainmamba.save_pretrained(tmp_path / "model", max_shard_size=size, variant=variant)
            expected = plainmamba(pixel_values).logits
            loaded = load_classifier(tmp_path / "model", variant=variant)
            assert torch.equal(loaded(pixel_values).logits, expected)
        weights = list((tmp_path / "model").glob("*.safetensors"))
        assert len(weights) == count if count else len(weights) > 1
        list_pushed_files(tmp_path / "model")


def test_saving_twice_within_a_tick_of_the_file_systems_clock(plainmamba, tmp_path, monkeypatch) -> None:
    def save(tensors: dict, file: str, **options) -> None:
        save_file(tensors, file, **options)
        os.utime(file, (0, 0))

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save)
    for _ in range(2):
        plainmamba.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").exists()


def test_a_name_alone_is_of_ones_own_account(hub, plainmamba, repo) -> None:
    name = repo.partition("/")[2]
    plainmamba.push_to_hub(name, commit_message=None, tags="clothes")  # both are allowed in transformers as well
    assert "model.safetensors" in hub.files(f"user/{name}")
    assert "\n- clothes\n" in hub.files(f"user/{name}")["README.md"].decode()
    assert hub.state.repositories[f"user/{name}"].branches["main"][-1].message == "Upload model"


def test_private_is_not_pushed_to_where_everybody_sees_it(hub, plainmamba, repo) -> None:
    plainmamba.push_to_hub(repo)
    with pytest.raises(PushError, match="already exists and is public"):
        plainmamba.push_to_hub(repo, private=True)


def test_a_hub_that_is_not_there_is_named(plainmamba, monkeypatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # or nobody would be asked
    with pytest.raises(PushError, match=r"user/name was not changed: .*[Cc]onnection refused"):
        plainmamba.push_to_hub("user/name")


def test_save_pretrained_pushes_on_request(hub, plainmamba, tmp_path, repo, monkeypatch) -> None:
    about, given = {"commit_message": "From here", "commit_description": "of two"}, {}

    def push(*arguments, **options):
        given.update(options)
        return push_model(*arguments, **options)

    monkeypatch.setattr(pretrained, "push_model", push)
    plainmamba.save_pretrained(tmp_path / "tiny", push_to_hub=True, repo_id=repo, **about)
    assert given.items() >= about.items()
    assert hub.state.repositories[repo].branches["main"][-1].message == "From here"
    assert hub.files(repo)["model.safetensors"] == (tmp_path / "tiny" / "model.safetensors").read_bytes()


# A Hub that fails for a moment


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("path", ["/repos/create", "/commit/"])
def test_a_hub_that_fails_twice_is_asked_a_third_time(path, status, hub, plainmamba, repo) -> None:
    hub.fail("POST", path, times=2, status=status)
    plainmamba.push_to_hub(repo)
    assert len(hub.state.repositories[repo].branches["main"]) == 2


@pytest.mark.parametrize(("status", "asked"), [(503, 3), (403, 1), (409, 1)])
def test_a_hub_that_goes_on_failing_is_left(status, asked, hub, plainmamba, repo) -> None:
    hub.fail("POST", "/commit/", times=99, status=status)
    with pytest.raises(PushError, match=str(status)):
        plainmamba.push_to_hub(repo)
    assert len(hub.requests("POST", "/commit/")) == asked
    assert len(hub.state.repositories[repo].branches["main"]) == 1


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, plainmamba, repo) -> None:
    hub.fail("POST", "/commit/", answer_lost=True, status=502)
    plainmamba.push_to_hub(repo)
    assert len(hub.state.repositories[repo].branches["main"]) == 2


def test_variants_of_weights_are_pushed_and_replaced_each_by_itself(hub, plainmamba, repo, tmp_path) -> None:
    folder = tmp_path / "model"
    plainmamba.save_pretrained(folder)
    plainmamba.save_pretrained(folder, variant="fp16", max_shard_size="50KB", push_to_hub=True, repo_id=repo)
    assert any(name.startswith("model.fp16-00002-of-") for name in hub.files(repo))
    assert "model.safetensors.index.fp16.json" in hub.files(repo)
    (folder / "model.safetensors").unlink()
    plainmamba.save_pretrained(folder, variant="fp16", push_to_hub=True, repo_id=repo)
    weights = {name for name in hub.files(repo) if "safetensors" in name}
    assert weights == {"model.safetensors", "model.fp16.safetensors"}
    plainmamba.save_pretrained(folder, variant="fp16", max_shard_size="50KB")
    plainmamba.save_pretrained(folder)  # transformers removes the variant's shards
    list_pushed_files(folder)


def test_what_was_sent_before_a_cut_is_not_sent_again(hub, plainmamba, repo) -> None:
    """The weights are in several files, and the connection is cut in the middle of the third."""
    hub.fail("PUT", "/lfs/", times=99, cut_after=100, skip=2)
    with pytest.raises(PushError, match="was not changed"):
        plainmamba.push_to_hub(repo, max_shard_size="20KB")
    arrived = set(hub.state.uploads)
    assert len(arrived) == 2
    assert len(hub.state.repositories[repo].branches["main"]) == 1
    hub.state.faults.clear()
    hub.state.requests.clear()
    plainmamba.push_to_hub(repo, max_shard_size="20KB")
    sent = {path.rpartition("/")[2] for _, path, _ in hub.requests("PUT", "/lfs/")}
    assert sent == set(hub.state.uploads) - arrived
    assert load_classifier(repo).classifier.bias.tolist() == plainmamba.classifier.bias.tolist()


def test_a_model_of_the_package_is_opened_by_its_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = EXAMPLE_MODEL.name
    assert torch.equal(load_classifier(name).classifier.weight, load_classifier(EXAMPLE_MODEL).classifier.weight)
    assert load_image_processor(name).size == load_image_processor(EXAMPLE_MODEL).size
    (tmp_path / name).mkdir()
    with pytest.raises((OSError, ValueError), match=name):
        load_config(name)  # a folder of the user's is taken first, though it is empty

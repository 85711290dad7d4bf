"""Pushes a saved model to the Hub, completely or not at all.

All files are uploaded in a single commit on top of the state that was checked before, so that nobody can ever load half
a model, and a push is refused if someone else has pushed in the meantime. Files that the Hub already has, for instance
from an interrupted push, are not sent again.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from hf_vssm_prune.hub.loading import load_config
from hf_vssm_prune.hub.retrying import TransportError, patiently
from hf_vssm_prune.hub.saving import CARD, CONFIG, NOTICE, weights_files, weights_variant


PICTURES = ("*.png", "*.jpg", "*.jpeg", "*.svg", "*.webp", "*.gif")
# The files that belong to a model, in addition to weights: no checkpoints, logs, optimizer states or pickles.
PUSHED = (CONFIG, CARD, "preprocessor_config.json", "*.py", *PICTURES, "LICENSE*", "NOTICE*")
PULL_REQUESTS = "refs/pr/"  # revisions of the Hub's pull requests, which are opened with a commit
# In a card's example code, the name of a local folder that is loaded. Names on the Hub have a slash.
LOADED_FOLDER = re.compile(r'(?P<start>(?:\bmodel=|\bfrom_pretrained\(\s*)")(?P<name>[^"/]+)(?=")')


class PushError(OSError):
    """The Hub rejected a request or could not be reached; the model on the Hub is unchanged."""


@dataclass(frozen=True)
class PushedFile:
    """A file of a model.

    Attributes:
        path: path on the disk.
        size: size in bytes.
    """

    path: Path
    size: int


def list_pushed_files(folder: str | Path) -> list[PushedFile]:
    """The files of a saved model that belong on the Hub, after checking that the model is complete.

    Raises:
        ValueError: the folder is not a complete model of this package; the message names what is wrong.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder.")
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}: give a folder that `save_for_hub` or a training script wrote.")
    load_config(str(folder))
    _check_weights(folder)
    _check_card(folder / CARD)
    paths = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return [
        PushedFile(path, path.stat().st_size)
        for path in paths
        if _matches(path.name, PUSHED) or weights_variant(path.name) is not None
    ]


def check_repo_id(repo_id: str) -> None:
    """Raises an error for a name that no repository can have.

    Raises:
        ValueError: it is one.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a valid repository name: use user/name.") from error


def push_model(
    folder: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    keep_card: bool = False,
) -> CommitInfo:
    """Pushes a saved model to the Hub in one commit. The repository and the branch are created if they are missing.

    Args:
        folder: folder written by `save_for_hub` or a training run.
        repo_id: `user/name`; without a user, the account of the token is used.
        revision: branch, or an open pull request such as "refs/pr/1". None: `main`.
        private: whether a new repository is private. None: the default of the account.
        commit_message: title of the commit. None: "Upload model".
        commit_description: text below the title.
        create_pr: open a pull request with the commit instead of changing the branch.
        token: token of the account. None: that of `hf auth login` or `HF_TOKEN`.
        keep_card: keep the repository's model card, if it has one, with its notices.

    Returns:
        The commit, or the last one if nothing has changed.

    Raises:
        ValueError: the folder is not a complete model, or the repository name is not valid.
        PushError: the Hub rejected the request, cannot be reached, or has changed in the meantime.
    """
    files = list_pushed_files(folder)
    check_repo_id(repo_id)
    api = HfApi(token=token)
    with _explained(repo_id):
        if "/" not in repo_id:
            repo_id = f"{patiently(api.whoami)['name']}/{repo_id}"
        if not create_pr:
            patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
            if revision is not None and not revision.startswith(PULL_REQUESTS):
                patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        base = patiently(lambda: api.model_info(repo_id, revision=revision))
        if private and base.private is False:
            raise PushError(f"{repo_id} already exists and is public, but `private` was requested.")
        there = {sibling.rfilename for sibling in base.siblings or []}
        if keep_card and CARD in there:
            files = [file for file in files if file.path.name not in {CARD, NOTICE} & there]
        pushed = {file.path.name for file in files}
        variants = set(map(weights_variant, pushed)) - {None}
        outdated = {name for name in there if weights_variant(name) in variants} - pushed

        def commit() -> CommitInfo:
            return api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(file.path.name, _content(file.path, repo_id)) for file in files),
                    *(CommitOperationDelete(name) for name in sorted(outdated)),
                ],
                commit_message=commit_message or "Upload model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=base.sha,
            )

        # If a commit succeeded but its response was lost, nothing is left to change. A pull request would be opened
        # twice.
        return commit() if create_pr else patiently(commit)


def _content(file: Path, repo_id: str) -> Path | bytes:
    """The content to upload: the file, or the card with examples that load the repository instead of the local folder
    that is named first. Other models in a card edited by hand stay."""
    if file.name != CARD:
        return file
    text = file.read_text(encoding="utf-8")
    first = LOADED_FOLDER.search(text)

    def load_repository(found: re.Match[str]) -> str:
        return found["start"] + repo_id if first and found["name"] == first["name"] else found[0]

    return LOADED_FOLDER.sub(load_repository, text).encode()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)


def _check_weights(folder: Path) -> None:
    variants = {weights_variant(path.name) for path in folder.iterdir()}
    for variant in sorted(each for each in variants if each is not None) or [""]:
        _check_variant(folder, variant)


def _check_variant(folder: Path, variant: str) -> None:
    single, _, index_name = weights_files(variant)
    index = folder / index_name
    if (folder / single).is_file() and index.is_file():
        raise ValueError(
            f"{folder} has weights in a single file and also in several files (listed in {index.name}): remove the "
            "older ones."
        )
    if (folder / single).is_file():
        shards = {single}
    elif index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} cannot be read: {error!r}") from error
        if foreign := sorted(shard for shard in shards if weights_variant(shard) != variant):
            raise ValueError(f"{index} names {foreign}; only weight files in the same folder are allowed.")
    else:
        raise ValueError(f"{folder} has no weights: {single} is missing.")
    for shard in sorted(shards):
        try:
            with safe_open(folder / shard, framework="pt"):  # reads the header, and compares sizes
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / shard} is damaged or missing: {error}") from error


def _check_card(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {CARD}: a model needs a model card; `save_for_hub` writes one.")
    try:
        ModelCard.load(file, ignore_metadata_errors=False)
    except Exception as error:  # YAML's own errors, and those of the metadata's classes
        raise ValueError(f"The metadata of {file} is not valid: {error}") from error


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Explains an error of the Hub in one sentence."""
    try:
        yield
    except RepositoryNotFoundError as error:
        raise PushError(f"{repo_id} does not exist, or this account has no access to it (HTTP 404 or 401).") from error
    except RevisionNotFoundError as error:
        raise PushError(f"{repo_id} has no such branch: {error}") from error
    except HfHubHTTPError as error:
        raise PushError(f"{repo_id}: {_meaning(error)}") from error
    except PushError:
        raise
    except (OSError, RuntimeError, TransportError) as error:
        # Connections that failed too often, or an upload that ended with an error in a thread.
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise PushError(f"{repo_id}: {_meaning(cause)}") from error
        raise PushError(f"{repo_id} was not changed: {error}{f' ({cause})' if cause else ''}") from error


def _meaning(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    detail = re.sub(r"\s+", " ", str(error)).strip()
    meanings = {
        401: "you are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN to a token with write access",
        403: "this account or its token has no write access there",
        409: "someone else is changing or creating it: try again",
        412: "someone else has changed it in the meantime: look at their changes, then push again",
        413: "a file is larger than the Hub allows",
        429: "there were too many requests: try again later",
    }
    meaning = meanings.get(
        status, "the Hub failed: try again later" if status >= 500 else "the Hub rejected the request"
    )
    return f"{meaning} (HTTP {status}: {detail})"

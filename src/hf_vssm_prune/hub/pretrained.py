"""The models' `save_pretrained` and `push_to_hub`: like those of transformers, plus everything else that a model's page
needs."""

import inspect
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from hf_vssm_prune.families import VisionMamba
from hf_vssm_prune.hub.model_card import ModelCardInfo
from hf_vssm_prune.hub.pushing import push_model
from hf_vssm_prune.hub.saving import (
    CARD,
    card_for,
    check_arguments,
    check_folder,
    complete_folder,
    has_adapters,
    weights_files,
    weights_variant,
)


def save_pretrained(
    model: VisionMamba,
    save_directory: str | os.PathLike[str],
    *arguments: Any,
    image_processor: ImageProcessingMixin | None = None,
    model_card: ModelCardInfo | None = None,
    **options: Any,
) -> None:
    """Saves a model with transformers' `save_pretrained`, and adds its code, image processor, card and notices.

    Like transformers, it writes directly into the folder, and accepts all of transformers' options, including
    positional ones; by contrast, `hub.save_for_hub` writes everything or nothing. For a model with adapters (PEFT), it
    saves only the adapters, as transformers does: loading the folder then needs the folder or repository of the base
    model.

    Args:
        model: a model of this package.
        save_directory: the folder.
        arguments, options: those of transformers' `save_pretrained`. With `push_to_hub`, the model is pushed
            afterwards, with `repo_id` (default: the folder's name), `commit_message`, `commit_description`,
            `create_pr`, `private`, `revision` and `token`. The repository's card is kept, unless a `model_card` is
            given or the folder has a card of its own.
        image_processor, model_card: as in `hub.save_for_hub`.

    Raises:
        TypeError: there are too many positional arguments, or as for `hub.save_for_hub`.
        NotADirectoryError: as for `hub.save_for_hub`.
        PushError: as for `hub.push_model`.
    """
    check_arguments(model, image_processor)
    folder = Path(os.path.abspath(save_directory))
    check_folder(folder)
    if len(arguments) > len(SAVE_ARGUMENTS):
        raise TypeError(
            f"`save_pretrained` got {1 + len(arguments)} positional arguments; allowed are at most "
            f"{1 + len(SAVE_ARGUMENTS)}: save_directory, {', '.join(SAVE_ARGUMENTS)}."
        )
    options |= dict(zip(SAVE_ARGUMENTS[: len(arguments)], arguments, strict=True))
    if has_adapters(model):
        PreTrainedModel.save_pretrained(model, folder, **options)
        if image_processor is not None:
            image_processor.save_pretrained(folder)
        return
    push_to_hub = options.pop("push_to_hub", False)
    token = options.get("token")
    push_options = {name: options.pop(name) for name in PUSH_OPTIONS if name in options}
    keep_card = model_card is None and not (folder / CARD).exists()
    model_card = card_for(model, folder, model_card)
    PreTrainedModel.save_pretrained(model, folder, **options)
    if options.get("is_main_process", True):
        _remove_outdated_weights(folder, options.get("variant") or "")
        complete_folder(model, folder, image_processor, model_card)
        if push_to_hub:
            repo_id = push_options.pop("repo_id", folder.name)
            push_model(folder, repo_id, token=token, keep_card=keep_card, **push_options)


def _remove_outdated_weights(folder: Path, variant: str) -> None:
    """Removes the single weights file of an earlier save next to the shards of the saved variant, and indices without
    shards; otherwise the wrong file could be loaded. transformers itself removes earlier shards, when weights without
    a variant are saved also those of variants."""
    single, shards, _ = weights_files(variant)
    if any(folder.glob(shards)):
        (folder / single).unlink(missing_ok=True)
    for index in folder.glob("model.safetensors.index*.json"):
        _, shards, _ = weights_files(weights_variant(index.name) or "")
        if not any(folder.glob(shards)):
            index.unlink()


# The parameters of transformers' `save_pretrained` after the folder, in their order.
SAVE_ARGUMENTS = [*inspect.signature(PreTrainedModel.save_pretrained).parameters][2:-1]
PUSH_OPTIONS = ("repo_id", "commit_message", "commit_description", "create_pr", "private", "revision")


def push_to_hub(
    model: VisionMamba,
    repo_id: str,
    *,
    image_processor: ImageProcessingMixin | None = None,
    model_card: ModelCardInfo | None = None,
    max_shard_size: int | str = "50GB",
    tags: list[str] | str | None = None,
    **options: Any,
) -> CommitInfo:
    """Pushes a model to the Hub in one commit: weights, configuration, code, image processor, card and notices.

    For a model with adapters (PEFT), it pushes only the adapters, as transformers does.

    Args:
        model: of this package.
        repo_id: `user/name`.
        image_processor: None: no image processor is pushed; one that is already in the repository is kept.
        model_card: None: the repository's card is kept; if it has none, one is created from the model itself.
        max_shard_size: maximum size of a weights file.
        tags: one or more tags for the card, if a new one is written.
        options: `revision`, `private`, `commit_message`, `commit_description`, `create_pr` and `token` of
            `hub.push_model`.

    Returns:
        The commit.

    Raises:
        TypeError: the model or the image processor has the wrong type.
        ValueError, PushError: as in `hub.push_model`.
    """
    if has_adapters(model):
        return PreTrainedModel.push_to_hub(model, repo_id, max_shard_size=max_shard_size, tags=tags, **options)
    card = model_card or ModelCardInfo(name=repo_id.split("/")[-1])
    tags = [tags] if isinstance(tags, str) else tags or []
    card = replace(card, model_id=card.model_id or repo_id, tags=[*card.tags, *tags])
    with tempfile.TemporaryDirectory(prefix="hf_vssm_prune-push-") as folder:
        save_pretrained(model, folder, image_processor=image_processor, model_card=card, max_shard_size=max_shard_size)
        return push_model(folder, repo_id, keep_card=model_card is None, **options)

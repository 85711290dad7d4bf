"""Saves a model as a folder for the Hub: weights, configuration, the code that it needs, image processor, model card
and licence notices.

The folder can be loaded with transformers' Auto classes after `import hf_vssm_prune`, or with `trust_remote_code=True`
where the package is not installed. Both use the same code: the files in the package's root that the model's module
imports are copied unchanged.
"""

import inspect
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.image_processing_base import ImageProcessingMixin

from hf_vssm_prune.configuration_common import VisionMambaConfig, has_head, pruned_config
from hf_vssm_prune.documentation import see
from hf_vssm_prune.families import FAMILIES, VisionMamba, family_names
from hf_vssm_prune.hub import heads_code
from hf_vssm_prune.hub.model_card import ModelCardInfo, create_model_card
from hf_vssm_prune.pruned_heads import PrunedHead


logger = logging.getLogger(__name__)

CARD, CONFIG = "README.md", "config.json"
UNFINISHED = ".saving-"  # prefix of the temporary folders, which remain if a process is killed
# The code's licence has to be included; a file named LICENSE would be taken for the licence of the weights.
CODE_LICENSE, NOTICE = Path(__file__).with_name("LICENSE-CODE"), "NOTICE"
_WEIGHTS_FILE = re.compile(
    r"model(?:\.(.+?))?(?:-\d+-of-\d+)?\.safetensors|model\.safetensors\.index(?:\.(.+))?\.json", re.IGNORECASE
)


def weights_files(variant: str = "") -> tuple[str, str, str]:
    """The names with which transformers saves weights: of a single file, of shards (a pattern) and of the shards'
    index. An empty variant: weights without one."""
    suffix = f".{variant}" if variant else ""
    return f"model{suffix}.safetensors", f"model{suffix}-*-of-*.safetensors", f"model.safetensors.index{suffix}.json"


def weights_variant(name: str) -> str | None:
    """The variant of the weights in a file of this name; empty for weights without one. None: it is no such file."""
    match = _WEIGHTS_FILE.fullmatch(name)
    return match and (match[1] or match[2] or "")


def save_for_hub(
    model: VisionMamba,
    folder: str | os.PathLike[str],
    image_processor: ImageProcessingMixin | None = None,
    model_card: ModelCardInfo | None = None,
) -> Path:
    """Saves a model as a folder that can be pushed to the Hub as it is.

    Everything is first written to a temporary folder. A new folder then appears in one step, complete. In an existing
    folder, the new files replace the old ones, `config.json` last, so that a mixture of old and new files can never be
    loaded. Files that are not part of the model are left unchanged.

    Args:
        model: a model of this package, with any head.
        folder: where to save it; created with its parents if it is missing.
        image_processor: prepares the images for this model. None: none is saved; one that is already in the folder is
            kept.
        model_card: information that cannot be read from the model itself. None: a card is created from the model alone,
            unless the folder already has one.

    Returns:
        The folder.

    Raises:
        TypeError: the model or the image processor has the wrong type.
        NotADirectoryError: `folder` or one of its parents is a file.
        OSError: the files cannot be written (what was there before is unchanged), or cannot be moved into place.
    """
    check_arguments(model, image_processor)
    if has_adapters(model):
        raise TypeError(
            "The model has adapters, and `save_for_hub` saves whole models: save the adapters alone with the model's "
            "`save_pretrained`, or merge them first (PEFT's `merge_and_unload`)."
        )
    folder = Path(os.path.abspath(folder))
    check_folder(folder)
    model_card = card_for(model, folder, model_card)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # On the same file system as the folder, so that moves are atomic.
        with tempfile.TemporaryDirectory(
            prefix=UNFINISHED, dir=folder if folder.exists() else folder.parent
        ) as scratch:
            staged = Path(scratch) / "model"
            staged.mkdir()
            PreTrainedModel.save_pretrained(model, staged)
            complete_folder(model, staged, image_processor, model_card)
            _publish(staged, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"The model could not be saved to {folder}: {error}") from error
    return folder


def auto_map(config: VisionMambaConfig) -> dict[str, str]:
    """Where transformers finds a model's classes in its code files, by Auto class name."""
    return heads_code.auto_map(config) if has_head(config) else FAMILIES[config.model_type].auto_map()


def code_files(config: VisionMambaConfig) -> list[Path]:
    """The modules of this package that a model needs, found in the same way as transformers finds them when loading."""
    family = FAMILIES[pruned_config(config).model_type]
    modules = {Path(inspect.getfile(found)) for found in (family.config, *family.classes.values())}
    if has_head(config):
        modules.add(Path(inspect.getfile(PrunedHead)))
    imported = {Path(file) for module in modules for file in get_relative_import_files(module)}
    return sorted(modules | imported)


def check_arguments(model: VisionMamba, image_processor: ImageProcessingMixin | None) -> None:
    if not any(isinstance(module, VisionMamba) for module in _modules(model)):
        raise TypeError(
            f"Expected a {family_names()} model of hf_vssm_prune, got a {_name(model)}. Unwrap a compiled or "
            "distributed model first; if the model was loaded with remote code, load it again after `import "
            "hf_vssm_prune`. "
            f"{see('a-model-of-this-package-is-needed')}"
        )
    if image_processor is not None and not isinstance(image_processor, ImageProcessingMixin):
        raise TypeError(f"`image_processor` is a {_name(image_processor)}; it must be a transformers image processor.")


def _modules(model: object) -> Iterator[object]:
    return model.modules() if isinstance(model, PreTrainedModel) else iter([model])


def has_adapters(model: VisionMamba) -> bool:
    """Whether the model has adapters from transformers' `add_adapter`: additional weights that are saved alone."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def _name(given: object) -> str:
    return f"{type(given).__module__}.{type(given).__qualname__}"


def check_folder(folder: Path) -> None:
    first_existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not first_existing.is_dir():
        raise NotADirectoryError(f"The model cannot be saved to {folder}: {first_existing} is a file.")


def card_for(model: VisionMamba, folder: Path, model_card: ModelCardInfo | None) -> ModelCardInfo | None:
    """The information for a folder's card. None: the folder already has a card, and no new one was requested; if the
    model in the folder has another pruning schedule, this is logged."""
    if model_card is None and (folder / CARD).exists():
        if _has_other_schedule(folder, pruned_config(model.config).token_pruning):
            logger.warning(
                "%s is kept, but it describes another pruning schedule than the model's: pass a `model_card`, or "
                "remove the file first.",
                folder / CARD,
            )
        return None
    if model_card is None:
        return ModelCardInfo(name=folder.name, model_id=folder.name)
    return model_card if model_card.model_id is not None else replace(model_card, model_id=folder.name)


def _has_other_schedule(folder: Path, token_pruning: Any) -> bool:
    """Whether the model in a folder has another schedule; False if there is none that can be read."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return config.get("backbone_config", config).get("token_pruning") != token_pruning
    except (OSError, ValueError, AttributeError):
        return False


def complete_folder(
    model: VisionMamba, folder: Path, image_processor: ImageProcessingMixin | None, model_card: ModelCardInfo | None
) -> None:
    """Adds everything else that a folder with weights and configuration needs: see `save_for_hub`."""
    for weights in folder.glob("*.safetensors"):
        share_as(folder / CONFIG, weights)
    _complete_config(folder / CONFIG, auto_map(model.config))
    for file in (*code_files(model.config), CODE_LICENSE):
        shutil.copyfile(file, folder / file.name)
    if has_head(model.config):
        code = heads_code.head_code(model.config)
        (folder / f"{heads_code.module_name(model.config)}.py").write_text(code, encoding="utf-8")
    if image_processor is not None:
        image_processor.save_pretrained(folder)
    if model_card is not None:
        write_card(model, folder, image_processor, model_card)


def share_as(like: Path, weights: Path) -> None:
    """Gives a file written by safetensors, which makes it readable only by its owner, the permissions of another file.
    Network file systems on which files belong to another user refuse this; there, all files have the same anyway."""
    with suppress(OSError):
        shutil.copymode(like, weights)


def write_card(
    model: VisionMamba, folder: Path, image_processor: ImageProcessingMixin | None, model_card: ModelCardInfo
) -> None:
    """Writes a card into a folder, with its picture and the notices, which name the same licence."""
    create_model_card(model, model_card, image_processor).save(folder / CARD)
    (folder / NOTICE).write_text(_notice(model_card), encoding="utf-8")
    if model_card.picture is not None:
        picture = folder / Path(model_card.picture).name
        if not (picture.exists() and picture.samefile(model_card.picture)):
            shutil.copyfile(model_card.picture, picture)


def _notice(model_card: ModelCardInfo) -> str:
    license = f"under {model_card.license}" if model_card.license else "no licence was named when they were saved"
    lines = [
        "The code in this folder (*.py) is hf_vssm_prune's, unchanged, under the Apache License, Version 2.0: see",
        f"{CODE_LICENSE.name}. It comes without warranty of any kind.",
        "",
        f"The weights: {license}.",
        *([model_card.license_notice] if model_card.license_notice else []),
    ]
    return "\n".join(lines) + "\n"


def _complete_config(file: Path, classes: dict[str, str]) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    config["auto_map"] = classes  # keeps label ids in numerical order, which is not the order of text
    # The scan's kernel is a choice for this machine: the next one may not have it.
    pruned = config.get("backbone_config", config)
    pruned.pop("scan_backend", None)
    file.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8")


def _publish(staged: Path, folder: Path) -> None:
    if not folder.exists():
        staged.rename(folder)
        return
    (folder / CONFIG).unlink(missing_ok=True)
    # transformers prefers a single weights file to shards, so weights of an earlier save must not remain.
    for pattern in weights_files():
        for outdated in folder.glob(pattern):
            outdated.unlink()
    for file in sorted(staged.iterdir(), key=lambda file: file.name == CONFIG):
        file.replace(folder / file.name)
